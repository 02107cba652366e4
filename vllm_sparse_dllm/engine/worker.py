# SPDX-License-Identifier: Apache-2.0
"""vLLM's workers with the diffusion model runner in them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import time
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker, init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sparse_dllm.engine.cpu_cores import bind_ray_worker
from vllm_sparse_dllm.engine.graphs import CudaCapture
from vllm_sparse_dllm.engine.runner import DiffusionModelRunner

logger = init_logger(__name__)

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4

#: Each layer's pages lie together: what the attention kernels and `allocate_pages` expect.
_KV_CACHE_LAYOUT = "LBHNC"


class _DiffusionWorker(Worker):
    """What the workers of all devices share."""

    model_runner: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # It is neither of vLLM's runners; what depends on this flag follows the first's way.
        self.use_v2_model_runner = False

    def get_supported_kv_cache_layouts(self) -> list[str]:
        return [_KV_CACHE_LAYOUT]

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        return self.model_runner.execute_model(scheduler_output)

    def _make_model_runner(self) -> Any:
        assert self.device is not None
        return DiffusionModelRunner(self.vllm_config, self.device)

    def reset_mm_cache(self) -> None:
        """There are no multimodal inputs."""

    def reset_encoder_cache(self) -> None:
        """There are no encoder inputs."""


class DiffusionGPUWorker(_DiffusionWorker):
    """The CUDA worker."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        # The profile run has prepared the kernels.
        start = time.perf_counter()
        if sizes := self.model_runner.graph_sizes:
            assert self.device is not None
            with DeviceMemoryProfiler() as profiler:
                self.model_runner.capture_graphs(CudaCapture(self.device))
            logger.info(
                "Captured block steps of %s sequences in %.1f s; they take %.2f GiB",
                ", ".join(map(str, sizes)),
                time.perf_counter() - start,
                profiler.consumed_memory / (1 << 30),
            )
        set_random_seed(self.model_config.seed)
        return CompilationTimes(language_model=time.perf_counter() - start, encoder=0.0)


class DiffusionCPUWorker(_DiffusionWorker, CPUWorker):
    """The CPU worker."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if vllm_config.parallel_config.use_ray:
            # vLLM's own executor binds its workers as it starts them; Ray's leaves it to them.
            bind_ray_worker()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        # As CPUWorker does, which builds vLLM's runner at its end and leaves no hook for another.
        self.device = torch.device("cpu")
        # The executor bound the threads; a later change would undo it.
        torch.set_num_threads = lambda num: None  # type: ignore[assignment]
        os.environ["VLLM_DIST_IDENT"] = shared_memory_name(self.distributed_init_method)
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        self.model_runner = self._make_model_runner()

    def compile_or_warm_up_model(self) -> CompilationTimes:
        times = super().compile_or_warm_up_model()
        _keep_freed_memory()
        return times


def shared_memory_name(method: str) -> str:
    """Return what ranks of one engine on one machine agree on, and no others.

    vLLM exchanges by shared memory where all ranks have the same name, over sockets elsewhere. Its
    own names (a port, a file) are the same on all machines of an engine.

    Args:
        method: Where the ranks find each other: ``tcp://HOST:PORT`` or ``file://PATH``.
    """
    place = method.removeprefix("file://").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return f"{place}-{socket.gethostname()}"


def _keep_freed_memory() -> None:
    """Have malloc keep what is freed for the next step, instead of giving it back.

    glibc maps large blocks anew each time they are allocated, so that every activation of a
    full pass starts with page faults: a tenth of its time. Other allocators have no `mallopt`
    or take no notice.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
