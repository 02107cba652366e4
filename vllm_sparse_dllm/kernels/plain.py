# SPDX-License-Identifier: Apache-2.0
"""Scoring keys and pooling scores in plain PyTorch: for any device, and as the kernels' twins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Span = tuple[int, int]


def key_scores(
    block_queries: torch.Tensor, keys: torch.Tensor, spans: tuple[Span, ...]
) -> torch.Tensor:
    """Return the sum over heads of the dot products of keys with the block's mean query.

    The sum over heads of ``q[h] . k[kv(h)]`` is one matrix-vector product, of the keys with
    the queries summed over the heads that share a key head.

    Args:
        block_queries: ``[block, heads, head_size]``.
        keys: ``[m, kv_heads, head_size]``.
        spans: Ranges of keys, in order.

    Returns:
        ``[n]`` scores of the keys in the spans, in the keys' dtype.
    """
    mean_query = block_queries.mean(dim=0)
    grouped = mean_query.view(keys.shape[1], -1, mean_query.shape[-1]).sum(dim=1)
    scores = torch.mv(keys.reshape(keys.shape[0], -1), grouped.view(-1))
    return torch.cat([scores[start:end] for start, end in spans])


def max_pool(values: torch.Tensor, kernel_size: int, run_length: int) -> torch.Tensor:
    """Return the maxima of windows around each value, and then of runs of these maxima.

    Args:
        values: ``[n]``.
        kernel_size: Odd width of the window around each value, at most ``2 * n - 1``.
        run_length: Values of a run; the last run may be short.

    Returns:
        ``[ceil(n / run_length)]``.
    """
    pooled = values.unsqueeze(0)
    if kernel_size > 1:
        pooled = F.max_pool1d(pooled, kernel_size, stride=1, padding=kernel_size // 2)
    if run_length > 1:
        pooled = F.max_pool1d(pooled, run_length, stride=run_length, ceil_mode=True)
    return pooled[0]


@dataclass(frozen=True)
class SelectionKernels:
    """How a device scores keys and pools scores.

    Attributes:
        scores: As `key_scores`.
        pool: As `max_pool`.
    """

    scores: Callable[[torch.Tensor, torch.Tensor, tuple[Span, ...]], torch.Tensor]
    pool: Callable[[torch.Tensor, int, int], torch.Tensor]


PLAIN = SelectionKernels(key_scores, max_pool)
