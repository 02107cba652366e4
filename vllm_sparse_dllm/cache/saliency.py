# SPDX-License-Identifier: Apache-2.0
"""What cache entries are worth to a block: the published score, and others."""

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
        fresh_keys: ``[block, kv_heads, head_size]`` keys of the block where ``keys`` lacks them,
            in a late eviction.
        total_heads: Query heads over all tensor-parallel ranks.
        kernels: The device's.
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
        """Return ``[n]`` the candidates' of values that are one a key."""
        return torch.cat([values[start:end] for start, end in self.rows])

    @property
    def window(self) -> Span:
        """Positions of the end of the prompt."""
        return max(0, self.canvas.prompt_length - WINDOW), self.canvas.prompt_length


class Saliency(ABC):
    """One way to rank keys; stateless, asked once a layer where a choice is made."""

    name: ClassVar[str]

    @abstractmethod
    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        """Return ``[n]`` scores of the candidates in position order, the highest kept first.

        Tensor-parallel ranks must return the same, bit for bit: each has some of the heads, and
        has to exchange what it makes of them, by `sum_of_ranks` or `max_of_ranks`.
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
        keys: ``[L, kv_heads, head_size]``, rotated.
        candidates: Position ranges, in order.
        total_heads: Query heads over all tensor-parallel ranks.
        kernels: The device's.

    Returns:
        ``[n]`` importance of the candidates in position order, in the keys' dtype.
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
    """Attention that the block pays: the mean share over its positions and all heads.

    The published score's queries, but what the softmax makes of their products with the keys.
    """

    name = "attention"

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        shares = mean_shares(inputs.block_queries, inputs.seen_keys).sum(dim=0)
        return sum_of_ranks(inputs.of_candidates(shares)) / inputs.total_heads


class Window(Saliency):
    """Attention that the prompt's end and the block pay; the end itself stays (after SnapKV).

    In each head a key gets the mean share of attention that the prompt's last positions pay it,
    softmax over all keys that they see, and the mean share that the block's pay it; of the
    heads' sums the largest counts. A late eviction has the block's queries only.
    """

    name = "window"

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        start, end = inputs.window
        keys = inputs.seen_keys
        shares = mean_shares(inputs.block_queries, keys)
        if inputs.first_query == 0 and end > start:
            shares += mean_shares(inputs.queries[start:end], keys)
        scores = max_of_ranks(inputs.of_candidates(shares.amax(dim=0)))
        # The prompt is where the candidates begin. No other score is above 2; where not all of
        # the window can stay, its end does.
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


def sum_of_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Add up what each tensor-parallel rank has, with the very same result on all of them.

    Ranks must keep the same positions, so not a bit may differ. An all-reduce does not promise
    that: vLLM's for CPU adds in another order on each rank.
    """
    return _reduce(scores, lambda parts: parts.float().sum(dim=0).to(scores.dtype))


def max_of_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Return the largest that any tensor-parallel rank has, the same on all of them."""
    return _reduce(scores, lambda parts: parts.amax(dim=0))


def _reduce(
    scores: torch.Tensor, reduction: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Reduce what the tensor-parallel ranks have, ``[ranks, n]`` in their order."""
    world_size = get_tensor_model_parallel_world_size()
    if world_size == 1:
        return scores
    return reduction(tensor_model_parallel_all_gather(scores, dim=0).view(world_size, -1))
