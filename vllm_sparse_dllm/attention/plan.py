# SPDX-License-Identifier: Apache-2.0
"""What one forward pass attends to. Built once per step, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionBackend
from vllm_sparse_dllm.cache.saliency import CanvasView
from vllm_sparse_dllm.cache.selection import Selection

Span = tuple[int, int]


@dataclass(frozen=True)
class CachedSegment:
    """The sequences that attend to their pages; their tokens come first in the batch.

    Attributes:
        num_tokens: Tokens of all these sequences.
        fresh_slots: ``[num_tokens]`` slots of the tokens' own keys, one tensor for all layers or
            one per layer.
        plans: The backend's plans, one for all layers or one per layer.
        last_plan: The plan of the last layer, whose queries are only the needed rows.
    """

    num_tokens: int
    fresh_slots: tuple[torch.Tensor, ...]
    plans: tuple[Any, ...]
    last_plan: Any

    def plan_of(self, layer: int) -> Any:
        return self.plans[layer if len(self.plans) > 1 else 0]

    def fresh_slots_of(self, layer: int) -> torch.Tensor:
        return self.fresh_slots[layer if len(self.fresh_slots) > 1 else 0]


@dataclass(frozen=True)
class FullSegment:
    """The sequences that run in full; their tokens follow the cached segment's."""

    plan: Any
    last_plan: Any


@dataclass(frozen=True)
class Fill:
    """One sequence whose cache is filled in this pass.

    Attributes:
        first_token: Row of the sequence's position 0 in the batch.
        length: Positions of the sequence that take part.
        canvas: The sequence's canvas.
        candidates: Position ranges of the candidates, in order.
        slots: ``[most]`` slots for the kept entries, in the order they are written.
        selection: How the kept candidates are chosen, None to keep all. The choice is made among
            all positions outside the block.
        num_kept: ``[layers]`` host array; each layer writes how many entries it kept.
        positions: ``[layers, at least most]`` host array or None; each layer writes the
            position kept in each slot.
    """

    first_token: int
    length: int
    canvas: CanvasView
    candidates: tuple[Span, ...]
    slots: torch.Tensor
    selection: Selection | None
    num_kept: np.ndarray
    positions: np.ndarray | None

    def __post_init__(self) -> None:
        start, end = self.canvas.block
        # Kept indices are mapped to positions by the gap that the block leaves.
        outside = (0, start), (end, self.length)
        if self.selection is not None and self.candidates != outside:
            raise ValueError(
                f"a selection is made among {outside}, all positions outside the block, got "
                f"candidates {self.candidates}"
            )


@dataclass(frozen=True)
class Eviction:
    """One sequence whose cache holds all candidates and is reduced in this step.

    Attributes:
        first_token: Row of the block's first query in the batch.
        canvas: The sequence's canvas.
        candidates: Position ranges of the entries, in order.
        slots: ``[n]`` slots of the entries, in order of their positions; the first ones hold
            the kept entries afterwards.
        selection: How the kept entries are chosen, by this step's queries.
        num_kept: As in `Fill`.
        positions: As in `Fill`.
    """

    first_token: int
    canvas: CanvasView
    candidates: tuple[Span, ...]
    slots: torch.Tensor
    selection: Selection
    num_kept: np.ndarray
    positions: np.ndarray | None


@dataclass(frozen=True)
class ForwardPlan:
    """All that the attention layers need to know about a step.

    Attributes:
        backend: The device's attention.
        cached: Sequences that attend to pages, or None.
        full: Sequences that run in full, or None.
        fills: Caches to fill, of sequences in ``full``.
        evictions: Caches to reduce, of sequences in ``cached``.
        last_rows: ``[rows]`` tokens whose hidden states are needed after the last layer,
            in ascending order; at least one.
        num_last_cached: How many of ``last_rows`` lie in ``cached``.
        padded: Whether some tokens belong to no sequence; their attention output is zero.
    """

    backend: AttentionBackend
    cached: CachedSegment | None
    full: FullSegment | None
    fills: tuple[Fill, ...]
    evictions: tuple[Eviction, ...]
    last_rows: torch.Tensor
    num_last_cached: int
    padded: bool = False
