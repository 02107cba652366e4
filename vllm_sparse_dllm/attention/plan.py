# SPDX-License-Identifier: Apache-2.0
"""What one forward pass attends to. Built once per step, read by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionBackend

Span = tuple[int, int]


@dataclass(frozen=True)
class CachedSegment:
    """The sequences that run against their pages; their tokens come first in the batch.

    Attributes:
        num_tokens: Tokens of all these sequences.
        fresh_slots: ``[num_tokens]`` slots of the tokens' own keys.
        plans: The backend's plan, one for all layers or one for each.
        last_plan: The plan of the last layer, whose queries are only the needed rows.
    """

    num_tokens: int
    fresh_slots: torch.Tensor
    plans: tuple[Any, ...]
    last_plan: Any

    def plan_of(self, layer: int) -> Any:
        return self.plans[layer if len(self.plans) > 1 else 0]


@dataclass(frozen=True)
class FullSegment:
    """The sequences that run whole; their tokens follow the cached segment's."""

    plan: Any
    last_plan: Any


@dataclass(frozen=True)
class CacheFill:
    """One sequence whose cache is filled in this pass.

    Attributes:
        first_token: Row of the sequence's position 0 in the batch.
        length: L, positions of the sequence.
        block: Positions [start, end) of the current block.
        candidates: Position ranges that may be kept, in order.
        slots: ``[most]`` slots of the kept entries, in the order they are written.
        keep: Entries to keep by saliency, or None to keep all candidates.
        kernel_size: Width of the max-pool over saliency.
        run_length: 1, or the positions selected together (granularity ``page``).
        num_kept: ``[layers]`` host array; each layer writes how many entries it kept.
        kept: Each layer appends the positions it kept, as a host array; None if nobody asks.
    """

    first_token: int
    length: int
    block: Span
    candidates: tuple[Span, ...]
    slots: torch.Tensor
    keep: int | None
    kernel_size: int
    run_length: int
    num_kept: np.ndarray
    kept: list[np.ndarray] | None = None


@dataclass(frozen=True)
class ForwardPlan:
    """All that the attention layers need to know of a step.

    Attributes:
        backend: The device's attention.
        cached: Sequences that run against pages, or None.
        full: Sequences that run whole, or None.
        fills: Caches to fill, of sequences in ``full``.
        last_rows: ``[rows]`` tokens whose hidden states are needed after the last layer,
            in ascending order; at least one.
        num_last_cached: How many of ``last_rows`` lie in ``cached``.
    """

    backend: AttentionBackend
    cached: CachedSegment | None
    full: FullSegment | None
    fills: tuple[CacheFill, ...]
    last_rows: torch.Tensor
    num_last_cached: int
