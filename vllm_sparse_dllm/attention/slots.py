# SPDX-License-Identifier: Apache-2.0
"""The pool with a row per slot, shared by all backends but those for CPUs only."""

from __future__ import annotations

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionBackend
from vllm_sparse_dllm.kernels import dtype_name


class SlotBackend(AttentionBackend):
    """A layer's pool is one tensor: the keys of all slots, then the values."""

    def bind_pages(self, layers: list[torch.Tensor]) -> None:
        shape = self.shape
        # [2, slots, kv_heads, head_size]: keys of all slots, then values.
        self._slots = [
            layer.view(self.dtype).view(2, -1, shape.num_kv_heads, shape.head_size)
            for layer in layers
        ]

    def clear(self, page_ids: np.ndarray) -> None:
        """Do nothing: only filled slots are ever read."""

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self._slots[layer][0].index_copy_(0, slots, keys)
        self._slots[layer][1].index_copy_(0, slots, values)

    def read_keys(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        return self._slots[layer][0].index_select(0, slots)

    def read_values(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        return self._slots[layer][1].index_select(0, slots)


class ZeroedSlotBackend(SlotBackend):
    """Zeroes pages for kernels that may multiply what follows a sequence's last slot by 0."""

    def clear(self, page_ids: np.ndarray) -> None:
        pages = torch.from_numpy(np.asarray(page_ids, dtype=np.int64)).to(
            self.device, non_blocking=True
        )
        for slots in self._slots:
            heads_and_channels = slots.shape[2:]
            slots.view(2, -1, self.page_size, *heads_and_channels).index_fill_(1, pages, 0)


def why_not_half_on_cuda(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return what keeps half-precision CUDA libraries from running, None if nothing does."""
    if device.type != "cuda":
        return f"it runs on CUDA devices only, not on {device.type!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its dtypes are float16 and bfloat16, got {dtype_name(dtype)}"
    return None
