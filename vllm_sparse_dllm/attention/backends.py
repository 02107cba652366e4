# SPDX-License-Identifier: Apache-2.0
"""Which attention a device gets."""

from __future__ import annotations

import torch

from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.attention.portable import PortableBackend


def make_backend(
    shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionBackend:
    """Return the backend for a device."""
    if device.type == "cpu":
        # Only here: the module needs vLLM's CPU build.
        from vllm_sparse_dllm.attention.cpu import CPUBackend

        if CPUBackend.supports(shape, page_size, dtype):
            return CPUBackend(shape, page_size, dtype, device)
    return PortableBackend(shape, page_size, dtype, device)
