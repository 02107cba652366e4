# SPDX-License-Identifier: Apache-2.0
"""Attention by the FlashAttention library that vLLM's CUDA builds include."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.attention.packing import PackedArrays, pack, pad_sequences, starts_of
from vllm_sparse_dllm.attention.slots import ZeroedSlotBackend, why_not_half_on_cuda
from vllm_sparse_dllm.kernels import why_unavailable
from vllm_sparse_dllm.transfer import HostArrays

_LIBRARY = "vllm.vllm_flash_attn"
_MOST_CHANNELS = 256


@dataclass(frozen=True)
class _Plan:
    """Arguments of the kernel.

    Attributes:
        views: Query starts, followed by key starts, or by key lengths and page table.
        num_queries: Most queries of a sequence.
        num_keys: Most keys of a sequence.
        arrays: The arrays behind ``views`` if the plan is static, else None.
    """

    views: tuple[torch.Tensor, ...]
    num_queries: int
    num_keys: int
    arrays: PackedArrays | None = None


class FlashAttentionBackend(ZeroedSlotBackend):
    """Non-causal varlen kernels; version 3 on Hopper where the build has it, else 2."""

    static_plans = True

    def __init__(
        self, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, page_size, dtype, device)
        library = importlib.import_module(_LIBRARY)
        self._attend = library.flash_attn_varlen_func
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        self._version = 3 if hopper and library.is_fa_version_supported(3) else 2
        self._write_rows: Callable[..., None] | None = None
        if why_unavailable(device) is None:
            from vllm_sparse_dllm.kernels import pages

            self._write_rows = pages.write_rows

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

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Write keys and values to slots; skip those whose slot is below 0."""
        if self._write_rows is not None:
            self._write_rows(keys, values, slots, *self._slots[layer].unbind(0))
            return
        own = slots >= 0
        somewhere = slots.clamp(min=0)
        for pool, rows in zip(self._slots[layer], (keys, values), strict=True):
            # Skipped rows write back what slot 0 holds; no sequence owns that slot.
            there = pool.index_select(0, somewhere)
            pool.index_copy_(0, somewhere, torch.where(own[:, None, None], rows, there))

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
            # With 1 and grouped heads, version 2 assumes that every sequence has a query.
            max_seqlen_q=max(2, plan.num_queries),
            cu_seqlens_q=query_start,
            max_seqlen_k=plan.num_keys,
            softmax_scale=self.scale,
            causal=False,
            out=output,
            fa_version=self._version,
            **options,
        )

    def plan_full(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _Plan:
        views = pack([starts_of(query_lengths), starts_of(key_lengths)], self.device, arrays)
        return _Plan(views, int(query_lengths.max(initial=0)), int(key_lengths.max(initial=0)))

    def attend_full(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: Any,
    ) -> None:
        query_start, key_start = plan.views
        self._run(queries, keys, values, output, plan, query_start, cu_seqlens_k=key_start)

    def plan_paged(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _Plan:
        views = pack([starts_of(query_lengths), key_lengths, page_table], self.device, arrays)
        return _Plan(views, int(query_lengths.max(initial=0)), int(key_lengths.max(initial=0)))

    def static_paged_plan(
        self, num_sequences: int, num_queries: int, width: int, arrays: HostArrays | None = None
    ) -> _Plan:
        shapes = [(num_sequences + 1,), (num_sequences,), (num_sequences, width)]
        packed = PackedArrays(shapes, self.device, arrays)
        if arrays is None:
            packed.rewrite([np.zeros(shape, dtype=np.int32) for shape in shapes])
        return _Plan(packed.views, num_queries, width * self.page_size, packed)

    def rewrite_paged_plan(
        self,
        plan: _Plan,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
    ) -> None:
        assert plan.arrays is not None
        arrays = pad_sequences(
            plan.views[-1].shape, plan.num_queries, query_lengths, key_lengths, page_table
        )
        plan.arrays.rewrite(arrays)

    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        query_start, key_lengths, page_table = plan.views
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
