# SPDX-License-Identifier: Apache-2.0
"""Allocation of the pool of pages."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig


def allocate_pages(
    kv_cache_config: KVCacheConfig, num_layers: int, device: torch.device
) -> list[torch.Tensor]:
    """Allocate the pool as vLLM sized it.

    Returns:
        For each layer its pages as one flat, zeroed byte buffer. On CPU, physical memory is
        taken only when pages are first written.
    """
    layers: dict[str, torch.Tensor] = {}
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    size = spec.page_size_bytes * kv_cache_config.num_blocks
    for tensor in kv_cache_config.kv_cache_tensors:
        if tensor.block_stride != spec.page_size_bytes:
            raise ValueError(
                "the KV cache layout must keep each layer's pages together; unset "
                "VLLM_KV_CACHE_LAYOUT"
            )
        if device.type == "cpu":
            raw = torch.from_numpy(np.zeros(tensor.size, dtype=np.int8))
        else:
            raw = torch.zeros(tensor.size, dtype=torch.int8, device=device)
        for number, name in enumerate(tensor.layers):
            start = tensor.offset + number * tensor.layer_stride
            layers[name] = raw[start : start + size]
    return [layers[f"layers.{index}.self_attn"] for index in range(num_layers)]
