# SPDX-License-Identifier: Apache-2.0
"""Choosing the token of each masked position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import ClassVar

import torch

#: Tokens among which a nucleus is looked for first.
_FEW_TOKENS = 1024


class TokenDistribution:
    """What a step predicts for its candidate positions, and the tokens chosen from it.

    Args:
        logits: ``[n, vocab]`` float32, the mask id included.
        tokens: ``[n]`` chosen ids; never the mask id.
    """

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        self.logits = logits
        self.tokens = tokens

    @cached_property
    def probabilities(self) -> torch.Tensor:
        """``[n, vocab]`` softmax; NaN where the logits are unusable.

        Stored as probabilities, not as a log-normaliser: near-certain positions differ only in
        the last bits below 1, which a difference of large logarithms loses.
        """
        return torch.softmax(self.logits, dim=-1)

    def probability(self) -> torch.Tensor:
        """Return ``[n]`` probabilities of the chosen tokens."""
        return self.probabilities.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)

    def margin(self) -> torch.Tensor:
        """Return ``[n]`` largest minus second largest probability."""
        largest = torch.topk(self.probabilities, 2, dim=-1).values
        return largest[:, 0] - largest[:, 1]

    def negative_entropy(self) -> torch.Tensor:
        """Return ``[n]`` sums of ``p * log(p + 1e-10)``."""
        return torch.sum(self.probabilities * torch.log(self.probabilities + 1e-10), dim=-1)

    def rows(self, index: torch.Tensor) -> TokenDistribution:
        """Return the distribution of some of the positions."""
        if index.shape[0] == self.tokens.shape[0]:
            return self
        selected = TokenDistribution(self.logits[index], self.tokens[index])
        selected.probabilities = self.probabilities[index]
        return selected


def greedy_tokens(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Return the most probable token of each row that is not the mask id, first on ties."""
    mask_logits = logits[:, mask_token_id].clone()
    logits[:, mask_token_id] = -torch.inf
    tokens = logits.argmax(dim=-1)
    logits[:, mask_token_id] = mask_logits
    return tokens


class TokenSampler(ABC):
    """A model family's way to draw tokens at ``temperature > 0``."""

    name: ClassVar[str]

    @abstractmethod
    def draw(
        self,
        logits: torch.Tensor,
        mask_token_id: int,
        temperature: float,
        top_p: float,
        top_k: int,
        generator: torch.Generator,
        min_p: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw one token per row.

        Args:
            logits: ``[n, vocab]`` float32.
            mask_token_id: Never drawn.
            temperature: Above 0.
            top_p: 1 for no restriction.
            top_k: 0 for no restriction.
            generator: The request's own, on the logits' device.
            min_p: 0 for no restriction.

        Returns:
            ``[n]`` tokens, and ``[n, vocab]`` logits that confidences are computed from.
        """


class GumbelSampler(TokenSampler):
    """LLaDA: Gumbel-max in float64; confidences from the unperturbed softmax."""

    name = "gumbel"

    def draw(
        self,
        logits: torch.Tensor,
        mask_token_id: int,
        temperature: float,
        top_p: float,
        top_k: int,
        generator: torch.Generator,
        min_p: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        uniform = torch.rand(
            logits.shape, dtype=torch.float64, device=logits.device, generator=generator
        )
        # argmax(exp(l) / (-log u)^T), in logarithms so that nothing overflows.
        scores = logits.double() - temperature * torch.log(-torch.log(uniform))
        if top_p < 1 or top_k > 0 or min_p > 0:
            kept = restrict(logits / temperature, top_p, top_k, min_p)
            scores = scores.masked_fill(torch.isneginf(kept), -torch.inf)
        return _best(scores, logits, mask_token_id), logits


class CategoricalSampler(TokenSampler):
    """Dream: categorical over the tempered, restricted softmax; confidences from the same."""

    name = "categorical"

    def draw(
        self,
        logits: torch.Tensor,
        mask_token_id: int,
        temperature: float,
        top_p: float,
        top_k: int,
        generator: torch.Generator,
        min_p: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        restricted = restrict(logits / temperature, top_p, top_k, min_p)
        race = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
        race.exponential_(generator=generator)
        # In logarithms of float64, so that small probabilities stay apart from 0.
        scores = torch.log_softmax(restricted.double(), dim=-1) - race.log()
        return _best(scores, logits, mask_token_id), restricted


def _best(scores: torch.Tensor, logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """Return the best token of each row that is not the mask id.

    Where a restriction leaves only the mask id, that is the most probable other token.
    """
    scores[:, mask_token_id] = -torch.inf
    best = scores.max(dim=-1)
    return torch.where(
        torch.isneginf(best.values), greedy_tokens(logits, mask_token_id), best.indices
    )


def restrict(logits: torch.Tensor, top_p: float, top_k: int, min_p: float = 0.0) -> torch.Tensor:
    """Set the logits that ``min_p``, then ``top_p``, then ``top_k`` excludes to -inf.

    ``min_p`` keeps tokens that are at least that fraction as probable as the most probable one;
    ``top_p`` keeps the smallest set of most probable tokens whose total probability exceeds it;
    ``top_k`` keeps logits no smaller than the k-th largest.
    """
    if min_p > 0:
        probabilities = torch.softmax(logits, dim=-1)
        least = min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, -torch.inf)
    if top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits, top_p, top_k), -torch.inf)
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = torch.topk(logits, top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    return logits


def _nucleus(logits: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Return ``[n, vocab]`` whether a token is in the nucleus, first on ties.

    Sorts no more than it has to: the ``top_k`` most probable tokens if only they can be drawn, and
    without ``top_k`` on a CPU a few that nearly always are enough. Elsewhere the host would have to
    wait to know whether they are.
    """
    vocab = logits.shape[-1]
    few = _FEW_TOKENS if logits.device.type == "cpu" else vocab
    most = min(top_k or few, vocab)
    if most < vocab:
        ordered = torch.topk(logits, most, dim=-1).values
    else:
        ordered = torch.sort(logits, dim=-1, descending=True).values
    largest = ordered[:, :1]
    # CUDA's scan of a single row is not deterministic; that of several rows is.
    rows = ordered if ordered.shape[0] != 1 else ordered.expand(2, -1)
    reached = torch.exp(rows - largest).cumsum(dim=-1)[: ordered.shape[0]]
    limit = top_p * torch.exp(logits - largest).sum(dim=-1, keepdim=True)
    num = 1 + (reached[:, :-1] <= limit).sum(dim=-1, keepdim=True)
    last = ordered.gather(-1, num - 1)
    tied = logits == last
    # Where the nucleus goes on behind the sorted tokens, more may be tied with their last.
    goes_on = reached[:, -1:] <= limit
    further = (limit - reached[:, -1:]) / torch.exp(last - largest)
    further = further.nan_to_num(vocab, posinf=vocab).clamp(max=vocab).long() + 1
    num_tied = num + goes_on * further - (ordered > last).sum(dim=-1, keepdim=True)
    nucleus = (logits > last) | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= num_tied))
    if most < vocab and not top_k:
        larger = torch.nonzero(goes_on.squeeze(-1)).squeeze(-1)
        if len(larger):
            nucleus[larger] = _nucleus(logits[larger], top_p, vocab)
    return nucleus
