# SPDX-License-Identifier: Apache-2.0
"""Measure where an engine step's time goes by wrapping the engine's functions.

The engine core must run in this process. The time of a part excludes the parts nested in it. A
function that is not found is named in the record, and its time counts towards its caller. Wrappers
around the model's modules make a pass measurably slower, so they are active only in detailed runs.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

#: Parts of a step, in order. "other" is the engine core's remaining time; "front end" is vLLM's
#: handling of the outputs, which in the multi-process engine overlaps with the next step.
PARTS = (
    "schedule",
    "batch build",
    "forward",
    "head",
    "denoise",
    "commit",
    "update",
    "other",
    "transport",
    "front end",
)
#: The model's parts: the decoder, and the head that computes logits.
FORWARD_PARTS = ("forward", "head")
#: Parts of the forward, by the last component of a module's name; below, by wrapped methods.
_MODULES = {
    "qkv_proj": "qkv GEMM",
    "o_proj": "output GEMM",
    "gate_up_proj": "gate and up GEMM",
    "down_proj": "down GEMM",
    "rotary": "rotary",
    "attention": "selection and copies",
    "embed_tokens": "embedding",
}
_NORM_METHODS = ("forward", "add_norm")
_BACKEND_METHODS = {
    "write": "cache writes",
    "attend_paged": "attention",
    "attend_full": "attention",
}
FORWARD_DETAILS = (
    "qkv GEMM",
    "rotary",
    "attention",
    "cache writes",
    "selection and copies",
    "output GEMM",
    "norms",
    "gate and up GEMM",
    "down GEMM",
    "embedding",
    "forward",
)


@dataclass
class _Step:
    """One engine step."""

    seconds: dict[str, float] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)
    num_forwards: int = 0
    used_pages: int = 0
    total: float = 0.0


class StepRecorder:
    """Wraps an engine's functions and adds up their times, step by step."""

    def __init__(self, llm: LLM) -> None:
        self.missing: list[str] = []
        self._active = self._detailed = False
        self._steps: list[_Step] = []
        self._inner: list[float] = []
        engine: Any = llm.llm_engine
        client: Any = engine.engine_core
        core = client.engine_core
        self._scheduler = core.scheduler
        self._make_codec()
        runner = engine.model_executor.driver_worker.worker.model_runner
        runner_module = importlib.import_module(type(runner).__module__)

        engine.step = self._whole_step(engine.step)
        core.step_fn = self._with_transport(self._timed(core.step_fn, "other"))
        self._wrap(self._scheduler, "schedule", "schedule", self._note_schedule)
        self._wrap(self._scheduler, "update_from_output", "update")
        self._wrap(runner_module, "build_batch", "batch build")
        self._wrap(runner.model, "forward", "forward", self._note_forward)
        self._wrap(runner.model, "compute_logits", "head")
        self._wrap(runner_module, "plan_step", "denoise")
        self._wrap(runner_module, "denoise", "denoise")
        self._wrap(runner_module, "commit_step", "commit")
        self._wrap_details(runner)

    def start(self, detailed: bool) -> None:
        """Start a new record."""
        self._steps = []
        self._active, self._detailed = True, detailed

    def stop(self) -> dict[str, Any]:
        """Stop recording and return the record, in seconds and bytes."""
        self._active = self._detailed = False
        config = self._scheduler.kv_cache_config
        page_bytes = sum(t.size for t in config.kv_cache_tensors) // config.num_blocks
        return {
            "steps": [
                {
                    "seconds": step.seconds,
                    "total": step.total,
                    "tokens": step.tokens,
                    "num_forwards": step.num_forwards,
                    "cache_bytes": step.used_pages * page_bytes,
                }
                for step in self._steps
            ],
            "page_bytes": page_bytes,
            "missing": self.missing,
        }

    # Wrapping.

    def _wrap(
        self,
        owner: Any,
        name: str,
        part: str,
        note: Callable[[Any], None] | None = None,
        detail: bool = False,
    ) -> None:
        function = getattr(owner, name, None)
        if function is None:
            self.missing.append(f"{getattr(owner, '__name__', type(owner).__name__)}.{name}")
            return
        setattr(owner, name, self._timed(function, part, note, detail))

    def _timed(
        self,
        function: Callable[..., Any],
        part: str,
        note: Callable[[Any], None] | None = None,
        detail: bool = False,
    ) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self._active or not self._inner or (detail and not self._detailed):
                return function(*args, **kwargs)
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                result = function(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                own = elapsed - self._inner.pop()
                self._inner[-1] += elapsed
                seconds = self._steps[-1].seconds
                seconds[part] = seconds.get(part, 0.0) + own
            if note is not None:
                note(result)
            return result

        return timed

    def _whole_step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return function(*args, **kwargs)
            record = _Step()
            self._steps.append(record)
            self._inner = [0.0]
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                record.total = time.perf_counter() - start
                record.seconds["front end"] = record.total - self._inner[0]
                self._inner = []

        return step

    def _note_schedule(self, output: Any) -> None:
        step = self._steps[-1]
        step.tokens = list(output.num_scheduled_tokens.values())
        pool = self._scheduler.kv_cache_manager.block_pool
        # One page of the pool is vLLM's placeholder, which is never free.
        step.used_pages = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def _note_forward(self, output: Any) -> None:
        self._steps[-1].num_forwards += 1

    def _wrap_details(self, runner: Any) -> None:
        for name, module in runner.model.named_modules():
            last = name.rpartition(".")[2]
            if last in _MODULES:
                self._wrap(module, "forward", _MODULES[last], detail=True)
            elif last == "norm" or last.endswith("_norm"):
                for method in _NORM_METHODS:
                    if hasattr(module, method):
                        self._wrap(module, method, "norms", detail=True)
        for method, part in _BACKEND_METHODS.items():
            self._wrap(runner.backend, method, part, detail=True)

    # Transport: in one process there is none, so outputs are encoded and decoded just to time it.

    def _make_codec(self) -> None:
        try:
            from vllm.v1.engine import EngineCoreOutputs
            from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

            self._encoder: Any = MsgpackEncoder()
            self._decoder: Any = MsgpackDecoder(EngineCoreOutputs)
        except ImportError:
            self._encoder = None
            self.missing.append("MsgpackEncoder")

    def _with_transport(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if self._active and self._inner and self._encoder is not None:
                start = time.perf_counter()
                for outputs in (result[0] or {}).values():
                    self._decoder.decode(self._encoder.encode(outputs))
                elapsed = time.perf_counter() - start
                self._inner[-1] += elapsed
                self._steps[-1].seconds["transport"] = elapsed
            return result

        return step
