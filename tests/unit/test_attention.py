# SPDX-License-Identifier: Apache-2.0
"""The CPU attention backends against a plain softmax: paged and whole, any page table."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vllm_sparse_dllm.attention.backends import choose_backend, make_backend
from vllm_sparse_dllm.attention.cpu import CPUBackend
from vllm_sparse_dllm.attention.cpu_tiles import TileBackend
from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.attention.portable import PortableBackend

PAGE = 32
NUM_PAGES = 24
CPU = torch.device("cpu")
BACKENDS = [TileBackend, CPUBackend, PortableBackend]

SHAPES = [
    AttentionShape(4, 4, 32),
    AttentionShape(4, 2, 64),
    AttentionShape(7, 1, 128),
    AttentionShape(6, 2, 48),
]
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

#: (queries, keys) of each sequence: one row, none, more keys than queries, whole pages, one key.
PAGED = [(4, 40), (0, 70), (1, 1), (33, 128), (7, 32), (0, 5), (5, 97)]
#: The same for whole sequences: all rows, or only some of them in the last layer.
WHOLE = [(40, 40), (0, 17), (3, 65), (1, 1), (64, 64), (8, 33)]


def cases() -> list:
    return [
        pytest.param(
            backend,
            shape,
            dtype,
            id=f"{backend.__name__}-{shape.num_heads}x"
            f"{shape.num_kv_heads}x{shape.head_size}-{str(dtype)[6:]}",
        )
        for backend, shape, dtype in itertools.product(BACKENDS, SHAPES, DTYPES)
        if backend.why_not(shape, PAGE, dtype, CPU) is None
    ]


CASES = pytest.mark.parametrize(("backend_class", "shape", "dtype"), cases())
Make = Callable[[AttentionShape, int, torch.dtype, torch.device], AttentionBackend]


def softmax_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of ``[n, heads, d]`` queries over ``[m, kv_heads, d]`` keys, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    weights = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", torch.softmax(weights, dim=-1), v)


def bound(
    make: Make, shape: AttentionShape, dtype: torch.dtype, num_layers: int = 2, fill: float = 0.0
) -> AttentionBackend:
    """Return a backend on a pool whose elements are all ``fill``."""
    backend = make(shape, PAGE, dtype, CPU)
    size = NUM_PAGES * 2 * PAGE * shape.num_kv_heads * shape.head_size
    backend.bind_pages(
        [torch.full((size,), fill, dtype=dtype).view(torch.int8) for _ in range(num_layers)]
    )
    return backend


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def page_table(lengths: list[int], seed: int) -> np.ndarray:
    """Return a table with pages of its own for each sequence, in random order."""
    pages = np.random.default_rng(seed).permutation(NUM_PAGES)
    counts = [-(-length // PAGE) for length in lengths]
    table = np.zeros((len(lengths), max(counts)), dtype=np.int64)
    taken = 0
    for row, count in zip(table, counts, strict=True):
        row[:count] = pages[taken : taken + count]
        taken += count
    return table


def slots_of(table: np.ndarray, row: int, length: int) -> torch.Tensor:
    slots = (table[row][:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:length]
    return torch.from_numpy(slots.astype(np.int64))


def run_paged(
    backend: AttentionBackend, dtype: torch.dtype, seed: int, layer: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write and attend to `PAGED`; return the backend's output and the expected one."""
    shape, generator = backend.shape, torch.Generator().manual_seed(seed)
    lengths = [keys for _, keys in PAGED]
    table = page_table(lengths, seed)
    expected, queries = [], []
    for row, (num_queries, num_keys) in enumerate(PAGED):
        k = randn(generator, num_keys, shape.num_kv_heads, shape.head_size, dtype=dtype)
        v = randn(generator, num_keys, shape.num_kv_heads, shape.head_size, dtype=dtype)
        q = randn(generator, num_queries, shape.num_heads, shape.head_size, dtype=dtype)
        order = torch.randperm(num_keys, generator=generator)
        slots = slots_of(table, row, num_keys)
        half = num_keys // 2  # in two writes, and in any order
        for part in (order[:half], order[half:]):
            backend.write(layer, k[part], v[part], slots[part])
        queries.append(q)
        expected.append(softmax_attention(q, k, v))
    plan = backend.plan_paged(np.array([num for num, _ in PAGED]), np.array(lengths), table)
    joined = torch.cat(queries)
    output = torch.full_like(joined, 77.0)
    backend.attend_paged(layer, joined, output, plan)
    return output, torch.cat(expected)


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@CASES
def test_paged(backend_class: Make, shape: AttentionShape, dtype: torch.dtype) -> None:
    for seed in range(2):
        assert_close(*run_paged(bound(backend_class, shape, dtype), dtype, seed))


GARBAGE = pytest.mark.parametrize("garbage", [1e4, -1e30, math.inf, math.nan])


@CASES
@GARBAGE
def test_stale_slots_do_not_leak(
    backend_class: Make,
    shape: AttentionShape,
    dtype: torch.dtype,
    garbage: float,
) -> None:
    """Pages are cleared for a new owner: what an earlier owner left must have no effect."""
    clean, expected = run_paged(bound(backend_class, shape, dtype), dtype, 5)
    backend = bound(backend_class, shape, dtype, fill=garbage)
    table = page_table([keys for _, keys in PAGED], 5)
    for row, (_, num_keys) in zip(table, PAGED, strict=True):
        backend.clear(row[: -(-num_keys // backend.page_size)])
    dirty, _ = run_paged(backend, dtype, 5)
    assert torch.equal(clean, dirty)
    assert_close(dirty, expected)


@CASES
@GARBAGE
def test_a_broken_sequence_does_not_leak_into_the_next_full_pass(
    backend_class: Make,
    shape: AttentionShape,
    dtype: torch.dtype,
    garbage: float,
) -> None:
    """A request whose keys are garbage runs in one step, a healthy one in the step after."""
    backend = bound(backend_class, shape, dtype)
    generator = torch.Generator().manual_seed(4)
    outputs = []
    for length, broken in ((64, True), (40, False)):
        q = randn(generator, length, shape.num_heads, shape.head_size, dtype=dtype)
        k = randn(generator, length, shape.num_kv_heads, shape.head_size, dtype=dtype)
        keys = torch.full_like(k, garbage) if broken else k
        output = torch.empty_like(q)
        backend.attend_full(
            q, keys, keys, output, backend.plan_full(np.array([length]), np.array([length]))
        )
        outputs.append((output, softmax_attention(q, k, k)))
    assert_close(*outputs[1])


@CASES
@pytest.mark.parametrize("broken", range(3))
def test_a_broken_sequence_does_not_leak_within_a_pass(
    backend_class: Make, shape: AttentionShape, dtype: torch.dtype, broken: int
) -> None:
    """Kernels reuse work space from one sequence to the next, here of different lengths."""
    backend = bound(backend_class, shape, dtype)
    generator = torch.Generator().manual_seed(4)
    lengths = np.array([40, 31, 7])
    q = randn(generator, 78, shape.num_heads, shape.head_size, dtype=dtype)
    k = randn(generator, 78, shape.num_kv_heads, shape.head_size, dtype=dtype)
    ends = np.cumsum(lengths)
    spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    k[spans[broken]] = math.nan
    output = torch.empty_like(q)
    backend.attend_full(q, k, k, output, backend.plan_full(lengths, lengths))
    for number, own in enumerate(spans):
        if number == broken:
            assert torch.isnan(output[own].float()).all()
        else:
            assert_close(output[own], softmax_attention(q[own], k[own], k[own]))


@CASES
def test_read_returns_what_was_written(
    backend_class: Make, shape: AttentionShape, dtype: torch.dtype
) -> None:
    backend = bound(backend_class, shape, dtype, fill=math.nan)
    generator = torch.Generator().manual_seed(6)
    slots = torch.randperm(NUM_PAGES * PAGE, generator=generator)[:200]
    keys, values = (
        randn(generator, 200, shape.num_kv_heads, shape.head_size, dtype=dtype) for _ in range(2)
    )
    backend.write(1, keys, values, slots)
    some = torch.randperm(200, generator=generator)[:77]
    for read, written in ((backend.read_keys, keys), (backend.read_values, values)):
        assert torch.equal(read(1, slots[some]), written[some])
        assert read(1, slots[:0]).shape == (0, *written.shape[1:])


@CASES
def test_full(backend_class: Make, shape: AttentionShape, dtype: torch.dtype) -> None:
    backend = bound(backend_class, shape, dtype)
    generator = torch.Generator().manual_seed(3)
    # Twice, the second time with fewer keys: scratch pages still hold those of the first pass.
    for sequences in (WHOLE, [(2, 9), (0, 3), (40, 40)]):
        expected, parts = [], []
        for num_queries, num_keys in sequences:
            k = randn(generator, num_keys, shape.num_kv_heads, shape.head_size, dtype=dtype)
            v = randn(generator, num_keys, shape.num_kv_heads, shape.head_size, dtype=dtype)
            q = randn(generator, num_queries, shape.num_heads, shape.head_size, dtype=dtype)
            parts.append((q, k, v))
            expected.append(softmax_attention(q, k, v))
        queries, keys, values = (torch.cat(part) for part in zip(*parts, strict=True))
        output = torch.full_like(queries, 77.0)
        plan = backend.plan_full(
            np.array([num for num, _ in sequences]), np.array([num for _, num in sequences])
        )
        backend.attend_full(queries, keys, values, output, plan)
        assert_close(output, torch.cat(expected))


@CASES
def test_layers_do_not_touch_each_other(
    backend_class: Make, shape: AttentionShape, dtype: torch.dtype
) -> None:
    backend = bound(backend_class, shape, dtype)
    first, expected = run_paged(backend, dtype, 1, layer=0)
    assert_close(first, expected)
    run_paged(backend, dtype, 2, layer=1)
    keys = randn(torch.Generator(), 0, shape.num_kv_heads, shape.head_size, dtype=dtype)
    backend.write(0, keys, keys, torch.zeros(0, dtype=torch.int64))  # nothing to write
    lengths = [num for _, num in PAGED]
    generator = torch.Generator().manual_seed(1)
    queries = []
    for num_queries, num_keys in PAGED:  # repeat the draws of the first run to get its queries
        for heads, num in ((shape.num_kv_heads, num_keys), (shape.num_kv_heads, num_keys)):
            randn(generator, num, heads, shape.head_size, dtype=dtype)
        queries.append(randn(generator, num_queries, shape.num_heads, shape.head_size, dtype=dtype))
        torch.randperm(num_keys, generator=generator)
    plan = backend.plan_paged(
        np.array([num for num, _ in PAGED]), np.array(lengths), page_table(lengths, 1)
    )
    again = torch.empty_like(first)
    backend.attend_paged(0, torch.cat(queries), again, plan)
    assert torch.equal(first, again)


@CASES
def test_a_sequence_alone_is_the_same_as_in_company(
    backend_class: Make, shape: AttentionShape, dtype: torch.dtype
) -> None:
    """Attention is batch-invariant, bit for bit."""
    backend = bound(backend_class, shape, dtype)
    generator = torch.Generator().manual_seed(9)
    k = randn(generator, 90, shape.num_kv_heads, shape.head_size, dtype=dtype)
    v = randn(generator, 90, shape.num_kv_heads, shape.head_size, dtype=dtype)
    q = randn(generator, 12, shape.num_heads, shape.head_size, dtype=dtype)
    table = np.array([[5, 2, 9], [1, 3, 4], [6, 7, 8]])
    for row in range(3):
        backend.write(0, k, v, slots_of(table, row, 90))
    alone, company = torch.empty_like(q), torch.empty(36, *q.shape[1:], dtype=dtype)
    backend.attend_paged(0, q, alone, backend.plan_paged(np.array([12]), np.array([90]), table[:1]))
    plan = backend.plan_paged(np.array([12] * 3), np.array([90] * 3), table)
    backend.attend_paged(0, q.repeat(3, 1, 1), company, plan)
    for part in company.split(12):
        assert torch.equal(part, alone)


def test_the_backend_that_fits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)

    def made(head_size: int, page: int = 32, dtype: torch.dtype = torch.float32) -> type:
        return type(make_backend(AttentionShape(4, 2, head_size), page, dtype, CPU))

    assert made(64) is made(128) is CPUBackend
    assert made(48) is PortableBackend  # a head size that the kernel does not support
    assert made(64, page=16) is PortableBackend
    assert made(64, dtype=torch.float64) is PortableBackend


@pytest.mark.parametrize(
    ("machine", "avx512", "dtype", "expected"),
    [
        ("x86_64", True, torch.float32, CPUBackend),
        ("x86_64", False, torch.float32, PortableBackend),
        ("x86_64", False, torch.float16, CPUBackend),
        ("aarch64", False, torch.float32, CPUBackend),
    ],
)
def test_a_processor_gets_the_fastest_backend(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    avx512: bool,
    dtype: torch.dtype,
    expected: type,
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    assert choose_backend("auto", AttentionShape(4, 2, 64), 32, dtype, CPU) is expected
