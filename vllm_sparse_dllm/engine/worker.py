# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker with the diffusion model runner, and the base class of all workers.

vLLM's CPU worker must not be imported here: its module replaces `torch.cuda.Stream` and the like by
stand-ins, for the whole process.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from vllm.logger import init_logger
from vllm.utils.gc_utils import freeze_gc_heap, maybe_attach_gc_debug_callback
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sparse_dllm.engine.graphs import CudaCapture
from vllm_sparse_dllm.engine.runner import DiffusionModelRunner

logger = init_logger("vllm." + __name__)

#: Each layer's pages lie together: what the attention kernels and `allocate_pages` expect.
_KV_CACHE_LAYOUT = "LBHNC"


class DiffusionWorker(Worker):
    """Base class of the workers of all devices."""

    model_runner: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The runner is neither of vLLM's; code that reads this flag treats it as the first.
        self.use_v2_model_runner = False

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return [_KV_CACHE_LAYOUT]

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        with self.annotate_profile(scheduler_output):
            return self.model_runner.execute_model(scheduler_output)

    def _make_model_runner(self) -> Any:
        assert self.device is not None
        return DiffusionModelRunner(self.vllm_config, self.device)

    def reset_mm_cache(self) -> None:
        """There are no multimodal inputs."""

    def reset_encoder_cache(self) -> None:
        """There are no encoder inputs."""


class DiffusionGPUWorker(DiffusionWorker):
    """The CUDA worker."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        # The profiling run has prepared the kernels already.
        start = time.perf_counter()
        if sizes := self.model_runner.graph_sizes:
            assert self.device is not None
            free = _free_memory()
            self.model_runner.capture_graphs(CudaCapture(self.device))
            logger.info(
                "Captured block steps of %s sequences in %.1f s; they take %.2f GiB",
                ", ".join(map(str, sizes)),
                time.perf_counter() - start,
                (free - _free_memory()) / (1 << 30),
            )
        set_random_seed(self.model_config.seed)
        # As in vLLM's own worker, after everything has warmed up: report kernels compiled from here
        # on, and exclude the model and the graphs from garbage collection.
        self._maybe_activate_jit_monitor()
        freeze_gc_heap()
        maybe_attach_gc_debug_callback()
        return CompilationTimes(language_model=time.perf_counter() - start, encoder=0.0)


def _free_memory() -> int:
    """Return the device's free bytes as its driver reports them, after emptying PyTorch's cache."""
    torch.accelerator.synchronize()
    torch.accelerator.empty_cache()
    return torch.accelerator.get_memory_info()[0]
