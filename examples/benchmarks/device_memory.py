# SPDX-License-Identifier: Apache-2.0
"""An extension of vLLM's worker class that reports on memory and kernels."""

from __future__ import annotations

from typing import Any

import devices
import torch


class DeviceMemory:
    """Mixed into the worker by vLLM's ``worker_extension_cls``."""

    device: torch.device
    model_runner: Any

    def memory_held(self) -> dict[str, int]:
        """Return the bytes of ``weights`` and of the ``pool`` of pages."""
        tensors = [*self.model_runner.model.parameters(), *self.model_runner.model.buffers()]
        pool = self.model_runner.kv_caches
        return {
            "weights": sum(one.numel() * one.element_size() for one in tensors),
            "pool": sum(one.numel() * one.element_size() for one in pool),
        }

    def kernels_in_use(self) -> dict[str, Any]:
        """Return the class name of the ``attention`` backend, and the ``graphs``' batch sizes."""
        graphs = self.model_runner.graphs
        return {
            "attention": type(self.model_runner.backend).__name__,
            "graphs": [] if graphs is None else graphs.sizes,
        }

    def reset_peak_memory(self) -> bool:
        devices.reset_peak_memory(self.device)
        return True

    def peak_memory(self) -> int:
        """Return the peak in bytes since `reset_peak_memory`."""
        return devices.peak_memory(self.device)
