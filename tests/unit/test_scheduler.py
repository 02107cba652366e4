# SPDX-License-Identifier: Apache-2.0
"""The scheduler with a simulated runner instead of a model, and what must hold in every step."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

import vllm_sparse_dllm
from tests.unit.helpers import traits_of
from vllm_sparse_dllm.cache.block_manager import SparseCacheSpec
from vllm_sparse_dllm.cache.policies import POLICIES, StepKind
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.figures import FIGURES
from vllm_sparse_dllm.engine.output import DiffusionRunnerOutput, Failure
from vllm_sparse_dllm.engine.requests import RequestState
from vllm_sparse_dllm.engine.scheduler import DiffusionScheduler
from vllm_sparse_dllm.plugin import register
from vllm_sparse_dllm.settings import DecodingSettings, request_settings

TINY_LLADA = str(Path(vllm_sparse_dllm.__file__).parent / "assets" / "tiny-llada")
PAGE = 32
FIRST_TOKEN = 1000  # the response's token at offset i is FIRST_TOKEN + i
MASK = 5


@cache
def base_config() -> VllmConfig:
    """Return an engine's configuration, built once; `make_scheduler` sets its numbers."""
    register()
    return EngineArgs(
        model=TINY_LLADA, dtype="float32", max_model_len=512, max_num_batched_tokens=512
    ).create_engine_config()


def make_scheduler(
    num_pages: int = 64,
    budget: int = 512,
    max_num_seqs: int = 8,
    policy: str = "fcfs",
    family: str = "llada",
) -> DiffusionScheduler:
    """Build the scheduler as `EngineCore` does, for a model of the family."""
    config = base_config()
    config.scheduler_config.max_num_batched_tokens = budget
    config.scheduler_config.max_num_seqs = max_num_seqs
    config.scheduler_config.policy = policy  # type: ignore[assignment]
    config.cache_config.num_gpu_blocks = num_pages + 1
    spec = SparseCacheSpec(
        block_size=PAGE,
        num_kv_heads=4,
        head_size=64,
        dtype=torch.float32,
        dcp_sharded=False,
        settings=DecodingSettings(),
    )
    scheduler_class = config.scheduler_config.get_scheduler_cls()
    scheduler = scheduler_class(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=num_pages + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layers.0.self_attn"], spec)],
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=PAGE,
        hash_block_size=PAGE,
        log_stats=True,
    )
    assert isinstance(scheduler, DiffusionScheduler)
    scheduler.traits = traits_of(family, MASK)
    return scheduler


@dataclass(frozen=True)
class Spec:
    """A request of a test."""

    prompt: int = 20
    response: int = 16
    priority: int = 0
    fails_at_run: int | None = None
    stops_after: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def decoding(self) -> DecodingSettings:
        return DecodingSettings(**self.settings)

    @property
    def canvas(self) -> Canvas:
        return Canvas(self.prompt, self.response, self.decoding.block_length)

    @property
    def num_pages(self) -> int:
        decoding = self.decoding
        return POLICIES[decoding.cache_policy].num_pages(self.canvas, decoding, PAGE)

    @property
    def peak_pages(self) -> int:
        decoding = self.decoding
        return POLICIES[decoding.cache_policy].peak_pages(self.canvas, decoding, PAGE)

    @property
    def peak_runs(self) -> int:
        """Most steps that it runs from a refresh until its cache is evicted, both included."""
        decoding, canvas = self.decoding, self.canvas
        # Every step commits something or changes the cache.
        if decoding.refresh_interval > 1:
            return canvas.response_length + 3 * canvas.num_blocks
        return min(decoding.eviction_delay, canvas.longest_block) + 2

    @property
    def most_runs(self) -> int:
        """Most steps that it runs: one per token, and those of each block that commit none."""
        decoding = self.decoding
        return self.response + self.canvas.num_blocks * (decoding.delay_steps + 2)

    @property
    def largest_step(self) -> int:
        return self.canvas.length * self.decoding.num_sequences

    @property
    def expected(self) -> list[int]:
        length = self.response
        if self.stops_after is not None:
            length = min(length, self.stops_after + 1)
        return [FIRST_TOKEN + i for i in range(length)]


class FakeRunner:
    """Commits invented tokens to positions as the real runner does; request states are real."""

    def __init__(self, scheduler: DiffusionScheduler) -> None:
        self.scheduler = scheduler
        self.states: dict[str, RequestState] = {}
        self.runs: Counter[str] = Counter()
        self.fails_at: dict[str, int] = {}
        self.kinds: Counter[StepKind] = Counter()

    def run(self, output: SchedulerOutput) -> DiffusionRunnerOutput:
        for request_id in output.finished_req_ids | (output.preempted_req_ids or set()):
            self.states.pop(request_id, None)
        for new in output.scheduled_new_reqs:
            assert new.req_id not in self.states
            self.states[new.req_id] = self._new_state(new)
        running = output.scheduled_cached_reqs
        for request_id, pages in zip(running.req_ids, running.new_block_ids, strict=True):
            if pages is not None:
                self.states[request_id].add_pages(pages[0])
        known = {new.req_id for new in output.scheduled_new_reqs}
        assert known | set(output.scheduled_cached_reqs.req_ids) == set(output.num_scheduled_tokens)
        request_ids = list(output.num_scheduled_tokens)
        result = DiffusionRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(request_ids)},
            sampled_token_ids=[[] for _ in request_ids],
        )
        self.kinds = Counter()
        for index, request_id in enumerate(request_ids):
            state = self.states[request_id]
            if state.finished:  # a canvas without masks
                result.sampled_token_ids[index], _ = state.take_final()
                result.progress[request_id] = state.progress
                continue
            step = state.next_step()
            # The pages that the scheduler has allocated are those that the runner holds.
            blocks = self.scheduler.block_manager.req_to_blocks.get(request_id, [])
            own = [page for sequence in state.sequences for page in sequence.page_ids.tolist()]
            assert sorted(page.block_id for page in blocks) == sorted(own)
            # Scheduler and runner agree on what runs.
            tokens = (step.queries[1] - step.queries[0]) * len(state.sequences)
            assert output.num_scheduled_tokens[request_id] == tokens
            self.kinds[step.kind] += 1
            result.counts.full_passes += step.kind.runs_all
            result.counts.block_steps += not step.kind.runs_all
            self.runs[request_id] += 1
            if self.runs[request_id] == self.fails_at.get(request_id):
                result.failed[request_id] = Failure("logits", "the model's logits are not finite")
                state.commit(step.candidates[:0], step.candidates[:0], None)
            else:
                count = step.count
                if state.settings.threshold is not None:  # a reproducible number above 0
                    name = f"{request_id}/{state.block_index}/{state.step}"
                    count = zlib.crc32(name.encode()) % len(step.candidates) + 1
                chosen = step.candidates[::-1][:count]  # from the right: commits out of order
                chosen = np.sort(chosen)
                state.commit(chosen, chosen - state.canvas.prompt_length + FIRST_TOKEN, None)
            result.sampled_token_ids[index], _ = state.take_final()
            result.progress[request_id] = state.progress
        return result

    def _new_state(self, new: Any) -> RequestState:
        decoding = request_settings(
            self.scheduler.engine_settings, self.scheduler.traits, new.sampling_params.extra_args
        )
        return RequestState(
            new.prompt_token_ids,
            decoding,
            new.sampling_params,
            self.scheduler.traits,
            new.block_ids[0],
            PAGE,
            1,
            torch.Generator(),
            delivered=(new.prefill_token_ids or [])[len(new.prompt_token_ids) :],
        )


class World:
    """A scheduler with its runner and clients; `step` checks what must always hold."""

    def __init__(self, **options: Any) -> None:
        self.scheduler = make_scheduler(**options)
        self.runner = FakeRunner(self.scheduler)
        self.specs: dict[str, Spec] = {}
        self.delivered: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.admitted: list[str] = []
        self.passed_over: Counter[str] = Counter()
        self.bounds: dict[str, int] = {}
        self.head_waits: tuple[str | None, int, int] = (None, 0, 0)
        self.longest_wait = 0
        self.longest_wait_for_pages = 0
        self.ages: Counter[str] = Counter()

    def add(self, spec: Spec, name: str | None = None) -> str:
        request_id = name or f"r{len(self.specs)}"
        extra = {f"diffusion_{key}": value for key, value in spec.settings.items()}
        stop = None if spec.stops_after is None else [FIRST_TOKEN + spec.stops_after]
        sampling = SamplingParams(
            max_tokens=spec.response,
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=stop,
            extra_args=extra or None,
        )
        request = Request(
            request_id=request_id,
            prompt_token_ids=list(range(10, 10 + spec.prompt)),
            sampling_params=sampling,
            pooling_params=None,
            arrival_time=float(len(self.specs)),
            priority=spec.priority,
        )
        self.specs[request_id] = spec
        self.delivered[request_id] = []
        if spec.fails_at_run is not None:
            self.runner.fails_at[request_id] = spec.fails_at_run
        self.scheduler.add_request(request)
        return request_id

    def abort(self, request_id: str) -> None:
        for request in self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED):
            self.finished[request.request_id] = "abort"
        self.passed_over.pop(request_id, None)

    def reset(self) -> None:
        assert self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.passed_over.clear()
        self.ages.clear()

    @property
    def running(self) -> list[str]:
        return [request.request_id for request in self.scheduler.running]

    @property
    def waiting(self) -> list[str]:
        return [request.request_id for request in self.scheduler.waiting]

    @property
    def num_held(self) -> int:
        manager = self.scheduler.block_manager
        return manager.num_pages - manager.block_pool.get_num_free_blocks()

    def step(self) -> SchedulerOutput:
        scheduler = self.scheduler
        before, head = self.running, next(iter(self.waiting), None)
        queue = self._admission_order()
        # The requests that can be at their peak before the head is admitted.
        company = [self.specs[request_id] for request_id in [*before, *([head] if head else [])]]
        peaks = sum(spec.peak_pages for spec in company)
        # The least that the pool must have room for: one request at its peak at a time.
        extra = max((spec.peak_pages - spec.num_pages for spec in company), default=0)
        least = sum(spec.num_pages for spec in company) + extra
        num_pages = scheduler.block_manager.num_pages
        seats = len(before) < scheduler.max_num_running_reqs

        output = scheduler.schedule()
        scheduled = output.num_scheduled_tokens
        new = [request.req_id for request in output.scheduled_new_reqs]
        assert sum(scheduled.values()) == output.total_num_scheduled_tokens
        assert output.total_num_scheduled_tokens <= scheduler.max_num_scheduled_tokens
        assert len(scheduler.running) <= scheduler.max_num_running_reqs
        assert set(self.running) == {*before, *new}
        assert new == queue[: len(new)]
        self.admitted += new
        if scheduler.pause_state is PauseState.PAUSED_ALL:
            assert not scheduled
        else:
            assert bool(scheduled) == bool(self.running)  # no step is wasted
            self._count_waits(before, scheduled)
            self._count_ages()
            if scheduler.pause_state is PauseState.UNPAUSED:
                bound = len(before) + 1 if peaks <= num_pages else self._turns_at_the_peak
                self._count_head_waits(head, head in new, least <= num_pages and seats, bound)
        if scheduler.pause_state is not PauseState.UNPAUSED:
            assert not new
        self._check_pages(scheduled, new)

        result = self.runner.run(output)
        outputs = scheduler.update_from_output(output, result)
        for request_id in result.failed:
            self.finished[request_id] = "error"
        for client in outputs.values():
            for own in client.outputs:
                self.delivered[own.request_id] += own.new_token_ids
                if own.finish_reason is not None:
                    self.finished[own.request_id] = str(own.finish_reason)
        self._check_pages()
        return output

    def _admission_order(self) -> list[str]:
        """Return waiting requests in vLLM's order of admission, without relying on the queue."""
        if self.scheduler.policy.value == "fcfs":
            # In order of arrival; preempted requests come before those that were never admitted.
            return sorted(self.waiting, key=lambda r: (r not in self.admitted, int(r[1:])))
        return sorted(self.waiting, key=lambda r: (self.specs[r].priority, int(r[1:])))

    def _count_waits(self, before: list[str], scheduled: dict[str, int]) -> None:
        for request_id in before:
            if request_id in scheduled:
                self.passed_over.pop(request_id, None)
                continue
            self.passed_over[request_id] += 1
            wait = self.passed_over[request_id]
            if self.scheduler.tracked[request_id].missing_pages:
                self.longest_wait_for_pages = max(self.longest_wait_for_pages, wait)
                assert wait <= self._turns_at_the_peak
                continue
            if wait == 1:  # bound: the other running requests, and the waiting head
                self.bounds[request_id] = len(before) - 1 + 1
            self.longest_wait = max(self.longest_wait, wait)
            assert wait <= self.bounds[request_id]

    def _count_ages(self) -> None:
        """Check that a request takes at most its own steps times the number of seats."""
        if any(spec.peak_pages > spec.num_pages for spec in self.specs.values()):
            return  # requests that wait for temporary pages may take longer
        for request_id in self.running:
            self.ages[request_id] += 1
            bound = self.specs[request_id].most_runs * self.scheduler.max_num_running_reqs
            assert self.ages[request_id] <= bound

    @property
    def _turns_at_the_peak(self) -> int:
        """The longest wait, in steps, for pages that others hold temporarily.

        In one turn of all requests each peak comes one step closer to its end; every request
        ahead may have its peak first.
        """
        seats = self.scheduler.max_num_running_reqs + 1
        longest = max(spec.peak_runs for spec in self.specs.values())
        return seats * (1 + longest * (seats + 1))

    def _count_head_waits(
        self, head: str | None, admitted: bool, admissible: bool, longest: int
    ) -> None:
        """Check that the first waiting request, while admissible, is admitted within its bound.

        If there is room for all peaks, ``longest`` is one step for it to be passed over, and one
        for each running request.
        """
        last, waits, bound = self.head_waits
        if head is None or admitted or not admissible:
            self.head_waits = (None, 0, 0)
            return
        if head != last:
            waits, bound = 0, longest
        self.head_waits = (head, waits + 1, bound)
        assert waits + 1 <= bound

    def _check_pages(self, scheduled: Container[str] = (), new: Container[str] = ()) -> None:
        scheduler, manager = self.scheduler, self.scheduler.block_manager
        owners: Counter[int] = Counter()
        for request_id, pages in manager.req_to_blocks.items():
            owners.update(page.block_id for page in pages)
            if pages:
                assert request_id in self.running
        assert all(count == 1 for count in owners.values())
        assert manager.block_pool.null_block.block_id not in owners
        for request_id in self.running:
            spec = self.specs[request_id]
            # Who is new stands where the scheduler says; the runner checks it.
            progress = scheduler.tracked[request_id].progress
            if request_id not in new:
                progress = self.runner.states[request_id].progress
            kind = POLICIES[spec.decoding.cache_policy].kind(progress, spec.decoding)
            refreshes = request_id in scheduled and kind is StepKind.REFRESH
            at_peak = progress.whole or refreshes
            expected = spec.peak_pages if at_peak else spec.num_pages
            assert manager.held_pages(request_id) == expected
        assert self.num_held == sum(owners.values())
        usage = self.num_held / manager.num_pages
        assert scheduler.kv_cache_manager.usage == pytest.approx(usage)
        stats = scheduler.make_stats()
        assert stats is not None
        assert stats.kv_cache_usage == pytest.approx(usage)
        assert (stats.num_running_reqs, stats.num_waiting_reqs) == (
            len(self.running),
            len(self.waiting) - len(scheduler.deferred_waiting),
        )
        assert scheduler.tracked.keys() == scheduler.requests.keys()

    def drain(self, limit: int = 5000) -> int:
        """Run until all requests are done; return the number of steps."""
        for number in range(limit):
            if not self.scheduler.has_unfinished_requests():
                self.check_empty()
                return number
            self.step()
        raise AssertionError(f"unfinished: {self.running} {self.waiting}")

    def check_empty(self) -> None:
        """Nothing of any request is left, in the scheduler or in the runner."""
        scheduler = self.scheduler
        self.runner.run(scheduler.schedule())
        assert not scheduler.tracked and not scheduler.requests
        assert not scheduler.running and not scheduler.waiting
        assert not scheduler.finished_req_ids
        assert not self.runner.states
        assert self.num_held == 0
        assert scheduler.kv_cache_manager.usage == 0
        assert not any(scheduler.block_manager.req_to_blocks.values())
        assert self.finished.keys() == self.specs.keys()
        for request_id, spec in self.specs.items():
            got = self.delivered[request_id]
            if self.finished[request_id] in ("abort", "error"):
                assert got == spec.expected[: len(got)]
            else:
                assert got == spec.expected
                assert self.finished[request_id] == (
                    "length" if len(got) == spec.response and spec.stops_after is None else "stop"
                )


# ------------------------------------------------------------------------------- any sequence


@st.composite
def specs(draw: st.DrawFn, guided: bool) -> Spec:
    policy = draw(st.sampled_from([*POLICIES]))
    own: dict[str, Any] = {
        "cache_policy": policy,
        "block_length": draw(st.sampled_from([1, 4, 8, 32])),
    }
    if policy == "sparse":
        own["delay_steps"] = draw(st.integers(0, 2))
        own["keep_ratio"] = draw(st.sampled_from([0.1, 0.5, 1.0]))
        own["granularity"] = draw(st.sampled_from(["token", "page"]))
        own["eviction_delay"] = draw(st.sampled_from([0, 1, 3, 30]))
    own["refresh_interval"] = draw(st.sampled_from([1, 1, 2, 4]))
    own["suffix_window"] = draw(st.sampled_from([None, None, 0, 10]))
    how = draw(st.sampled_from(["one", "steps", "threshold"]))
    response = draw(st.integers(1, 24))
    if draw(st.integers(0, 3)) == 0:
        fixed = draw(st.lists(st.booleans(), min_size=1, max_size=response))
        own["canvas"] = [FIRST_TOKEN + i if is_fixed else MASK for i, is_fixed in enumerate(fixed)]
    if how == "steps":
        own["steps"] = draw(st.integers(1, 40))
    elif how == "threshold":
        own["threshold"] = 0.9
    if guided and draw(st.integers(0, 4)) == 0:
        own["cfg_scale"] = 1.0
    return Spec(
        prompt=draw(st.integers(1, 150)),
        response=response,
        priority=draw(st.integers(0, 2)),
        fails_at_run=draw(st.none() | st.none() | st.integers(1, 10)),
        stops_after=draw(st.none() | st.integers(0, response - 1)),
        settings=own,
    )


@dataclass(frozen=True)
class Story:
    """Requests that arrive over time, and what happens to them."""

    requests: list[tuple[int, Spec]]
    aborts: dict[int, list[int]]
    resets: frozenset[int]
    pauses: dict[int, PauseState]
    max_num_seqs: int
    spare_budget: int
    spare_pages: int
    policy: str
    family: str


@st.composite
def stories(draw: st.DrawFn, calm: bool = False) -> Story:
    family = draw(st.sampled_from(["llada", "dream"]))
    entry = st.tuples(st.integers(0, 25), specs(guided=family == "llada"))
    requests = draw(st.lists(entry, min_size=1, max_size=9))
    some = st.dictionaries(st.integers(0, 40), st.lists(st.integers(0, 8), max_size=2), max_size=4)
    pauses = st.dictionaries(st.integers(0, 40), st.sampled_from(PauseState), max_size=2)
    return Story(
        requests=requests,
        aborts={} if calm else draw(some),
        resets=frozenset() if calm else draw(st.frozensets(st.integers(0, 40), max_size=1)),
        pauses={} if calm else draw(pauses),
        max_num_seqs=draw(st.integers(1, 8)),
        spare_budget=draw(st.sampled_from([0, 0, 10, 100, 2000])),
        spare_pages=draw(st.sampled_from([0, 0, 2, 10, 100])),
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        family=family,
    )


def play(story: Story) -> World:
    """Run a story; budget and pool are enough for each request alone, as admission ensures."""
    world = World(
        num_pages=max([1, *(spec.peak_pages for _, spec in story.requests)]) + story.spare_pages,
        budget=max(spec.largest_step for _, spec in story.requests) + story.spare_budget,
        max_num_seqs=story.max_num_seqs,
        policy=story.policy,
        family=story.family,
    )
    arrivals = sorted(story.requests, key=lambda entry: entry[0])
    last = max([arrivals[-1][0], *story.aborts, *story.resets, *story.pauses])
    for number in range(last + 1):
        while arrivals and arrivals[0][0] <= number:
            world.add(arrivals.pop(0)[1])
        for index in story.aborts.get(number, ()):
            if f"r{index}" in world.specs:
                world.abort(f"r{index}")
        if number in story.resets:
            world.reset()
        if number in story.pauses:
            world.scheduler.set_pause_state(story.pauses[number])
        world.step()
    world.scheduler.set_pause_state(PauseState.UNPAUSED)
    world.drain()
    return world


@settings(max_examples=150)
@given(stories())
def test_any_story_ends_well(story: Story) -> None:
    """Whatever happens, every invariant of `World.step` and `World.check_empty` holds."""
    play(story)


@settings(max_examples=60)
@given(stories(calm=True))
def test_a_story_is_repeatable(story: Story) -> None:
    """No decision depends on time: the same story gives the same schedule."""
    first, second = play(story), play(story)
    assert first.admitted == second.admitted
    assert first.runner.runs == second.runner.runs
    assert first.longest_wait == second.longest_wait


# ------------------------------------------------------------------------------ one at a time


def test_refreshes_and_block_steps_share_a_step() -> None:
    world = World(budget=400)
    for _ in range(4):
        world.add(Spec(prompt=100, response=32, settings={"block_length": 8}))
        world.step()
    seen = set()
    while world.scheduler.has_unfinished_requests():
        world.step()
        seen.add(frozenset(world.runner.kinds))
    assert {StepKind.CACHED, StepKind.FULL} <= set().union(*(s for s in seen if len(s) > 1))
    assert any({StepKind.CACHED, StepKind.REFRESH} <= kinds for kinds in seen)
    world.check_empty()


def test_block_steps_are_not_starved_by_newcomers() -> None:
    """A new request arrives in every step; an old one still runs in nearly every step."""
    world = World(budget=300, max_num_seqs=16, num_pages=100)
    old = world.add(Spec(prompt=60, response=40, settings={"block_length": 40, "steps": 40}))
    world.step()
    steps = 0
    while old not in world.finished:
        world.add(Spec(prompt=200, response=8))
        world.step()
        steps += 1
    assert steps <= 60
    for request_id in [*world.waiting]:
        world.abort(request_id)
    world.drain()


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    """A waiting request that needs the whole budget gets it after one turn of those running."""
    world = World(budget=256, max_num_seqs=8)
    small = Spec(prompt=10, response=30, settings={"block_length": 30})
    for _ in range(6):
        world.add(small)
    world.step()
    large = world.add(Spec(prompt=240, response=16))
    steps = 0
    while large not in world.running:
        world.step()
        steps += 1
    assert steps <= 7 + 1
    world.drain()


def test_admission_is_first_come_first_served() -> None:
    world = World(max_num_seqs=2)
    names = [world.add(Spec(priority=5 - number)) for number in range(6)]
    world.drain()
    assert world.admitted == names


def test_admission_by_priority_and_then_by_arrival() -> None:
    world = World(max_num_seqs=1, policy="priority")
    for priority in (2, 0, 1, 0, 2):
        world.add(Spec(priority=priority))
    world.drain()
    assert world.admitted == ["r1", "r3", "r2", "r0", "r4"]


WHOLE_BUDGET = {"prompt": 240, "response": 16, "settings": {"cache_policy": "none"}}


def test_arrivals_of_rising_priority_do_not_keep_everybody_out() -> None:
    """Each request takes the whole budget, and in every step one of better priority arrives."""
    world = World(budget=256, policy="priority")
    first = world.add(Spec(**WHOLE_BUDGET, priority=20))
    world.step()
    for number in range(8):
        world.add(Spec(**WHOLE_BUDGET, priority=19 - number))
        world.step()
    # With one running request, a waiting one is admitted after two steps at most.
    assert world.running != [first]


def test_old_tickets_do_not_add_up_to_a_long_wait() -> None:
    """Each waiting request was the head once; they must not all go before the running one."""
    world = World(budget=256, policy="priority")
    world.add(Spec(**WHOLE_BUDGET, priority=20))
    world.step()
    for number in range(5):
        world.add(Spec(**WHOLE_BUDGET, priority=19 - number))
        world.step()
    world.drain()  # where `_count_waits` checks the bound


def test_max_num_seqs_leaves_others_waiting() -> None:
    world = World(max_num_seqs=3, budget=512)
    for _ in range(5):
        world.add(Spec())
    world.step()
    assert world.running == ["r0", "r1", "r2"]
    assert world.waiting == ["r3", "r4"]
    assert world.scheduler.get_request_counts() == (3, 2)
    world.drain()


def test_who_does_not_fit_the_pool_waits_and_nobody_overtakes() -> None:
    dual = {"cache_policy": "dual"}
    world = World(num_pages=10, budget=512)
    world.add(Spec(prompt=200, response=16, settings=dual))  # 7 pages
    world.step()
    big = world.add(Spec(prompt=180, response=16, settings=dual))  # 7 pages: not now
    tiny = world.add(Spec(prompt=4, response=4, settings={"cache_policy": "none"}))  # no page
    while "r0" in world.running:
        world.step()
        if "r0" in world.running:
            assert world.waiting == [big, tiny]
    world.step()
    assert set(world.running) == {big, tiny}
    world.drain()
    assert world.admitted == ["r0", big, tiny]


def test_the_pool_of_exactly_one_request() -> None:
    spec = Spec(prompt=200, response=32, settings={"cache_policy": "dual"})
    world = World(num_pages=spec.num_pages, budget=spec.largest_step)
    for _ in range(3):
        world.add(spec)
    world.step()
    assert world.scheduler.kv_cache_manager.usage == 1.0
    world.drain()
    assert world.admitted == ["r0", "r1", "r2"]


def late(**more: Any) -> dict[str, Any]:
    return {"eviction_delay": 2, "block_length": 8, "keep_ratio": 0.2, **more}


@pytest.mark.parametrize("own", [{}, {"delay_steps": 0}, {"refresh_interval": 2}])
def test_peaks_do_not_coincide_where_there_is_no_room_for_it(own: dict[str, Any]) -> None:
    """The pool has room for three requests, one at its peak: they run together and take turns."""
    spec = Spec(prompt=176, response=16, settings=late(**own))
    assert (spec.num_pages, spec.peak_pages) == (2, 6)
    world = World(num_pages=3 * 2 + 4, budget=600)
    names = [world.add(spec) for _ in range(4)]
    together, at_peak = 0, Counter[str]()
    while world.scheduler.has_unfinished_requests():
        world.step()
        together = max(together, len(world.running))
        peaks = [name for name in world.running if world.runner.states[name].cache_is_whole]
        assert len(peaks) <= 1
        at_peak.update(peaks)
    world.check_empty()
    assert together == 3
    assert sorted(at_peak) == names
    assert world.longest_wait_for_pages > 0
    assert world.admitted == names


def test_nobody_takes_pages_before_one_that_waits_for_its_peak() -> None:
    world = World(num_pages=10, budget=600)
    first = world.add(Spec(prompt=176, response=16, settings=late(eviction_delay=5)))
    while (
        not world.step().scheduled_cached_reqs.req_ids
        or not world.runner.states[first].cache_is_whole
    ):
        pass
    second = world.add(Spec(prompt=176, response=16, settings=late()))
    world.step()
    small = world.add(Spec(prompt=10, response=8, settings={"cache_policy": "dual"}))
    world.step()
    assert world.running == [first, second]  # 8 of 10 pages; `small` needs only one
    while small not in world.running:
        world.step()
        assert small in world.running or not world.runner.states[second].cache_is_whole
    world.drain()


def test_who_needs_no_pages_does_not_wait_for_them() -> None:
    world = World(num_pages=10, budget=600)
    first = world.add(Spec(prompt=176, response=16, settings=late(eviction_delay=5)))
    while first not in world.runner.states or not world.runner.states[first].cache_is_whole:
        world.step()
    second = world.add(Spec(prompt=176, response=16, settings=late(delay_steps=0)))
    world.step()
    assert world.waiting == [second]  # 6 pages are taken, 6 more are needed
    world.abort(second)
    third = world.add(Spec(prompt=176, response=16, settings=late()))
    world.step()
    free = world.add(Spec(prompt=10, response=8, settings={"cache_policy": "none"}))
    world.step()
    assert world.running == [first, third, free]
    world.drain()


def test_the_head_has_pages_before_those_who_came_to_their_peak_later() -> None:
    """Each block is at its peak from its first to its last step, and requests take turns."""
    own = late(delay_steps=0, eviction_delay=7)
    spec = Spec(prompt=176, response=64, settings=own)
    assert (spec.num_pages, spec.peak_pages) == (2, 8)
    world = World(num_pages=2 + 2 + 2 + 6, budget=600)
    names = [world.add(spec) for _ in range(3)]
    # The first one had waited longer for its second block than the last one for its first block.
    for _ in range(4 * 8):
        world.step()
    assert world.running == names
    assert [world.runner.states[name].progress.block for name in names] == [2, 1, 1]
    world.drain()


def test_the_pool_of_exactly_one_peak() -> None:
    spec = Spec(prompt=200, response=32, settings=late())
    world = World(num_pages=spec.peak_pages, budget=spec.largest_step)
    for _ in range(3):
        world.add(spec)
    usage = set()
    while world.scheduler.has_unfinished_requests():
        world.step()
        usage.add(world.num_held)
    assert max(usage) == spec.peak_pages > spec.num_pages
    world.check_empty()


@pytest.mark.parametrize("after", range(1, 12))
def test_an_abort_at_the_peak_lets_the_next_one_have_it(after: int) -> None:
    spec = Spec(prompt=176, response=16, settings=late(eviction_delay=30, refresh_interval=9))
    world = World(num_pages=8, budget=600)
    first, second = world.add(spec), world.add(spec)
    for _ in range(after):
        world.step()
    world.abort(first)
    for _ in range(3):
        world.step()
    assert world.runner.states[second].cache_is_whole
    world.drain()


@pytest.mark.parametrize("after", range(1, 12, 2))
def test_a_reset_at_the_peak(after: int) -> None:
    world = World(num_pages=10, budget=600)
    for _ in range(3):
        world.add(Spec(prompt=176, response=16, settings=late()))
    for _ in range(after):
        world.step()
    world.reset()
    assert world.num_held == 0
    world.drain()


def test_none_holds_no_page() -> None:
    world = World(num_pages=1, budget=512)
    for _ in range(4):
        world.add(Spec(settings={"cache_policy": "none"}))
    world.step()
    assert len(world.running) == 4
    assert world.scheduler.kv_cache_manager.usage == 0
    world.drain()


def test_paused_new_lets_the_running_go_on() -> None:
    world = World()
    first = world.add(Spec(response=4))
    world.step()
    world.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    second = world.add(Spec())
    while world.running:
        world.step()
    assert first in world.finished
    assert world.waiting == [second]
    assert not world.step().num_scheduled_tokens
    world.scheduler.set_pause_state(PauseState.UNPAUSED)
    world.drain()


def test_paused_all_runs_nobody_and_loses_nothing() -> None:
    world = World()
    world.add(Spec())
    world.step()
    world.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    world.add(Spec())
    for _ in range(3):
        assert world.step().total_num_scheduled_tokens == 0
    assert world.scheduler.get_num_unfinished_requests() == 0
    world.abort("r0")  # still possible, and frees its page
    assert world.num_held == 0
    world.scheduler.set_pause_state(PauseState.UNPAUSED)
    world.drain()


def test_a_step_that_runs_nobody_does_not_lengthen_a_burst(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An abort while paused is such a step, and takes next to no time."""
    clock = SimpleNamespace(now=0.0)
    module = "vllm_sparse_dllm.engine.scheduler"
    monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(f"{module}._BURST_SECONDS", 4.0)
    world = World()
    run = world.runner.run

    def timed(output: SchedulerOutput) -> DiffusionRunnerOutput:
        clock.now += 1.0 if output.num_scheduled_tokens else 1e-6
        return run(output)

    world.runner.run = timed  # type: ignore[method-assign]
    first, _ = world.add(Spec()), world.add(Spec())
    bursts = [getattr(world.step(), "max_steps", None) for _ in range(4)]
    assert bursts == [1, 1, 4, 4]  # the first two are full passes
    world.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    world.abort(first)
    world.step()
    world.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert getattr(world.step(), "max_steps", None) == 4
    world.drain()


@pytest.mark.parametrize("after", range(1, 20, 3))
def test_a_reset_preempts_and_each_token_is_delivered_once(after: int) -> None:
    world = World(max_num_seqs=2)
    own = {"block_length": 4, "threshold": 0.9}
    for _ in range(3):
        world.add(Spec(response=24, settings=own))
    for _ in range(after):
        world.step()
    running, held = world.running, world.num_held
    world.reset()
    assert world.running == [] and world.num_held == 0
    assert world.waiting[: len(running)] == running  # before those never admitted
    if held:
        output = world.step()
        assert [new.req_id for new in output.scheduled_new_reqs] == (running + world.waiting)[:2]
        assert output.preempted_req_ids == set(running)
    world.drain()


def test_an_abort_between_preemption_and_resumption() -> None:
    world = World()
    first, second = world.add(Spec()), world.add(Spec())
    for _ in range(5):
        world.step()
    world.reset()
    world.abort(first)
    assert world.step().scheduled_new_reqs[0].req_id == second
    world.drain()
    assert world.finished[first] == "abort"


def test_failure_stops_one_request_with_an_error() -> None:
    world = World()
    broken = world.add(Spec(fails_at_run=3))
    world.add(Spec())
    for _ in range(3):
        world.step()
    assert world.finished == {broken: "error"}
    assert world.scheduler.block_manager.held_pages(broken) == 0
    world.drain()


@pytest.mark.parametrize(
    ("bad", "cause", "reason"),
    [
        (
            Spec(prompt=200, settings={"cache_policy": "dual"}),
            "pages",
            r"max_tokens=16 with this prompt needs \d+ cache pages \(cache policy dual\), but the "
            r"pool of this engine has 3",
        ),
        (
            Spec(prompt=600, settings={"cache_policy": "none"}),
            "refused",
            "max_tokens=16 with this prompt needs 616 tokens in a step, but a step may have 512",
        ),
        (
            Spec(prompt=250, settings={"cache_policy": "none", "cfg_scale": 1.0}),
            "refused",
            "max_tokens=16 with this prompt needs 532 tokens in a step, but a step may have 512",
        ),
        (
            Spec(prompt=20, settings={"keep_ratio": 2.0}),
            "refused",
            r"diffusion_keep_ratio must be a number with 0 < r <= 1, got 2\.0",
        ),
    ],
)
def test_what_can_never_run_ends_at_once(bad: Spec, cause: str, reason: str) -> None:
    """A front end of several engines knows only the mean of their pools; others know nothing."""
    world = World(num_pages=3)
    whole = {"cache_policy": "dual"}
    before, never, behind = (
        world.add(Spec(settings=whole)),
        world.add(bad),
        world.add(Spec(settings=whole)),
    )
    scheduler = world.scheduler
    output = scheduler.schedule()
    assert never not in output.num_scheduled_tokens
    outputs = scheduler.update_from_output(output, world.runner.run(output))
    (end,) = (one for one in outputs[0].outputs if one.request_id == never)
    assert str(end.finish_reason) == "error"
    assert re.fullmatch(reason, str(end.stop_reason))
    stats = outputs[0].scheduler_stats
    assert stats is not None and stats.kv_connector_stats is not None
    assert stats.kv_connector_stats[FIGURES]["failures"] == {cause: 1}
    for one in outputs[0].outputs:
        world.delivered[one.request_id] += one.new_token_ids
    world.finished[never] = str(end.finish_reason)
    world.drain()
    assert world.finished == {before: "length", never: "error", behind: "length"}


def test_a_failure_in_the_step_that_another_finishes() -> None:
    world = World()
    spec = Spec(response=2, settings={"cache_policy": "none"})
    world.add(spec)
    world.add(Spec(response=2, fails_at_run=2, settings={"cache_policy": "none"}))
    world.drain()
    assert world.finished == {"r0": "length", "r1": "error"}


def test_blocks_that_are_not_needed_are_not_run() -> None:
    """A stop token in the first block: the other blocks are never computed."""
    world = World()
    spec = Spec(response=32, stops_after=2, settings={"block_length": 4})
    request_id = world.add(spec)
    world.drain()
    assert world.delivered[request_id] == spec.expected
    assert world.runner.runs[request_id] <= 4


def test_aborting_everybody() -> None:
    world = World(max_num_seqs=2)
    for _ in range(5):
        world.add(Spec())
    world.step()
    for request_id in [*world.specs, "nobody"]:
        world.abort(request_id)
    assert world.num_held == 0
    assert not world.scheduler.has_unfinished_requests()
    world.check_empty()


def test_the_prefix_cache_cannot_be_reset_under_running_requests() -> None:
    world = World()
    world.add(Spec())
    world.step()
    assert not world.scheduler.reset_prefix_cache()
    assert world.running == ["r0"]
    world.drain()
    assert world.scheduler.reset_prefix_cache()
