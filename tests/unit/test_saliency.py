# SPDX-License-Identifier: Apache-2.0
"""Saliency and selection against the reference: the same scores and exactly the same entries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.reference.decode import Options
from tests.reference.decode import attention_importance as naive_attention
from tests.reference.decode import importance as naive_importance
from tests.reference.decode import select as naive_select
from tests.reference.decode import window_importance as naive_window
from vllm_sparse_dllm.cache import saliency
from vllm_sparse_dllm.cache.saliency import (
    SALIENCIES,
    WINDOW,
    CanvasView,
    SaliencyInputs,
    importance,
)
from vllm_sparse_dllm.cache.selection import Selection, select_entries

SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def one_rank():
    """Set the number of ranks to 1, since no distributed group is set up here."""
    patch = pytest.MonkeyPatch()
    patch.setattr(saliency, "get_tensor_model_parallel_world_size", lambda: 1)
    yield
    patch.undo()


@st.composite
def layers(draw: st.DrawFn, integers: bool = False, kv_heads: tuple[int, ...] = (1, 2, 3)):
    """One layer's queries and keys, and a block somewhere in the canvas."""
    num_kv_heads = draw(st.sampled_from(kv_heads))
    group = draw(st.sampled_from([1, 2, 4]))
    head_size = draw(st.sampled_from([2, 8, 32]))
    length = draw(st.integers(2, 80))
    start = draw(st.integers(0, length - 1))
    end = draw(st.integers(start + 1, length))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shapes = (length, num_kv_heads * group, head_size), (length, num_kv_heads, head_size)
    if integers:
        q, k = (torch.randint(-2, 3, s, generator=generator).float() for s in shapes)
    else:
        q, k = (torch.randn(s, generator=generator) for s in shapes)
    return q, k, (start, end)


def both(q: torch.Tensor, k: torch.Tensor, block: tuple[int, int]) -> list[torch.Tensor]:
    """Return the importance of all keys outside the block, by the package and by the reference."""
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
    """With small integers and a block of a power of two nothing is rounded: no bit may differ."""
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


def inputs_of(
    q: torch.Tensor,
    k: torch.Tensor,
    block: tuple[int, int],
    prompt: int,
    late: bool = False,
    total_heads: int | None = None,
) -> SaliencyInputs:
    """Return what an attention layer passes on in a refresh, or in a late eviction."""
    start, end = block
    total = total_heads or q.shape[1]
    spans = ((0, start), (end, len(q)))
    canvas = CanvasView("", np.zeros(len(q)), prompt, block, np.ones(end - start, dtype=bool))
    if not late:
        return SaliencyInputs(0, q, 0, k, spans, spans, None, canvas, total)
    entries = torch.cat([k[:start], k[end:]])
    rows = ((0, len(entries)),)
    own = q[start:end]
    return SaliencyInputs(0, own, start, entries, rows, spans, k[start:end], canvas, total)


@given(layers(), st.floats(0, 1), st.booleans())
def test_window_is_the_references(layer, share: float, late: bool) -> None:
    q, k, (start, end) = layer
    prompt = int(start * share)
    got = SALIENCIES["window"].score(inputs_of(q, k, (start, end), prompt, late))
    others = torch.cat([torch.arange(start), torch.arange(end, len(q))])
    heads_first = q.transpose(0, 1)
    groups = [heads_first[:, start:end]]
    if prompt and not late:
        groups.append(heads_first[:, max(0, prompt - WINDOW) : prompt])
    naive = naive_window(groups, k.transpose(0, 1), others, prompt)
    kept_always = torch.arange(len(others)) >= max(0, prompt - WINDOW)
    kept_always &= torch.arange(len(others)) < prompt
    torch.testing.assert_close(got[~kept_always], naive[~kept_always], rtol=1e-4, atol=1e-6)
    assert torch.equal(got[kept_always].argsort(), naive[kept_always].argsort())
    assert (got[kept_always] >= 3).all() and (got[~kept_always] < 2.01).all()


def test_window_by_hand() -> None:
    """Heads are combined by maximum: a key that one query of one head looks at scores high."""
    length, prompt = WINDOW + 6, WINDOW + 3
    q, k = torch.zeros(length, 2, 2), torch.zeros(length, 2, 2)
    q[3, 1, 0] = 100.0  # one query of the window, in one head
    k[1, 1, 0] = 1.0
    block = (prompt, prompt + 2)
    scores = SALIENCIES["window"].score(inputs_of(q, k, block, prompt))
    evenly = 1 / length  # the share that every key gets from each of the other queries
    assert scores[:3].tolist() == pytest.approx(
        [2 * evenly, evenly + (15 * evenly + 1) / 16, 2 * evenly], rel=1e-4
    )
    assert scores[3:prompt].tolist() == [3 + i for i in range(WINDOW)]
    assert len(scores) == length - 2


@given(layers(), st.booleans())
def test_attention_is_the_references(layer, late: bool) -> None:
    q, k, (start, end) = layer
    got = SALIENCIES["attention"].score(inputs_of(q, k, (start, end), start, late))
    others = torch.cat([torch.arange(start), torch.arange(end, len(q))])
    heads_first = q.transpose(0, 1)
    naive = naive_attention(heads_first[:, start:end], k.transpose(0, 1), others)
    torch.testing.assert_close(got, naive, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["attention", "window"])
@given(layer=layers(), most=st.integers(1, 2000), late=st.booleans())
def test_a_long_block_takes_no_more_memory(name: str, layer, most: int, late: bool) -> None:
    """So many shares of attention at a time, or one query's; the scores are the same."""
    q, k, (start, end) = layer
    inputs = inputs_of(q, k, (start, end), start, late)
    whole = SALIENCIES[name].score(inputs)
    sizes = []

    def softmax(scores: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(scores.numel())
        return original(scores, dim=dim)

    original = torch.softmax
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saliency, "_MOST_SHARES", most)
        patch.setattr(torch, "softmax", softmax)
        parts = SALIENCIES[name].score(inputs)
    assert max(sizes) <= max(most, q.shape[1] * len(k))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_the_bound_is_for_long_blocks_only() -> None:
    """A block of 32 of a model with 32 heads is one part up to 16,384 positions, bit for bit."""
    q, k = torch.randn(32, 32, 16), torch.randn(2048, 8, 16)
    grouped = q.view(32, 8, 4, 16).permute(1, 2, 0, 3).reshape(8, 4 * 32, 16)
    scores = torch.bmm(grouped, k.permute(1, 2, 0))
    expected = torch.softmax(scores * 16**-0.5, dim=-1).view(32, 32, 2048).mean(dim=1)
    assert torch.equal(saliency.mean_shares(q, k), expected)
    assert saliency._MOST_SHARES == 32 * 32 * 16384


def test_attention_by_hand() -> None:
    """A key that one row of one head looks at counts, though the mean query ranks it low."""
    q, k = torch.zeros(6, 2, 2), torch.zeros(6, 1, 2)
    block = (3, 5)
    q[3, 0] = torch.tensor([100.0, 0.0])
    q[4, 0] = torch.tensor([-300.0, 0.0])
    q[3:5, 1, 1] = -1.0  # in the other head all rows avoid keys 0 and 2
    k[:, 0] = torch.tensor([[0, 99], [1, 0], [0.5, 99], [0, 0], [0, 0], [-2, 0]])
    refresh, late = (inputs_of(q, k, block, 3, late) for late in (False, True))
    published = SALIENCIES["paper"].score(refresh)
    assert published[1] < published[0]
    # In head 0, row 3 looks at key 1 and row 4 at key 5; in head 1, four keys get a fourth each.
    expected = [0, (1 + 2 / 4) / 4, 0, (1 + 2 / 4) / 4]
    for inputs in (refresh, late):
        assert SALIENCIES["attention"].score(inputs).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", SALIENCIES)
@given(layer=layers(kv_heads=(2, 4)), late=st.booleans())
def test_two_ranks_are_one(name: str, layer, late: bool) -> None:
    """Each rank has half of the heads and sends its part; both get the same, bit for bit."""
    q, k, block = layer
    assume(len(q) > block[1] - block[0])  # layers always have candidates
    total, heads, kv_heads = q.shape[1], q.shape[1] // 2, k.shape[1] // 2
    score = SALIENCIES[name].score
    whole = score(inputs_of(q, k, block, block[0], late))
    ranks = [
        inputs_of(q[:, own], k[:, kv], block, block[0], late, total)
        for own, kv in (
            (slice(heads), slice(kv_heads)),
            (slice(heads, None), slice(kv_heads, None)),
        )
    ]
    parts: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saliency, "get_tensor_model_parallel_world_size", lambda: 2)

        def send(own: torch.Tensor, dim: int) -> torch.Tensor:
            parts.append(own)
            return torch.cat([own, own], dim=dim)

        patch.setattr(saliency, "tensor_model_parallel_all_gather", send)
        for inputs in ranks:
            score(inputs)
        patch.setattr(
            saliency, "tensor_model_parallel_all_gather", lambda own, dim: torch.cat(parts, dim)
        )
        first, second = (score(inputs) for inputs in ranks)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, whole, rtol=1e-4, atol=1e-5)


# Ties are frequent: there are few different values, and pooling repeats maxima.
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
    if keep == 0:  # attention layers do not select 0 entries
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
    """B5.5: pooling runs over the concatenated vector, so a peak lifts its neighbour across it."""
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
