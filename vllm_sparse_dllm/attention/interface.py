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

    Plans are built from host arrays before a step's layers run; what they contain is up to the
    backend.

    Attributes:
        static_plans: Whether the backend has plans that can be rewritten in place, as CUDA
            graphs need: see `static_paged_plan`. If so, `write` skips slots below 0, and what
            `write` and `attend_paged` launch does not depend on the numbers in their tensors.
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
        """Return what keeps the backend from running, None if no reason is known."""
        return None

    @abstractmethod
    def bind_pages(self, layers: list[torch.Tensor]) -> None:
        """Bind the pool: for each layer a flat byte buffer of all its pages."""

    def prepare(self) -> None:  # noqa: B027 (most have nothing to compile)
        """Compile the kernels of later steps, so that none waits for it; pages must be bound."""

    @abstractmethod
    def clear(self, page_ids: np.ndarray) -> None:
        """Prepare pages for a new owner, whose results must not depend on their old contents.

        A kernel may multiply what follows a sequence's last slot by 0, and 0 times NaN is NaN.
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
        """The kernels that score keys and pool scores on this device."""
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
        """Write selected keys and values of a sequence to slots.

        Args:
            layer: 0-based layer.
            keys: ``[positions, kv_heads, head_size]``, rotated.
            values: ``[positions, kv_heads, head_size]``.
            entries: ``[n]`` selected positions, numbered as if those of the gap did not exist.
            slots: ``[n]`` target slot of each entry.
            gap: Start and length of the range of positions that ``entries`` skips.
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
            key_lengths: ``[sequences]`` filled slots, counted from a sequence's first slot.
            page_table: ``[sequences, width]`` page ids.
            arrays: Host arrays to send the plan's data with; the caller sends them before the
                plan is used. None to send the data at once.
        """

    @abstractmethod
    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        """Write attention of ``queries`` ``[n, heads, head_size]`` to ``output``."""

    def static_paged_plan(
        self, num_sequences: int, num_queries: int, width: int, arrays: HostArrays | None = None
    ) -> Any:
        """Return a plan for `rewrite_paged_plan` to fill, whose tensors never move.

        The three sizes determine which kernels `attend_paged` launches with the plan, on which
        tensors and with how many programs, so that the launches can be captured once and
        replayed. The memory they need is allocated here.

        Args:
            num_sequences: Most sequences.
            num_queries: Most queries of a sequence.
            width: Most pages of a sequence.
            arrays: Host arrays in which the plan reserves its places; it is undefined until it
                is filled and they are sent. None: the plan starts without sequences, and
                `rewrite_paged_plan` sends its data by itself.
        """
        raise NotImplementedError(f"{type(self).__name__} has no static plans")

    def rewrite_paged_plan(
        self,
        plan: Any,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
    ) -> None:
        """Fill a static plan; arguments as in `plan_paged`, for at most as many sequences.

        Takes effect in the order of the current stream. `attend_paged` does not write the output
        of query rows after those of the sequences.

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
