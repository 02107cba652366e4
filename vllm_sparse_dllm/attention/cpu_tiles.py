# SPDX-License-Identifier: Apache-2.0
"""Attention on CPU in bfloat16 by this package's kernels, on processors with tiles (AMX).

On such processors, exponentials take most of attention's time; these kernels compute them with
no more instructions than bfloat16 weights need. Pages have the layout that tile products read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.attention.packing import starts_of
from vllm_sparse_dllm.kernels.cpu import PagePool, cpu_kernels, why_no_cpu_kernels
from vllm_sparse_dllm.transfer import HostArrays


@dataclass(frozen=True)
class _PagedPlan:
    query_starts: torch.Tensor
    key_lengths: torch.Tensor
    page_table: torch.Tensor


@dataclass(frozen=True)
class _FullPlan:
    query_starts: torch.Tensor
    key_starts: torch.Tensor


def _starts(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(starts_of(lengths).astype(np.int64, copy=False))


def why_not_pages_on_cpu(page_size: int, device: torch.device) -> str | None:
    """Return what keeps CPU kernels for pages from running, None if nothing does."""
    if device.type != "cpu":
        return f"it is for CPUs, not {device.type}"
    if page_size % 32:
        return f"its page sizes are the multiples of 32, got {page_size}"
    return None


class TileBackend(AttentionBackend):
    """This package's CPU kernels, for pages and for whole sequences."""

    def __init__(
        self, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, page_size, dtype, device)
        kernels = cpu_kernels(dtype)
        assert kernels is not None
        self._kernels = kernels
        self._pools: list[PagePool] = []

    @classmethod
    def why_not(
        cls, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        if (reason := why_not_pages_on_cpu(page_size, device)) is not None:
            return reason
        if shape.head_size % 32:
            return f"its head sizes are the multiples of 32, got {shape.head_size}"
        reason = why_no_cpu_kernels(dtype)
        return None if reason is None else f"its kernels: {reason}"

    def bind_pages(self, layers: list[torch.Tensor]) -> None:
        shape = self.shape
        self._pools = [
            PagePool(layer.view(self.dtype), self.page_size, shape.num_kv_heads, shape.head_size)
            for layer in layers
        ]

    def clear(self, page_ids: np.ndarray) -> None:
        pages = torch.from_numpy(page_ids)
        numbers = 2 * self.page_size * self.shape.num_kv_heads * self.shape.head_size
        for pool in self._pools:
            pool.numbers.view(-1, numbers).index_fill_(0, pages, 0)

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self._kernels.write_pages(self._pools[layer], keys, values, slots)

    def read_keys(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        return self._kernels.read_pages(self._pools[layer], slots, values=False)

    def read_values(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        return self._kernels.read_pages(self._pools[layer], slots, values=True)

    def plan_paged(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _PagedPlan:
        return _PagedPlan(
            _starts(query_lengths),
            torch.from_numpy(key_lengths.astype(np.int64)),
            torch.from_numpy(np.ascontiguousarray(page_table, dtype=np.int32)),
        )

    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        paged = plan.query_starts, plan.key_lengths, plan.page_table
        self._kernels.attend_pages(self._pools[layer], queries, output, *paged, self.scale)

    def plan_full(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _FullPlan:
        return _FullPlan(_starts(query_lengths), _starts(key_lengths))

    def attend_full(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: Any,
    ) -> None:
        starts = plan.query_starts, plan.key_starts
        self._kernels.attend(queries, keys, values, output, *starts, self.scale)
