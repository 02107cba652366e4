# SPDX-License-Identifier: Apache-2.0
"""What cache entries are worth to a block: the published score, and others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from vllm_sparse_dllm.settings import allow_saliencies

Span = tuple[int, int]


@dataclass(frozen=True)
class CanvasView:
    """What a choice may know of the canvas it is made for.

    The arrays are the engine's own: not to be changed, nor kept beyond the call.

    Attributes:
        request_id: vLLM's, of the request; the engine adds to the one that a client gave.
        token_ids: ``[L]`` ids as the pass saw them.
        prompt_length: Positions of the prompt.
        block: Positions [start, end) of the current block.
        masked: ``[block]`` which of its positions were masks in the pass.
    """

    request_id: str
    token_ids: np.ndarray
    prompt_length: int
    block: Span
    masked: np.ndarray


@dataclass(frozen=True)
class SaliencyInputs:
    """What a choice may look at: one layer of one sequence in one pass.

    Attributes:
        layer: 0-based layer.
        queries: ``[rows, heads, head_size]`` this rank's rotated queries of the pass: of all
            positions in a refresh, of the block in a late eviction.
        first_query: Position of the first of them.
        keys: ``[m, kv_heads, head_size]`` this rank's rotated keys, the candidates' among them.
        rows: Ranges of ``keys`` that are the candidates', in order.
        candidates: Their position ranges, in order.
        canvas: The canvas.
        total_heads: Query heads over all tensor-parallel ranks.
    """

    layer: int
    queries: torch.Tensor
    first_query: int
    keys: torch.Tensor
    rows: tuple[Span, ...]
    candidates: tuple[Span, ...]
    canvas: CanvasView
    total_heads: int

    @property
    def block_queries(self) -> torch.Tensor:
        """``[block, heads, head_size]`` queries of the block."""
        start, end = self.canvas.block
        return self.queries[start - self.first_query : end - self.first_query]


class Saliency(ABC):
    """One way to rank keys; stateless, asked once a layer where a choice is made."""

    name: ClassVar[str]

    @abstractmethod
    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        """Return ``[n]`` scores of the candidates in position order, the highest kept first.

        Tensor-parallel ranks must return the same, bit for bit: each has some of the heads, and
        has to exchange what it makes of them.
        """


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


class Paper(Saliency):
    """Sparse-dLLM: raw dot products with the block's mean query."""

    name = "paper"

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        return importance(inputs.block_queries, inputs.keys, inputs.rows, inputs.total_heads)


SALIENCIES: dict[str, Saliency] = {saliency.name: saliency for saliency in (Paper(),)}


def register_saliency(saliency: Saliency) -> None:
    """Let settings name a further saliency, in this process.

    Engines of several processes need it in each of them, as from an own entry point of vLLM's
    group ``vllm.general_plugins``.

    Raises:
        ValueError: If the name is taken.
    """
    if saliency.name in SALIENCIES:
        raise ValueError(f"saliency {saliency.name!r} is registered already")
    SALIENCIES[saliency.name] = saliency
    allow_saliencies(SALIENCIES)


def unregister_saliency(name: str) -> None:
    """Take a registered saliency back; no request may be using it."""
    del SALIENCIES[name]
    allow_saliencies(SALIENCIES)


def _sum_of_ranks(scores: torch.Tensor, world_size: int) -> torch.Tensor:
    """Add up what each tensor-parallel rank has, with the very same result on all of them.

    Ranks must keep the same positions, so not a bit may differ. An all-reduce does not promise
    that: vLLM's for CPU adds in another order on each rank.
    """
    parts = tensor_model_parallel_all_gather(scores, dim=0).view(world_size, -1)
    return parts.float().sum(dim=0).to(scores.dtype)
