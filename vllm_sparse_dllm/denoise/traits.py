# SPDX-License-Identifier: Apache-2.0
"""What the decoding code has to know about a model family."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_sparse_dllm.denoise.sampling import TokenSampler
from vllm_sparse_dllm.denoise.timetable import CommitSchedule


@dataclass(frozen=True)
class ModelTraits:
    """A checkpoint as the decoding code sees it.

    Attributes:
        family: Name used in messages.
        mask_token_id: The id of a masked position.
        default_remasking: The model's own unmasking rule.
        schedule: How many positions a step commits under fixed steps.
        sampler: How tokens are drawn at ``temperature > 0``.
        shifts_logits: Whether position p is predicted by the logits row of p - 1 (Dream). Then,
            under all cache policies but `none`, a block's first step commits only its first
            position.
        supports_guidance: Whether ``cfg_scale`` has a meaning.
    """

    family: str
    mask_token_id: int
    default_remasking: str
    schedule: CommitSchedule
    sampler: TokenSampler
    shifts_logits: bool
    supports_guidance: bool
