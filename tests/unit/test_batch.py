# SPDX-License-Identifier: Apache-2.0
"""One step's batch: which rows, at which positions, into which slots, with logits of which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams

from tests.unit.helpers import traits_of
from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.cache.policies import POLICIES, StepKind
from vllm_sparse_dllm.denoise.rules import RULES
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.batch import StepBatch, build_batch
from vllm_sparse_dllm.engine.requests import NextStep, RequestState
from vllm_sparse_dllm.settings import GRANULARITIES, DecodingSettings

PAGE, LAYERS, MASK = 4, 3, 3


@dataclass
class Recorder(AttentionBackend):
    """A backend whose plans are the arrays they are made of."""

    calls: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(AttentionShape(2, 2, 8), PAGE, torch.float32, torch.device("cpu"))

    def plan_paged(
        self, query_lengths: np.ndarray, key_lengths: np.ndarray, page_table: np.ndarray
    ) -> Any:
        return query_lengths.tolist(), key_lengths.tolist(), page_table.tolist()

    def plan_full(self, query_lengths: np.ndarray, key_lengths: np.ndarray) -> Any:
        return query_lengths.tolist(), key_lengths.tolist()

    def bind_pages(self, layers: list[torch.Tensor]) -> None: ...
    def clear(self, page_ids: np.ndarray) -> None: ...
    def write(self, *args: Any) -> None: ...
    def attend_paged(self, *args: Any) -> None: ...
    def attend_full(self, *args: Any) -> None: ...


def make_state(
    kind: str = "llada",
    prompt: int = 5,
    response: int = 8,
    first_page: int = 1,
    **settings: Any,
) -> RequestState:
    decoding = DecodingSettings(**{"block_length": 4, "remasking": "low_confidence", **settings})
    canvas = Canvas(prompt, response, decoding.block_length)
    pages = POLICIES[decoding.cache_policy].num_pages(canvas, decoding, PAGE)
    return RequestState(
        [10 + i for i in range(prompt)],
        decoding,
        SamplingParams(max_tokens=response, temperature=0.0),
        traits_of(kind, MASK),
        list(range(first_page, first_page + pages)),
        PAGE,
        LAYERS,
        torch.Generator(),
    )


def build(*states: RequestState) -> tuple[StepBatch, list[NextStep]]:
    steps = [state.next_step() for state in states]
    return build_batch(states, steps, Recorder()), steps


def advance(state: RequestState, num: int = 1) -> None:
    """Take ``num`` steps: each commits the first of its candidates it is allowed to."""
    for _ in range(num):
        step = state.next_step()
        chosen = step.candidates[: step.count]
        state.commit(chosen, chosen + 100, None)
        if step.kind is StepKind.REFRESH:
            spans = state.policy.candidates(state.canvas, step.block)
            kept = state.policy.num_kept(
                sum(end - start for start, end in spans), state.settings, PAGE
            )
            for sequence in state.sequences:
                sequence.num_kept[:] = kept


def test_a_full_forward_has_every_position_and_the_candidates_rows() -> None:
    state = make_state(cache_policy="none", steps=4)
    batch, _ = build(state)
    assert batch.input_ids.tolist() == [10, 11, 12, 13, 14] + [MASK] * 8
    assert batch.positions.tolist() == list(range(13))
    assert batch.plan.cached is None
    assert batch.plan.full is not None
    assert batch.plan.full.plan == ([13], [13])
    assert batch.plan.last_rows.tolist() == [5, 6, 7, 8]  # the block's masks
    assert batch.plan.full.last_plan == ([4], [13])
    assert batch.plan.fills == ()
    assert batch.logits_rows.tolist() == [0, 1, 2, 3]
    assert batch.guided.numel() == batch.guidance.numel() == 0


def test_committed_positions_ask_for_no_logits() -> None:
    state = make_state(cache_policy="none", steps=4)
    state.commit(np.array([6, 8]), np.array([40, 41]), None)
    batch, _ = build(state)
    assert batch.input_ids.tolist()[5:9] == [MASK, 40, MASK, 41]
    assert batch.plan.last_rows.tolist() == [5, 7]


def test_a_model_that_shifts_asks_for_the_rows_before() -> None:
    state = make_state("dream", cache_policy="none", steps=2)
    batch, steps = build(state)
    assert steps[0].candidates.tolist() == [5, 6, 7, 8]
    assert batch.plan.last_rows.tolist() == [4, 5, 6, 7]
    # Cached, the rows before are those of the same forward; the first position is filled.
    state = make_state("dream", cache_policy="dual")
    advance(state)
    batch, steps = build(state)
    if steps[0].count == 0:
        advance(state)
        batch, steps = build(state)
    assert batch.positions.tolist() == [5, 6, 7, 8]
    assert steps[0].candidates.tolist() == [6, 7, 8]
    assert batch.plan.last_rows.tolist() == [0, 1, 2]


def test_dreams_first_step_of_a_block_asks_for_one_row() -> None:
    batch, steps = build(make_state("dream", cache_policy="sparse"))
    assert steps[0].candidates.tolist() == [5]
    assert batch.plan.last_rows.tolist() == [4]
    # Without a prompt there is no row before position 0: it has its own.
    batch, _ = build(make_state("dream", prompt=0, cache_policy="sparse"))
    assert batch.plan.last_rows.tolist() == [0]


def test_a_refresh_fills_the_slots_behind_those_of_the_fresh_keys() -> None:
    state = make_state(cache_policy="dual", first_page=7)
    batch, _ = build(state)
    (fill,) = batch.plan.fills
    assert fill.block == (5, 9)
    assert fill.candidates == ((0, 5), (9, 13))
    # Pages 7, 8, ...: slots 28, 29, ...; four for the block, then the kept.
    assert fill.slots.tolist() == list(range(28 + 4, 28 + 4 + 9))
    assert (fill.keep, fill.first_token, fill.length, fill.run_length) == (None, 0, 13, 1)
    advance(state)
    assert state.sequences[0].num_kept.tolist() == [9] * LAYERS
    batch, _ = build(state)
    assert batch.plan.full is None
    assert batch.plan.cached is not None
    assert batch.plan.cached.fresh_slots.tolist() == [28, 29, 30, 31]
    assert batch.plan.cached.plans == (([4], [13], [[7, 8, 9, 10]]),)
    assert batch.plan.cached.last_plan == ([3], [13], [[7, 8, 9, 10]])


def test_sparse_keeps_by_saliency() -> None:
    state = make_state(cache_policy="sparse", keep_ratio=0.5, kernel_size=5)
    batch, _ = build(state)
    assert batch.plan.fills == ()  # the delayed step keeps nothing
    advance(state)
    (fill,) = build(state)[0].plan.fills
    assert (fill.keep, fill.kernel_size, fill.run_length) == (4, 5, 1)
    assert fill.slots.tolist() == list(range(4 + 4, 4 + 4 + 4))
    paged = make_state(cache_policy="sparse", granularity="page", delay_steps=0, keep_ratio=0.6)
    (fill,) = build(paged)[0].plan.fills
    assert (fill.keep, fill.run_length) == (5, PAGE)
    assert len(fill.slots) == 8  # two runs of which 5 are asked for


def test_layers_that_keep_different_numbers_have_plans_of_their_own() -> None:
    """Granularity ``page``: one layer may have kept the short last run, another not."""
    state = make_state(cache_policy="sparse", granularity="page", delay_steps=0)
    advance(state)
    state.sequences[0].num_kept[:] = [8, 5, 8]
    cached = build(state)[0].plan.cached
    assert cached is not None
    assert [cached.plan_of(layer)[1] for layer in range(LAYERS)] == [[12], [9], [12]]
    state.sequences[0].num_kept[:] = 8
    cached = build(state)[0].plan.cached
    assert cached is not None
    assert len(cached.plans) == 1
    assert [cached.plan_of(layer)[1] for layer in range(LAYERS)] == [[12]] * LAYERS


def test_cached_sequences_come_first_and_logits_in_the_requests_order() -> None:
    full = make_state(cache_policy="none", steps=4)
    cached = make_state(prompt=2, cache_policy="dual", first_page=9)
    advance(cached)
    batch, steps = build(full, cached)
    assert batch.plan.cached is not None and batch.plan.full is not None
    assert batch.plan.cached.num_tokens == 4
    assert batch.positions.tolist() == [2, 3, 4, 5, *range(13)]
    assert batch.plan.last_rows.tolist() == [1, 2, 3, 9, 10, 11, 12]
    assert batch.plan.num_last_cached == 3
    assert batch.logits_rows.tolist() == [3, 4, 5, 6, 0, 1, 2]
    rows = batch.plan.last_rows[batch.logits_rows]
    asked = np.concatenate([step.candidates for step in steps]).tolist()
    assert batch.positions[rows].tolist() == asked


def test_prefix_runs_the_suffix_too() -> None:
    state = make_state(cache_policy="prefix", first_page=2)
    (fill,) = build(state)[0].plan.fills
    assert fill.candidates == ((0, 5),)
    advance(state)
    batch, _ = build(state)
    assert batch.positions.tolist() == list(range(5, 13))
    assert batch.plan.cached is not None
    assert batch.plan.cached.fresh_slots.tolist() == list(range(8, 16))
    assert batch.plan.last_rows.tolist() == [1, 2, 3]


def test_guidance_runs_a_second_canvas() -> None:
    plain = make_state(cache_policy="none", steps=4)
    guided = make_state(cache_policy="none", steps=4, prompt=3, cfg_scale=1.5)
    batch, _ = build(plain, guided)
    assert batch.input_ids.tolist() == (
        [10, 11, 12, 13, 14] + [MASK] * 8 + [10, 11, 12] + [MASK] * 8 + [MASK] * 11
    )
    assert batch.positions.tolist() == [*range(13), *range(11), *range(11)]
    assert batch.plan.last_rows.tolist() == [5, 6, 7, 8, 16, 17, 18, 19, 27, 28, 29, 30]
    assert batch.logits_rows.tolist() == list(range(12))  # the unconditional ones are last
    assert batch.guided.tolist() == [4, 5, 6, 7]
    assert batch.guidance.tolist() == [1.5] * 4
    # A commit reaches both canvases, and only the response.
    guided.commit(np.array([4]), np.array([50]), None)
    assert guided.sequences[0].token_ids.tolist() == [10, 11, 12, MASK, 50] + [MASK] * 6
    assert guided.sequences[1].token_ids.tolist() == [MASK] * 4 + [50] + [MASK] * 6


def test_guidance_between_others_keeps_the_order() -> None:
    first = make_state(cache_policy="none", steps=4, cfg_scale=2.0)
    second = make_state(cache_policy="dual", first_page=1, cfg_scale=0.5)
    advance(second)
    third = make_state(cache_policy="none", steps=4)
    batch, steps = build(first, second, third)
    num = [len(step.candidates) for step in steps]
    assert num == [4, 3, 4]
    rows = batch.plan.last_rows[batch.logits_rows]
    positions = batch.positions[rows].tolist()
    asked = [step.candidates.tolist() for step in steps]
    assert positions == asked[0] + asked[1] + asked[2] + asked[0] + asked[1]
    assert batch.guided.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.guidance.tolist() == [2.0] * 4 + [0.5] * 3
    assert batch.plan.cached is not None
    assert batch.plan.cached.num_tokens == 8  # both canvases of the second
    own, unconditional = (sequence.page_ids.tolist() for sequence in second.sequences)
    assert not set(own) & set(unconditional)


def test_a_step_without_candidates_still_has_a_row() -> None:
    """A refresh that commits nothing: the layers behind the attention want a row."""
    state = make_state("dream", response=32, block_length=32, cache_policy="sparse")
    advance(state)
    step = state.next_step()
    assert (step.kind, step.count) == (StepKind.REFRESH, 0)  # B6: 1, 0, 1, ...
    batch, _ = build(state)
    assert batch.plan.last_rows.tolist() == [0]
    assert batch.plan.full is not None
    assert batch.plan.full.last_plan == ([1], [37])
    assert batch.logits_rows.numel() == 0
    # Beside others there is no need for it.
    batch, _ = build(state, make_state(cache_policy="none", steps=4))
    assert batch.plan.full is not None
    assert batch.plan.full.last_plan == ([0, 4], [37, 13])
    assert len(batch.plan.last_rows) == 4


@st.composite
def running(draw: st.DrawFn, kind: str) -> list[RequestState]:
    """Requests of all kinds, each somewhere in its life."""
    states, first_page = [], 1
    for _ in range(draw(st.integers(1, 5))):
        state = make_state(
            kind,
            prompt=draw(st.integers(1, 12)),
            response=draw(st.integers(1, 12)),
            first_page=first_page,
            block_length=draw(st.integers(1, 6)),
            cache_policy=draw(st.sampled_from([*POLICIES])),
            keep_ratio=draw(st.sampled_from([0.1, 0.5, 1.0])),
            delay_steps=draw(st.integers(0, 2)),
            granularity=draw(st.sampled_from(GRANULARITIES)),
            steps=draw(st.none() | st.integers(1, 12)),
            remasking=draw(st.sampled_from([*RULES])),
            cfg_scale=draw(st.sampled_from([0.0, 1.0])) if kind == "llada" else 0.0,
        )
        first_page += sum(len(sequence.page_ids) for sequence in state.sequences)
        for _ in range(draw(st.integers(0, 8))):
            before = state.block_index, state.step
            advance(state)
            if state.finished:
                break
            assert (state.block_index, state.step) > before
        if not state.finished:
            states.append(state)
    return states


@given(st.sampled_from(["llada", "dream"]).flatmap(lambda k: st.tuples(st.just(k), running(k))))
def test_any_batch_is_consistent(drawn: tuple[str, list[RequestState]]) -> None:
    kind, states = drawn
    if not states:
        return
    batch, steps = build(*states)
    plan = batch.plan
    cached = [
        (state, sequence, step)
        for state, step in zip(states, steps, strict=True)
        if step.kind is StepKind.CACHED
        for sequence in state.sequences
    ]
    # Every token is its canvas' at its position: cached sequences first, then whole ones.
    whole = [
        (state, sequence, step)
        for state, step in zip(states, steps, strict=True)
        if step.kind is not StepKind.CACHED
        for sequence in state.sequences
    ]
    positions = np.concatenate([np.arange(*step.queries) for _, _, step in cached + whole])
    tokens = np.concatenate([q.token_ids[slice(*step.queries)] for _, q, step in cached + whole])
    assert batch.positions.tolist() == positions.tolist()
    assert batch.input_ids.tolist() == tokens.tolist()
    # Fresh keys and kept entries have different slots, all of them the sequence's own.
    if cached:
        assert plan.cached is not None
        fresh = plan.cached.fresh_slots.tolist()
        assert len(set(fresh)) == len(fresh) == plan.cached.num_tokens
        offset = 0
        for _, sequence, step in cached:
            num = step.queries[1] - step.queries[0]
            assert fresh[offset : offset + num] == sequence.slots[:num].tolist()
            assert num + sequence.num_kept.max() <= len(sequence.slots)
            offset += num
    else:
        assert plan.cached is None
    refreshed = [entry for entry in whole if entry[2].kind is StepKind.REFRESH]
    assert len(plan.fills) == len(refreshed)
    for fill, (state, sequence, _step) in zip(plan.fills, refreshed, strict=True):
        assert set(fill.slots.tolist()) <= set(sequence.slots.tolist())
        assert batch.positions[fill.first_token] == 0
        assert batch.positions[fill.first_token + fill.length - 1] == state.canvas.length - 1
        assert fill.num_kept is sequence.num_kept
    # Logits: the candidates of the requests in order, shifted models one row before.
    rows = plan.last_rows[batch.logits_rows]
    asked = [step.candidates for step in steps]
    asked += [s.candidates for r, s in zip(states, steps, strict=True) if r.settings.cfg_scale]
    joined = np.concatenate(asked)
    if kind == "dream":
        starts = np.concatenate([np.full(len(step.candidates), step.queries[0]) for step in steps])
        joined = np.maximum(joined - 1, starts)
    assert batch.positions[rows].tolist() == joined.tolist()
    assert (torch.diff(plan.last_rows) > 0).all()  # ascending, none twice
    assert plan.num_last_cached == int(
        (plan.last_rows < sum(step.queries[1] - step.queries[0] for _, _, step in cached)).sum()
    )


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("policy", [*POLICIES])
def test_a_request_walks_through_all_its_blocks(kind: str, policy: str) -> None:
    """Every position is committed once, in the order of the blocks, and none is left."""
    state = make_state(kind, response=10, cache_policy=policy, remasking="entropy")
    seen: list[int] = []
    while not state.finished:
        step = state.next_step()
        assert all(step.block[0] <= p < step.block[1] for p in step.candidates)
        seen += step.candidates[: step.count].tolist()
        advance(state)
    assert seen == list(range(5, 15))
    tokens, logprobs = state.take_final()
    assert (tokens, logprobs) == ([p + 100 for p in range(5, 15)], [])
    assert state.take_final() == ([], [])
