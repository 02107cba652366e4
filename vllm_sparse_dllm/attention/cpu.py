# SPDX-License-Identifier: Apache-2.0
"""Attention on CPU, by vLLM's paged kernel.

The kernel reads keys only from pages. Where `backends` chooses it, it is faster than
scaled_dot_product_attention for whole sequences too; so unless `cpu_rows` has a faster kernel,
the keys of a full forward are written to scratch pages, one layer's worth that every layer
overwrites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from vllm_sparse_dllm.attention.cpu_rows import RowAttention, RowPlan
from vllm_sparse_dllm.attention.cpu_tiles import why_not_pages_on_cpu
from vllm_sparse_dllm.attention.interface import AttentionBackend, AttentionShape
from vllm_sparse_dllm.kernels import dtype_name
from vllm_sparse_dllm.transfer import HostArrays


class _Cells:
    """The layout of a head's part of a page, of its keys or of its values.

    Args:
        numbers: ``[page_size, head_size]`` flat offset of each number in that part.
    """

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers
        plain = torch.arange(numbers.numel())
        self.plain = torch.equal(numbers.flatten(), plain)
        self.transposed = torch.equal(numbers.T.flatten(), plain)


@dataclass(frozen=True)
class _PagedPlan:
    query_start: torch.Tensor
    key_lengths: torch.Tensor
    page_table: torch.Tensor
    metadata: torch.Tensor


@dataclass(frozen=True)
class _FullPlan:
    paged: _PagedPlan
    slots: torch.Tensor
    num_pages: int
    #: Scratch pages that are not filled to their end, where numbers of an earlier step remain.
    ragged_pages: torch.Tensor


class CPUBackend(AttentionBackend):
    """vLLM's CPU attention kernel, without a causal mask."""

    def __init__(
        self, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, page_size, dtype, device)
        self._isa = _get_attn_isa(dtype, page_size, shape.head_size)
        self._pools: list[torch.Tensor] = []
        self._pages: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._rows: RowAttention | None = None
        if RowAttention.supports(shape, dtype):
            self._rows = RowAttention(self.scale)
        self._scratch_pool = self._zeros(1)
        self._scratch = self._split(self._scratch_pool)
        self._key_cells, self._value_cells = self._find_cells()

    @classmethod
    def why_not(
        cls, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        if (reason := why_not_pages_on_cpu(page_size, device)) is not None:
            return reason
        head_sizes = CPUAttentionBackend.get_supported_head_sizes()
        if shape.head_size not in head_sizes:
            return f"its head sizes are {', '.join(map(str, head_sizes))}, got {shape.head_size}"
        if dtype not in CPUAttentionBackend.supported_dtypes:
            return f"it has no kernels for {dtype_name(dtype)}"
        return None

    def _zeros(self, num_pages: int) -> torch.Tensor:
        shape = self.shape
        return torch.zeros(
            num_pages, shape.num_kv_heads, self.page_size * 2, shape.head_size, dtype=self.dtype
        )

    @staticmethod
    def _split(pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = pages.chunk(2, dim=2)
        return keys, values

    def bind_pages(self, layers: list[torch.Tensor]) -> None:
        shape = self.shape
        self._pools = [
            layer.view(self.dtype).view(-1, shape.num_kv_heads, self.page_size * 2, shape.head_size)
            for layer in layers
        ]
        self._pages = [self._split(pool) for pool in self._pools]

    def clear(self, page_ids: np.ndarray) -> None:
        pages = torch.from_numpy(page_ids)
        for pool in self._pools:
            pool.index_fill_(0, pages, 0)

    def _write(
        self,
        pages: tuple[torch.Tensor, torch.Tensor],
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        ops.cpu_attn_reshape_and_cache(keys, values, pages[0], pages[1], slots, self._isa)

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        self._write(self._pages[layer], keys, values, slots)

    def _find_cells(self) -> tuple[_Cells, _Cells]:
        """Find out how the kernel lays out keys and values within a head's part of a page.

        The layout is internal to the kernel and differs between instruction sets, so known
        numbers are written and then located.

        Returns:
            Cells of keys, and of values.
        """
        page, size = self.page_size, self.shape.head_size
        numbers = torch.arange(page * size).view(page, 1, size)
        found = torch.zeros(2, page * size, dtype=torch.int64)
        # Digits to base 128, which every dtype represents exactly.
        for place in (1, 1 << 7, 1 << 14):
            digits = (numbers // place % 128).to(self.dtype)
            digits = digits.expand(page, self.shape.num_kv_heads, size).contiguous()
            self._write(self._scratch, digits, digits, torch.arange(page))
            for number, cells in enumerate(self._scratch):
                found[number] += cells[0, 0].reshape(-1).long() * place
        self._scratch_pool.zero_()
        keys, values = (_Cells(torch.argsort(numbers).view(page, size)) for numbers in found)
        return keys, values

    def read_keys(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        return self._read(self._pages[layer][0], self._key_cells, slots)

    def read_values(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        return self._read(self._pages[layer][1], self._value_cells, slots)

    def _read(self, part: torch.Tensor, cells: _Cells, slots: torch.Tensor) -> torch.Tensor:
        page, size = self.page_size, self.shape.head_size
        pages, offsets = slots // page, slots % page
        # The gather of single numbers below takes several times as long as these two cases.
        if cells.plain:
            return part[pages, :, offsets]
        if cells.transposed:
            pages, rows = torch.unique(pages, return_inverse=True)
            whole = part.index_select(0, pages).view(len(pages), part.shape[1], size, page)
            whole = whole.permute(0, 3, 1, 2).reshape(len(pages) * page, part.shape[1], size)
            return whole.index_select(0, rows * page + offsets)
        numbers = part.flatten(2)[pages.unsqueeze(-1), :, cells.numbers[offsets]]
        return numbers.transpose(1, 2).contiguous()

    def plan_paged(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _PagedPlan:
        # Sequences without queries have nothing to compute and are not passed to the kernel.
        active = query_lengths > 0
        query_start = np.zeros(int(active.sum()) + 1, dtype=np.int32)
        np.cumsum(query_lengths[active], out=query_start[1:])
        query_start_tensor = torch.from_numpy(query_start)
        key_lengths_tensor = torch.from_numpy(key_lengths[active].astype(np.int32))
        shape = self.shape
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(query_start) - 1,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_size,
            seq_lens=key_lengths_tensor,
            dtype=self.dtype,
            query_start_loc=query_start_tensor,
            causal=False,
            sliding_window_size=-1,
            isa=self._isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        table = torch.from_numpy(np.ascontiguousarray(page_table[active], dtype=np.int32))
        return _PagedPlan(query_start_tensor, key_lengths_tensor, table, metadata)

    def _attend(
        self,
        pages: tuple[torch.Tensor, torch.Tensor],
        queries: torch.Tensor,
        output: torch.Tensor,
        plan: _PagedPlan,
    ) -> None:
        ops.cpu_attention_with_kv_cache(
            query=queries,
            key_cache=pages[0],
            value_cache=pages[1],
            output=output,
            query_start_loc=plan.query_start,
            seq_lens=plan.key_lengths,
            scale=self.scale,
            causal=False,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=plan.page_table,
            softcap=0.0,
            scheduler_metadata=plan.metadata,
            s_aux=None,
        )

    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        self._attend(self._pages[layer], queries, output, plan)

    def plan_full(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _FullPlan | RowPlan:
        if self._rows is not None:
            return RowPlan.of(query_lengths, key_lengths)
        page_counts = -(-key_lengths // self.page_size)
        first_pages = np.concatenate(([0], np.cumsum(page_counts)))
        table = first_pages[:-1, None] + np.arange(page_counts.max())
        slots = np.concatenate(
            [
                np.arange(first * self.page_size, first * self.page_size + length)
                for first, length in zip(first_pages, key_lengths, strict=False)
            ]
        )
        # Entries of the table after a sequence's own pages are never read.
        table = np.minimum(table, first_pages[-1] - 1)
        return _FullPlan(
            self.plan_paged(query_lengths, key_lengths, table),
            torch.from_numpy(slots.astype(np.int64)),
            int(first_pages[-1]),
            torch.from_numpy(first_pages[1:][key_lengths % self.page_size > 0] - 1),
        )

    def attend_full(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: Any,
    ) -> None:
        if self._rows is not None:
            self._rows.attend(queries, keys, values, output, plan)
            return
        if self._scratch[0].shape[0] < plan.num_pages:
            self._scratch_pool = self._zeros(plan.num_pages)
            self._scratch = self._split(self._scratch_pool)
        self._scratch_pool.index_fill_(0, plan.ragged_pages, 0)
        self._write(self._scratch, keys, values, plan.slots)
        self._attend(self._scratch, queries, output, plan.paged)
