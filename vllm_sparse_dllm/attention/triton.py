# SPDX-License-Identifier: Apache-2.0
"""Attention by the Triton kernels of this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.attention.packing import (
    PackedArrays,
    pack,
    pad_sequences,
    row_tiles,
    starts_of,
)
from vllm_sparse_dllm.attention.slots import SlotBackend
from vllm_sparse_dllm.kernels import dtype_name, interpreted, why_unavailable
from vllm_sparse_dllm.kernels.plain import SelectionKernels
from vllm_sparse_dllm.transfer import HostArrays

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_CHANNELS = 256


@dataclass(frozen=True)
class _FullPlan:
    views: tuple[torch.Tensor, ...]
    config: Any


@dataclass(frozen=True)
class TritonPagedPlan:
    """Attention over pages.

    Attributes:
        views: Tiles, query starts, key lengths and page table on the device.
        config: Launch parameters that the tiles were made for.
        num_splits: Programs that share the keys of a tile.
        partial: Work space of the kernels, shared with other plans.
        statistics: Work space of the kernels, shared with other plans.
        num_queries: Most queries of a sequence.
        arrays: The arrays behind ``views`` if the plan is static, else None.
    """

    views: tuple[torch.Tensor, ...]
    config: Any
    num_splits: int
    partial: torch.Tensor
    statistics: torch.Tensor
    num_queries: int
    arrays: PackedArrays | None = None


class TritonBackend(SlotBackend):
    """Triton kernels for attention, page writes and the scoring of keys.

    Nothing waits for the device: plans are sent with a step's other arrays, and `attend_full`,
    `attend_paged`, `write` and `move` only launch kernels, without allocating memory. So they
    can be captured in CUDA graphs, with plans from `static_paged_plan`.
    """

    static_plans = True

    def __init__(
        self, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(shape, page_size, dtype, device)
        # Imported only here because a machine may not have Triton.
        from vllm_sparse_dllm.kernels import full_attention, paged_attention, pages, saliency

        self._full, self._paged, self._pages = full_attention, paged_attention, pages
        self._selection = saliency.TRITON
        self._group = shape.num_heads // shape.num_kv_heads
        self._num_cores = 8
        if device.type == "cuda":
            self._num_cores = torch.cuda.get_device_properties(device).multi_processor_count
        self._space = [self._floats(1), self._floats(1)]

    def _floats(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device)

    @classmethod
    def why_not(
        cls, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        if dtype not in _DTYPES:
            return f"it has no kernels for {dtype_name(dtype)}"
        if shape.head_size > _MOST_CHANNELS:
            return f"its head sizes are at most {_MOST_CHANNELS}, got {shape.head_size}"
        return why_unavailable(device)

    def prepare(self) -> None:
        """Launch each variant of each kernel on tiny inputs; pages keep their contents."""
        if interpreted():
            return
        shape = self.shape
        q = torch.zeros(1, shape.num_heads, shape.head_size, dtype=self.dtype, device=self.device)
        k = q.new_zeros(4, shape.num_kv_heads, shape.head_size)
        one, keys, page = np.array([1]), np.array([4]), np.zeros((1, 1), dtype=np.int64)
        for count in self._full.QUERY_COUNTS:
            config = self._full.choose_config(shape.head_size, self.dtype, count)
            arrays = [row_tiles(one, config.block_m), starts_of(one), starts_of(keys)]
            plan = _FullPlan(pack(arrays, self.device, None), config)
            self.attend_full(q, k, k, q.clone(), plan)
        for count in self._paged.ROW_COUNTS:
            paged_config = self._paged.choose_config(shape.head_size, self.dtype, count)
            tiles = row_tiles(one * self._group, paged_config.block_m)
            arrays = [tiles, starts_of(one), keys, page]
            for num_splits in (1, 2):
                sizes = self._paged.work_space(
                    len(tiles), shape.num_kv_heads, num_splits, paged_config, shape.head_size
                )
                paged_plan = TritonPagedPlan(
                    views=pack(arrays, self.device, None),
                    config=paged_config,
                    num_splits=num_splits,
                    partial=self._floats(sizes[0]),
                    statistics=self._floats(sizes[1]),
                    num_queries=1,
                )
                self.attend_paged(0, q, q.clone(), paged_plan)
        nowhere = torch.full((4,), -1, dtype=torch.int64, device=self.device)
        self.write(0, k, k, nowhere)
        self.move(0, k, k, nowhere, nowhere)
        scores = self.selection.scores(q, k, ((0, 1), (2, 4)))
        # Some saliencies are in float32 whatever the model's dtype.
        for some in (scores, scores.float()):
            for run in (1, self.page_size):
                self.selection.pool(some, 3, run)

    @property
    def selection(self) -> SelectionKernels:
        return self._selection

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Write keys and values to slots; skip those whose slot is below 0."""
        key_slots, value_slots = self._slots[layer].unbind(0)
        self._pages.write_rows(keys, values, slots, key_slots, value_slots)

    def move(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        entries: torch.Tensor,
        slots: torch.Tensor,
        gap: tuple[int, int] = (0, 0),
    ) -> None:
        key_slots, value_slots = self._slots[layer].unbind(0)
        self._pages.write_rows(keys, values, slots, key_slots, value_slots, entries, gap)

    # Whole sequences.

    def plan_full(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _FullPlan:
        num_queries = int(query_lengths.max(initial=0))
        config = self._full.choose_config(self.shape.head_size, self.dtype, num_queries)
        tiles = row_tiles(query_lengths, config.block_m)
        # The longest sequences first, so that the last tiles to run have few keys.
        order = np.argsort(-key_lengths[tiles[:, 0]], kind="stable")
        numbers = [tiles[order], starts_of(query_lengths), starts_of(key_lengths)]
        return _FullPlan(pack(numbers, self.device, arrays), config)

    def attend_full(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: Any,
    ) -> None:
        tiles, query_start, key_start = plan.views
        self._full.full_attention(
            queries,
            keys,
            values,
            output,
            tiles,
            query_start,
            key_start,
            self.scale,
            plan.config,
        )

    # Pages.

    def _launch(
        self, num_queries: int, num_tiles_of: Callable[[int], int], num_keys: int
    ) -> tuple[int, Any, int, tuple[int, int]]:
        """Return the launch parameters of `attend_paged`.

        Args:
            num_queries: Most queries of a sequence.
            num_tiles_of: Returns the number of tiles for a number of rows per tile.
            num_keys: Most keys of a sequence.

        Returns:
            Number of tiles, their config, splits of the keys, sizes of the two work spaces.
        """
        shape = self.shape
        config = self._paged.choose_config(shape.head_size, self.dtype, num_queries * self._group)
        num_tiles = num_tiles_of(config.block_m)
        num_splits = self._paged.choose_splits(
            num_tiles * shape.num_kv_heads, num_keys, self.dtype, self._num_cores
        )
        sizes = self._paged.work_space(
            num_tiles, shape.num_kv_heads, num_splits, config, shape.head_size
        )
        return num_tiles, config, num_splits, sizes

    def _work_space(self, sizes: tuple[int, int]) -> list[torch.Tensor]:
        """Return the two work spaces, which plans share as they run one after another.

        A plan keeps the ones it was given when later plans need larger ones.
        """
        for number, size in enumerate(sizes):
            if self._space[number].shape[0] < size:
                self._space[number] = self._floats(size)
        return list(self._space)

    def plan_paged(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> TritonPagedPlan:
        num_queries = int(query_lengths.max(initial=0))
        _, config, num_splits, sizes = self._launch(
            num_queries,
            lambda rows: int((-(-query_lengths * self._group // rows)).sum()),
            int(key_lengths.max(initial=0)),
        )
        partial, statistics = self._work_space(sizes)
        tiles = row_tiles(query_lengths * self._group, config.block_m)
        numbers = [tiles, starts_of(query_lengths), key_lengths, page_table]
        return TritonPagedPlan(
            views=pack(numbers, self.device, arrays),
            config=config,
            num_splits=num_splits,
            partial=partial,
            statistics=statistics,
            num_queries=num_queries,
        )

    def static_paged_plan(
        self, num_sequences: int, num_queries: int, width: int, arrays: HostArrays | None = None
    ) -> TritonPagedPlan:
        num_tiles, config, num_splits, sizes = self._launch(
            num_queries,
            lambda rows: num_sequences * -(-num_queries * self._group // rows),
            width * self.page_size,
        )
        shapes = [(num_tiles, 2), (num_sequences + 1,), (num_sequences,), (num_sequences, width)]
        packed = PackedArrays(shapes, self.device, arrays)
        partial, statistics = self._work_space(sizes)
        plan = TritonPagedPlan(
            views=packed.views,
            config=config,
            num_splits=num_splits,
            partial=partial,
            statistics=statistics,
            num_queries=num_queries,
            arrays=packed,
        )
        if arrays is None:
            nothing = np.zeros(0, dtype=np.int64)
            self.rewrite_paged_plan(plan, nothing, nothing, np.zeros((0, 0), dtype=np.int64))
        return plan

    def rewrite_paged_plan(
        self,
        plan: TritonPagedPlan,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
    ) -> None:
        assert plan.arrays is not None
        shapes = [view.shape for view in plan.views]
        sequences = pad_sequences(
            shapes[-1], plan.num_queries, query_lengths, key_lengths, page_table
        )
        # The remaining tiles of a static plan belong to no sequence.
        tiles = np.full(shapes[0], -1, np.int32)
        own = row_tiles(query_lengths * self._group, plan.config.block_m)
        tiles[: len(own)] = own
        plan.arrays.rewrite([tiles, *sequences])

    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        tiles, query_start, key_lengths, page_table = plan.views
        key_slots, value_slots = self._slots[layer].unbind(0)
        self._paged.paged_attention(
            queries,
            key_slots,
            value_slots,
            output,
            tiles,
            query_start,
            key_lengths,
            page_table,
            self.page_size,
            self.scale,
            plan.config,
            plan.num_splits,
            plan.partial,
            plan.statistics,
        )
