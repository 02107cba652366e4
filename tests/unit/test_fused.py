# SPDX-License-Identifier: Apache-2.0
"""The fused elementwise operations, and the PyTorch code that replaces them, compiled or not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vllm_sparse_dllm.models import fused


@pytest.fixture(params=["vllm", "plain", "compiled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Select how operations run; compiled code is traced whole, but without a code generator."""
    if request.param == "vllm":
        assert fused._COMPILED  # the CPU build has them too
    else:
        monkeypatch.setattr(fused, "_COMPILED", False)
    monkeypatch.setattr(fused, "_compiles", lambda device: request.param == "compiled")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    fused._compiled.cache_clear()
    yield request.param
    num_compiled = fused._compiled.cache_info().currsize
    assert num_compiled == (3 if request.param == "compiled" else 0)
    fused._compiled.cache_clear()


@torch.inference_mode()
def test_they_compute_the_same(way: str) -> None:
    generator = torch.Generator().manual_seed(3)
    norm = fused.FusedRMSNorm(48, eps=1e-5)
    norm.weight.data = torch.randn(48, generator=generator)
    for rows in (5, 1, 17):
        x, residual, gate_up = (
            torch.randn(rows, width, generator=generator) for width in (48, 48, 64)
        )
        expected = F.rms_norm(x.double(), (48,), norm.weight.double(), 1e-5).float()
        torch.testing.assert_close(norm(x.clone()), expected)
        total = x + residual
        expected = F.rms_norm(total.double(), (48,), norm.weight.double(), 1e-5).float()
        normed, added = norm.add_norm(x.clone(), residual.clone())
        torch.testing.assert_close(normed, expected)
        torch.testing.assert_close(added, total)
        expected = F.silu(gate_up[:, :32]) * gate_up[:, 32:]
        torch.testing.assert_close(fused.silu_and_mul(gate_up.clone()), expected)


@pytest.mark.parametrize("width", [24, 32])
def test_swiglu_of_any_width(width: int) -> None:
    """The width need not be a multiple of 16, which only the package's own kernel requires."""
    gate_up = torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(4)).bfloat16()
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = (F.silu(gate) * up).bfloat16()
    torch.testing.assert_close(fused.silu_and_mul(gate_up.clone()), expected, rtol=2e-2, atol=1e-2)
