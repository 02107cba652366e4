# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a batch: from logits to committed tokens, for all requests at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse_dllm.denoise.plan import Candidates, RowGroup, Span, StepPlan
from vllm_sparse_dllm.denoise.rules import factor_counts, threshold_counts
from vllm_sparse_dllm.denoise.sampling import (
    TokenDistribution,
    TokenSampler,
    greedy_tokens,
)
from vllm_sparse_dllm.transfer import HostArrays, read_back


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities in the step of the commit, for the committed rows in order.

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
        logprobs: Those of each request, None if it did not ask for them.
        confidences: ``[rows]`` host array, the confidence by which each candidate was ranked,
            before noise; its token's probability under a rule that draws the order. None if no
            request asked for them.
    """

    tokens: np.ndarray
    committed: np.ndarray
    failed: np.ndarray
    logprobs: list[Logprobs | None]
    confidences: np.ndarray | None = None


#: Returns the logits of a step's rows [start, end), ``[n, vocab]`` in the model dtype, or in
#: float32 with guidance; a new tensor each time. With an index, ``[m]`` on the device and counted
#: from start, only those of the indexed rows; the rows must then belong to one request.
LogitsOf = Callable[[int, int, torch.Tensor | None], torch.Tensor]

#: Returns a device's own distribution at temperature 0, which stores no probabilities, from
#: ``[n, vocab]`` logits in any dtype and the mask id.
GreedyDistribution = Callable[[torch.Tensor, int], TokenDistribution]


def denoise(
    logits_of: LogitsOf,
    plan: StepPlan,
    mask_token_id: int,
    sampler: TokenSampler,
    arrays: HostArrays,
    greedy: GreedyDistribution | None = None,
) -> Commits:
    """Choose tokens, rank the candidates of each request and commit the surest.

    Logits are computed for a chunk of rows at a time, so that those of all candidates of a large
    batch need never fit in memory. The step waits for the device once, and again where
    log-probabilities are requested.

    Args:
        logits_of: Computes the logits of the plan's rows.
        plan: The step's plan; its data for the device has been sent.
        mask_token_id: Never chosen.
        sampler: How the model family draws at ``temperature > 0``.
        arrays: Host arrays for what is sent to the device during the step.
        greedy: The device's own distribution at temperature 0, or None for PyTorch's.
    """
    requests, spans, device = plan.requests, plan.spans, plan.places.device
    tokens = torch.empty(plan.num_rows, dtype=torch.int64, device=device)
    confidence = torch.empty(plan.num_rows, device=device)
    finite = torch.empty(plan.num_rows, dtype=torch.bool, device=device)
    for chunk in plan.chunks:
        first, last = chunk.span
        logits = logits_of(first, last, None)
        if greedy is None or chunk.edits:
            logits = logits.float()
        for edit, (start, end), number in chunk.edits:
            edit.apply(logits[start:end], number)
        for group in chunk.groups:
            decided = _decide(logits, group, mask_token_id, sampler, greedy)
            for result, own in zip((tokens, confidence, finite), decided, strict=True):
                if group.rows is None:
                    result[first:last] = own
                else:
                    result[first:last].index_copy_(0, group.rows, own)
    results = [tokens, finite]
    traced = any(request.traced for request in requests)
    if traced:
        results.append(confidence.clone())  # `_add_draws` writes to its argument
    _add_draws(confidence, plan)

    rows, columns = plan.places
    most = max(end - start for start, end in spans)
    padded = torch.full((len(requests), most), -torch.inf, device=device)
    padded[rows, columns] = confidence
    ordered, order = torch.sort(padded, dim=-1, descending=True, stable=True)
    chosen = torch.arange(most, device=device) < _counts(ordered, plan).unsqueeze(-1)
    results.append(torch.zeros_like(chosen).scatter_(-1, order, chosen)[rows, columns])
    if any(request.check is not None for request in requests):
        results.append(order)

    # The only read of a step's results.
    read = iter(read_back(results))
    host_tokens, host_finite = next(read), next(read)
    confidences = next(read) if traced else None
    committed = next(read)
    host_order = next(read, None)
    for number, (request, (start, end)) in enumerate(zip(requests, spans, strict=True)):
        if request.check is not None:
            assert host_order is not None
            standing = committed[start:end]
            surest = host_order[number][: standing.sum()]
            standing[surest] = request.check(surest, host_tokens[start:end][surest])
    return Commits(
        tokens=host_tokens,
        committed=committed,
        failed=~np.logical_and.reduceat(host_finite, [start for start, _ in spans]),
        logprobs=_logprobs(logits_of, host_tokens, committed, plan, arrays),
        confidences=confidences,
    )


def _decide(
    logits: torch.Tensor,
    group: RowGroup,
    mask_token_id: int,
    sampler: TokenSampler,
    greedy: GreedyDistribution | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``[rows]`` tokens, their confidences, and whether the logits were usable."""
    if group.rows is not None:
        logits = logits.index_select(0, group.rows)
    if greedy is None or group.draws:
        distribution = _choose(logits.float(), group.requests, group.spans, mask_token_id, sampler)
    else:
        distribution = greedy(logits, mask_token_id)
    return (
        distribution.tokens,
        _confidence(distribution, group),
        torch.isfinite(distribution.probability()),
    )


def _choose(
    logits: torch.Tensor,
    requests: Sequence[Candidates],
    spans: Sequence[Span],
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
                request.min_p,
            )
            if own.data_ptr() != logits[start:end].data_ptr():
                if confidence_logits is logits:
                    confidence_logits = logits.clone()
                confidence_logits[start:end] = own
    return TokenDistribution(confidence_logits, tokens)


def _confidence(distribution: TokenDistribution, group: RowGroup) -> torch.Tensor:
    """Return ``[rows]`` confidences, one rule at a time over the rows that use it."""
    confidence = torch.zeros(distribution.tokens.shape[0], device=distribution.logits.device)
    for ranked in group.ranked:
        assert ranked.rule.confidence is not None
        if ranked.rows is None:
            return ranked.rule.confidence(distribution)
        own = ranked.rule.confidence(distribution.rows(ranked.rows))
        confidence.index_copy_(0, ranked.rows, own)
    return confidence


def _add_draws(confidence: torch.Tensor, plan: StepPlan) -> None:
    """Draw the confidences of rules that draw them, and add noise to the order where set."""
    for request, (start, end) in zip(plan.requests, plan.spans, strict=True):
        own = confidence[start:end]
        if request.ranking.confidence is None:
            own.copy_(torch.rand(end - start, device=own.device, generator=request.generator))
        if request.ranking.independent:
            # A smaller draw is a higher confidence: draws below the chance are committed.
            own.neg_()
        elif request.alg_temp > 0:
            race = torch.empty(end - start, dtype=torch.float64, device=own.device)
            race.exponential_(generator=request.generator)
            weights = torch.log_softmax(own.double() / request.alg_temp, dim=-1)
            # Only the order matters, and logarithms keep it where float32 would underflow.
            own.copy_(weights - race.log())


def _counts(ordered: torch.Tensor, plan: StepPlan) -> torch.Tensor:
    """Return ``[requests]`` numbers of commits."""
    counts = plan.counts
    if (rule := plan.threshold) is not None:
        counts = torch.where(rule.applies, threshold_counts(ordered, rule.values), counts)
    if (rule := plan.factor) is not None:
        own = factor_counts(ordered, rule.values, plan.sizes)
        counts = torch.where(rule.applies, own, counts)
    if (rule := plan.chance) is not None:
        own = (ordered > -rule.values.unsqueeze(-1)).sum(dim=-1)
        counts = torch.where(rule.applies, own, counts)
    return counts


def _logprobs(
    logits_of: LogitsOf,
    tokens: np.ndarray,
    committed: np.ndarray,
    plan: StepPlan,
    arrays: HostArrays,
) -> list[Logprobs | None]:
    """Return the log-probabilities that requests asked for.

    Waits for the device once, or more often where the results would take more memory than a
    chunk of logits.
    """
    asking = [n for n, request in enumerate(plan.requests) if request.num_logprobs is not None]
    if not asking:
        return [None] * len(plan.requests)
    # Each part: its request, the commits among the request's rows, and their tokens.
    parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    for number in asking:
        start, end = plan.spans[number]
        rows = np.flatnonzero(committed[start:end])
        for first in range(0, max(1, len(rows)), plan.max_rows):
            own = rows[first : first + plan.max_rows]
            parts.append((number, arrays.put(own), arrays.put(tokens[start + own])))
    arrays.send()
    results: list[torch.Tensor] = []
    read: list[np.ndarray] = []
    for number, index, own_tokens in parts:
        logits = logits_of(*plan.spans[number], index)
        num_rows, vocab = logits.shape
        k = plan.requests[number].num_logprobs
        k = vocab if k is None or k < 0 else min(k, vocab)
        pending = sum(result.numel() for result in results)
        if pending and pending + num_rows * 2 * k > plan.max_rows * vocab:
            # Read back before there are more: profiling measures the memory of one part.
            read += read_back(results)
            results = []
        results += _ranked_logprobs(logits, own_tokens, k)
    if results:
        read += read_back(results)
    logprobs: list[Logprobs | None] = [None] * len(plan.requests)
    for number in asking:
        own_parts = [
            read[3 * place : 3 * place + 3]
            for place, (owner, _, _) in enumerate(parts)
            if owner == number
        ]
        logprobs[number] = Logprobs(*(np.concatenate(own) for own in zip(*own_parts, strict=True)))
    return logprobs


def _ranked_logprobs(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> list[torch.Tensor]:
    """Return token ids, values and ranks as in `Logprobs`."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    tokens = tokens.unsqueeze(-1)
    own = logprobs.gather(-1, tokens)
    top = torch.topk(logprobs, k, dim=-1)
    return [
        torch.cat([tokens, top.indices], dim=-1),
        torch.cat([own, top.values], dim=-1),
        (logprobs >= own).sum(dim=-1),
    ]
