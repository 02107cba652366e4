# SPDX-License-Identifier: Apache-2.0
"""Confidences at temperature 0 by kernels that never store probabilities."""

from __future__ import annotations

from copy import copy

import torch

from vllm_sparse_dllm.denoise.sampling import TokenDistribution
from vllm_sparse_dllm.denoise.step import GreedyDistribution
from vllm_sparse_dllm.kernels import why_unavailable


def greedy_distribution(device: torch.device) -> GreedyDistribution | None:
    """Return the device's own distribution at temperature 0, None where there is none."""
    return FusedDistribution if why_unavailable(device) is None else None


class FusedDistribution(TokenDistribution):
    """`TokenDistribution` of the most probable tokens, from logits in any dtype.

    Computes the same functions in float32, but adds up sums in a different order.

    Args:
        logits: ``[n, vocab]``, contiguous within each row.
        mask_token_id: Never chosen.
    """

    def __init__(self, logits: torch.Tensor, mask_token_id: int) -> None:
        from vllm_sparse_dllm.kernels import token_statistics

        self._kernels = token_statistics
        self._statistics = token_statistics.token_statistics(logits, mask_token_id)
        self._rows: torch.Tensor | None = None
        super().__init__(logits, self._statistics.tokens)

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        return values if self._rows is None else values[self._rows]

    def probability(self) -> torch.Tensor:
        return self._own(self._statistics.probability)

    def margin(self) -> torch.Tensor:
        return self._own(self._statistics.margin)

    def negative_entropy(self) -> torch.Tensor:
        rows = self._rows
        if rows is None:
            rows = torch.arange(self.logits.shape[0], device=self.logits.device)
        return self._kernels.negative_entropy(self.logits, self._statistics, rows)

    def rows(self, index: torch.Tensor) -> TokenDistribution:
        if index.shape[0] == self.tokens.shape[0]:
            return self
        selected = copy(self)
        selected.tokens = self.tokens[index]
        selected._rows = index if self._rows is None else self._rows[index]
        return selected
