# SPDX-License-Identifier: Apache-2.0
"""Who runs in each step: continuous batching of full forwards, refreshes and block steps.

Every step is packed by one rule: who was served least recently goes first. A request that does
not fit what is left of the token budget is passed over for this step, and is then further
ahead in the next; at the head it has the whole budget, which admission made sure is enough.
So no request waits more steps than there are requests ahead of it, whatever they run. The head
of the waiting queue takes part in the same order, from the step on in which it was first passed
over, so that running requests cannot keep it out, nor newcomers starve the running.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_sparse_dllm.cache.block_manager import SparseBlockManager
from vllm_sparse_dllm.cache.policies import POLICIES, StepKind, step_tokens
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.figures import FIGURES, EngineFigures
from vllm_sparse_dllm.engine.output import DiffusionRunnerOutput, DiffusionSchedulerOutput
from vllm_sparse_dllm.engine.trace import TRACE
from vllm_sparse_dllm.models.configs import model_traits
from vllm_sparse_dllm.settings import DecodingSettings, EngineSettings, request_settings

logger = init_logger(__name__)

#: How long the runner may go on by itself, in seconds: what a request that comes in or is
#: aborted meanwhile waits at the most, and how coarse a stream may get.
_BURST_SECONDS = 0.02
_MAX_BURST_STEPS = 64


@dataclass
class Progress:
    """What the scheduler knows of a request.

    Attributes:
        settings: The request's settings.
        canvas: Its blocks.
        num_pages: Pages it holds while it runs.
        block: Block of its next step.
        step: Next step within the block.
        last_served: Scheduler step in which it last ran.
    """

    settings: DecodingSettings
    canvas: Canvas
    num_pages: int
    block: int = 0
    step: int = 0
    last_served: int = -1

    @property
    def cost(self) -> int:
        """Query tokens of the next step."""
        return step_tokens(self.canvas, self.settings, self.block, self.step)

    @property
    def takes_block_step(self) -> bool:
        """Whether the next step runs against the cache."""
        policy = POLICIES[self.settings.cache_policy]
        return policy.kind(self.step, self.settings) is StepKind.CACHED


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
        self.progress: dict[str, Progress] = {}
        self.figures = EngineFigures()
        # Step since which the head of the waiting queue, whoever it is, is passed over.
        self._head_ticket: int | None = None
        self._scheduled_at = 0.0
        # Of the last step; until one was measured, steps are run one at a time.
        self._step_seconds = _BURST_SECONDS

    def add_request(self, request: Request) -> None:
        sampling = request.sampling_params
        assert sampling is not None and sampling.max_tokens is not None
        settings = request_settings(self.engine_settings, self.traits, sampling.extra_args)
        canvas = Canvas(request.num_prompt_tokens, sampling.max_tokens, settings.block_length)
        num_pages = POLICIES[settings.cache_policy].num_pages(
            canvas, settings, self.block_manager.block_size
        )
        self.progress[request.request_id] = Progress(settings, canvas, num_pages)
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.current_step += 1
        now = time.monotonic()
        budget = self.max_num_scheduled_tokens
        self.kv_cache_manager.new_step_starts()

        scheduled: list[Request] = []
        admitted: list[NewRequestData] = []
        num_tokens: dict[str, int] = {}
        if self._pause_state != PauseState.PAUSED_ALL:
            # Python's sort is stable: among equals, the order of admission.
            queue = sorted(self.running, key=lambda r: self.progress[r.request_id].last_served)
            head = self._waiting_head()
            if head is not None and self._head_ticket is not None:
                ticket = self._head_ticket
                place = sum(self.progress[r.request_id].last_served <= ticket for r in queue)
                queue.insert(place, head)
            for request in queue:
                cost = self.progress[request.request_id].cost
                if cost > budget:
                    continue
                if request is head:
                    new = self._admit(request, now)
                    if new is None:
                        continue
                    admitted.append(new)
                else:
                    scheduled.append(request)
                num_tokens[request.request_id] = cost
                budget -= cost
            waits_for = "max_num_seqs"
            while (head := self._waiting_head()) is not None:
                progress = self.progress[head.request_id]
                if progress.cost > budget:
                    if self._head_ticket is None:
                        self._head_ticket = self.current_step
                    waits_for = "token_budget"
                    break
                cost = progress.cost
                new = self._admit(head, now)
                if new is None:
                    waits_for = "pages"
                    break
                admitted.append(new)
                num_tokens[head.request_id] = cost
                budget -= cost
            if num_tokens and self.waiting and self._pause_state == PauseState.UNPAUSED:
                self.figures.queue(waits_for, len(self.waiting))

        for request_id in num_tokens:
            self.progress[request_id].last_served = self.current_step
        self._scheduled_at = now
        output = DiffusionSchedulerOutput(
            scheduled_new_reqs=admitted,
            scheduled_cached_reqs=CachedRequestData(
                req_ids=[request.request_id for request in scheduled],
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[None] * len(scheduled),
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
            max_steps=self._burst(num_tokens),
        )
        self._update_after_schedule(output)
        return output

    def _burst(self, scheduled: dict[str, int]) -> int:
        """Return how many steps the runner may take before it asks again.

        More than one only where there is nothing to decide: nobody waits, everybody runs, and
        all take block steps.
        """
        if self.waiting or not scheduled or len(scheduled) < len(self.running):
            return 1
        if not all(self.progress[request_id].takes_block_step for request_id in scheduled):
            return 1
        return max(1, min(_MAX_BURST_STEPS, int(_BURST_SECONDS / self._step_seconds)))

    def _waiting_head(self) -> Request | None:
        """Return the request that is next to be admitted, if one may be."""
        if self._pause_state != PauseState.UNPAUSED or not self.waiting:
            return None
        if len(self.running) >= self.max_num_active_reqs:
            return None
        return self.waiting.peek_request()

    def _admit(self, request: Request, now: float) -> NewRequestData | None:
        """Give the head of the waiting queue its pages, None if there are too few."""
        progress = self.progress[request.request_id]
        pages = self.block_manager.reserve(request.request_id, progress.num_pages)
        if pages is None:
            return None
        self.waiting.pop_request()
        self._head_ticket = None
        if request.prefill_stats is not None:
            request.prefill_stats.set(request.num_prompt_tokens, 0, 0)
        if self.log_stats:
            request.record_event(EngineCoreEventType.SCHEDULED, now)
        request.status = RequestStatus.RUNNING
        self.running.append(request)
        new = NewRequestData.from_request(request, (pages,))
        # What a request delivered before a preemption is computed again, not delivered again.
        new.num_computed_tokens = request.num_output_tokens
        return new

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        # A denoising step makes no prefix of the canvas final, so vLLM's counter of computed
        # tokens follows what was delivered.
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
        failed: dict[str, str] = {}
        traces: dict[str, dict[str, Any]] = {}
        if isinstance(model_runner_output, DiffusionRunnerOutput):
            failed = model_runner_output.failed
            traces = model_runner_output.traces
            self.figures.steps.add(model_runner_output.counts)
            if failed:
                self.figures.fail("logits", sum(name in self.requests for name in failed))
            elapsed = time.monotonic() - self._scheduled_at
            self._step_seconds = max(1e-6, elapsed / model_runner_output.num_steps)
            for request_id, (block, step) in model_runner_output.progress.items():
                progress = self.progress.get(request_id)
                if progress is not None:
                    progress.block, progress.step = block, step
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if traces:
            for client_outputs in outputs.values():
                for output in client_outputs.outputs:
                    if output.request_id in traces:
                        # The one field that vLLM carries to a request's output unread.
                        output.kv_transfer_params = {TRACE: traces[output.request_id]}
        for request_id, reason in failed.items():
            logger.error("request %s failed: %s", request_id, reason)
        for request in self.finish_requests(failed, RequestStatus.FINISHED_ERROR):
            core_outputs = outputs.setdefault(request.client_index, EngineCoreOutputs())
            core_outputs.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            num_pages = self.block_manager.num_pages
            held = num_pages - self.block_manager.block_pool.get_num_free_blocks()
            # vLLM's dictionary for the statistics of out-of-tree parts.
            stats.kv_connector_stats = {FIGURES: self.figures.message(held, num_pages)}
            self.figures = EngineFigures()
        return stats

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        # vLLM preempts only to reset its caches; the request starts anew.
        progress = self.progress[request.request_id]
        progress.block, progress.step, progress.last_served = 0, 0, -1
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _free_blocks(self, request: Request) -> None:
        self.progress.pop(request.request_id, None)
        super()._free_blocks(request)
