# SPDX-License-Identifier: Apache-2.0
"""The CUDA worker, on the device that `apart` simulates."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from apart import Captured, apart, move
from vllm.v1.worker import gpu_worker

from vllm_sparse_dllm.engine import runner, worker
from vllm_sparse_dllm.engine.worker import DiffusionGPUWorker

MEMORY = 8 << 30
#: Results of the functions that would ask the GPU.
ANSWERS: dict[str, Any] = {
    "device_count": 1,
    "set_device_index": None,
    "synchronize": None,
    "empty_cache": None,
    "empty_host_cache": None,
    "get_memory_info": (MEMORY, MEMORY),
    "memory_stats": {},
    "memory_reserved": 0,
    "max_memory_allocated": MEMORY // 2,
    "reset_peak_memory_stats": None,
}


def answering(answer: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer


class PretendedWorker(DiffusionGPUWorker):
    """Does everything that vLLM's `Worker` does, except asking the GPU."""

    def init_device(self) -> None:
        # Importing it replaces functions for streams and memory by placeholders, even on a GPU.
        assert "vllm.v1.worker.cpu_worker" not in sys.modules
        for owner in (torch.accelerator, torch.cuda):
            for name, answer in ANSWERS.items():
                if hasattr(owner, name):
                    setattr(owner, name, answering(answer))
        # Few: profiling samples from the maximum number of logits, here in Triton's interpreter.
        runner._MAX_LOGITS = 1 << 13
        connect = gpu_worker.init_worker_distributed_environment
        gpu_worker.init_worker_distributed_environment = lambda *args: connect(*args[:-1], "gloo")
        self.captured = Captured()
        worker.CudaCapture = answering(self.captured)  # type: ignore[misc, assignment]
        self._device = ExitStack()
        self._device.enter_context(apart())
        super().init_device()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        # Load on the host, then move: parameters that vLLM creates are not `DeviceTensor`.
        there, self.device_config.device = self.device_config.device, torch.device("cpu")
        super().load_model(*args, **kwargs)
        self.device_config.device = there
        move(self.model_runner.model)

    def determine_available_memory(self) -> int:
        # First as if no size were given: what remains of the GPU's memory.
        cache = self.cache_config
        said, cache.kv_cache_memory_bytes = cache.kv_cache_memory_bytes, None
        assert 0 < super().determine_available_memory() < MEMORY
        cache.kv_cache_memory_bytes = said
        return super().determine_available_memory()

    def execute_model(self, scheduler_output: Any) -> Any:
        before = self.captured.num_replayed
        output = super().execute_model(scheduler_output)
        if self.captured.num_replayed > before:
            # Flushed at once: vLLM may kill this process as soon as there is nothing left to do.
            print(f"replayed {self.captured.num_replayed} steps", flush=True)
        return output

    def _scoped_allocator_max_split(self, max_split_size_mb: int) -> AbstractContextManager[Any]:
        return nullcontext()
