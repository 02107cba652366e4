# SPDX-License-Identifier: Apache-2.0
"""Attention in plain PyTorch: any device, any head size, one call per sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from vllm_sparse_dllm.attention.slots import SlotBackend
from vllm_sparse_dllm.transfer import HostArrays


@dataclass(frozen=True)
class _PagedPlan:
    #: For each sequence with queries: rows [start, end), and the slots of its keys.
    sequences: tuple[tuple[int, int, torch.Tensor], ...]


@dataclass(frozen=True)
class _FullPlan:
    #: For each sequence with queries: rows [q0, q1) and keys [k0, k1).
    sequences: tuple[tuple[int, int, int, int], ...]


class PortableBackend(SlotBackend):
    """scaled_dot_product_attention over gathered keys."""

    def plan_paged(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _PagedPlan:
        own = arrays or HostArrays(self.device)
        ends = np.cumsum(query_lengths)
        sequences = []
        for index in np.flatnonzero(query_lengths):
            slots = page_table[index][:, None] * self.page_size + np.arange(self.page_size)
            slots = slots.reshape(-1)[: key_lengths[index]]
            start = int(ends[index] - query_lengths[index])
            sequences.append((start, int(ends[index]), own.put(slots)))
        if arrays is None:
            own.send()
        return _PagedPlan(tuple(sequences))

    def _attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        grouped = self.shape.num_heads != self.shape.num_kv_heads
        return F.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            scale=self.scale,
            enable_gqa=grouped,
        )[0].transpose(0, 1)

    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        keys, values = self._slots[layer]
        for start, end, slots in plan.sequences:
            output[start:end] = self._attend(
                queries[start:end], keys.index_select(0, slots), values.index_select(0, slots)
            )

    def plan_full(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> _FullPlan:
        query_ends, key_ends = np.cumsum(query_lengths), np.cumsum(key_lengths)
        return _FullPlan(
            tuple(
                (
                    int(query_ends[i] - query_lengths[i]),
                    int(query_ends[i]),
                    int(key_ends[i] - key_lengths[i]),
                    int(key_ends[i]),
                )
                for i in np.flatnonzero(query_lengths)
            )
        )

    def attend_full(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: Any,
    ) -> None:
        for q0, q1, k0, k1 in plan.sequences:
            output[q0:q1] = self._attend(queries[q0:q1], keys[k0:k1], values[k0:k1])
