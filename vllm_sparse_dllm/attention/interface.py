# SPDX-License-Identifier: Apache-2.0
"""What a device has to provide for attention; everything else is device-independent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_sparse_dllm.kernels.plain import PLAIN, SelectionKernels
from vllm_sparse_dllm.transfer import HostArrays


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

    Attributes:
        static_plans: Whether there are plans that can be rewritten in place, which CUDA graphs
            need: see `static_paged_plan`. Then a slot below 0 is written nowhere, and `write`
            and `attend_paged` launch the same whatever the numbers in their tensors are.
    """

    static_plans: ClassVar[bool] = False

    def __init__(
        self, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.page_size = page_size
        self.dtype = dtype
        self.device = device
        self.scale = shape.head_size**-0.5

    @classmethod
    def why_not(
        cls, shape: AttentionShape, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Return what keeps the backend from running, None if nothing is known to."""
        return None

    @abstractmethod
    def bind_pages(self, layers: list[torch.Tensor]) -> None:
        """Take the pool: for each layer a flat byte buffer of all its pages."""

    def prepare(self) -> None:  # noqa: B027 (most have nothing to compile)
        """Compile what steps may launch, once pages are bound, so that no step waits for it."""

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

    @property
    def selection(self) -> SelectionKernels:
        """How keys are scored and scores pooled here."""
        return PLAIN

    def move(
        self,
        layer: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        entries: torch.Tensor,
        slots: torch.Tensor,
        gap: tuple[int, int] = (0, 0),
    ) -> None:
        """Write some of the keys and values of a sequence to slots.

        Args:
            layer: 0-based layer.
            keys: ``[positions, kv_heads, head_size]``, rotated.
            values: ``[positions, kv_heads, head_size]``.
            entries: ``[n]`` which positions, counted without those of the gap.
            slots: ``[n]`` where each goes.
            gap: Start and length of the positions that entries do not count.
        """
        start, length = gap
        if length:
            entries = torch.where(entries < start, entries, entries + length)
        self.write(layer, keys.index_select(0, entries), values.index_select(0, entries), slots)

    @abstractmethod
    def plan_paged(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> Any:
        """Plan attention of sequences over their pages.

        Args:
            query_lengths: ``[sequences]``; 0 is allowed.
            key_lengths: ``[sequences]`` filled slots, from a sequence's first on.
            page_table: ``[sequences, width]`` page ids.
            arrays: What the plan has for the device goes along with these, and they are sent
                before the plan is used; None: it is sent at once.
        """

    @abstractmethod
    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        """Write attention of ``queries`` ``[n, heads, head_size]`` to ``output``."""

    def static_paged_plan(
        self, num_sequences: int, num_queries: int, width: int, arrays: HostArrays | None = None
    ) -> Any:
        """Return a plan that `rewrite_paged_plan` fills, whose tensors never move.

        Which kernels `attend_paged` launches with it, on which tensors and with how many
        programs, is fixed by these three numbers, so that it can be captured once and replayed.
        Memory it needs is allocated here.

        Args:
            num_sequences: Most sequences.
            num_queries: Most queries of a sequence.
            width: Most pages of a sequence.
            arrays: The plan keeps its places among these. Then it holds nothing until it is
                filled and they are sent; without them it holds no sequence, and
                `rewrite_paged_plan` sends by itself.
        """
        raise NotImplementedError(f"{type(self).__name__} has no static plans")

    def rewrite_paged_plan(
        self,
        plan: Any,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
    ) -> None:
        """Fill a static plan; arguments as those of `plan_paged`, as many as it holds or fewer.

        In the order of the current stream. Rows of queries behind those of the sequences are
        left out: `attend_paged` does not write their output.

        Raises:
            ValueError: If the plan is too small.
        """
        raise NotImplementedError(f"{type(self).__name__} has no static plans")

    @abstractmethod
    def plan_full(
        self,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        arrays: HostArrays | None = None,
    ) -> Any:
        """Plan attention of sequences over keys of the same pass.

        Args:
            query_lengths: ``[sequences]``; 0 is allowed.
            key_lengths: ``[sequences]``.
            arrays: As in `plan_paged`.
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
