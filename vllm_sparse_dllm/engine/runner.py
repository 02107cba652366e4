# SPDX-License-Identifier: Apache-2.0
"""The model runner, the same on every device: takes requests, returns committed tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.tasks import SupportedTask
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.workspace import reset_workspace_manager

from vllm_sparse_dllm.attention.backends import make_backend
from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.attention.plan import ForwardPlan
from vllm_sparse_dllm.cache.block_manager import SparseCacheSpec
from vllm_sparse_dllm.cache.pages import allocate_pages
from vllm_sparse_dllm.denoise.fused import greedy_distribution
from vllm_sparse_dllm.denoise.plan import StepPlan, plan_step
from vllm_sparse_dllm.denoise.step import Commits, denoise
from vllm_sparse_dllm.engine.batch import LogitsRows, StepBatch, build_batch
from vllm_sparse_dllm.engine.commit import commit_step, output_of, report
from vllm_sparse_dllm.engine.graphs import MOST_SLOTS, BlockGraphs, Capture, ladder
from vllm_sparse_dllm.engine.output import DiffusionRunnerOutput
from vllm_sparse_dllm.engine.profiling import profile_steps, run_full_pass
from vllm_sparse_dllm.engine.requests import NextStep, RequestState
from vllm_sparse_dllm.kernels.cpu import why_no_cpu_kernels
from vllm_sparse_dllm.models.configs import model_traits
from vllm_sparse_dllm.models.files import check_files
from vllm_sparse_dllm.models.layers import DiffusionDecoder
from vllm_sparse_dllm.settings import EngineSettings, request_settings
from vllm_sparse_dllm.transfer import HostArrays

logger = init_logger("vllm." + __name__)

#: Most logits that exist at a time; sampling needs a few float64 copies of them.
_MAX_LOGITS = 1 << 26


@dataclass(frozen=True)
class _BegunStep:
    """A step on which the network was launched.

    Attributes:
        states: The requests.
        steps: Their steps.
        batch: What was run.
        hidden: ``[n, hidden]`` the network's output.
        planned: Whether ``plan`` is there.
        plan: How tokens are chosen, None if there are none to choose.
    """

    states: list[RequestState]
    steps: list[NextStep]
    batch: StepBatch
    hidden: torch.Tensor
    planned: bool
    plan: StepPlan | None


class DiffusionModelRunner:
    """Keeps the requests' canvases and runs one ragged batch per step, as scheduled."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.cache_config = vllm_config.cache_config
        self.load_config = vllm_config.load_config
        self.device = device
        self.engine_settings = EngineSettings.from_additional_config(vllm_config.additional_config)
        self.traits = model_traits(self.model_config.hf_config)
        self.greedy = greedy_distribution(device)
        self.requests: dict[str, RequestState] = {}
        # As they were when they were preempted, until they are admitted again.
        self.preempted: dict[str, RequestState] = {}
        self.kv_caches: list[torch.Tensor] = []
        self.model_memory_usage = 0
        self.model: DiffusionDecoder
        self.backend: AttentionBackend
        self.arrays = HostArrays(device)
        self.graphs: BlockGraphs | None = None
        # Between `execute_model` and `sample_tokens`: the scheduled requests and their step.
        self._begun: tuple[list[RequestState], _BegunStep | None] | None = None

    # The methods that vLLM's worker calls on a runner.

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
            self.attention_shape,
            self.cache_config.block_size,
            self.dtype,
            self.device,
            self.engine_settings.attention_backend,
        )
        if self.device.type == "cpu" and (reason := why_no_cpu_kernels(self.dtype)) is not None:
            logger.info("Without compiled CPU kernels: %s", reason)

    @property
    def attention_shape(self) -> AttentionShape:
        attention: Any = self.model.layers[0].self_attn
        return AttentionShape(attention.num_heads, attention.num_kv_heads, attention.head_size)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def num_layers(self) -> int:
        return self.model.shape.num_layers

    def get_model(self) -> nn.Module:
        return self.model

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        shape = self.attention_shape
        spec = SparseCacheSpec(
            block_size=self.cache_config.block_size,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            dtype=self.dtype,
            dcp_sharded=False,
            settings=self.engine_settings.decoding,
        )
        return {f"layers.{index}.self_attn": spec for index in range(self.num_layers)}

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager[None] | None = None,
    ) -> None:
        with kv_cache_allocation_context or nullcontext():
            self.kv_caches = allocate_pages(kv_cache_config, self.num_layers, self.device)
        self.backend.bind_pages(self.kv_caches)
        self.backend.prepare()
        # Graphs captured before would write to the previous pages.
        self.graphs = None

    def get_draft_model(self) -> None:
        """Return None: there is no draft model."""

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Reload the weights in place, as vLLM's own runner does.

        Args:
            weights_iterator: Names and weights of a whole checkpoint; None to load from disk.
            weights_path: The checkpoint on disk; None for the model's own.
            is_checkpoint_format: Whether the weights are as in a checkpoint. Otherwise they are as
                in the layers, which is refused on a CPU, whose layers keep only packed weights.

        Raises:
            ValueError: If the format is refused, or if weights do not fit the model or are
                missing, which leaves it unusable.
        """
        if not is_checkpoint_format and self.device.type == "cpu":
            raise ValueError("is_checkpoint_format must be True on a CPU, got False")
        reload_weights(
            self.vllm_config,
            self.model,
            weights_iterator=weights_iterator,
            weights_path=weights_path,
            is_checkpoint_format=is_checkpoint_format,
        )
        self.model.process_tied_head()

    def shutdown(self) -> None:
        """Forget all requests, and release the device's memory."""
        self.requests.clear()
        self.preempted.clear()
        self.graphs = None
        self.kv_caches = []
        for name in ("backend", "model"):
            self.__dict__.pop(name, None)
        # vLLM keeps these for the next model of the process: rotary tables and workspaces.
        _ROPE_DICT.clear()
        reset_workspace_manager()

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    @torch.inference_mode()
    def profile_run(self, randomize_inputs: bool = False) -> None:
        """Run the costliest steps once, so that vLLM sees the memory they take."""
        profile_steps(self)

    @torch.inference_mode()
    def warming_up_model(self) -> None:
        """Run a small step once, so that kernels are prepared before memory is counted."""
        run_full_pass(self, min(64, self.vllm_config.scheduler_config.max_num_batched_tokens))

    @torch.inference_mode()
    def _dummy_run(self, num_tokens: int, **kwargs: object) -> None:
        # Data parallelism runs this on a rank that has nothing to do.
        run_full_pass(self, num_tokens)

    @property
    def graph_sizes(self) -> list[int]:
        """Batch sizes of the block steps to capture, in sequences; empty to capture none."""
        config = self.model_config
        if config.enforce_eager or not self.backend.static_plans:
            return []
        return ladder(
            self.vllm_config.scheduler_config.max_num_seqs,
            self.engine_settings.decoding.block_length,
            getattr(config, "graph_tokens", None),
            getattr(config, "most_graph_tokens", None),
        )

    @torch.inference_mode()
    def capture_graphs(self, capture: Capture, sizes: list[int] | None = None) -> None:
        """Capture block steps; the pages must have been allocated.

        Args:
            capture: Captures on the device.
            sizes: Batch sizes in sequences; None for `graph_sizes`.
        """
        sizes = self.graph_sizes if sizes is None else sizes
        if sizes:
            most_slots = min(self.model_config.max_model_len, MOST_SLOTS)
            self.graphs = BlockGraphs(
                self._run_model,
                capture,
                self.backend,
                sizes,
                self.engine_settings.decoding.block_length,
                -(-most_slots // self.cache_config.block_size),
                self.model.shape.hidden_size,
            )

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: object = None
    ) -> DiffusionRunnerOutput | None:
        """Run the scheduled requests for one step, or for up to ``max_steps``.

        Returns:
            None if a grammar constrains some of them: vLLM then calls `sample_tokens`, with the
            masks that it has computed in the meantime.
        """
        self._update_requests(scheduler_output)
        names = list(scheduler_output.num_scheduled_tokens)
        states = [self.requests[name] for name in names]
        # A request whose given canvas has no mask is finished before its first step.
        running = [state for state in states if not state.finished]
        if getattr(scheduler_output, "constrained", ()):
            self._begun = states, self._begin_step(running, [s.next_step() for s in running])
            return None
        output = output_of(names)
        max_steps = getattr(scheduler_output, "max_steps", 1)
        for number in range(1, max_steps + 1 if running else 1):
            steps = [state.next_step() for state in running]
            commits = self.run_step(running, steps)
            commit_step(running, steps, commits, output, self.model.shape.vocab_size)
            output.num_steps = number
            if output.failed or not all(state.continues_alone for state in states):
                break
        report(states, output)
        return output

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> DiffusionRunnerOutput:
        """Choose and commit the tokens of the step that `execute_model` has begun."""
        assert self._begun is not None and grammar_output is not None
        (states, begun), self._begun = self._begun, None
        names, masks = (
            grammar_output.structured_output_request_ids,
            grammar_output.grammar_bitmask,
        )
        for name, mask in zip(names, masks, strict=True):
            self.requests[name].allowed_tokens = mask
        output = output_of([state.request_id for state in states])
        if begun is not None:
            commits = self._finish_step(begun)
            vocab_size = self.model.shape.vocab_size
            commit_step(begun.states, begun.steps, commits, output, vocab_size)
        report(states, output)
        return output

    def _update_requests(self, scheduler_output: SchedulerOutput) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self.requests.pop(request_id, None)
            self.preempted.pop(request_id, None)
        for request_id in scheduler_output.preempted_req_ids or ():
            if (state := self.requests.pop(request_id, None)) is not None:
                self.preempted[request_id] = state
        for new in scheduler_output.scheduled_new_reqs:
            self.requests[new.req_id] = self._new_request(new)
        running = scheduler_output.scheduled_cached_reqs
        for request_id, page_ids in zip(running.req_ids, running.new_block_ids, strict=True):
            if page_ids is not None:
                self.backend.clear(np.array(page_ids[0]))
                self.requests[request_id].add_pages(page_ids[0])

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
        state = RequestState(
            new.prompt_token_ids,
            settings,
            sampling,
            self.traits,
            page_ids,
            self.cache_config.block_size,
            self.num_layers,
            torch.Generator(self.device).manual_seed(seed % 2**63),
            delivered=(new.prefill_token_ids or [])[len(new.prompt_token_ids) :],
            request_id=new.req_id,
        )
        if (before := self.preempted.pop(new.req_id, None)) is not None:
            state.follow(before)
        return state

    def run_step(self, states: list[RequestState], steps: list[NextStep]) -> Commits | None:
        """Run a step of each request; return None if none has anything to commit."""
        begun = self._begin_step(states, steps, planned=True)
        return self._finish_step(begun) if begun is not None else None

    def _begin_step(
        self, states: list[RequestState], steps: list[NextStep], planned: bool = False
    ) -> _BegunStep | None:
        """Launch the network on a step of each request, None if there are no requests.

        Args:
            states: The requests.
            steps: Their next steps.
            planned: Whether the choice of tokens is planned now, so that all data for the device
                is sent at once.
        """
        if not states:
            return None
        batch = build_batch(states, steps, self.backend, self.arrays, self.graphs)
        plan = self._plan_of(states, steps, batch) if planned else None
        # Send everything that the device needs for this step at once.
        batch.arrays.send()
        if batch.replay is None:
            hidden = self._run_model(batch.input_ids, batch.positions, batch.plan)
        else:
            hidden = batch.replay()
        return _BegunStep(states, steps, batch, hidden, planned, plan)

    def _finish_step(self, begun: _BegunStep) -> Commits | None:
        """Choose the tokens of a step; None if there is nothing to choose."""
        batch, plan = begun.batch, begun.plan
        if not begun.planned:
            plan = self._plan_of(begun.states, begun.steps, batch)
            batch.arrays.send()
        if plan is None:
            return None
        return denoise(
            partial(self.logits_of, begun.hidden, batch.logits),
            plan,
            self.traits.mask_token_id,
            self.traits.sampler,
            batch.arrays,
            self.greedy,
        )

    def _plan_of(
        self, states: list[RequestState], steps: list[NextStep], batch: StepBatch
    ) -> StepPlan | None:
        candidates = [
            state.candidates_of(step)
            for state, step in zip(states, steps, strict=True)
            if len(step.candidates)
        ]
        if not candidates:
            return None
        fused = self.greedy is not None
        return plan_step(candidates, self.max_logits_rows, batch.arrays, fused)

    def _run_model(
        self, input_ids: torch.Tensor, positions: torch.Tensor, plan: ForwardPlan
    ) -> torch.Tensor:
        with set_forward_context(None, self.vllm_config):
            return self.model(input_ids, positions, plan=plan)

    @property
    def max_logits_rows(self) -> int:
        """Most rows of logits that exist at a time."""
        return max(1, _MAX_LOGITS // self.model.shape.vocab_size)

    def logits_of(
        self,
        hidden: torch.Tensor,
        of: LogitsRows,
        start: int,
        end: int,
        index: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return logits of a step's candidates, guided if the request asks for it (`LogitsOf`).

        Args:
            hidden: ``[n, hidden]`` states of the step.
            of: The rows whose logits the step needs.
            start: First candidate.
            end: Candidate after the last.
            index: ``[m]`` the candidates to return, counted from ``start``; None for all.
        """
        rows = of.rows[start:end]
        logits = self._head(hidden, rows if index is None else rows.index_select(0, index))
        first, last = np.searchsorted(of.guided_candidates, (start, end)).tolist()
        if first == last:
            return logits
        # Unconditional rows follow all candidates, in the order of the guided ones.
        rows, weights = of.rows[of.num + first : of.num + last], of.guidance[first:last]
        guided = of.guided[first:last] - start
        if index is not None:
            # The candidates are of one request, so all of them are guided.
            rows, weights = rows.index_select(0, index), weights.index_select(0, index)
            guided = torch.arange(index.shape[0], device=index.device)
        unconditional = self._head(hidden, rows).float()
        logits = logits.float()
        difference = logits.index_select(0, guided) - unconditional
        return logits.index_copy(
            0, guided, unconditional + (weights.unsqueeze(-1) + 1) * difference
        )

    def _head(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model.compute_logits(hidden.index_select(0, rows))
        assert logits is not None
        return logits
