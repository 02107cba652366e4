# SPDX-License-Identifier: Apache-2.0
"""Saliencies, which rank cache entries for a block: the published score, and others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)

from vllm_sparse_dllm.kernels.plain import PLAIN, SelectionKernels
from vllm_sparse_dllm.settings import allow_saliencies

Span = tuple[int, int]

#: Positions at the end of a prompt that count as its question.
WINDOW = 16

#: Shares of attention that exist at a time: a request's block may be as long as its response.
_MOST_SHARES = 1 << 24


@dataclass(frozen=True)
class CanvasView:
    """What a saliency can know about the canvas.

    The arrays belong to the engine: they must not be modified, or kept beyond the call.

    Attributes:
        request_id: vLLM's id of the request, which extends the id that the client gave.
        token_ids: ``[L]`` ids that were the input of the pass.
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
    """The inputs of a saliency: one layer of one sequence in one pass.

    Attributes:
        layer: 0-based layer.
        queries: ``[rows, heads, head_size]`` this rank's rotated queries of the pass: of all
            positions in a refresh, of the block in a late eviction.
        first_query: Position of the first query.
        keys: ``[m, kv_heads, head_size]`` this rank's rotated keys, including the candidates'.
        rows: Ranges of the rows of ``keys`` that are candidates, in order.
        candidates: Position ranges of the candidates, in order.
        canvas: The canvas.
        fresh_keys: ``[block, kv_heads, head_size]`` keys of the block in a late eviction, where
            ``keys`` lacks them; else None.
        total_heads: Query heads over all tensor-parallel ranks.
        kernels: The device's kernels for scoring and pooling.
    """

    layer: int
    queries: torch.Tensor
    first_query: int
    keys: torch.Tensor
    rows: tuple[Span, ...]
    candidates: tuple[Span, ...]
    fresh_keys: torch.Tensor | None
    canvas: CanvasView
    total_heads: int
    kernels: SelectionKernels = PLAIN

    @property
    def block_queries(self) -> torch.Tensor:
        """``[block, heads, head_size]`` queries of the block."""
        start, end = self.canvas.block
        return self.queries[start - self.first_query : end - self.first_query]

    @property
    def seen_keys(self) -> torch.Tensor:
        """``[m', kv_heads, head_size]`` all keys that the queries saw, those of `keys` first."""
        if self.fresh_keys is None:
            return self.keys
        return torch.cat([self.keys, self.fresh_keys])

    def of_candidates(self, values: torch.Tensor) -> torch.Tensor:
        """Return the candidates' values ``[n]``, out of one value for each of `seen_keys`."""
        return torch.cat([values[start:end] for start, end in self.rows])

    @property
    def window(self) -> Span:
        """Position range of the end of the prompt."""
        return max(0, self.canvas.prompt_length - WINDOW), self.canvas.prompt_length


class Saliency(ABC):
    """A way to rank keys. Stateless; called once per layer in a pass that chooses entries."""

    name: ClassVar[str]

    @abstractmethod
    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        """Return ``[n]`` scores of the candidates in position order; the highest are kept.

        Tensor-parallel ranks must return the same scores, bit for bit: each has only some of the
        heads, and has to combine its result with the others', by `sum_of_ranks` or
        `max_of_ranks`.
        """


def importance(
    block_queries: torch.Tensor,
    keys: torch.Tensor,
    candidates: tuple[Span, ...],
    total_heads: int,
    kernels: SelectionKernels = PLAIN,
) -> torch.Tensor:
    """Score the candidates: raw dot products with the block's mean query, mean over heads.

    Args:
        block_queries: ``[block, heads, head_size]``, rotated.
        keys: ``[m, kv_heads, head_size]``, rotated.
        candidates: Ranges of the rows of ``keys`` that are candidates, in order.
        total_heads: Query heads over all tensor-parallel ranks.
        kernels: The device's kernels.

    Returns:
        ``[n]`` importance of the candidates in the same order, in the keys' dtype.
    """
    return sum_of_ranks(kernels.scores(block_queries, keys, candidates)) / total_heads


class Paper(Saliency):
    """Sparse-dLLM: raw dot products with the block's mean query."""

    name = "paper"

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        return importance(
            inputs.block_queries, inputs.keys, inputs.rows, inputs.total_heads, inputs.kernels
        )


class BlockAttention(Saliency):
    """Attention paid by the block: the mean share over its positions and all heads.

    Uses the same queries as the published score, but the softmax of their products with the keys.
    """

    name = "attention"

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        shares = mean_shares(inputs.block_queries, inputs.seen_keys).sum(dim=0)
        return sum_of_ranks(inputs.of_candidates(shares)) / inputs.total_heads


class Window(Saliency):
    """Attention paid by the prompt's end and the block; the end itself is kept (after SnapKV).

    In each head, a key's score is the mean share of attention that the prompt's last positions
    pay it (softmax over all keys that they see) plus the mean share that the block's positions
    pay it; the score is the maximum over heads. A late eviction has only the block's queries.
    """

    name = "window"

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        start, end = inputs.window
        keys = inputs.seen_keys
        shares = mean_shares(inputs.block_queries, keys)
        if inputs.first_query == 0 and end > start:
            shares += mean_shares(inputs.queries[start:end], keys)
        scores = max_of_ranks(inputs.of_candidates(shares.amax(dim=0)))
        # The candidates begin with the prompt, so these rows are the window. No other score is
        # above 2; if not all of the window can be kept, its end is.
        scores[start:end] = torch.arange(3, 3 + end - start, device=scores.device)
        return scores


def mean_shares(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the mean share of attention that queries pay each key, ``[heads, m]``, float32.

    Args:
        queries: ``[n, heads, head_size]``, rotated, at least one.
        keys: ``[m, kv_heads, head_size]``, rotated.
    """
    (n, num_heads, head_size), (m, num_kv_heads, _) = queries.shape, keys.shape
    mean = torch.zeros(num_heads, m, device=keys.device)
    for part in queries.split(max(1, _MOST_SHARES // (num_heads * m))):
        rows = part.shape[0]
        grouped = part.view(rows, num_kv_heads, -1, head_size).permute(1, 2, 0, 3)
        scores = torch.bmm(grouped.reshape(num_kv_heads, -1, head_size), keys.permute(1, 2, 0))
        shares = torch.softmax(scores.float() * head_size**-0.5, dim=-1)
        mean += shares.view(num_heads, rows, m).mean(dim=1) * (rows / n)
    return mean


SALIENCIES: dict[str, Saliency] = {
    saliency.name: saliency for saliency in (Paper(), BlockAttention(), Window())
}


def register_saliency(saliency: Saliency) -> None:
    """Let settings name a further saliency, in this process.

    An engine of several processes needs the call in each of them, for example from an entry point
    of vLLM's group ``vllm.general_plugins``.

    Raises:
        ValueError: If the name is taken.
    """
    if saliency.name in SALIENCIES:
        raise ValueError(f"saliency {saliency.name!r} is registered already")
    SALIENCIES[saliency.name] = saliency
    allow_saliencies(SALIENCIES)


def unregister_saliency(name: str) -> None:
    """Remove a registered saliency, which must not be in use by any request."""
    del SALIENCIES[name]
    allow_saliencies(SALIENCIES)


def sum_of_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Return the sum of ``scores`` over tensor-parallel ranks, bit-identical on all of them.

    Ranks must keep the same positions, so not a bit may differ. An all-reduce does not guarantee
    that: vLLM's for CPU adds in a different order on each rank.
    """
    return _reduce(scores, lambda parts: parts.float().sum(dim=0).to(scores.dtype))


def max_of_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Return the maximum of ``scores`` over tensor-parallel ranks, identical on all of them."""
    return _reduce(scores, lambda parts: parts.amax(dim=0))


def _reduce(
    scores: torch.Tensor, reduction: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Gather scores from the tensor-parallel ranks, ``[ranks, n]`` in rank order, and reduce."""
    world_size = get_tensor_model_parallel_world_size()
    if world_size == 1:
        return scores
    return reduction(tensor_model_parallel_all_gather(scores, dim=0).view(world_size, -1))
