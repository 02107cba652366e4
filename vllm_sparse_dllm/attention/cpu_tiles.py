# SPDX-License-Identifier: Apache-2.0
"""Attention on CPU in bfloat16, over the keys of the same pass, by our own kernel.

It multiplies in the processor's tiles (AMX), where exponentials are the larger part of the time,
and takes them with as few instructions as bfloat16 weights need: 1.5 times the rate of `cpu_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.kernels.cpu import cpu_kernels


@dataclass(frozen=True)
class TilePlan:
    """Where sequences lie.

    Attributes:
        query_starts: ``[sequences + 1]`` first query of each, and the end of the last.
        key_starts: The same of keys.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor


class TileAttention:
    """Our own kernel, as `cpu_rows.RowAttention` has vLLM's."""

    def __init__(self, dtype: torch.dtype, scale: float) -> None:
        kernels = cpu_kernels(dtype)
        assert kernels is not None
        self._kernels = kernels
        self._scale = scale

    @staticmethod
    def supports(shape: AttentionShape, dtype: torch.dtype) -> bool:
        """Return whether the kernel can be had here."""
        kernels = cpu_kernels(dtype)
        return kernels is not None and kernels.attends and shape.head_size % 32 == 0

    def plan(self, query_lengths: np.ndarray, key_lengths: np.ndarray) -> TilePlan:
        """Plan attention of sequences; 0 queries are allowed."""
        starts = np.zeros((2, len(key_lengths) + 1), dtype=np.int64)
        np.cumsum((query_lengths, key_lengths), axis=1, out=starts[:, 1:])
        return TilePlan(*torch.from_numpy(starts))

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: TilePlan,
    ) -> None:
        """Write attention of ``queries`` over ``keys``, sequence by sequence, to ``output``."""
        starts = plan.query_starts, plan.key_starts
        self._kernels.attend(queries, keys, values, output, *starts, self._scale)
