# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with the diffusion model runner."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment
from vllm.v1.worker.worker_base import CompilationTimes

from vllm_sparse_dllm.engine.cpu_cores import bind_ray_worker
from vllm_sparse_dllm.engine.worker import DiffusionWorker

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


class DiffusionCPUWorker(DiffusionWorker, CPUWorker):
    """The CPU worker."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        if vllm_config.parallel_config.use_ray:
            # vLLM's own executor binds the workers that it starts; Ray's leaves it to them.
            bind_ray_worker()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        # As in `CPUWorker`, which ends by building vLLM's runner and has no hook for another.
        self.device = torch.device("cpu")
        # The threads are bound already; setting their number now would undo that.
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
    """Return a name that only the ranks of one engine on one machine have in common.

    vLLM uses shared memory if all ranks have the same name, and sockets otherwise. Its own names
    (a port, a file) are the same on all machines of an engine.

    Args:
        method: Where the ranks find each other: ``tcp://HOST:PORT`` or ``file://PATH``.
    """
    place = method.removeprefix("file://").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    return f"{place}-{socket.gethostname()}"


def _keep_freed_memory() -> None:
    """Have malloc keep freed memory for the next step instead of returning it to the system.

    glibc maps a large block anew each time it is allocated, so that every activation of a full
    pass starts with page faults, a tenth of the pass's time. Other allocators have no `mallopt`
    or ignore it.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
