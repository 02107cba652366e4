# SPDX-License-Identifier: Apache-2.0
"""Unmasking rules: which candidate positions are surest, and how many a step commits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import methodcaller

import torch

from vllm_sparse_dllm.denoise.sampling import TokenDistribution


@dataclass(frozen=True)
class UnmaskingRule:
    """An unmasking rule.

    Attributes:
        name: Name in the settings.
        confidence: Returns ``[n]`` confidences of a distribution; None if they are drawn at
            random.
        independent: Whether each position is committed by its own draw (``origin``), so that
            the number of commits is random too.
    """

    name: str
    confidence: Callable[[TokenDistribution], torch.Tensor] | None
    independent: bool = False


RULES: dict[str, UnmaskingRule] = {
    rule.name: rule
    for rule in (
        UnmaskingRule("low_confidence", methodcaller("probability")),
        UnmaskingRule("random", None),
        UnmaskingRule("maskgit_plus", methodcaller("probability")),
        UnmaskingRule("topk_margin", methodcaller("margin")),
        UnmaskingRule("entropy", methodcaller("negative_entropy")),
        UnmaskingRule("origin", None, independent=True),
    )
}

#: With `threshold` or `factor` this rule's confidence is used, whatever rule is set.
PROBABILITY_RULE = RULES["low_confidence"]


def threshold_counts(ordered: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Count commits under Fast-dLLM's threshold: the surest, and all others that reach it.

    Args:
        ordered: ``[requests, most]`` confidences in descending order, -inf past the candidates.
        threshold: ``[requests]``.
    """
    return (ordered >= threshold.unsqueeze(-1)).sum(dim=-1).clamp(min=1)


def factor_counts(
    ordered: torch.Tensor, factor: torch.Tensor, num_candidates: torch.Tensor
) -> torch.Tensor:
    """Count commits under Fast-dLLM's factor rule (2601 form).

    Let k be the first index above 0 whose confidence is below ``1 - factor / (index + 2)``, or
    the last index if there is none. Then k positions are committed, and one more if k is the last
    index.

    Args:
        ordered: ``[requests, most]`` confidences in descending order, -inf past the candidates.
        factor: ``[requests]``.
        num_candidates: ``[requests]``.
    """
    index = torch.arange(ordered.shape[-1], device=ordered.device)
    bars = (1 - factor.double().unsqueeze(-1) / (index + 2)).to(ordered.dtype)
    bars[:, 0] = -1
    last = num_candidates - 1
    below = (ordered < bars) & (index < num_candidates.unsqueeze(-1))
    first = torch.where(below, index, last.unsqueeze(-1)).amin(dim=-1)
    return first + ((first == 0) | (first == last))
