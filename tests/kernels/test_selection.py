# SPDX-License-Identifier: Apache-2.0
"""Scores, pooling and page writes against plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.kernels import twins
from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.attention.portable import PortableBackend
from vllm_sparse_dllm.attention.triton import TritonBackend
from vllm_sparse_dllm.kernels.pages import write_rows
from vllm_sparse_dllm.kernels.saliency import key_scores, max_pool

SEEDS = st.integers(0, 2**16)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def layers(draw: st.DrawFn, integers: bool):
    """A block's queries, keys as a slice of wider rows, and the ranges around the block."""
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    head_size = draw(st.sampled_from([16, 48, 80]))
    length = draw(st.integers(2, 70))
    start = draw(st.integers(0, length - 1))
    end = draw(st.integers(start + 1, length))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shapes = (end - start, kv_heads * group, head_size), (length, kv_heads + 1, head_size)
    if integers:
        # A block of 4: with a power of two the mean is exact.
        shapes = (4, *shapes[0][1:]), shapes[1]
        q, k = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    else:
        q, k = (torch.randn(shape, generator=generator) for shape in shapes)
    dtype = draw(DTYPES)
    return q.to(dtype), k.to(dtype)[:, :kv_heads], ((0, start), (end, length))


@given(layer=layers(integers=False))
def test_scores_are_close(layer, device: torch.device) -> None:
    q, k, spans = layer
    got = key_scores(q.to(device), k.to(device), spans).cpu()
    expected = twins.key_scores(q.double(), k.double(), spans)
    assert got.dtype == k.dtype and got.shape == expected.shape
    # Rounded three times; the sum has as many terms as a row of keys.
    tolerance = 4 * torch.finfo(k.dtype).eps * math.sqrt(k.shape[1] * k.shape[2])
    tolerance *= math.sqrt(q.shape[1] / k.shape[1])
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@given(layer=layers(integers=True))
def test_scores_of_small_integers_are_the_twins(layer, device: torch.device) -> None:
    """Where nothing is rounded, not a bit differs, so the same scores tie."""
    q, k, spans = layer
    expected = twins.key_scores(q.float(), k.float(), spans)
    got = key_scores(q.to(device), k.to(device), spans).cpu()
    assert torch.equal(got, expected.to(k.dtype))


def test_scores_of_any_ranges(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 2, 16, generator=generator).to(device)
    k = torch.randn(50, 1, 16, generator=generator).to(device)
    for spans in (((0, 50),), ((3, 9),), ((0, 0), (4, 50)), ((1, 2), (5, 9), (20, 31))):
        got, expected = key_scores(q, k, spans), twins.key_scores(q, k, spans)
        torch.testing.assert_close(got, expected)


@given(
    length=st.integers(1, 300),
    kernel_size=st.sampled_from([1, 3, 5, 9, 301]),
    run_length=st.sampled_from([1, 2, 16, 32]),
    dtype=DTYPES,
    special=st.sampled_from([None, math.nan, math.inf, -math.inf]),
    seed=SEEDS,
)
def test_pooling_is_the_twins(
    device: torch.device,
    length: int,
    kernel_size: int,
    run_length: int,
    dtype: torch.dtype,
    special: float | None,
    seed: int,
) -> None:
    """Bit for bit, so that `torch.topk` gets the same vector and breaks ties in the same way."""
    values = torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if special is not None:
        values[seed % length] = special
    kernel_size = min(kernel_size, 2 * length - 1)
    expected = twins.max_pool(values, kernel_size, run_length)
    got = max_pool(values.to(device), kernel_size, run_length).cpu()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@given(
    num=st.integers(0, 40),
    kv_heads=st.sampled_from([1, 3]),
    head_size=st.sampled_from([16, 48]),
    dtype=DTYPES,
    gap=st.tuples(st.integers(0, 20), st.integers(0, 9)),
    chosen=st.booleans(),
    seed=SEEDS,
)
def test_rows_land_in_their_slots_and_nowhere_else(
    device: torch.device,
    num: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    gap: tuple[int, int],
    chosen: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(50, 2 * kv_heads * head_size, generator=generator).to(device, dtype)
    keys, values = (half.view(50, kv_heads, head_size) for half in wide.chunk(2, dim=1))
    pool = torch.full((2, 64, kv_heads, head_size), math.nan, dtype=dtype, device=device)
    expected = pool.clone()
    slots = torch.randperm(64, generator=generator)[:num]
    slots[::5] = -1
    slots = slots.to(device)
    entries = None
    if chosen:
        entries = torch.randperm(41, generator=generator)[:num].to(device)
    write_rows(keys, values, slots, *pool, entries, gap)
    twins.write_rows(keys, values, slots, *expected, entries, gap)
    assert torch.equal(pool.view(torch.int8), expected.view(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_backends_agree(dtype: torch.dtype, device: torch.device) -> None:
    """Both move the same entries to the same slots, and read the same from them."""
    shape = AttentionShape(4, 2, 32)
    backends = [kind(shape, 16, dtype, device) for kind in (TritonBackend, PortableBackend)]
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 30, 2, 32, generator=generator).to(device, dtype)
    entries = torch.tensor([20, 3, 9, 10, 0], device=device)
    slots = torch.tensor([5, 63, 17, 0, 40], device=device)
    for backend in backends:
        pool = torch.zeros(4 * 16 * 2 * 2 * 32, dtype=dtype, device=device)
        backend.bind_pages([pool.view(torch.int8)])
        backend.move(0, keys, values, entries, slots, (8, 6))
    for rows in (slots, torch.arange(64, device=device)):
        one, other = ([b.read_keys(0, rows), b.read_values(0, rows)] for b in backends)
        assert torch.equal(torch.stack(one), torch.stack(other))
    assert torch.equal(backends[0].read_keys(0, slots), keys[[26, 3, 15, 16, 0]])
