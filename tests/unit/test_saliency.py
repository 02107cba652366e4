# SPDX-License-Identifier: Apache-2.0
"""Saliency and selection against the reference: the same scores, the very same entries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.decode import Options
from tests.reference.decode import importance as naive_importance
from tests.reference.decode import select as naive_select
from vllm_sparse_dllm.cache import saliency
from vllm_sparse_dllm.cache.saliency import importance
from vllm_sparse_dllm.cache.selection import Selection, select_entries

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def one_rank():
    """No distributed group is set up here: one rank."""
    patch = pytest.MonkeyPatch()
    patch.setattr(saliency, "get_tensor_model_parallel_world_size", lambda: 1)
    yield
    patch.undo()


@st.composite
def layers(draw: st.DrawFn, integers: bool = False):
    """One layer's queries and keys, and a block somewhere in the canvas."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    group = draw(st.sampled_from([1, 2, 4]))
    head_size = draw(st.sampled_from([2, 8, 32]))
    length = draw(st.integers(2, 80))
    start = draw(st.integers(0, length - 1))
    end = draw(st.integers(start + 1, length))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shapes = (length, kv_heads * group, head_size), (length, kv_heads, head_size)
    if integers:
        q, k = (torch.randint(-2, 3, s, generator=generator).float() for s in shapes)
    else:
        q, k = (torch.randn(s, generator=generator) for s in shapes)
    return q, k, (start, end)


def both(q: torch.Tensor, k: torch.Tensor, block: tuple[int, int]) -> list[torch.Tensor]:
    """The package's and the reference's importance of everything but the block."""
    start, end = block
    length = len(q)
    fast = importance(q[start:end], k, ((0, start), (end, length)), q.shape[1])
    others = torch.cat([torch.arange(start), torch.arange(end, length)])
    return [fast, naive_importance(q.transpose(0, 1)[:, start:end], k.transpose(0, 1)[:, others])]


@given(layers())
def test_importance_is_the_references(layer) -> None:
    fast, naive = both(*layer)
    torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-5)


@given(layers(integers=True), st.sampled_from([1, 2, 4, 8]))
def test_importance_is_exact_where_sums_are(layer, block_length: int) -> None:
    """Small integers, a block of a power of two: no rounding, so not a bit may differ."""
    q, k, (start, _) = layer
    if start + block_length > len(q) or q.shape[1] % 3 == 0:
        return
    fast, naive = both(q, k, (start, start + block_length))
    assert torch.equal(fast, naive)


def test_importance_ranks_by_raw_dot_products() -> None:
    """B5 by hand: mean query of the block, no scale, no softmax, mean over heads."""
    q = torch.zeros(5, 2, 2)
    q[2] = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    q[3] = torch.tensor([[3.0, 0.0], [0.0, 1.0]])  # means (2, 0) and (0, 2)
    k = torch.tensor([[1.0, 1.0], [4.0, 0.0], [9.0, 9.0], [9.0, 9.0], [-1.0, 3.0]])
    k = k.unsqueeze(1)  # one key head, shared by both query heads
    got = importance(q[2:4], k, ((0, 2), (4, 5)), 2)
    assert got.tolist() == [(2 + 2) / 2, (8 + 0) / 2, (-2 + 6) / 2]


@given(layers(), st.sampled_from([(0, 1), (2, 2), (0, 0)]))
def test_importance_needs_no_candidates_on_one_side(layer, _) -> None:
    q, k, _ = layer
    length = len(q)
    for block in ((0, 1), (length - 1, length)):
        fast, naive = both(q, k, block)
        torch.testing.assert_close(fast, naive, rtol=1e-4, atol=1e-5)


@given(layers())
def test_importance_of_two_ranks_is_that_of_one(layer) -> None:
    """Heads are split over ranks; the all-reduce adds what each has of them."""
    q, k, (start, end) = layer
    kv_heads = k.shape[1]
    if kv_heads % 2:
        return
    spans, total = ((0, start), (end, len(q))), q.shape[1]
    whole = importance(q[start:end], k, spans, total)
    parts = [
        importance(q[start:end, heads], k[:, kv], spans, total)
        for heads, kv in zip(
            (slice(total // 2), slice(total // 2, None)),
            (slice(kv_heads // 2), slice(kv_heads // 2, None)),
            strict=True,
        )
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saliency, "get_tensor_model_parallel_world_size", lambda: 2)
        patch.setattr(
            saliency,
            "tensor_model_parallel_all_gather",
            lambda own, dim: torch.cat([own, parts[1] * total], dim=dim),
        )
        reduced = importance(q[start:end, : total // 2], k[:, : kv_heads // 2], spans, total)
    torch.testing.assert_close(reduced, whole, rtol=1e-4, atol=1e-5)


# Ties are everywhere: few different values, and the pool repeats its maxima.
@st.composite
def vectors(draw: st.DrawFn) -> torch.Tensor:
    n = draw(st.integers(1, 300))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    if draw(st.booleans()):
        return torch.randint(-3, draw(st.integers(-2, 20)), (n,), generator=generator).float()
    values = torch.randn(n, generator=generator)
    return values.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))


@given(vectors(), st.floats(0, 1), st.sampled_from([1, 3, 5, 9, 31]))
def test_the_very_entries_of_the_reference(scores: torch.Tensor, ratio: float, kernel: int) -> None:
    keep = int(len(scores) * ratio)
    if keep == 0:  # the attention layer does not ask for nothing
        return
    expected = naive_select(scores, Options(keep_ratio=ratio, kernel_size=kernel))
    got = select_entries(scores, Selection(keep, kernel, 1))
    assert got.tolist() == expected.tolist()  # order included
    assert len(set(got.tolist())) == keep


@given(
    vectors(),
    st.floats(0, 1),
    st.sampled_from([1, 3, 5]),
    st.sampled_from([2, 3, 16, 32, 64]),
)
def test_the_very_runs_of_the_reference(
    scores: torch.Tensor, ratio: float, kernel: int, page: int
) -> None:
    keep = int(len(scores) * ratio)
    if keep == 0:
        return
    options = Options(keep_ratio=ratio, kernel_size=kernel, granularity="page", page=page)
    expected = naive_select(scores, options)
    got = select_entries(scores, Selection(keep, kernel, page))
    assert got.tolist() == expected.tolist()
    assert -(-keep // page) * page >= len(got)
    whole = {i // page for i in got.tolist()}
    assert sorted(got.tolist()) == [i for i in range(len(scores)) if i // page in whole]


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_every_keep_of_one_vector(kernel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (1, 2, 31, 97):
        scores = torch.randint(0, 6, (n,), generator=generator).float()
        for keep in range(1, n + 1):
            ratio = keep / n
            if int(n * ratio) != keep:
                ratio = (keep + 0.5) / n
            expected = naive_select(scores, Options(keep_ratio=ratio, kernel_size=kernel))
            assert select_entries(scores, Selection(keep, kernel, 1)).tolist() == expected.tolist()


def test_the_window_crosses_the_seam_between_prefix_and_suffix() -> None:
    """B5.5: the pool runs over the concatenated vector, so a peak lifts its neighbour there."""
    q = torch.zeros(8, 1, 1)
    q[3:5] = 1.0  # the block
    k = torch.tensor([0.0, 1.0, 9.0, 0.0, 0.0, 2.0, 3.0, 4.0]).view(8, 1, 1)
    scores = importance(q[3:5], k, ((0, 3), (5, 8)), 1)
    assert scores.tolist() == [0, 1, 9, 2, 3, 4]
    kept = select_entries(scores, Selection(3, 3, 1))
    assert sorted(kept.tolist()) == [1, 2, 3]  # entry 3 is position 5, behind the block


def test_a_short_last_run_is_kept_whole_and_nothing_behind_it() -> None:
    scores = torch.tensor([0.0] * 8 + [5.0, 4.0])
    assert select_entries(scores, Selection(3, 1, 8)).tolist() == [8, 9]
    assert select_entries(scores, Selection(9, 1, 8)).tolist() == [8, 9, 0, 1, 2, 3, 4, 5, 6, 7]
    assert select_entries(torch.tensor([1.0, 2.0]), Selection(1, 3, 32)).tolist() == [0, 1]


def test_a_window_wider_than_all_entries_costs_no_more() -> None:
    saliency = torch.tensor([0.5, 2.0, -1.0, 0.0, 1.0])
    widest = select_entries(saliency, Selection(3, 9, 1)).tolist()
    assert select_entries(saliency, Selection(3, 2**61 + 1, 1)).tolist() == widest
