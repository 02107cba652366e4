# SPDX-License-Identifier: Apache-2.0
"""What a device has to provide for attention; everything else is device-independent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one tensor-parallel rank.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key/value heads; divides ``num_heads``.
        head_size: Channels of a head. The softmax scale is ``head_size ** -0.5``.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int


class AttentionBackend(ABC):
    """Bidirectional attention over pages, and over keys of the same forward pass.

    Plans are built once per step from host arrays and read by every layer; what they hold is
    the backend's own affair.
    """

    def __init__(
        self, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.scale = shape.head_size**-0.5

    @abstractmethod
    def bind_pages(self, layers: list[torch.Tensor]) -> None:
        """Take the pool: for each layer a flat byte buffer of all its pages."""

    @abstractmethod
    def clear(self, page_ids: np.ndarray) -> None:
        """Make pages fit for a new owner: nothing in them may reach its results.

        A kernel may multiply what lies behind a sequence's last slot by 0, and NaN stays NaN.
        """

    @abstractmethod
    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Write rotated keys and values ``[n, kv_heads, head_size]`` to slots ``[n]``."""

    @abstractmethod
    def read_keys(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Return the keys ``[n, kv_heads, head_size]`` in slots ``[n]``."""

    @abstractmethod
    def read_values(self, layer: int, slots: torch.Tensor) -> torch.Tensor:
        """Return the values ``[n, kv_heads, head_size]`` in slots ``[n]``."""

    @abstractmethod
    def plan_paged(
        self, query_lengths: np.ndarray, key_lengths: np.ndarray, page_table: np.ndarray
    ) -> Any:
        """Plan attention of sequences over their pages.

        Args:
            query_lengths: ``[sequences]``; 0 is allowed.
            key_lengths: ``[sequences]`` filled slots, from a sequence's first on.
            page_table: ``[sequences, width]`` page ids.
        """

    @abstractmethod
    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        """Write attention of ``queries`` ``[n, heads, head_size]`` to ``output``."""

    @abstractmethod
    def plan_full(self, query_lengths: np.ndarray, key_lengths: np.ndarray) -> Any:
        """Plan attention of sequences over keys of the same pass.

        Args:
            query_lengths: ``[sequences]``; 0 is allowed.
            key_lengths: ``[sequences]``.
        """

    @abstractmethod
    def attend_full(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        plan: Any,
    ) -> None:
        """Write attention of ``queries`` over ``keys``, sequence by sequence, to ``output``."""
