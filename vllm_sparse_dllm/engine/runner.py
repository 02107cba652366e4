# SPDX-License-Identifier: Apache-2.0
"""The model runner, the same on every device: requests in, committed tokens out."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.sampling_params import SamplingParams
from vllm.tasks import SupportedTask
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import LogprobsLists

from vllm_sparse_dllm.attention.backends import make_backend
from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.cache.block_manager import SparseCacheSpec
from vllm_sparse_dllm.cache.pages import allocate_pages
from vllm_sparse_dllm.cache.policies import POLICIES, StepKind
from vllm_sparse_dllm.denoise.fused import greedy_distribution
from vllm_sparse_dllm.denoise.rules import RULES
from vllm_sparse_dllm.denoise.step import Candidates, Commits, denoise
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.batch import StepBatch, build_batch
from vllm_sparse_dllm.engine.figures import StepCounts
from vllm_sparse_dllm.engine.output import DiffusionRunnerOutput
from vllm_sparse_dllm.engine.requests import NextStep, RequestState
from vllm_sparse_dllm.models.configs import model_traits
from vllm_sparse_dllm.models.files import check_files
from vllm_sparse_dllm.models.layers import DiffusionDecoder
from vllm_sparse_dllm.settings import EngineSettings, request_settings

logger = init_logger(__name__)

#: Logits that exist at a time; sampling needs a few float64 copies of them.
_MAX_LOGITS = 1 << 26


class DiffusionModelRunner:
    """Keeps the requests' canvases and runs one ragged batch a step; takes no decisions."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.cache_config = vllm_config.cache_config
        self.load_config = vllm_config.load_config
        self.device = device
        self.engine_settings = EngineSettings.from_additional_config(vllm_config.additional_config)
        self.traits = model_traits(self.model_config.hf_config)
        self._greedy = greedy_distribution(device)
        self.requests: dict[str, RequestState] = {}
        self.kv_caches: list[torch.Tensor] = []
        self.model_memory_usage = 0
        self.model: DiffusionDecoder
        self.backend: AttentionBackend

    # What vLLM's worker asks of a runner.

    def load_model(self, load_dummy_weights: bool = False) -> None:
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        logger.info("Loading diffusion model %s", self.model_config.model)
        profiler = DeviceMemoryProfiler() if self.device.type == "cuda" else nullcontext()
        with profiler:
            try:
                model = get_model(vllm_config=self.vllm_config)
            except Exception as error:
                check_files(self.model_config, self.load_config, error)
                raise
        self.model_memory_usage = getattr(profiler, "consumed_memory", 0)
        assert isinstance(model, DiffusionDecoder)
        self.model = model
        self.backend = make_backend(
            self._attention_shape,
            self.cache_config.block_size,
            self._dtype,
            self.device,
            self.engine_settings.attention_backend,
        )

    @property
    def _attention_shape(self) -> AttentionShape:
        attention: Any = self.model.layers[0].self_attn
        return AttentionShape(attention.num_heads, attention.num_kv_heads, attention.head_size)

    @property
    def _dtype(self) -> torch.dtype:
        dtype = self.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def _num_layers(self) -> int:
        return self.model.shape.num_layers

    def get_model(self) -> nn.Module:
        return self.model

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        settings = self.engine_settings.decoding
        context = self.model_config.max_model_len
        # A response of one token leaves the most positions to keep.
        canvas = Canvas(max(0, context - 1), 1, settings.block_length)
        policy = POLICIES[settings.cache_policy]
        shape = self._attention_shape
        longest = Canvas(0, context, settings.block_length)
        page = self.cache_config.block_size
        spec = SparseCacheSpec(
            block_size=page,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            dtype=self._dtype,
            dcp_sharded=False,
            max_slots=max(policy.peak_slots(c, settings, page) for c in (canvas, longest)),
        )
        return {f"layers.{index}.self_attn": spec for index in range(self._num_layers)}

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager[None] | None = None,
    ) -> None:
        with kv_cache_allocation_context or nullcontext():
            self.kv_caches = allocate_pages(kv_cache_config, self._num_layers, self.device)
        self.backend.bind_pages(self.kv_caches)
        self.backend.prepare()

    def shutdown(self) -> None:
        """Forget all requests; the worker releases the rest."""
        self.requests.clear()

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def profile_run(self, randomize_inputs: bool = False) -> None:
        """Run the largest step once, so that vLLM sees the memory it takes."""
        self._dummy_step(self.vllm_config.scheduler_config.max_num_batched_tokens)
        self._dummy_sampling()

    def warming_up_model(self) -> None:
        """Run a small step once, so that kernels are prepared before memory is counted."""
        self._dummy_step(min(64, self.vllm_config.scheduler_config.max_num_batched_tokens))

    def _dummy_run(self, num_tokens: int, **kwargs: object) -> None:
        # What data parallelism runs on a rank that has nothing to do.
        self._dummy_step(num_tokens)

    def _dummy_step(self, num_tokens: int) -> None:
        """Run a full forward of about ``num_tokens`` tokens and logits for its blocks."""
        context = min(self.model_config.max_model_len, num_tokens)
        block_length = min(self.engine_settings.decoding.block_length, context)
        lengths = [context] * max(1, num_tokens // context)
        settings = request_settings(
            self.engine_settings, self.traits, {"diffusion_cache_policy": "none"}
        )
        states = [
            RequestState(
                [0] * (length - block_length),
                settings,
                SamplingParams(max_tokens=block_length, temperature=0.0),
                self.traits,
                [],
                self.cache_config.block_size,
                self._num_layers,
                torch.Generator(self.device),
            )
            for length in lengths
        ]
        steps = [state.next_step() for state in states]
        self._forward(states, steps)

    @torch.inference_mode()
    def _dummy_sampling(self) -> None:
        """Sample from as many logits as may ever exist at a time, in the costliest way."""
        rows = self._max_logits_rows
        shape = self.model.shape
        hidden = torch.zeros(rows, shape.hidden_size, dtype=self._dtype, device=self.device)
        everything = torch.arange(rows, device=self.device)
        candidates = Candidates(
            num=rows,
            count=1,
            rule=RULES["entropy"],
            commit_probability=1.0,
            threshold=None,
            factor=None,
            temperature=1.0,
            top_p=0.9,
            top_k=1,
            alg_temp=0.0,
            generator=torch.Generator(self.device),
            num_logprobs=None,
        )
        kinds = [candidates]
        if self._greedy is not None:
            # So that its kernels are compiled now.
            kinds.append(replace(candidates, temperature=0.0))
        for kind in kinds:
            denoise(
                partial(self._head, hidden, everything),
                [kind],
                self.traits.mask_token_id,
                self.traits.sampler,
                self.device,
                rows,
                self._greedy,
            )

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: object = None
    ) -> DiffusionRunnerOutput:
        """Run the scheduled requests, one step or as many as the scheduler leaves to us."""
        self._update_requests(scheduler_output)
        request_ids = list(scheduler_output.num_scheduled_tokens)
        output = DiffusionRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: i for i, request_id in enumerate(request_ids)},
            sampled_token_ids=[[] for _ in request_ids],
        )
        if not request_ids:
            return output
        states = [self.requests[request_id] for request_id in request_ids]
        # A canvas that was given without a mask is finished before its first step.
        active = [index for index, state in enumerate(states) if not state.finished]
        running = [states[index] for index in active]
        max_steps = getattr(scheduler_output, "max_steps", 1)
        failed: list[int] = []
        for number in range(1, max_steps + 1 if running else 1):
            steps = [state.next_step() for state in running]
            commits = self._forward(running, steps)
            failed = self._commit(running, steps, commits, output.counts)
            output.num_steps = number
            if failed or not all(state.continues_alone for state in states):
                break
        for index in failed:
            failure = running[index].failure(self.model.shape.vocab_size)
            output.failed[request_ids[active[index]]] = failure
        self._report(states, output)
        return output

    def _update_requests(self, scheduler_output: SchedulerOutput) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self.requests.pop(request_id, None)
        for request_id in scheduler_output.preempted_req_ids or ():
            self.requests.pop(request_id, None)
        for new in scheduler_output.scheduled_new_reqs:
            self.requests[new.req_id] = self._new_request(new)
        running = scheduler_output.scheduled_cached_reqs
        for request_id, page_ids in zip(running.req_ids, running.new_block_ids, strict=True):
            if page_ids is not None:
                self.backend.clear(np.array(page_ids[0]))
                self.requests[request_id].add_pages(page_ids[0])
        for request_id, mask in getattr(scheduler_output, "allowed_tokens", {}).items():
            self.requests[request_id].allowed_tokens = mask

    def _new_request(self, new: NewRequestData) -> RequestState:
        sampling = new.sampling_params
        assert sampling is not None and new.prompt_token_ids is not None
        settings = request_settings(self.engine_settings, self.traits, sampling.extra_args)
        seed = sampling.seed
        if seed is None:
            name = f"{self.model_config.seed}/{new.req_id}".encode()
            seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little")
        page_ids = new.block_ids[0]
        if page_ids:
            self.backend.clear(np.array(page_ids))
        return RequestState(
            new.prompt_token_ids,
            settings,
            sampling,
            self.traits,
            page_ids,
            self.cache_config.block_size,
            self._num_layers,
            torch.Generator(self.device).manual_seed(seed % 2**63),
            num_delivered=new.num_computed_tokens,
            request_id=new.req_id,
        )

    def _forward(self, states: list[RequestState], steps: list[NextStep]) -> Commits | None:
        """Run the batch; None if no step has anything to commit."""
        batch = build_batch(states, steps, self.backend)
        with set_forward_context(None, self.vllm_config):
            hidden = self.model(batch.input_ids, batch.positions, plan=batch.plan)
        active = [
            (state, step) for state, step in zip(states, steps, strict=True) if len(step.candidates)
        ]
        if not active:
            return None
        return denoise(
            partial(self._logits, hidden, batch),
            [state.candidates_of(step) for state, step in active],
            self.traits.mask_token_id,
            self.traits.sampler,
            self.device,
            self._max_logits_rows,
            self._greedy,
        )

    @property
    def _max_logits_rows(self) -> int:
        return max(1, _MAX_LOGITS // self.model.shape.vocab_size)

    def _logits(self, hidden: torch.Tensor, batch: StepBatch, rows: np.ndarray) -> torch.Tensor:
        """Return ``[n, vocab]`` logits of candidates, guided where a request asks for it."""
        logits = self._head(hidden, batch.logits_rows, rows)
        num_guided = batch.guided.shape[0]
        if num_guided == 0:
            return logits
        # Unconditional rows lie behind all candidates, in the order of the guided ones.
        num_candidates = batch.logits_rows.shape[0] - num_guided
        unconditional_row = np.full(num_candidates, -1)
        unconditional_row[batch.guided.cpu().numpy()] = np.arange(num_guided)
        own = unconditional_row[rows]
        guided = torch.from_numpy(np.flatnonzero(own >= 0)).to(self.device)
        own = own[own >= 0]
        unconditional = self._head(hidden, batch.logits_rows, own + num_candidates).float()
        weights = batch.guidance.index_select(0, torch.from_numpy(own).to(self.device))
        logits = logits.float()
        difference = logits.index_select(0, guided) - unconditional
        return logits.index_copy(
            0, guided, unconditional + (weights.unsqueeze(-1) + 1) * difference
        )

    def _head(
        self, hidden: torch.Tensor, hidden_rows: torch.Tensor, rows: np.ndarray
    ) -> torch.Tensor:
        index = hidden_rows.index_select(0, torch.from_numpy(rows).to(self.device))
        logits = self.model.compute_logits(hidden.index_select(0, index))
        assert logits is not None
        return logits

    def _commit(
        self,
        states: list[RequestState],
        steps: list[NextStep],
        commits: Commits | None,
        counts: StepCounts,
    ) -> list[int]:
        """Write what a step decided to the canvases; return the requests that failed."""
        failed: list[int] = []
        nothing = np.zeros(0, dtype=np.int64)
        row = active = 0
        for index, (state, step) in enumerate(zip(states, steps, strict=True)):
            num, block_index = len(step.candidates), state.block_index
            _count_step(state, step, counts)
            changes = step.kind in (StepKind.REFRESH, StepKind.EVICT, StepKind.APPEND)
            if state.trace is not None and state.trace.with_kept and changes:
                kept = state.sequences[0].kept_positions
                state.trace.record_cache(step.kind.value, step.block, kept)
            if commits is None or num == 0:
                if state.trace is not None:
                    state.trace.record_pass(nothing, nothing)
                state.commit(nothing, nothing, None)
            else:
                if commits.failed[active]:
                    failed.append(index)
                else:
                    committed = commits.committed[row : row + num]
                    positions = step.candidates[committed]
                    if state.trace is not None:
                        assert commits.confidences is not None
                        state.trace.record_pass(
                            positions - state.canvas.prompt_length,
                            commits.confidences[row : row + num][committed],
                        )
                    state.commit(
                        positions,
                        commits.tokens[row : row + num][committed],
                        commits.logprobs[active],
                    )
                    counts.committed += len(positions)
                row += num
                active += 1
            if state.block_index > block_index:
                counts.blocks += 1
                counts.finished_positions += step.block[1] - step.block[0]
        return failed

    @staticmethod
    def _report(states: list[RequestState], output: DiffusionRunnerOutput) -> None:
        """Tell the scheduler what became final and where each request stands."""
        logprobs: list[list[tuple[np.ndarray, np.ndarray, int]]] = []
        for index, (request_id, state) in enumerate(zip(output.req_ids, states, strict=True)):
            output.sampled_token_ids[index], own = state.take_final()
            logprobs.append(own)
            output.progress[request_id] = state.progress
            if state.trace is not None and output.sampled_token_ids[index]:
                num_new = len(output.sampled_token_ids[index])
                output.traces[request_id] = state.trace.take(num_new)
        if any(logprobs):
            output.logprobs = _logprobs_lists(output.sampled_token_ids, logprobs)


def _count_step(state: RequestState, step: NextStep, counts: StepCounts) -> None:
    counts.full_passes += step.kind.runs_all
    counts.refreshes += step.kind is StepKind.REFRESH
    counts.block_steps += not step.kind.runs_all
    counts.positions += step.block[1] - step.block[0]
    if step.kind is state.policy.choice(state.settings):
        spans = state.policy.candidates(state.canvas, step.block, state.settings)
        num_candidates = sum(end - start for start, end in spans)
        for sequence in state.sequences:
            # With runs of positions a layer that takes the short last one keeps fewer.
            num_kept = int(sequence.num_kept.max())
            counts.kept += num_kept
            counts.evicted += num_candidates - num_kept


def _logprobs_lists(
    tokens: list[list[int]], entries: list[list[tuple[np.ndarray, np.ndarray, int]]]
) -> LogprobsLists:
    """Lay log-probabilities out as vLLM has them: a row a token, all of one width.

    A short row is filled up with its own token, which vLLM's dictionaries hold once.
    """
    width = max(len(entry[0]) for own in entries for entry in own)
    ends = np.cumsum([len(own) for own in tokens])
    token_ids = np.zeros((ends[-1], width), dtype=np.int32)
    values = np.full((ends[-1], width), -np.inf, dtype=np.float32)
    ranks = np.zeros(ends[-1], dtype=np.int32)
    starts = [0, *ends.tolist()]
    for start, own in zip(starts, entries, strict=False):
        for row, (ids, logprobs, rank) in enumerate(own, start):
            token_ids[row], values[row] = ids[0], logprobs[0]
            token_ids[row, : len(ids)] = ids
            values[row, : len(ids)] = logprobs
            ranks[row] = rank
    return LogprobsLists(token_ids, values, ranks, starts)
