# SPDX-License-Identifier: Apache-2.0
"""Which cache entries a block keeps (Sparse-dLLM, arXiv 2508.02558, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

Span = tuple[int, int]


def importance(
    block_queries: torch.Tensor,
    keys: torch.Tensor,
    candidates: tuple[Span, ...],
    total_heads: int,
) -> torch.Tensor:
    """Score the candidates: raw dot products with the block's mean query, mean over heads.

    The mean over heads of ``q[h] . k[kv(h)]`` is one matrix-vector product, of the keys with
    the queries summed over the heads that share a key head.

    Args:
        block_queries: ``[block, heads, head_size]``, rotated.
        keys: ``[L, kv_heads, head_size]``, rotated.
        candidates: Position ranges, in order.
        total_heads: Query heads over all tensor-parallel ranks.

    Returns:
        ``[n]`` importance of the candidates in position order, in the keys' dtype.
    """
    num_kv_heads = keys.shape[1]
    mean_query = block_queries.mean(dim=0)
    grouped = mean_query.view(num_kv_heads, -1, mean_query.shape[-1]).sum(dim=1)
    scores = torch.mv(keys.reshape(keys.shape[0], -1), grouped.view(-1))
    scores = torch.cat([scores[start:end] for start, end in candidates])
    world_size = get_tensor_model_parallel_world_size()
    if world_size > 1:
        scores = _sum_of_ranks(scores, world_size)
    return scores / total_heads


def _sum_of_ranks(scores: torch.Tensor, world_size: int) -> torch.Tensor:
    """Add up what each tensor-parallel rank has, with the very same result on all of them.

    Ranks must keep the same positions, so not a bit may differ. An all-reduce does not promise
    that: vLLM's for CPU adds in another order on each rank.
    """
    parts = tensor_model_parallel_all_gather(scores, dim=0).view(world_size, -1)
    return parts.float().sum(dim=0).to(scores.dtype)


@dataclass(frozen=True)
class Selection:
    """How entries are chosen by saliency.

    Attributes:
        keep: Entries to keep, at most as many as there are.
        kernel_size: Odd width of the max-pool over saliency.
        run_length: 1 to select entries; more to select whole runs of that many, each by its
            maximum, ``ceil(keep / run_length)`` of them (the last run may be short).
    """

    keep: int
    kernel_size: int
    run_length: int


def select_entries(saliency: torch.Tensor, selection: Selection) -> torch.Tensor:
    """Choose entries by max-pooled saliency.

    Ties decide results, and `torch.topk` breaks them by the whole vector: it is called on
    exactly the ``[1, n]`` vector, neither padded nor sorted.

    Args:
        saliency: ``[n]``.
        selection: How, with 1 <= keep <= n.

    Returns:
        Indices of the kept entries, in order of falling importance.
    """
    keep, run_length = selection.keep, selection.run_length
    pooled = saliency.unsqueeze(0)
    # A wider window sees no more, but costs its width.
    kernel_size = min(selection.kernel_size, 2 * saliency.shape[0] - 1)
    if kernel_size > 1:
        pooled = F.max_pool1d(pooled, kernel_size, stride=1, padding=kernel_size // 2)
    if run_length == 1:
        return torch.topk(pooled, keep).indices[0]
    n = saliency.shape[0]
    runs = F.max_pool1d(pooled, run_length, stride=run_length, ceil_mode=True)
    chosen = torch.topk(runs, -(-keep // run_length)).indices[0]
    offsets = torch.arange(run_length, device=saliency.device)
    entries = (chosen.unsqueeze(1) * run_length + offsets).flatten()
    return entries[entries < n] if n % run_length else entries
