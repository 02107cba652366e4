# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a batch: from logits to committed tokens, for all requests at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse_dllm.denoise.rules import (
    PROBABILITY_RULE,
    UnmaskingRule,
    factor_counts,
    threshold_counts,
)
from vllm_sparse_dllm.denoise.sampling import (
    TokenDistribution,
    TokenSampler,
    greedy_tokens,
)


@dataclass(frozen=True)
class Candidates:
    """The candidate positions of one request in this step, and how it commits them.

    Attributes:
        num: Rows of the logits that are this request's, at least 1.
        count: Positions to commit; unused with threshold, factor or an independent rule.
        rule: How positions are ranked.
        commit_probability: For an independent rule: chance of each position.
        threshold: Fast-dLLM's threshold, or None.
        factor: Fast-dLLM's factor, or None.
        temperature: 0 for the most probable token.
        top_p: Nucleus, 1 for none.
        top_k: 0 for none.
        alg_temp: Noise on the order of commits, 0 for none.
        generator: The request's own noise; needed wherever something is drawn.
        num_logprobs: Most probable alternatives to report a committed token, or None.
    """

    num: int
    count: int
    rule: UnmaskingRule
    commit_probability: float
    threshold: float | None
    factor: float | None
    temperature: float
    top_p: float
    top_k: int
    alg_temp: float
    generator: torch.Generator
    num_logprobs: int | None

    @property
    def ranking(self) -> UnmaskingRule:
        """The rule whose confidence counts."""
        parallel = self.threshold is not None or self.factor is not None
        return PROBABILITY_RULE if parallel else self.rule


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities at the step of commit, for the committed rows in order.

    Attributes:
        token_ids: ``[commits, 1 + k]`` the chosen token, then the k most probable.
        values: ``[commits, 1 + k]``.
        ranks: ``[commits]`` 1-based rank of the chosen token.
    """

    token_ids: np.ndarray
    values: np.ndarray
    ranks: np.ndarray


@dataclass(frozen=True)
class Commits:
    """What a step decided.

    Attributes:
        tokens: ``[rows]`` host array, the token chosen for each candidate.
        committed: ``[rows]`` host array, True where it is committed.
        failed: ``[requests]`` host array, True where the logits were not finite.
        logprobs: For each request that asked for them, else None.
    """

    tokens: np.ndarray
    committed: np.ndarray
    failed: np.ndarray
    logprobs: list[Logprobs | None]


def denoise(
    logits: torch.Tensor,
    requests: Sequence[Candidates],
    mask_token_id: int,
    sampler: TokenSampler,
) -> Commits:
    """Choose tokens, rank the candidates of each request and commit the surest.

    Args:
        logits: ``[rows, vocab]`` in the model dtype, the requests' candidates one after the
            other, each in position order.
        requests: Whose rows they are.
        mask_token_id: Never chosen.
        sampler: How the model family draws at ``temperature > 0``.
    """
    device = logits.device
    logits = logits.float()
    sizes = np.array([request.num for request in requests])
    ends = np.cumsum(sizes)
    spans = list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))

    distribution = _choose(logits, requests, spans, mask_token_id, sampler)
    confidence = _rank(distribution, requests, spans)

    row_request = np.repeat(np.arange(len(requests)), sizes)
    row_column = np.arange(len(row_request)) - np.repeat(ends - sizes, sizes)
    index = torch.from_numpy(np.stack([row_request, row_column])).to(device)
    padded = torch.full(
        (len(requests), int(sizes.max())), -torch.inf, dtype=confidence.dtype, device=device
    )
    padded[index[0], index[1]] = confidence
    ordered, order = torch.sort(padded, dim=-1, descending=True, stable=True)
    counts = _counts(ordered, requests, sizes, device)
    chosen = torch.arange(ordered.shape[1], device=device) < counts.unsqueeze(-1)
    selected = torch.zeros_like(chosen).scatter_(-1, order, chosen)[index[0], index[1]]

    broken = torch.zeros(len(requests), dtype=torch.bool, device=device)
    broken.index_put_((index[0],), ~torch.isfinite(distribution.probability()), accumulate=True)
    # The one read of a step's results.
    result = torch.stack([distribution.tokens, selected.long()]).cpu().numpy()
    committed = result[1].astype(bool)
    return Commits(
        tokens=result[0],
        committed=committed,
        failed=broken.cpu().numpy(),
        logprobs=_logprobs(logits, distribution.tokens, committed, requests, spans),
    )


def _choose(
    logits: torch.Tensor,
    requests: Sequence[Candidates],
    spans: list[tuple[int, int]],
    mask_token_id: int,
    sampler: TokenSampler,
) -> TokenDistribution:
    tokens = greedy_tokens(logits, mask_token_id)
    confidence_logits = logits
    for request, (start, end) in zip(requests, spans, strict=True):
        if request.temperature > 0:
            tokens[start:end], own = sampler.draw(
                logits[start:end],
                mask_token_id,
                request.temperature,
                request.top_p,
                request.top_k,
                request.generator,
            )
            if own.data_ptr() != logits[start:end].data_ptr():
                if confidence_logits is logits:
                    confidence_logits = logits.clone()
                confidence_logits[start:end] = own
    return TokenDistribution(confidence_logits, tokens)


def _rank(
    distribution: TokenDistribution,
    requests: Sequence[Candidates],
    spans: list[tuple[int, int]],
) -> torch.Tensor:
    """Return ``[rows]`` confidences, one rule at a time over the rows that use it."""
    device = distribution.logits.device
    confidence = torch.empty(distribution.tokens.shape[0], device=device)
    by_rule: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        by_rule.setdefault(request.ranking.name, []).append(number)
    for numbers in by_rule.values():
        rule = requests[numbers[0]].ranking
        if rule.confidence is None:
            for number in numbers:
                start, end = spans[number]
                confidence[start:end] = torch.rand(
                    end - start, device=device, generator=requests[number].generator
                )
            continue
        if len(by_rule) == 1:
            confidence = rule.confidence(distribution)
            continue
        rows = torch.from_numpy(np.concatenate([np.arange(*spans[n]) for n in numbers]))
        rows = rows.to(device)
        confidence[rows] = rule.confidence(distribution.rows(rows))

    for request, (start, end) in zip(requests, spans, strict=True):
        if request.ranking.independent:
            # The smaller the draw, the surer: those below the chance are committed.
            confidence[start:end].neg_()
        elif request.alg_temp > 0:
            race = torch.empty(end - start, dtype=torch.float64, device=device)
            race.exponential_(generator=request.generator)
            weights = torch.softmax(confidence[start:end].double() / request.alg_temp, dim=-1)
            # Only the order counts, and logarithms keep it where float32 would underflow.
            confidence[start:end] = (weights.log() - race.log()).float()
    return confidence


def _counts(
    ordered: torch.Tensor,
    requests: Sequence[Candidates],
    sizes: np.ndarray,
    device: torch.device,
) -> torch.Tensor:
    """Return ``[requests]`` numbers of commits."""
    counts = torch.tensor([request.count for request in requests], device=device)
    if any(request.threshold is not None for request in requests):
        values = [request.threshold for request in requests]
        counts = torch.where(
            torch.tensor([value is not None for value in values], device=device),
            threshold_counts(ordered, torch.tensor([v or 1.0 for v in values], device=device)),
            counts,
        )
    if any(request.factor is not None for request in requests):
        values = [request.factor for request in requests]
        counts = torch.where(
            torch.tensor([value is not None for value in values], device=device),
            factor_counts(
                ordered,
                torch.tensor([v or 1.0 for v in values], dtype=torch.float64, device=device),
                torch.from_numpy(sizes).to(device),
            ),
            counts,
        )
    if any(request.ranking.independent for request in requests):
        chance = torch.tensor([request.commit_probability for request in requests], device=device)
        counts = torch.where(
            torch.tensor([request.ranking.independent for request in requests], device=device),
            (ordered > -chance.unsqueeze(-1)).sum(dim=-1),
            counts,
        )
    return counts


def _logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    committed: np.ndarray,
    requests: Sequence[Candidates],
    spans: list[tuple[int, int]],
) -> list[Logprobs | None]:
    results: list[Logprobs | None] = [None] * len(requests)
    for number, (request, (start, end)) in enumerate(zip(requests, spans, strict=True)):
        if request.num_logprobs is None:
            continue
        rows = torch.from_numpy(np.flatnonzero(committed[start:end]) + start).to(logits.device)
        logprobs = torch.log_softmax(logits.index_select(0, rows), dim=-1)
        own_tokens = tokens.index_select(0, rows).unsqueeze(-1)
        own = logprobs.gather(-1, own_tokens)
        k = logprobs.shape[-1] if request.num_logprobs < 0 else request.num_logprobs
        top = torch.topk(logprobs, k, dim=-1)
        results[number] = Logprobs(
            token_ids=torch.cat([own_tokens, top.indices], dim=-1).cpu().numpy(),
            values=torch.cat([own, top.values], dim=-1).cpu().numpy(),
            ranks=(logprobs >= own).sum(dim=-1).cpu().numpy(),
        )
    return results
