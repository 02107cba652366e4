# SPDX-License-Identifier: Apache-2.0
"""Float32 products of half-precision weights, for CPUs without half-precision products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vllm_sparse_dllm.kernels import native
from vllm_sparse_dllm.kernels.native import VARIABLE
from vllm_sparse_dllm.models.cpu_products import float32_product, wants_float32_products

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_they_are_rounded_once(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(5)
    layer = nn.Linear(96, 80, bias=bias, dtype=dtype)
    exact = nn.Linear(96, 80, bias=bias, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    product = float32_product(layer.weight)
    nn.init.zeros_(layer.weight)  # The packed weight is a copy.
    for rows in (1, 40, 7):
        x = torch.randn(rows, 96).to(dtype)
        found, expected = product(x, layer.bias), exact(x.double())
        assert found.dtype == dtype and found.shape == (rows, 80)
        # Half a unit in the last place, plus the error of float32 sums.
        allowed = expected.abs() * torch.finfo(dtype).eps / 2 + 1e-5
        assert ((found.double() - expected).abs() <= allowed).all()


def test_rows_do_not_depend_on_their_company() -> None:
    torch.manual_seed(6)
    product = float32_product(torch.randn(48, 64).bfloat16())
    x = torch.randn(33, 64).bfloat16()
    together = product(x)
    for start, end in ((0, 1), (1, 9), (9, 33)):
        assert torch.equal(product(x[start:end]), together[start:end])


@pytest.mark.parametrize("supported", [True, False])
def test_who_wants_them(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    """x86 processors without AVX-512, for each dtype that their AVX2 does not multiply."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(native, "lacks_avx512", lambda: True)
    for asked, other in (HALVES, HALVES[::-1]):
        for dtype in HALVES:
            name = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
            answer = supported if dtype == asked else not supported
            monkeypatch.setattr(
                torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda a=answer: a
            )
        assert wants_float32_products(asked) is not supported
        assert wants_float32_products(other) is supported
    assert not wants_float32_products(torch.float32)
    monkeypatch.setenv(VARIABLE, "0")
    assert not any(map(wants_float32_products, HALVES))
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(native, "lacks_avx512", lambda: False)
    assert not any(map(wants_float32_products, HALVES))
