# SPDX-License-Identifier: Apache-2.0
"""Which requests run in each step: continuous batching of full forwards and block steps.

Every step is packed by one rule: the least recently served request goes first. A request that does
not fit the rest of the token budget is passed over for this step and is then further ahead in the
next; at the head it has the whole budget, which admission has made sure is enough. So no request
waits more steps than there are requests ahead of it, whatever they run. The head of the waiting
queue takes part in the same order from the step in which it was first passed over, so that running
requests cannot keep it out, nor newcomers starve running ones.

Pages that a request needs only temporarily (late eviction) are given out in the same order: the
first request that lacks pages gets the next free ones, and until then only requests that need none
run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import (
    CachedRequestData,
    GrammarOutput,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import (
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
)
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_sparse_dllm.cache.block_manager import SparseBlockManager
from vllm_sparse_dllm.cache.policies import POLICIES, Progress, StepKind, step_tokens
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.course import Course
from vllm_sparse_dllm.engine.figures import FIGURES, TOLD_CAUSES, EngineFigures
from vllm_sparse_dllm.engine.output import DiffusionRunnerOutput, DiffusionSchedulerOutput, Failure
from vllm_sparse_dllm.engine.structured_output import AllowedTokens, has_grammar
from vllm_sparse_dllm.engine.trace import TRACE
from vllm_sparse_dllm.models.configs import model_traits
from vllm_sparse_dllm.settings import DecodingSettings, EngineSettings, request_settings

logger = init_logger("vllm." + __name__)

#: Seconds that the runner may go on by itself. A request that arrives or is aborted meanwhile waits
#: for up to that long, and a stream becomes as coarse.
_BURST_SECONDS = 0.02
_MAX_BURST_STEPS = 64


@dataclass
class Tracked:
    """The scheduler's state of a request.

    Attributes:
        settings: The request's settings.
        canvas: The layout of its blocks.
        num_pages: Pages it always holds while it runs.
        peak_pages: Pages it holds from a refresh until it has evicted.
        progress: The request's progress.
        last_served: Scheduler step in which it last ran.
    """

    settings: DecodingSettings
    canvas: Canvas
    num_pages: int
    peak_pages: int
    progress: Progress = field(default_factory=Progress)
    last_served: int = -1

    @property
    def num_committed(self) -> int:
        """Tokens committed by a request that commits one per step, from left to right."""
        return self.progress.block * self.canvas.block_length + self.progress.step

    @property
    def cost(self) -> int:
        """Query tokens of the next step."""
        return step_tokens(self.canvas, self.settings, self.progress)

    @property
    def kind(self) -> StepKind:
        """What the next step runs."""
        return POLICIES[self.settings.cache_policy].kind(self.progress, self.settings)

    @property
    def extra_pages(self) -> int:
        """Pages that it needs temporarily, beyond those it always holds."""
        return self.peak_pages - self.num_pages

    @property
    def missing_pages(self) -> int:
        """Pages that it has to get for its next step, beyond those it always holds."""
        return self.extra_pages if self.kind is StepKind.REFRESH else 0


class DiffusionScheduler(Scheduler):
    """vLLM's scheduler with another `schedule`; stopping, outputs and statistics are vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.engine_settings = EngineSettings.from_additional_config(
            self.vllm_config.additional_config
        )
        self.traits = model_traits(self.vllm_config.model_config.hf_config)
        manager = self.kv_cache_manager.coordinator.single_type_managers[0]
        assert isinstance(manager, SparseBlockManager)
        self.block_manager = manager
        self.allowed_tokens = AllowedTokens(
            self.structured_output_manager, self.traits.mask_token_id
        )
        self.figures = EngineFigures()
        self.tracked: dict[str, Tracked] = {}
        # Requests that can never run, but whose front end knew only the mean of several engines'
        # pools, or is not the one that admission is part of.
        self._refused: dict[str, Failure] = {}
        # Step in which the head of the waiting queue was first passed over, None if it was not;
        # kept if another request becomes the head without an admission.
        self._head_ticket: int | None = None
        # Whether a request lacked pages in this step.
        self._pages_are_spoken_for = False
        # vLLM logs these details once per call of `schedule`.
        details = self.vllm_config.observability_config.enable_logging_iteration_details
        self._max_burst_steps = 1 if details else _MAX_BURST_STEPS
        self._scheduled_at = 0.0
        # Duration of the last step; until one is measured, steps are run one at a time.
        self._step_seconds = _BURST_SECONDS

    def add_request(self, request: Request) -> None:
        sampling = request.sampling_params
        assert sampling is not None and sampling.max_tokens is not None
        name, engine, traits = request.request_id, self.engine_settings, self.traits
        try:
            settings = request_settings(engine, traits, sampling.extra_args)
        except ValueError as error:
            self._refused[name] = Failure("refused", str(error))
            settings = request_settings(engine, traits, None)
        canvas = Canvas(request.num_prompt_tokens, sampling.max_tokens, settings.block_length)
        policy, page_size = POLICIES[settings.cache_policy], self.block_manager.block_size
        self.tracked[name] = tracked = Tracked(
            settings,
            canvas,
            policy.num_pages(canvas, settings, page_size),
            policy.peak_pages(canvas, settings, page_size),
            self._start(request, canvas, settings),
        )
        tokens, most = canvas.length * settings.num_sequences, self.max_num_scheduled_tokens
        pages, pool = tracked.peak_pages, self.block_manager.num_pages
        what = f"max_tokens={sampling.max_tokens} with this prompt needs"
        if tokens > most:
            why = f"{what} {tokens} tokens in a step, but a step may have {most}"
            self._refused.setdefault(name, Failure("refused", why))
        if pages > pool:
            policy_name = settings.cache_policy
            why = f"{what} {pages} cache pages (cache policy {policy_name}), but the pool of this "
            self._refused.setdefault(name, Failure("pages", f"{why}engine has {pool}"))
        super().add_request(request)

    def _start(self, request: Request, canvas: Canvas, settings: DecodingSettings) -> Progress:
        """Return where a request starts or restarts; in its last block if no block has masks."""
        assert request.sampling_params is not None
        left_to_right = has_grammar(request.sampling_params)
        start = Course(canvas, settings, self.traits, left_to_right, request.output_token_ids).start
        return replace(start, block=min(start.block, canvas.num_blocks - 1))

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.current_step += 1
        now = time.monotonic()
        budget = self.max_num_scheduled_tokens
        self.kv_cache_manager.new_step_starts()

        scheduled: list[Request] = []
        admitted: list[NewRequestData] = []
        num_tokens: dict[str, int] = {}
        new_pages: dict[str, list[int]] = {}
        self._pages_are_spoken_for = False
        if self._pause_state != PauseState.PAUSED_ALL:
            # Python's sort is stable: ties keep the order of admission.
            queue = sorted(self.running, key=lambda r: self.tracked[r.request_id].last_served)
            head = self._waiting_head()
            if head is not None and self._head_ticket is not None:
                ticket = self._head_ticket
                place = sum(self.tracked[r.request_id].last_served <= ticket for r in queue)
                queue.insert(place, head)
            for request in queue:
                tracked = self.tracked[request.request_id]
                cost = tracked.cost
                if cost > budget:
                    continue
                if request is head:
                    new = self._admit(request, now)
                    if new is None:
                        continue
                    admitted.append(new)
                else:
                    pages = self._take_pages(request, tracked.missing_pages)
                    if pages is None:
                        continue
                    if pages:
                        new_pages[request.request_id] = pages
                    scheduled.append(request)
                num_tokens[request.request_id] = cost
                budget -= cost
            if self._pause_state == PauseState.UNPAUSED:
                for request in tuple(self.deferred_waiting):
                    self._is_ready(request)
            waits_for = "max_num_seqs"
            while (head := self._waiting_head()) is not None:
                cost = self.tracked[head.request_id].cost
                new = None if cost > budget else self._admit(head, now)
                if new is None:
                    if self._head_ticket is None:
                        self._head_ticket = self.current_step
                    waits_for = "token_budget" if cost > budget else "pages"
                    break
                admitted.append(new)
                num_tokens[head.request_id] = cost
                budget -= cost
            if num_tokens and self._pause_state == PauseState.UNPAUSED:
                num_compiling = len(self.deferred_waiting)
                self.figures.queue("grammar", num_compiling)
                self.figures.queue(waits_for, len(self.waiting) - num_compiling)

        for request_id in num_tokens:
            self.tracked[request_id].last_served = self.current_step
        self._scheduled_at = now
        constrained = tuple(
            name for name in num_tokens if self.requests[name].use_structured_output
        )
        output = DiffusionSchedulerOutput(
            scheduled_new_reqs=admitted,
            scheduled_cached_reqs=CachedRequestData(
                req_ids=[request.request_id for request in scheduled],
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[
                    (new_pages[request.request_id],) if request.request_id in new_pages else None
                    for request in scheduled
                ],
                num_computed_tokens=[request.num_computed_tokens for request in scheduled],
                num_output_tokens=[request.num_output_tokens for request in scheduled],
            ),
            num_scheduled_tokens=num_tokens,
            total_num_scheduled_tokens=sum(num_tokens.values()),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=[],
            preempted_req_ids=self.reset_preempted_req_ids,
            # A grammar sees one token at a time.
            max_steps=1 if constrained else self._burst(num_tokens),
            constrained=constrained,
        )
        self._update_after_schedule(output)
        return output

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """Return the masks of the constrained requests' next tokens, None if there are none."""
        names = getattr(scheduler_output, "constrained", ())
        if not names:
            return None
        requests = [self.requests[name] for name in names]
        num_committed = {name: self.tracked[name].num_committed for name in names}
        return GrammarOutput(list(names), self.allowed_tokens.next_masks(requests, num_committed))

    def _burst(self, scheduled: dict[str, int]) -> int:
        """Return how many steps the runner may take by itself.

        More than one only if there is nothing to decide: no request waits, all run, and all take
        block steps that leave the cache unchanged.
        """
        if self.waiting or not scheduled or len(scheduled) < len(self.running):
            return 1
        if any(self.tracked[request_id].kind is not StepKind.CACHED for request_id in scheduled):
            return 1
        return max(1, min(self._max_burst_steps, int(_BURST_SECONDS / self._step_seconds)))

    def _waiting_head(self) -> Request | None:
        """Return the next request to admit, None if none can be."""
        if self._pause_state != PauseState.UNPAUSED or not self.waiting:
            return None
        if len(self.running) >= self.max_num_active_reqs:
            return None
        head = self.waiting.peek_request()
        if self._is_ready(head):
            return head
        # Requests that wait for their grammar are overtaken.
        return next(filter(self._is_ready, self.waiting), None)

    def _is_ready(self, request: Request) -> bool:
        """Return whether a waiting request waits for nothing but its turn."""
        if request.request_id in self._refused:
            return False
        if not self._is_blocked_waiting_status(request.status):
            return True
        if not self._handle_blocked_waiting_request(request):
            return False
        self.deferred_waiting.discard(request)
        return True

    def _take_pages(self, request: Request, num_pages: int) -> list[int] | None:
        """Give a request further pages; None if too few are free or another one is to get them.

        The first request that gets none is to get the next ones: requests that come later in this
        step get none either.
        """
        if not num_pages:
            return []
        if self._pages_are_spoken_for:
            return None
        pages = self.block_manager.grow(request.request_id, num_pages)
        self._pages_are_spoken_for = pages is None
        return pages

    def _admit(self, request: Request, now: float) -> NewRequestData | None:
        """Give a waiting request its pages and admit it; None if there are too few pages.

        Beyond what all requests always hold, the pool must have room for the largest temporary
        need between a refresh and an eviction. So a request that waits for such pages gets them
        once others have evicted, and temporary needs coincide only where there is room.
        """
        tracked = self.tracked[request.request_id]
        company = [self.tracked[r.request_id] for r in self.running]
        held = sum(own.num_pages for own in company)
        peak = max((own.extra_pages for own in company), default=0)
        needed = held + tracked.num_pages + max(peak, tracked.extra_pages)
        if needed > self.block_manager.num_pages:
            return None
        pages = self._take_pages(request, tracked.num_pages + tracked.missing_pages)
        if pages is None:
            return None
        if request is self.waiting.peek_request():
            self.waiting.pop_request()
        else:
            self.waiting.remove_request(request)
        self._head_ticket = None
        if request.prefill_stats is not None:
            request.prefill_stats.set(request.num_prompt_tokens, 0, 0)
        if self.log_stats:
            request.record_event(EngineCoreEventType.SCHEDULED, now)
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        # A restarted request goes on from what it delivered before the preemption.
        given = list(request.all_token_ids) if request.num_output_tokens else None
        return NewRequestData.from_request(request, (pages,), prefill_token_ids=given)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # A step's tokens are not a prefix that stays computed, so vLLM's counter of computed
        # tokens follows the delivered ones instead.
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            request.num_computed_tokens = request.num_tokens
            request.num_in_flight_tokens += num_tokens
            request.is_prefill_chunk = False
        self.finished_req_ids = set()
        self.reset_preempted_req_ids = set()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        failed, self._refused = self._refused, {}
        traces: dict[str, dict[str, Any]] = {}
        constrained = {
            request_id: request
            for request_id in (
                *getattr(scheduler_output, "constrained", ()),
                *self.grammar_compile_error_reqs,
            )
            if (request := self.requests.get(request_id)) is not None
        }
        if isinstance(model_runner_output, DiffusionRunnerOutput):
            failed |= model_runner_output.failed
            traces = model_runner_output.traces
            self.figures.steps.add(model_runner_output.counts)
            counts = model_runner_output.counts
            if counts.full_passes or counts.block_steps:
                # A step that ran nothing, as after an abort while paused, says nothing of others.
                elapsed = time.monotonic() - self._scheduled_at
                self._step_seconds = max(1e-6, elapsed / model_runner_output.num_steps)
            for request_id, progress in model_runner_output.progress.items():
                tracked = self.tracked.get(request_id)
                if tracked is not None:
                    tracked.progress = progress
                    if not progress.whole:
                        self.block_manager.shrink(request_id, tracked.num_pages)
        for request_id, failure in failed.items():
            if request_id in self.requests:
                self.figures.fail(failure.cause)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if traces:
            for client_outputs in outputs.values():
                for output in client_outputs.outputs:
                    if output.request_id in traces:
                        # The one field that vLLM passes on to a request's output unread.
                        output.kv_transfer_params = {TRACE: traces[output.request_id]}
        if constrained:
            self._explain_ends(constrained, outputs)
        reasons = {name: self._reason(name, failure) for name, failure in failed.items()}
        for request in self.finish_requests(failed, RequestStatus.FINISHED_ERROR):
            reason = reasons[request.request_id]
            core_outputs = outputs.setdefault(request.client_index, EngineCoreOutputs())
            core_outputs.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    # The front end reports it to the client.
                    stop_reason=reason if failed[request.request_id].cause in TOLD_CAUSES else None,
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs

    def _reason(self, request_id: str, failure: Failure) -> str:
        """Return why a request failed, and log it."""
        reason = failure.reason
        request = self.requests.get(request_id)
        if request is not None and failure.cause == "grammar":
            reason = self.allowed_tokens.problem(request) or reason
        logger.error("request %s failed: %s", request_id, reason)
        return reason

    def _explain_ends(
        self, constrained: dict[str, Request], outputs: dict[int, EngineCoreOutputs]
    ) -> None:
        """Add the reason to the outputs of requests that vLLM ended because of their grammar."""
        for client_outputs in outputs.values():
            for output in client_outputs.outputs:
                request = constrained.get(output.request_id)
                if request is None or output.finish_reason != FinishReason.ERROR:
                    continue
                output.stop_reason = self.allowed_tokens.problem(request)
                self.figures.fail("grammar")
                logger.error("request %s failed: %s", output.request_id, output.stop_reason)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            num_pages = self.block_manager.num_pages
            held = num_pages - self.block_manager.num_free_pages
            # vLLM's dictionary for the statistics of out-of-tree components.
            stats.kv_connector_stats = {FIGURES: self.figures.message(held, num_pages)}
            self.figures = EngineFigures()
        return stats

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        # vLLM preempts only to reset its caches.
        tracked = self.tracked[request.request_id]
        tracked.progress = self._start(request, tracked.canvas, tracked.settings)
        tracked.last_served = -1
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _free_blocks(self, request: Request) -> None:
        self.tracked.pop(request.request_id, None)
        super()._free_blocks(request)
