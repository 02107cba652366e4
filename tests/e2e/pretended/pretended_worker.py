# SPDX-License-Identifier: Apache-2.0
"""The CUDA worker with its tensors on a CPU: all that differs is where they are."""

from __future__ import annotations

import torch
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from vllm_sparse_dllm.engine.worker import DiffusionGPUWorker


class PretendedWorker(DiffusionGPUWorker):
    """As vLLM's `Worker.init_device` does, less what asks the card."""

    def init_device(self) -> None:
        self.device = torch.device("cpu")
        init_worker_distributed_environment(
            self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
        )
        set_random_seed(self.model_config.seed)
        self.model_runner = self._make_model_runner()
