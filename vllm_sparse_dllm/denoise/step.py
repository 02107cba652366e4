# SPDX-License-Identifier: Apache-2.0
"""One denoising step of a batch: from logits to committed tokens, for all requests at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse_dllm.denoise.constraints import CommitCheck, LogitsEdit
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
        min_p: Least probability relative to the largest, 0 for none.
        edits: Changes of the logits, in order.
        check: Decides between the commits of this step, or None.
        traced: Whether the confidences are reported.
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
    min_p: float = 0.0
    edits: tuple[LogitsEdit, ...] = ()
    check: CommitCheck | None = None
    traced: bool = False

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
        confidences: ``[rows]`` host array, the confidence by which each candidate was ranked,
            before noise; its probability under a rule that draws the order. None if nobody
            asked for them.
    """

    tokens: np.ndarray
    committed: np.ndarray
    failed: np.ndarray
    logprobs: list[Logprobs | None]
    confidences: np.ndarray | None = None


#: The logits of a host array of candidate rows, ``[n, vocab]`` in the model dtype; a new
#: tensor each time.
LogitsOf = Callable[[np.ndarray], torch.Tensor]

#: What a device makes of rows of logits at temperature 0, in any dtype, without their
#: probabilities: ``[n, vocab]`` logits and the mask id.
GreedyDistribution = Callable[[torch.Tensor, int], TokenDistribution]

Span = tuple[int, int]

#: Of tokens, confidences, and of whether logits are usable.
_DECIDED = (torch.int64, torch.float32, torch.bool)


def denoise(
    logits_of: LogitsOf,
    requests: Sequence[Candidates],
    mask_token_id: int,
    sampler: TokenSampler,
    device: torch.device,
    max_rows: int,
    greedy: GreedyDistribution | None = None,
) -> Commits:
    """Choose tokens, rank the candidates of each request and commit the surest.

    Logits exist for ``max_rows`` rows at a time, so that the vocabulary times the candidates
    of a large batch need never fit the memory.

    Args:
        logits_of: The requests' candidates are rows 0, 1, ..., one request after the other,
            each in position order.
        requests: Whose rows they are.
        mask_token_id: Never chosen.
        sampler: How the model family draws at ``temperature > 0``.
        device: Where the logits are.
        max_rows: At least 1.
        greedy: The device's own way at temperature 0, or None for PyTorch's.
    """
    sizes = np.array([request.num for request in requests])
    ends = np.cumsum(sizes)
    spans = list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))

    num_rows = int(ends[-1])
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    confidence = torch.empty(num_rows, device=device)
    finite = torch.empty(num_rows, dtype=torch.bool, device=device)
    for parts in _chunks(spans, max_rows):
        first, last = parts[0][1][0], parts[-1][1][1]
        own_requests = [requests[number] for number, _ in parts]
        own_spans = [(start - first, end - first) for _, (start, end) in parts]
        logits = logits_of(np.arange(first, last))
        if greedy is None or any(request.edits for request in own_requests):
            logits = logits.float()
        for number, (start, end) in parts:
            for edit in requests[number].edits:
                edit.apply(logits[start - first : end - first], start - spans[number][0])
        decided = _decide(logits, own_requests, own_spans, mask_token_id, sampler, greedy)
        tokens[first:last], confidence[first:last], finite[first:last] = decided
    confidences = None
    if any(request.traced for request in requests):
        confidences = confidence.cpu().numpy().copy()  # `_add_draws` writes to its argument
    _add_draws(confidence, requests, spans)

    row_request = np.repeat(np.arange(len(requests)), sizes)
    row_column = np.arange(num_rows) - np.repeat(ends - sizes, sizes)
    index = torch.from_numpy(np.stack([row_request, row_column])).to(device)
    padded = torch.full((len(requests), int(sizes.max())), -torch.inf, device=device)
    padded[index[0], index[1]] = confidence
    ordered, order = torch.sort(padded, dim=-1, descending=True, stable=True)
    counts = _counts(ordered, requests, sizes, device)
    chosen = torch.arange(ordered.shape[1], device=device) < counts.unsqueeze(-1)
    selected = torch.zeros_like(chosen).scatter_(-1, order, chosen)[index[0], index[1]]

    # The one read of a step's results.
    result = torch.stack([tokens, selected.long(), finite.long()]).cpu().numpy()
    committed = result[1].astype(bool)
    for number, (request, (start, end)) in enumerate(zip(requests, spans, strict=True)):
        if request.check is not None:
            own = committed[start:end]
            surest = order[number].cpu().numpy()[: own.sum()]
            own[surest] = request.check(surest, result[0, start:end][surest])
    return Commits(
        tokens=result[0],
        committed=committed,
        failed=np.minimum.reduceat(result[2], ends - sizes) == 0,
        logprobs=_logprobs(logits_of, result[0], committed, requests, spans),
        confidences=confidences,
    )


def _chunks(spans: list[Span], max_rows: int) -> Iterator[list[tuple[int, Span]]]:
    """Pack the requests' rows into chunks.

    A request is cut only where it alone is too large, and then from its own first row on: how
    its noise is drawn must not depend on who else is in the batch.
    """
    chunk: list[tuple[int, Span]] = []
    num_rows = 0
    for number, (first, last) in enumerate(spans):
        for start in range(first, last, max_rows):
            end = min(start + max_rows, last)
            if num_rows + end - start > max_rows:
                yield chunk
                chunk, num_rows = [], 0
            chunk.append((number, (start, end)))
            num_rows += end - start
    if chunk:
        yield chunk


def _decide(
    logits: torch.Tensor,
    requests: Sequence[Candidates],
    spans: list[Span],
    mask_token_id: int,
    sampler: TokenSampler,
    greedy: GreedyDistribution | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``[rows]`` tokens, their confidences, and whether the logits were usable."""
    drawing = {request.temperature > 0 for request in requests}
    if greedy is not None and len(drawing) == 2:
        # A row's result must not depend on who else is in the batch: each goes its own way.
        tokens, confidence, finite = (
            torch.empty(logits.shape[0], dtype=dtype, device=logits.device) for dtype in _DECIDED
        )
        for draws in drawing:
            group = [n for n, request in enumerate(requests) if (request.temperature > 0) is draws]
            own = [requests[number] for number in group]
            rows = torch.from_numpy(np.concatenate([np.arange(*spans[n]) for n in group]))
            rows = rows.to(logits.device)
            sizes = np.array([spans[n][1] - spans[n][0] for n in group])
            ends = np.cumsum(sizes)
            own_spans = list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))
            results = _decide(logits[rows], own, own_spans, mask_token_id, sampler, greedy)
            tokens[rows], confidence[rows], finite[rows] = results
        return tokens, confidence, finite
    if greedy is None or True in drawing:
        distribution = _choose(logits.float(), requests, spans, mask_token_id, sampler)
    else:
        distribution = greedy(logits, mask_token_id)
    return (
        distribution.tokens,
        _confidence(distribution, requests, spans),
        torch.isfinite(distribution.probability()),
    )


def _choose(
    logits: torch.Tensor,
    requests: Sequence[Candidates],
    spans: list[Span],
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


def _confidence(
    distribution: TokenDistribution, requests: Sequence[Candidates], spans: list[Span]
) -> torch.Tensor:
    """Return ``[rows]`` confidences, one rule at a time over the rows that use it."""
    device = distribution.logits.device
    confidence = torch.zeros(distribution.tokens.shape[0], device=device)
    by_rule: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        by_rule.setdefault(request.ranking.name, []).append(number)
    for numbers in by_rule.values():
        rule = requests[numbers[0]].ranking
        if rule.confidence is None:
            # Its order is drawn later; only a trace shows how sure the model is.
            if not any(requests[number].traced for number in numbers):
                continue
            rule = PROBABILITY_RULE
        assert rule.confidence is not None
        if len(by_rule) == 1:
            return rule.confidence(distribution)
        rows = torch.from_numpy(np.concatenate([np.arange(*spans[n]) for n in numbers]))
        rows = rows.to(device)
        confidence[rows] = rule.confidence(distribution.rows(rows))
    return confidence


def _add_draws(confidence: torch.Tensor, requests: Sequence[Candidates], spans: list[Span]) -> None:
    """Draw the confidences that are drawn, and add noise where the order has some."""
    for request, (start, end) in zip(requests, spans, strict=True):
        own = confidence[start:end]
        if request.ranking.confidence is None:
            own.copy_(torch.rand(end - start, device=own.device, generator=request.generator))
        if request.ranking.independent:
            # The smaller the draw, the surer: those below the chance are committed.
            own.neg_()
        elif request.alg_temp > 0:
            race = torch.empty(end - start, dtype=torch.float64, device=own.device)
            race.exponential_(generator=request.generator)
            weights = torch.log_softmax(own.double() / request.alg_temp, dim=-1)
            # Only the order counts, and logarithms keep it where float32 would underflow.
            own.copy_(weights - race.log())


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
    logits_of: LogitsOf,
    tokens: np.ndarray,
    committed: np.ndarray,
    requests: Sequence[Candidates],
    spans: list[Span],
) -> list[Logprobs | None]:
    results: list[Logprobs | None] = [None] * len(requests)
    for number, (request, (start, end)) in enumerate(zip(requests, spans, strict=True)):
        if request.num_logprobs is None:
            continue
        rows = np.flatnonzero(committed[start:end]) + start
        logprobs = torch.log_softmax(logits_of(rows).float(), dim=-1)
        own_tokens = torch.from_numpy(tokens[rows]).to(logprobs.device).unsqueeze(-1)
        own = logprobs.gather(-1, own_tokens)
        k = logprobs.shape[-1] if request.num_logprobs < 0 else request.num_logprobs
        top = torch.topk(logprobs, k, dim=-1)
        results[number] = Logprobs(
            token_ids=torch.cat([own_tokens, top.indices], dim=-1).cpu().numpy(),
            values=torch.cat([own, top.values], dim=-1).cpu().numpy(),
            ranks=(logprobs >= own).sum(dim=-1).cpu().numpy(),
        )
    return results
