# SPDX-License-Identifier: Apache-2.0
"""Attention by the FlashAttention that vLLM's CUDA builds bring along."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.attention.packing import PackedArrays, pad_sequences, starts_of
from vllm_sparse_dllm.attention.slots import ZeroedSlotBackend, why_not_half_on_cuda

_LIBRARY = "vllm.vllm_flash_attn"
_MOST_CHANNELS = 256


@dataclass(frozen=True)
class _Plan:
    """Arguments of the kernel.

    Attributes:
        arrays: Query starts, then key starts, or key lengths and page table.
        num_queries: Most queries of a sequence.
        num_keys: Most keys of a sequence.
    """

    arrays: PackedArrays
    num_queries: int
    num_keys: int


class FlashAttentionBackend(ZeroedSlotBackend):
    """Varlen kernels without causality; version 3 on Hopper where the build has it, else 2."""

    static_plans = True

    def __init__(
        self, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, page_size, dtype, device)
        library = importlib.import_module(_LIBRARY)
        self._attend = library.flash_attn_varlen_func
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        self._version = 3 if hopper and library.is_fa_version_supported(3) else 2

    @classmethod
    def why_not(
        cls, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        if (reason := why_not_half_on_cuda(dtype, device)) is not None:
            return reason
        if shape.head_size % 8 or shape.head_size > _MOST_CHANNELS:
            return (
                f"its head sizes are the multiples of 8 to {_MOST_CHANNELS}, got {shape.head_size}"
            )
        if page_size % 16:
            return f"its page sizes are the multiples of 16, got block_size={page_size}"
        try:
            library = importlib.import_module(_LIBRARY)
        except ImportError as error:
            return f"this build of vLLM does not have it ({error})"
        return library.fa_version_unsupported_reason(2)

    def _run(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: _Plan,
        query_start: torch.Tensor,
        **options: torch.Tensor,
    ) -> None:
        self._attend(
            q=queries,
            k=keys,
            v=values,
            max_seqlen_q=plan.num_queries,
            cu_seqlens_q=query_start,
            max_seqlen_k=plan.num_keys,
            softmax_scale=self.scale,
            causal=False,
            out=output,
            fa_version=self._version,
            **options,
        )

    def plan_full(self, query_lengths: np.ndarray, key_lengths: np.ndarray) -> _Plan:
        arrays = PackedArrays.of([starts_of(query_lengths), starts_of(key_lengths)], self.device)
        return _Plan(arrays, int(query_lengths.max(initial=0)), int(key_lengths.max(initial=0)))

    def attend_full(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: Any,
    ) -> None:
        query_start, key_start = plan.arrays.views
        self._run(queries, keys, values, output, plan, query_start, cu_seqlens_k=key_start)

    def plan_paged(
        self, query_lengths: np.ndarray, key_lengths: np.ndarray, page_table: np.ndarray
    ) -> _Plan:
        arrays = PackedArrays.of([starts_of(query_lengths), key_lengths, page_table], self.device)
        return _Plan(arrays, int(query_lengths.max(initial=0)), int(key_lengths.max(initial=0)))

    def static_paged_plan(self, num_sequences: int, num_queries: int, width: int) -> _Plan:
        shapes = [(num_sequences + 1,), (num_sequences,), (num_sequences, width)]
        arrays = PackedArrays(shapes, self.device)
        arrays.rewrite([np.zeros(shape, dtype=np.int32) for shape in shapes])
        return _Plan(arrays, num_queries, width * self.page_size)

    def rewrite_paged_plan(
        self,
        plan: _Plan,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
    ) -> None:
        table_shape = plan.arrays.views[-1].shape
        arrays = pad_sequences(
            table_shape, plan.num_queries, query_lengths, key_lengths, page_table
        )
        plan.arrays.rewrite(arrays)

    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        query_start, key_lengths, page_table = plan.arrays.views
        pages = self._slots[layer].view(2, -1, self.page_size, *self._slots[layer].shape[2:])
        self._run(
            queries,
            pages[0],
            pages[1],
            output,
            plan,
            query_start,
            seqused_k=key_lengths,
            block_table=page_table,
        )
