# SPDX-License-Identifier: Apache-2.0
"""One step's batch: the rows that run, their positions and slots, and the rows with logits."""

from __future__ import annotations

import itertools
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
from vllm_sparse_dllm.attention.plan import Fill
from vllm_sparse_dllm.cache.policies import POLICIES, StepKind, visible_end
from vllm_sparse_dllm.cache.selection import Selection
from vllm_sparse_dllm.denoise.rules import RULES
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.batch import StepBatch, build_batch
from vllm_sparse_dllm.engine.requests import NextStep, RequestState, Sequence
from vllm_sparse_dllm.settings import GRANULARITIES, DecodingSettings
from vllm_sparse_dllm.transfer import HostArrays

PAGE, LAYERS, MASK = 4, 3, 3
FURTHER_PAGES = itertools.count(10_000)


@dataclass
class Recorder(AttentionBackend):
    """A backend whose plans are the arrays that they are made from."""

    calls: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(AttentionShape(2, 2, 8), PAGE, torch.float32, torch.device("cpu"))

    def plan_paged(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> Any:
        return query_lengths.tolist(), key_lengths.tolist(), page_table.tolist()

    def plan_full(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> Any:
        return query_lengths.tolist(), key_lengths.tolist()

    def bind_pages(self, layers: list[torch.Tensor]) -> None: ...
    def clear(self, page_ids: np.ndarray) -> None: ...
    def write(self, *args: Any) -> None: ...
    def read_keys(self, *args: Any) -> Any: ...
    def read_values(self, *args: Any) -> Any: ...
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
    pages = POLICIES[decoding.cache_policy].peak_pages(canvas, decoding, PAGE)
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
    for state, step in zip(states, steps, strict=True):
        if step.kind is StepKind.REFRESH:  # as the scheduler does
            held = sum(len(sequence.page_ids) for sequence in state.sequences)
            peak = state.policy.peak_pages(state.canvas, state.settings, PAGE)
            state.add_pages([next(FURTHER_PAGES) for _ in range(peak - held)])
    return build_batch(states, steps, Recorder(), HostArrays(torch.device("cpu"))), steps


def advance(state: RequestState, num: int = 1) -> None:
    """Take ``num`` steps, each of which commits its first ``count`` candidates."""
    for _ in range(num):
        _, (step,) = run(state)
        chosen = step.candidates[: step.count]
        state.commit(chosen, chosen + 100, None)


def run(*states: RequestState) -> tuple[StepBatch, list[NextStep]]:
    """Build a batch and update the caches as attention layers do, but keep random entries."""
    batch, steps = build(*states)
    for number, task in enumerate([*batch.plan.fills, *batch.plan.evictions]):
        for layer in range(LAYERS):
            if isinstance(task, Fill):
                there = np.concatenate([np.arange(*span) for span in task.candidates])
            else:
                there = np.arange(len(task.slots))
            kept = choose(there, task.selection, number + layer)
            task.num_kept[layer] = len(kept)
            if task.positions is not None:
                own = task.positions[layer]
                own[: len(kept)] = kept if isinstance(task, Fill) else own[kept]
                own[len(kept) :] = -1
    return batch, steps


def choose(entries: np.ndarray, selection: Selection | None, seed: int) -> np.ndarray:
    """Return random ones of the entries, as many as the selection keeps; all without one."""
    if selection is None:
        return entries
    length = selection.run_length
    runs = [entries[first : first + length] for first in range(0, len(entries), length)]
    order = np.random.default_rng(seed).permutation(len(runs))
    kept = [runs[i] for i in order[: -(-selection.keep // length)]]
    return np.concatenate([entries[:0], *kept])


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
    assert batch.logits.rows.tolist() == [0, 1, 2, 3]
    assert batch.logits.guided.numel() == batch.logits.guidance.numel() == 0


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
    # In a cached step these rows are of the same forward; the first position is committed.
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
    # Without a prompt, position 0 has no row before it and uses its own.
    batch, _ = build(make_state("dream", prompt=0, cache_policy="sparse"))
    assert batch.plan.last_rows.tolist() == [0]


def test_a_refresh_fills_the_slots_behind_those_of_the_fresh_keys() -> None:
    state = make_state(cache_policy="dual", first_page=7)
    batch, _ = build(state)
    (fill,) = batch.plan.fills
    assert fill.canvas.block == (5, 9)
    assert fill.candidates == ((0, 5), (9, 13))
    # Pages 7, 8, ...: slots 28, 29, ...; four for the block, then the kept.
    assert fill.slots.tolist() == list(range(28 + 4, 28 + 4 + 9))
    assert (fill.selection, fill.first_token, fill.length) == (None, 0, 13)
    advance(state)
    assert state.sequences[0].num_kept.tolist() == [9] * LAYERS
    batch, _ = build(state)
    assert batch.plan.full is None
    assert batch.plan.cached is not None
    assert batch.plan.cached.fresh_slots[0].tolist() == [28, 29, 30, 31]
    assert batch.plan.cached.plans == (([4], [13], [[7, 8, 9, 10]]),)
    assert batch.plan.cached.last_plan == ([3], [13], [[7, 8, 9, 10]])


def test_sparse_keeps_by_saliency() -> None:
    state = make_state(cache_policy="sparse", keep_ratio=0.5, kernel_size=5)
    batch, _ = build(state)
    assert batch.plan.fills == ()  # steps within the delay keep nothing
    advance(state)
    (fill,) = build(state)[0].plan.fills
    assert fill.selection == Selection(keep=4, kernel_size=5, run_length=1)
    assert fill.slots.tolist() == list(range(4 + 4, 4 + 4 + 4))
    paged = make_state(cache_policy="sparse", granularity="page", delay_steps=0, keep_ratio=0.6)
    (fill,) = build(paged)[0].plan.fills
    assert fill.selection == Selection(keep=5, kernel_size=3, run_length=PAGE)
    assert len(fill.slots) == 8  # two runs of 4, to keep 5


def test_layers_that_keep_different_numbers_have_plans_of_their_own() -> None:
    """With granularity ``page``, only some layers may have kept the short last run."""
    state = make_state(cache_policy="sparse", granularity="page", delay_steps=0)
    advance(state)
    state.sequences[0].num_kept[:] = [8, 5, 8]
    cached = build(state)[0].plan.cached
    assert cached is not None
    assert [cached.plan_of(layer)[1] for layer in range(LAYERS)] == [[12], [9], [12]]
    assert cached.plan_of(0) is cached.plan_of(2)  # one for all layers with the same numbers
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
    assert batch.logits.rows.tolist() == [3, 4, 5, 6, 0, 1, 2]
    rows = batch.plan.last_rows[batch.logits.rows]
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
    assert batch.plan.cached.fresh_slots[0].tolist() == list(range(8, 16))
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
    assert batch.logits.rows.tolist() == list(range(12))  # unconditional rows are last
    assert batch.logits.guided.tolist() == [4, 5, 6, 7]
    assert batch.logits.guidance.tolist() == [1.5] * 4
    # A commit is written to the response of both canvases.
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
    rows = batch.plan.last_rows[batch.logits.rows]
    positions = batch.positions[rows].tolist()
    asked = [step.candidates.tolist() for step in steps]
    assert positions == asked[0] + asked[1] + asked[2] + asked[0] + asked[1]
    assert batch.logits.guided.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert batch.logits.guidance.tolist() == [2.0] * 4 + [0.5] * 3
    assert batch.plan.cached is not None
    assert batch.plan.cached.num_tokens == 8  # both canvases of the second
    own, unconditional = (sequence.page_ids.tolist() for sequence in second.sequences)
    assert not set(own) & set(unconditional)


def test_a_step_without_candidates_still_has_a_row() -> None:
    """A refresh that commits nothing: the layers after the attention need at least one row."""
    state = make_state("dream", response=32, block_length=32, cache_policy="sparse")
    advance(state)
    step = state.next_step()
    assert (step.kind, step.count) == (StepKind.REFRESH, 0)  # B6: 1, 0, 1, ...
    batch, _ = build(state)
    assert batch.plan.last_rows.tolist() == [0]
    assert batch.plan.full is not None
    assert batch.plan.full.last_plan == ([1], [37])
    assert batch.logits.rows.numel() == 0
    # Beside a request with candidates, no such row is needed.
    batch, _ = build(state, make_state(cache_policy="none", steps=4))
    assert batch.plan.full is not None
    assert batch.plan.full.last_plan == ([0, 4], [37, 13])
    assert len(batch.plan.last_rows) == 4


@st.composite
def running(draw: st.DrawFn, kind: str) -> list[RequestState]:
    """Requests of all kinds, each after a random number of steps."""
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
            suffix_window=draw(st.sampled_from([None, None, 0, 3, 30])),
            refresh_interval=draw(st.sampled_from([1, 2, 3, 50])),
            eviction_delay=draw(st.sampled_from([0, 0, 1, 2, 9])),
        )
        first_page += sum(len(sequence.page_ids) for sequence in state.sequences)
        for _ in range(draw(st.integers(0, 12))):
            before = state.block_index, state.step
            advance(state)
            if state.finished:
                break
            assert (state.block_index, state.step) > before
        if not state.finished:
            states.append(state)
    return states


def split(slots: list[int], steps: list[NextStep]) -> list[list[int]]:
    """Cut a row of slots into those of each sequence."""
    ends = itertools.accumulate(step.queries[1] - step.queries[0] for step in steps)
    return [part.tolist() for part in np.split(np.array(slots), [*ends])[:-1]]


def check_slots(
    state: RequestState, sequence: Sequence, step: NextStep, fresh: list[int], layer: int
) -> None:
    """Check slots: fresh keys of the queries, then kept entries of others, no gap, none twice."""
    queries = state.policy.queries(state.canvas, step.block, state.settings)
    num_fresh = queries[1] - queries[0]
    num_keys = num_fresh + int(sequence.num_kept[layer])
    assert num_keys <= len(sequence.slots)
    assert fresh[-num_fresh:] == sequence.slots[:num_fresh].tolist()
    visible = visible_end(state.canvas, step.block, state.settings)
    if sequence.positions is None:
        assert step.kind is not StepKind.APPEND
        assert len(fresh) == num_fresh
        return
    positions = sequence.positions[layer]
    assert (positions[:num_fresh] == -1).all() and (positions[num_keys:] == -1).all()
    kept = positions[num_fresh:num_keys].tolist()
    assert len(set(kept)) == len(kept)
    assert all(0 <= p < visible and not queries[0] <= p < queries[1] for p in kept)
    if step.kind is StepKind.APPEND:
        # This pass writes the previous block's keys to the slots that are recorded for them.
        places = [sequence.slots.tolist().index(slot) for slot in fresh[:-num_fresh]]
        assert positions[places].tolist() == list(range(step.queries[0], queries[0]))


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
        if not step.kind.runs_all
        for sequence in state.sequences
    ]
    # Every token is that of its canvas at its position; cached sequences come before whole ones.
    whole = [
        (state, sequence, step)
        for state, step in zip(states, steps, strict=True)
        if step.kind.runs_all
        for sequence in state.sequences
    ]
    positions = np.concatenate([np.arange(*step.queries) for _, _, step in cached + whole])
    tokens = np.concatenate([q.token_ids[slice(*step.queries)] for _, q, step in cached + whole])
    assert batch.positions.tolist() == positions.tolist()
    assert batch.input_ids.tolist() == tokens.tolist()
    # Fresh keys and kept entries have different slots, all of their own sequence.
    if cached:
        assert plan.cached is not None
        for layer in range(LAYERS):
            fresh = plan.cached.fresh_slots_of(layer).tolist()
            assert len(set(fresh)) == len(fresh) == plan.cached.num_tokens
            for own, (state, sequence, step) in zip(
                split(fresh, [step for _, _, step in cached]), cached, strict=True
            ):
                check_slots(state, sequence, step, own, layer)
        num_keys = [int(q.num_fresh + q.num_kept[-1]) for _, q, _ in cached]
        assert plan.cached.last_plan[1] == num_keys
    else:
        assert plan.cached is None
    refreshed = [entry for entry in whole if entry[2].kind is StepKind.REFRESH]
    assert len(plan.fills) == len(refreshed)
    for fill, (state, sequence, step) in zip(plan.fills, refreshed, strict=True):
        assert set(fill.slots.tolist()) <= set(sequence.slots.tolist())
        assert batch.positions[fill.first_token] == 0
        last = visible_end(state.canvas, step.block, state.settings) - 1
        assert batch.positions[fill.first_token + fill.length - 1] == last
        assert fill.num_kept is sequence.num_kept
        late = state.policy.selects and state.settings.eviction_delay > 0
        assert (fill.selection is not None) == (state.policy.selects and not late)
    evicted = [entry for entry in cached if entry[2].kind is StepKind.EVICT]
    assert len(plan.evictions) == len(evicted)
    for eviction, (state, sequence, step) in zip(plan.evictions, evicted, strict=True):
        rows = slice(eviction.first_token, eviction.first_token + step.block[1] - step.block[0])
        assert batch.positions[rows].tolist() == list(range(*step.block))
        others = sum(
            hi - lo for lo, hi in state.policy.candidates(state.canvas, step.block, state.settings)
        )
        spans = state.policy.candidates(state.canvas, step.block, state.settings)
        assert eviction.candidates == spans
        first = sequence.num_fresh
        assert eviction.slots.tolist() == sequence.slots[first : first + others].tolist()
        assert eviction.selection.keep == int(others * state.settings.keep_ratio)
    # Logits: the requests' candidates in order; if the model shifts logits, the rows before them.
    rows = plan.last_rows[batch.logits.rows]
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


def test_a_step_that_appends_beside_a_block_step() -> None:
    """Each layer has a row of slots; keys of the previous block take the slots that are free."""
    plain = make_state(prompt=2, cache_policy="dual", first_page=30)
    advance(plain)
    state = make_state(
        prompt=3, response=10, cache_policy="dual", refresh_interval=3, threshold=0.5, first_page=1
    )
    advance(state)
    step = state.next_step()
    assert (step.kind, step.block, step.queries) == (StepKind.APPEND, (7, 11), (3, 11))
    cached = build(plain, state)[0].plan.cached
    assert cached is not None
    # Positions 0 to 2 and 7 to 12 were kept, in slots 8 to 16; 3 to 6 replace 7 to 10, now stale.
    for layer in range(LAYERS):
        assert cached.fresh_slots_of(layer).tolist() == [
            *(120, 121, 122, 123),
            *(11, 12, 13, 14),
            *(4, 5, 6, 7),
        ]
    assert cached.plans == (([4, 8], [10, 13], [[30, 31, 32, 0], [1, 2, 3, 4]]),)
    state.commit(np.arange(7, 11), np.arange(4), None)
    # The last block is shorter: free are two slots after its fresh keys and its two stale slots.
    cached = build(state)[0].plan.cached
    assert cached is not None
    assert cached.fresh_slots_of(0).tolist() == [6, 7, 15, 16, 4, 5]
    assert cached.plans == (([6], [13], [[1, 2, 3, 4]]),)


def test_late_eviction_holds_everything_for_a_while() -> None:
    state = make_state(
        prompt=9, cache_policy="sparse", delay_steps=0, eviction_delay=2, keep_ratio=0.5
    )
    sequence = state.sequences[0]
    assert len(sequence.page_ids) == 5 and state.num_pages == 3
    batch, _ = build(state)
    assert batch.plan.fills[0].selection is None
    advance(state)
    assert state.progress.whole
    batch, (step,) = build(state)
    assert step.kind is StepKind.CACHED and batch.plan.evictions == ()
    advance(state)
    batch, (step,) = build(state)
    (eviction,) = batch.plan.evictions
    assert step.kind is StepKind.EVICT
    # The step itself attends to everything.
    assert batch.plan.cached is not None
    assert batch.plan.cached.plans == (([4], [17], [sequence.page_ids.tolist()]),)
    assert eviction.first_token == 0
    assert eviction.canvas.block == step.block
    assert eviction.selection == Selection(keep=6, kernel_size=3, run_length=1)
    assert eviction.slots.tolist() == list(range(8, 21))
    advance(state)
    assert not state.progress.whole
    assert sequence.page_ids.tolist() == [1, 2, 3]
    assert sequence.num_kept.tolist() == [6] * LAYERS


def test_a_block_that_ends_before_its_eviction_gives_the_pages_back() -> None:
    for interval in (1, 2):
        state = make_state(
            prompt=9,
            cache_policy="sparse",
            delay_steps=0,
            eviction_delay=9,
            refresh_interval=interval,
            threshold=0.5,
        )
        advance(state)  # all of the first block at once
        assert state.block_index == 1
        goes_on = interval == 2
        assert state.progress.whole == goes_on
        assert len(state.sequences[0].page_ids) == (5 if goes_on else state.num_pages)
        kind = StepKind.APPEND if goes_on else StepKind.REFRESH
        assert state.next_step().kind is kind


@given(st.data())
def test_make_room(data: st.DataObject) -> None:
    """Whatever was kept: no gap remains, and the finished block's positions are added, once."""
    draw = data.draw
    num_before = draw(st.integers(0, 10))
    size, window = draw(st.integers(1, 6)), draw(st.integers(0, 12))
    prefix = draw(st.booleans())
    length = num_before + draw(st.integers(size + 1, 40))
    sizes = [size]
    while num_before + sum(sizes) < length:
        sizes.append(min(size, length - num_before - sum(sizes)))

    def queries_of(start: int, end: int) -> tuple[int, int]:
        return start, min(length, end + window) if prefix else end

    start, end = num_before, num_before + size
    first = queries_of(start, end)
    others = [*range(start)]
    if not prefix:
        others += range(end, min(length, end + window))
    pages = np.arange(-(-length // PAGE))
    sequence = Sequence(np.zeros(length, dtype=np.int64), pages, PAGE, LAYERS, True)
    assert sequence.positions is not None
    sequence.num_fresh = first[1] - first[0]
    most = draw(st.integers(0, len(others)))
    expected = []
    for own in sequence.positions:
        kept = draw(st.permutations(others))[: draw(st.integers(0, most))]
        own[sequence.num_fresh : sequence.num_fresh + len(kept)] = kept
        expected.append(set(kept))
    for following in sizes[1:]:
        finished, queries = (start, end), queries_of(end, end + following)
        targets = sequence.make_room(finished, queries)
        assert targets.shape == (LAYERS, size)
        assert sequence.num_fresh == queries[1] - queries[0]
        for layer, own in enumerate(sequence.positions):
            expected[layer] -= set(range(*queries))
            expected[layer] |= set(range(*finished))
            num = int(sequence.num_kept[layer])
            kept = own[sequence.num_fresh : sequence.num_fresh + num].tolist()
            assert num == len(expected[layer]) and set(kept) == expected[layer]
            assert (own[: sequence.num_fresh] == -1).all()
            assert (own[sequence.num_fresh + num :] == -1).all()
            assert own[targets[layer]].tolist() == list(range(*finished))
        start, end = end, end + following


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("policy", [*POLICIES])
def test_a_request_walks_through_all_its_blocks(kind: str, policy: str) -> None:
    """Every position is committed once, in the order of the blocks."""
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
