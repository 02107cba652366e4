# SPDX-License-Identifier: Apache-2.0
"""The Triton backend against a plain softmax: ragged lengths, any page table, any split."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import twins
from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.attention.packing import PackedArrays, row_tiles, starts_of
from vllm_sparse_dllm.attention.triton import TritonBackend
from vllm_sparse_dllm.kernels.common import TileConfig
from vllm_sparse_dllm.kernels.full_attention import full_attention
from vllm_sparse_dllm.kernels.paged_attention import (
    choose_splits,
    paged_attention,
    work_space,
)

SHAPES = [
    AttentionShape(2, 2, 64),
    AttentionShape(4, 2, 48),
    AttentionShape(7, 1, 128),
    AttentionShape(2, 1, 256),
    AttentionShape(3, 3, 80),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
NUM_PAGES = 40

#: (queries, keys): one row, none, more keys than queries, whole pages, one key.
PAGED = [(4, 40), (0, 70), (1, 1), (33, 128), (7, 32), (0, 5), (5, 97)]
#: The same for whole sequences: all rows, or only some of them in the last layer.
WHOLE = [(40, 40), (0, 17), (3, 65), (1, 1), (64, 64), (8, 33)]


def name(value: object) -> str:
    if isinstance(value, AttentionShape):
        return f"{value.num_heads}x{value.num_kv_heads}x{value.head_size}"
    return str(value).removeprefix("torch.")


CASES = pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *itertools.product(SHAPES[:2], DTYPES),
        *itertools.product(SHAPES[2:], [torch.bfloat16]),
        (SHAPES[3], torch.float32),
    ],
    ids=name,
)
PAGES = pytest.mark.parametrize("page_size", [16, 32])


class Pool:
    """A backend whose pages are filled with ``fill``, and views of their keys and values."""

    def __init__(
        self,
        shape: AttentionShape,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = 16,
        fill: float = math.nan,
    ) -> None:
        self.backend = TritonBackend(shape, page_size, dtype, device)
        self.shape, self.dtype, self.device = shape, dtype, device
        size = NUM_PAGES * 2 * page_size * shape.num_kv_heads * shape.head_size
        pool = torch.full((size,), fill, dtype=dtype, device=device)
        self.backend.bind_pages([pool.view(torch.int8)])
        self.keys, self.values = pool.view(
            2, NUM_PAGES * page_size, shape.num_kv_heads, shape.head_size
        )

    def randn(self, generator: torch.Generator, rows: int, heads: int) -> torch.Tensor:
        drawn = torch.randn(rows, heads, self.shape.head_size, generator=generator)
        return drawn.to(self.device, self.dtype)

    def table(self, lengths: list[int], seed: int) -> np.ndarray:
        """Write random keys and values of each sequence to pages of its own; return the table."""
        generator = torch.Generator().manual_seed(seed)
        page_size = self.backend.page_size
        pages = np.random.default_rng(seed).permutation(NUM_PAGES)
        counts = [-(-length // page_size) for length in lengths]
        table = np.zeros((len(lengths), max(counts)), dtype=np.int64)
        taken = 0
        for row, count, length in zip(table, counts, lengths, strict=True):
            row[:count] = pages[taken : taken + count]
            taken += count
            slots = (row[:, None] * page_size + np.arange(page_size)).reshape(-1)[:length]
            kv_heads = self.shape.num_kv_heads
            self.backend.write(
                0,
                self.randn(generator, length, kv_heads),
                self.randn(generator, length, kv_heads),
                torch.from_numpy(slots).to(self.device),
            )
        return table

    def expected(
        self, q: torch.Tensor, queries: np.ndarray, keys: np.ndarray, table: np.ndarray
    ) -> torch.Tensor:
        page = self.backend.page_size
        return twins.paged_attention(q, self.keys, self.values, queries, keys, table, page)


def assert_close(output: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[output.dtype]
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@CASES
@PAGES
def test_paged(
    shape: AttentionShape, dtype: torch.dtype, page_size: int, device: torch.device
) -> None:
    """Slots after a sequence's last key hold NaN, which must not reach the output."""
    pool = Pool(shape, dtype, device, page_size)
    queries, keys = (np.array(column) for column in zip(*PAGED, strict=True))
    table = pool.table(keys.tolist(), seed=1)
    q = pool.randn(torch.Generator().manual_seed(2), int(queries.sum()), shape.num_heads)
    output = torch.full_like(q, 77.0)
    pool.backend.attend_paged(0, q, output, pool.backend.plan_paged(queries, keys, table))
    assert_close(output, pool.expected(q, queries, keys, table))


@CASES
def test_full(shape: AttentionShape, dtype: torch.dtype, device: torch.device) -> None:
    """Queries, keys and values are columns of one tensor, as the projection leaves them."""
    backend = TritonBackend(shape, 16, dtype, device)
    queries, keys = (np.array(column) for column in zip(*WHOLE, strict=True))
    heads, kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_size
    rows = int(keys.sum())
    generator = torch.Generator().manual_seed(3)
    joined = torch.randn(rows, (heads + 2 * kv_heads) * size, generator=generator)
    joined = joined.to(device, dtype)
    parts = joined.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    q, k, v = (part.view(rows, -1, size) for part in parts)
    q = q[: int(queries.sum())]
    output = torch.full(q.shape, 77.0, dtype=dtype, device=device)
    backend.attend_full(q, k, v, output, backend.plan_full(queries, keys))
    query_ends, key_ends = np.cumsum(queries), np.cumsum(keys)
    for number, (num_queries, num_keys) in enumerate(WHOLE):
        own = slice(query_ends[number] - num_queries, query_ends[number])
        seen = slice(key_ends[number] - num_keys, key_ends[number])
        assert_close(output[own], twins.attention(q[own], k[seen], v[seen]))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 150)), min_size=1, max_size=4),
    block_m=st.sampled_from([16, 32, 64]),
    block_n=st.sampled_from([16, 64]),
    num_splits=st.integers(1, 6),
    group=st.sampled_from([1, 3, 4]),
    page_size=st.sampled_from([16, 32, 48]),
    seed=st.integers(0, 2**16),
)
def test_any_tiles_and_splits(
    device: torch.device,
    lengths: list[tuple[int, int]],
    block_m: int,
    block_n: int,
    num_splits: int,
    group: int,
    page_size: int,
    seed: int,
) -> None:
    """The result does not depend on the launch parameters."""
    shape = AttentionShape(group, 1, 16)
    pool = Pool(shape, torch.float32, device, page_size)
    queries, keys = (np.array(column) for column in zip(*lengths, strict=True))
    table = pool.table(keys.tolist(), seed)
    q = pool.randn(torch.Generator().manual_seed(seed), int(queries.sum()), group)
    expected = pool.expected(q, queries, keys, table)
    config = TileConfig(block_m, block_n, 4, 1)
    tiles = row_tiles(queries * group, block_m)
    arrays = PackedArrays.of([tiles, starts_of(queries), keys, table], device)
    space = [
        torch.full((size,), math.nan, device=device)
        for size in work_space(len(tiles), 1, num_splits, config, 16)
    ]
    output = torch.full_like(q, 77.0)
    paged_attention(
        q, pool.keys, pool.values, output, *arrays.views, page_size, 0.25, config, num_splits,
        *space,
    )  # fmt: skip
    assert_close(output, expected)

    # The same keys, as rows of a full pass.
    page_slots = table[:, :, None] * page_size + np.arange(page_size)
    slots = [row.reshape(-1)[:num] for row, num in zip(page_slots, keys, strict=True)]
    rows = torch.from_numpy(np.concatenate(slots)).to(device)
    tiles = row_tiles(queries, block_m)
    arrays = PackedArrays.of([tiles, starts_of(queries), starts_of(keys)], device)
    output = torch.full_like(q, 77.0)
    config = TileConfig(block_m, block_n, 4, 1)
    full_attention(q, pool.keys[rows], pool.values[rows], output, *arrays.views, 0.25, config)
    assert_close(output, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_keys_are_split_where_sequences_are_few(dtype: torch.dtype, device: torch.device) -> None:
    """Not in float32, where the order of summation must not depend on the batch."""
    pool = Pool(AttentionShape(2, 1, 32), dtype, device)
    queries, keys = np.array([4]), np.array([600])
    table = pool.table([600], seed=4)
    q = pool.randn(torch.Generator().manual_seed(5), 4, 2)
    plan = pool.backend.plan_paged(queries, keys, table)
    assert (plan.num_splits > 1) == (dtype is torch.bfloat16)
    output = torch.full_like(q, 77.0)
    pool.backend.attend_paged(0, q, output, plan)
    assert_close(output, pool.expected(q, queries, keys, table))


def test_splits_fill_the_device_and_no_more() -> None:
    bf16 = torch.bfloat16
    assert choose_splits(32, 4096, bf16, 132) == 9  # 288 programs for 132 multiprocessors
    assert choose_splits(32 * 32, 4096, bf16, 132) == 1
    assert choose_splits(32, 544, bf16, 132) == 5  # no fewer than 128 keys each
    assert choose_splits(1, 1 << 20, bf16, 132) == 32
    assert choose_splits(32, 4096, torch.float32, 132) == 1
    assert choose_splits(0, 0, bf16, 132) == 1


@pytest.mark.parametrize("broken", range(3))
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e30])
def test_a_broken_sequence_does_not_leak(broken: int, garbage: float, device: torch.device) -> None:
    backend = TritonBackend(AttentionShape(2, 1, 32), 16, torch.float32, device)
    generator = torch.Generator().manual_seed(4)
    lengths = np.array([40, 31, 7])
    q = torch.randn(78, 2, 32, generator=generator).to(device)
    k = torch.randn(78, 1, 32, generator=generator).to(device)
    ends = np.cumsum(lengths)
    spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    k[spans[broken]] = garbage
    output = torch.empty_like(q)
    backend.attend_full(q, k, k, output, backend.plan_full(lengths, lengths))
    for number, own in enumerate(spans):
        if number != broken:
            assert_close(output[own], twins.attention(q[own], k[own], k[own]))
        elif math.isnan(garbage):
            assert torch.isnan(output[own]).all()


def test_a_sequence_alone_is_the_same_as_in_company(device: torch.device) -> None:
    """Attention in float32 is batch-invariant, bit for bit."""
    pool = Pool(AttentionShape(4, 2, 32), torch.float32, device)
    table = pool.table([300, 90, 17], seed=6)
    q = pool.randn(torch.Generator().manual_seed(7), 60, 4)
    alone, company = torch.empty_like(q[:12]), torch.empty_like(q)
    backend = pool.backend
    plan = backend.plan_paged(np.array([12]), np.array([300]), table[:1])
    backend.attend_paged(0, q[:12], alone, plan)
    plan = backend.plan_paged(np.array([12, 47, 1]), np.array([300, 90, 17]), table)
    backend.attend_paged(0, q, company, plan)
    assert torch.equal(company[:12], alone)

    k = pool.randn(torch.Generator().manual_seed(8), 260, 2)
    backend.attend_full(q[:12], k[:60], k[:60], alone, backend.plan_full(
        np.array([12]), np.array([60])))  # fmt: skip
    backend.attend_full(q, k, k, company, backend.plan_full(
        np.array([12, 48]), np.array([60, 200])))  # fmt: skip
    assert torch.equal(company[:12], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_a_static_plan_is_rewritten_in_place(dtype: torch.dtype, device: torch.device) -> None:
    """The tensors that a CUDA graph captures stay in place, also if less of the plan is used."""
    shape = AttentionShape(4, 2, 32)
    pool = Pool(shape, dtype, device)
    plan = pool.backend.static_paged_plan(num_sequences=4, num_queries=8, width=20)
    tensors = [*plan.arrays.views, plan.partial, plan.statistics]
    addresses = [tensor.data_ptr() for tensor in tensors]
    generator = torch.Generator().manual_seed(9)
    q = pool.randn(generator, 32, shape.num_heads)

    untouched = torch.full_like(q, 77.0)
    pool.backend.attend_paged(0, q, untouched, plan)
    assert (untouched == 77.0).all()
    for number, lengths in enumerate([[(8, 300)], [(8, 40), (8, 33)], [(3, 9), (0, 4), (8, 64)]]):
        queries, keys = (np.array(column) for column in zip(*lengths, strict=True))
        table = pool.table(keys.tolist(), seed=10 + number)
        pool.backend.rewrite_paged_plan(plan, queries, keys, table)
        output = torch.full_like(q, 77.0)
        pool.backend.attend_paged(0, q, output, plan)
        used = int(queries.sum())
        assert_close(output[:used], pool.expected(q[:used], queries, keys, table))
        assert (output[used:] == 77.0).all()
    assert [tensor.data_ptr() for tensor in tensors] == addresses

    one = np.array([1])
    for queries, table in (
        (np.full(5, 1), np.zeros((5, 1))),
        (np.array([9]), np.zeros((1, 1))),
        (one, np.zeros((1, 21))),
    ):
        with pytest.raises(ValueError, match="the plan is for 4 sequences of 8 queries on 20"):
            pool.backend.rewrite_paged_plan(plan, queries, np.ones_like(queries), table)


def test_the_shapes_and_dtypes_it_takes(device: torch.device) -> None:
    def why_not(head_size: int, dtype: torch.dtype) -> str | None:
        return TritonBackend.why_not(AttentionShape(4, 2, head_size), 16, dtype, device)

    assert why_not(256, torch.bfloat16) is None
    assert "at most 256, got 320" in str(why_not(320, torch.bfloat16))
    assert "no kernels for float64" in str(why_not(64, torch.float64))
