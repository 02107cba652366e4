# SPDX-License-Identifier: Apache-2.0
"""The CUDA worker with its tensors on a CPU: all that differs is where they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from vllm_sparse_dllm.engine.worker import DiffusionGPUWorker


class PretendedWorker(DiffusionGPUWorker):
    """As vLLM's `Worker.init_device` does, less what asks the card."""

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        # The model is made there.
        self.device_config.device = self.device
        torch.accelerator.max_memory_allocated = lambda device=None: 0  # type: ignore[assignment]
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        set_random_seed(self.model_config.seed)
        self.model_runner = self._make_model_runner()

    def _scoped_allocator_max_split(self, max_split_size_mb: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def determine_available_memory(self) -> int:
        # Without the largest step, which takes Triton's interpreter minutes.
        return self.cache_config.kv_cache_memory_bytes
