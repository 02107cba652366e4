# SPDX-License-Identifier: Apache-2.0
"""The choice of attention backends, and the calls of those that use a library.

FlashAttention and xFormers need a GPU. Stand-ins compute what their documentation says for the
arguments that they get; xFormers' own masks are used where it is installed.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_attention import NUM_PAGES, PAGED, WHOLE, softmax_attention
from vllm_sparse_dllm.attention.backends import BACKENDS, choose_backend, make_backend
from vllm_sparse_dllm.attention.cpu import CPUBackend
from vllm_sparse_dllm.attention.cpu_tiles import TileBackend
from vllm_sparse_dllm.attention.flash_attn import FlashAttentionBackend
from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.attention.portable import PortableBackend
from vllm_sparse_dllm.attention.xformers import XFormersBackend
from vllm_sparse_dllm.kernels.cpu import why_no_cpu_kernels

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPE = AttentionShape(6, 2, 32)
PAGE = 16


def flash_attn_varlen_func(**given: Any) -> None:
    """Compute what vLLM's FlashAttention documents for the arguments that the backend passes."""
    assert given["causal"] is False and given["fa_version"] == 2
    if given["max_seqlen_q"] == 1 and given["q"].shape[1] > given["k"].shape[-2]:
        # It then folds the heads of a group into queries, taking every sequence to have one query.
        given["q"].view(len(given["cu_seqlens_q"]) - 1, given["k"].shape[-2], -1)
    queries = given["cu_seqlens_q"].tolist()
    if "block_table" in given:
        assert given["max_seqlen_k"] >= given["seqused_k"].max()
        keys = [
            (table.long(), int(num))
            for table, num in zip(given["block_table"], given["seqused_k"], strict=True)
        ]
        parts = [
            (given["k"][pages].flatten(0, 1)[:num], given["v"][pages].flatten(0, 1)[:num])
            for pages, num in keys
        ]
    else:
        starts = given["cu_seqlens_k"].tolist()
        assert given["max_seqlen_k"] >= max(np.diff(starts))
        parts = [
            (given["k"][a:b], given["v"][a:b]) for a, b in zip(starts, starts[1:], strict=False)
        ]
    for first, last, (k, v) in zip(queries, queries[1:], parts, strict=False):
        assert last - first <= given["max_seqlen_q"]
        if last > first:
            out = softmax_attention(given["q"][first:last], k, v)
            given["out"][first:last] = out.to(given["out"].dtype)


@dataclass
class Mask:
    """Stands in for xFormers' masks, as far as they are used, if it is not installed."""

    q_seqlen: list[int]
    kv_seqlen: list[int]
    block_tables: torch.Tensor | None = None
    page_size: int = 1

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: list[int],
        kv_seqlen: list[int],
        block_tables: torch.Tensor | None = None,
        page_size: int = 1,
        device: torch.device | None = None,
    ) -> Mask:
        return cls(q_seqlen, kv_seqlen, block_tables, page_size)

    def __post_init__(self) -> None:
        starts = np.cumsum([0, *self.q_seqlen]).tolist()
        self.q_seqinfo = SimpleNamespace(max_seqlen=max(self.q_seqlen), seqstart_py=starts)

    def materialize(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self.block_tables is not None:
            # As in the package, the result has a column for every slot of the pages.
            shape = (shape[0], (int(self.block_tables.max()) + 1) * self.page_size)
        mask = torch.full(shape, -math.inf)
        first_query = first_key = 0
        for row, (queries, keys) in enumerate(zip(self.q_seqlen, self.kv_seqlen, strict=True)):
            columns = torch.arange(first_key, first_key + keys)
            if self.block_tables is not None:
                pages = self.block_tables[row].long().unsqueeze(1) * self.page_size
                columns = (pages + torch.arange(self.page_size)).flatten()[:keys]
            mask[first_query : first_query + queries, columns] = 0.0
            first_query, first_key = first_query + queries, first_key + keys
        return mask


class SplitK:
    """Stands in for xFormers' split-K operator."""


def memory_efficient_attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_bias: Any, scale: float, op: Any
) -> torch.Tensor:
    """Compute attention under a mask, for ``[1, n, groups, heads, d]`` or ``[1, n, heads, d]``."""
    paged = getattr(attn_bias, "block_tables", None) is not None
    if paged and op is not SplitK:
        raise NotImplementedError("no operator for pages")
    if not paged and q.dim() == 5 and attn_bias.q_seqinfo.max_seqlen == 1:
        # PyTorch's kernel folds the heads of a group into queries, one query per sequence.
        q.view(len(attn_bias.q_seqinfo.seqstart_py) - 1, q.shape[2], -1)
    shape = q.shape
    q, k, v = (x[0].reshape(x.shape[1], -1, x.shape[-1]).double() for x in (q, k, v))
    num_keys = attn_bias.block_tables.numel() * attn_bias.page_size if paged else k.shape[0]
    mask = attn_bias.materialize((q.shape[0], num_keys))
    k, v = k[: mask.shape[-1]], v[: mask.shape[-1]]
    weights = torch.einsum("qhd,khd->hqk", q, k) * scale + mask
    # Masked keys have weight 0, and 0 times NaN is NaN: pages must have been cleared.
    out = torch.einsum("hqk,khd->qhd", torch.softmax(weights, dim=-1), v)
    return out.view(shape).to(torch.bfloat16)


def masks() -> SimpleNamespace:
    try:
        return importlib.import_module("xformers.ops.fmha.attn_bias")
    except ImportError:
        return SimpleNamespace(BlockDiagonalMask=Mask, PagedBlockDiagonalPaddedKeysMask=Mask)


@pytest.fixture(params=[FlashAttentionBackend, XFormersBackend], ids=["flash_attn", "xformers"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionBackend:
    flash = SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func,
        is_fa_version_supported=lambda version: version == 2,
    )
    xformers = SimpleNamespace(
        memory_efficient_attention_forward=memory_efficient_attention_forward,
        attn_bias=masks(),
        # An operator that is installed but cannot read pages of this size.
        flash3=SimpleNamespace(FwOp=object),
        triton_splitk=SimpleNamespace(FwOp=SplitK),
    )
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", flash)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", xformers)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return request.param(SHAPE, PAGE, torch.bfloat16, CPU)


def randn(generator: torch.Generator, rows: int, heads: int) -> torch.Tensor:
    return torch.randn(rows, heads, SHAPE.head_size, generator=generator).bfloat16()


def test_full(backend: AttentionBackend) -> None:
    generator = torch.Generator().manual_seed(1)
    queries, keys = (np.array(column) for column in zip(*WHOLE, strict=True))
    q = randn(generator, int(queries.sum()), SHAPE.num_heads)
    k, v = (randn(generator, int(keys.sum()), SHAPE.num_kv_heads) for _ in range(2))
    output = torch.full_like(q, 77.0)
    backend.attend_full(q, k, v, output, backend.plan_full(queries, keys))
    twin = PortableBackend(SHAPE, PAGE, torch.bfloat16, CPU)
    expected = torch.empty_like(q)
    twin.attend_full(q, k, v, expected, twin.plan_full(queries, keys))
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("queries", [[1, 0], [0, 1, 0], [1, 1, 0]])
def test_sequences_of_one_query_and_of_none(backend: AttentionBackend, queries: list[int]) -> None:
    """As in the last layer, where some requests have one mask left and others none."""
    generator = torch.Generator().manual_seed(4)
    lengths, keys = np.array(queries), np.array([5, 7, 3][: len(queries)])
    q = randn(generator, int(lengths.sum()), SHAPE.num_heads)
    k, v = (randn(generator, int(keys.sum()), SHAPE.num_kv_heads) for _ in range(2))
    twin = PortableBackend(SHAPE, PAGE, torch.bfloat16, CPU)
    output, expected = torch.full_like(q, 77.0), torch.empty_like(q)
    backend.attend_full(q, k, v, output, backend.plan_full(lengths, keys))
    twin.attend_full(q, k, v, expected, twin.plan_full(lengths, keys))
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


def paged(backend: AttentionBackend, plan: Any = None) -> None:
    """Attend to `PAGED` on pages that were full of NaN; compare with plain PyTorch."""
    generator = torch.Generator().manual_seed(2)
    queries, keys = (np.array(column) for column in zip(*PAGED, strict=True))
    counts = -(-keys // PAGE)
    table = np.zeros((len(keys), counts.max()), dtype=np.int64)
    pages = np.random.default_rng(3).permutation(NUM_PAGES + 8)
    pool = torch.full((2 * (NUM_PAGES + 8) * PAGE, 2, SHAPE.head_size), math.nan).bfloat16()
    twin = PortableBackend(SHAPE, PAGE, torch.bfloat16, CPU)
    for each in (backend, twin):
        each.bind_pages([pool.flatten().view(torch.int8)])
    backend.clear(pages)
    for row, count, first, num in zip(table, counts, np.cumsum(counts) - counts, keys, strict=True):
        row[:count] = pages[first : first + count]
        slots = torch.from_numpy((row[:, None] * PAGE + np.arange(PAGE)).flatten()[:num])
        k, v = (randn(generator, int(num), SHAPE.num_kv_heads) for _ in range(2))
        backend.write(0, k, v, slots)
    q = randn(generator, int(queries.sum()), SHAPE.num_heads)
    output, expected = torch.full_like(q, 77.0), torch.empty_like(q)
    if plan is None:
        plan = backend.plan_paged(queries, keys, table)
    else:
        backend.rewrite_paged_plan(plan, queries, keys, table)
    backend.attend_paged(0, q, output, plan)
    twin.attend_paged(0, q, expected, twin.plan_paged(queries, keys, table))
    torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)


def test_paged(backend: AttentionBackend) -> None:
    paged(backend)


def test_static_plans(backend: AttentionBackend) -> None:
    if not backend.static_plans:
        with pytest.raises(NotImplementedError, match="XFormersBackend has no static plans"):
            backend.static_paged_plan(1, 1, 1)
        return
    plan = backend.static_paged_plan(len(PAGED) + 2, 40, 12)
    paged(backend, plan)
    with pytest.raises(ValueError, match="the plan is for 9 sequences of 40 queries on 12 pages"):
        backend.rewrite_paged_plan(plan, np.array([41]), np.array([41]), np.zeros((1, 3)))


def test_what_has_no_slot_is_written_nowhere(backend: AttentionBackend) -> None:
    if not backend.static_plans:
        return
    pool = torch.randn(2, 3 * PAGE, SHAPE.num_kv_heads, SHAPE.head_size).bfloat16()
    expected = pool.clone()
    backend.bind_pages([pool.view(torch.int8).flatten()])
    k, v = torch.randn(2, 5, SHAPE.num_kv_heads, SHAPE.head_size).bfloat16()
    backend.write(0, k, v, torch.tensor([-1, 7, -1, 20, -1]))
    expected[0, [7, 20]], expected[1, [7, 20]] = k[[1, 3]], v[[1, 3]]
    assert torch.equal(pool, expected)


def test_a_step_without_queries(backend: AttentionBackend) -> None:
    nothing = torch.zeros(0, SHAPE.num_heads, SHAPE.head_size, dtype=torch.bfloat16)
    keys = torch.zeros(5, SHAPE.num_kv_heads, SHAPE.head_size, dtype=torch.bfloat16)
    plan = backend.plan_full(np.array([0]), np.array([5]))
    backend.attend_full(nothing, keys, keys, nothing.clone(), plan)


def test_no_operator_for_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, attn_bias: Any, **options: Any) -> torch.Tensor:
        if getattr(attn_bias, "block_tables", None) is None:
            return args[0]
        raise ValueError("page size should be divisible by the block size")

    library = SimpleNamespace(
        memory_efficient_attention_forward=refuse,
        attn_bias=masks(),
        triton_splitk=SimpleNamespace(FwOp=SplitK),
    )
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", library)
    with pytest.raises(
        ValueError, match=r"cannot read pages of block_size=16 here; .* of 64: .*page"
    ):
        XFormersBackend(SHAPE, PAGE, torch.bfloat16, CPU)


REFUSED = [
    ("triton", CPU, SHAPE, PAGE, torch.bfloat16, "no Triton kernels for the device 'cpu'"),
    ("flash_attn", CPU, SHAPE, PAGE, torch.bfloat16, "CUDA devices only, not on 'cpu'"),
    ("xformers", CPU, SHAPE, PAGE, torch.bfloat16, "CUDA devices only, not on 'cpu'"),
    ("triton", CUDA, AttentionShape(1, 1, 320), PAGE, torch.bfloat16, "at most 256, got 320"),
    ("triton", CUDA, SHAPE, PAGE, torch.float64, "no kernels for float64"),
    ("flash_attn", CUDA, SHAPE, PAGE, torch.float32, "float16 and bfloat16, got float32"),
    ("flash_attn", CUDA, AttentionShape(1, 1, 36), PAGE, torch.bfloat16, "to 256, got 36"),
    ("flash_attn", CUDA, SHAPE, 24, torch.bfloat16, "got block_size=24"),
    ("xformers", CUDA, SHAPE, PAGE, torch.float32, "float16 and bfloat16, got float32"),
]


@pytest.mark.parametrize(("name", "device", "shape", "page", "dtype", "reason"), REFUSED)
def test_what_cannot_run_is_refused_with_the_reason(
    name: str,
    device: torch.device,
    shape: AttentionShape,
    page: int,
    dtype: torch.dtype,
    reason: str,
) -> None:
    with pytest.raises(ValueError) as error:
        make_backend(shape, page, dtype, device, name)
    assert str(error.value).startswith(f"attention_backend {name} cannot be used here: ")
    assert reason in str(error.value)


def test_what_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm.vllm_flash_attn", "xformers", "triton"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("vllm_sparse_dllm.kernels.find_spec", lambda name: None)
    monkeypatch.setattr("vllm_sparse_dllm.attention.xformers.find_spec", lambda name: None)
    for name, reason in (
        ("flash_attn", "this build of vLLM does not have it"),
        ("xformers", "the package is not installed"),
        ("triton", "the package triton is not installed"),
    ):
        with pytest.raises(ValueError, match=reason):
            choose_backend(name, SHAPE, PAGE, torch.bfloat16, CUDA)
    assert choose_backend("auto", SHAPE, PAGE, torch.bfloat16, CUDA) is PortableBackend


@pytest.mark.parametrize(
    ("backend", "head_size", "page", "dtype", "device", "reason"),
    [
        (
            TileBackend,
            48,
            32,
            torch.bfloat16,
            CPU,
            "its head sizes are the multiples of 32, got 48",
        ),
        (
            TileBackend,
            64,
            16,
            torch.bfloat16,
            CPU,
            "its page sizes are the multiples of 32, got 16",
        ),
        (TileBackend, 64, 32, torch.float32, CPU, "its kernels: they are of bfloat16, not float32"),
        (TileBackend, 64, 32, torch.bfloat16, CUDA, "it is for CPUs, not cuda"),
        (CPUBackend, 65, 32, torch.bfloat16, CPU, "its head sizes are .*, got 65"),
        (CPUBackend, 64, 48, torch.bfloat16, CPU, "its page sizes are the multiples of 32, got 48"),
        (CPUBackend, 64, 32, torch.float64, CPU, "it has no kernels for float64"),
        (CPUBackend, 64, 32, torch.bfloat16, CUDA, "it is for CPUs, not cuda"),
    ],
)
def test_what_keeps_a_cpu_backend_from_running(
    backend: type[AttentionBackend],
    head_size: int,
    page: int,
    dtype: torch.dtype,
    device: torch.device,
    reason: str,
) -> None:
    found = backend.why_not(AttentionShape(4, 2, head_size), page, dtype, device)
    assert found is not None and re.fullmatch(reason, found)


def test_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def auto(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> type[AttentionBackend]:
        return choose_backend("auto", SHAPE, 32, dtype, device)

    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert auto(CPU, torch.float32) is CPUBackend
    has_tiles = why_no_cpu_kernels(torch.bfloat16) is None
    assert auto(CPU) is (TileBackend if has_tiles else CPUBackend)
    assert auto(CUDA) is BACKENDS["triton"]
    assert auto(CUDA, torch.float64) is PortableBackend
    assert choose_backend("portable", SHAPE, 32, torch.bfloat16, CPU) is PortableBackend
