# SPDX-License-Identifier: Apache-2.0
"""What is known about a denoising step before the network runs: its rows and how they commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse_dllm.denoise.constraints import CommitCheck, LogitsEdit
from vllm_sparse_dllm.denoise.rules import PROBABILITY_RULE, UnmaskingRule
from vllm_sparse_dllm.transfer import HostArrays

Span = tuple[int, int]


@dataclass(frozen=True)
class Candidates:
    """The candidate positions of one request in this step, and how it commits them.

    Attributes:
        num: The request's rows of logits, at least 1.
        count: Positions to commit; unused with threshold, factor or an independent rule.
        rule: How positions are ranked.
        commit_probability: For an independent rule: the chance that a position is committed.
        threshold: Fast-dLLM's threshold, or None.
        factor: Fast-dLLM's factor, or None.
        temperature: 0 for the most probable token.
        top_p: Probability of the nucleus, 1 for no restriction.
        top_k: 0 for no restriction.
        alg_temp: Noise on the order of commits, 0 for none.
        generator: The request's own source of noise, used for everything that is drawn.
        num_logprobs: Most probable alternatives to report per committed token, None for no
            log-probabilities.
        min_p: Least probability relative to the largest, 0 for no restriction.
        edits: Edits of the logits, in order.
        check: Decides which commits of this step stand, or None.
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
        """The rule that ranks the candidates."""
        parallel = self.threshold is not None or self.factor is not None
        return PROBABILITY_RULE if parallel else self.rule


@dataclass(frozen=True)
class RankedRows:
    """Rows of a group that one rule ranks.

    Attributes:
        rule: The rule; its ``confidence`` is not None.
        rows: ``[n]`` rows of the group, None for all.
    """

    rule: UnmaskingRule
    rows: torch.Tensor | None


@dataclass(frozen=True)
class RowGroup:
    """Rows of a chunk whose tokens are chosen the same way.

    Attributes:
        requests: Requests that the rows belong to, in order.
        spans: Rows of each request in the group.
        rows: ``[n]`` rows of the chunk, None for all.
        draws: Whether some request has a temperature above 0, so that tokens are drawn.
        ranked: Rules and the rows they rank; rows without a rule have the confidence 0.
    """

    requests: tuple[Candidates, ...]
    spans: tuple[Span, ...]
    rows: torch.Tensor | None
    draws: bool
    ranked: tuple[RankedRows, ...]


@dataclass(frozen=True)
class RowChunk:
    """Rows whose logits are in memory at the same time.

    Attributes:
        span: Rows [start, end) of the step.
        edits: Requests' edits, each with its rows of the chunk and the number of the first of
            these among the request's rows.
        groups: Groups that hold each row of the chunk once.
    """

    span: Span
    edits: tuple[tuple[LogitsEdit, Span, int], ...]
    groups: tuple[RowGroup, ...]


@dataclass(frozen=True)
class Criterion:
    """A rule for how many positions are committed, and the requests that it applies to.

    Attributes:
        applies: ``[requests]`` whether the rule applies to the request.
        values: ``[requests]`` threshold, factor, or chance; unused where it does not apply.
    """

    applies: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class StepPlan:
    """A step's requests, and what the device has to know about them.

    Attributes:
        requests: In the order of their rows.
        spans: Rows of each request.
        max_rows: Most rows whose logits are in memory at the same time.
        chunks: All rows, in parts of at most ``max_rows``.
        places: ``[2, rows]`` request of each row, and the row's number within the request.
        sizes: ``[requests]`` rows of each request.
        counts: ``[requests]`` commits under fixed steps.
        threshold: Thresholds, None if no request has one.
        factor: Factors, None if no request has one.
        chance: Chances of rules that commit each position by its own draw, None if no request
            has such a rule.
    """

    requests: tuple[Candidates, ...]
    spans: tuple[Span, ...]
    max_rows: int
    chunks: tuple[RowChunk, ...]
    places: torch.Tensor
    sizes: torch.Tensor
    counts: torch.Tensor
    threshold: Criterion | None
    factor: Criterion | None
    chance: Criterion | None

    @property
    def num_rows(self) -> int:
        return self.spans[-1][1]


def plan_step(
    requests: Sequence[Candidates], max_rows: int, arrays: HostArrays, fused: bool = False
) -> StepPlan:
    """Plan a step.

    Args:
        requests: Their candidates are rows 0, 1, ..., one request after the other, each in
            position order.
        max_rows: Most rows whose logits are in memory at the same time, at least 1.
        arrays: Host arrays to send the plan's data with; they must be sent before it is used.
        fused: Whether the device's own kernels choose tokens at temperature 0; they run on groups
            without drawn tokens.
    """
    sizes = np.array([request.num for request in requests])
    ends = np.cumsum(sizes)
    spans = tuple(zip((ends - sizes).tolist(), ends.tolist(), strict=True))
    row_request = np.repeat(np.arange(len(requests)), sizes)
    row_number = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)
    return StepPlan(
        requests=tuple(requests),
        spans=spans,
        max_rows=max_rows,
        chunks=tuple(
            _chunk(parts, requests, spans, arrays, fused) for parts in _cut(spans, max_rows)
        ),
        places=arrays.put(np.stack([row_request, row_number])),
        sizes=arrays.put(sizes),
        counts=arrays.put(np.array([request.count for request in requests])),
        threshold=_criterion([request.threshold for request in requests], np.float32, arrays),
        factor=_criterion([request.factor for request in requests], np.float64, arrays),
        chance=_criterion(
            [
                request.commit_probability if request.ranking.independent else None
                for request in requests
            ],
            np.float32,
            arrays,
        ),
    )


def _criterion(
    values: list[float | None], dtype: type[np.floating], arrays: HostArrays
) -> Criterion | None:
    if all(value is None for value in values):
        return None
    return Criterion(
        arrays.put(np.array([value is not None for value in values]), np.bool_),
        arrays.put(np.array([1.0 if value is None else value for value in values]), dtype),
    )


def _cut(spans: Sequence[Span], max_rows: int) -> Iterator[list[tuple[int, Span]]]:
    """Pack the requests' rows into chunks.

    A request is cut only if it alone is too large, and then from its own first row on: how its
    noise is drawn must not depend on the rest of the batch.
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


def _chunk(
    parts: list[tuple[int, Span]],
    requests: Sequence[Candidates],
    spans: Sequence[Span],
    arrays: HostArrays,
    fused: bool,
) -> RowChunk:
    first, last = parts[0][1][0], parts[-1][1][1]
    own = [(requests[number], (start - first, end - first)) for number, (start, end) in parts]
    drawing = sorted({request.temperature > 0 for request, _ in own})
    if not fused or len(drawing) == 1:
        groups = [_group(own, None, arrays)]
    else:
        # A row's result must not depend on the rest of the batch: group greedy rows and drawn
        # rows apart.
        groups = []
        for draws in drawing:
            members = [part for part in own if (part[0].temperature > 0) is draws]
            rows = arrays.put(np.concatenate([np.arange(*span) for _, span in members]))
            sizes = np.array([end - start for _, (start, end) in members])
            ends = np.cumsum(sizes).tolist()
            packed = [
                (request, (end - size, end))
                for (request, _), size, end in zip(members, sizes.tolist(), ends, strict=True)
            ]
            groups.append(_group(packed, rows, arrays))
    return RowChunk(
        span=(first, last),
        edits=tuple(
            (edit, (start - first, end - first), start - spans[number][0])
            for number, (start, end) in parts
            for edit in requests[number].edits
        ),
        groups=tuple(groups),
    )


def _group(
    own: list[tuple[Candidates, Span]], rows: torch.Tensor | None, arrays: HostArrays
) -> RowGroup:
    by_rule: dict[str, list[tuple[Candidates, Span]]] = {}
    for request, span in own:
        by_rule.setdefault(request.ranking.name, []).append((request, span))
    ranked = []
    for members in by_rule.values():
        rule = members[0][0].ranking
        if rule.confidence is None:
            # The order is drawn later; confidences are needed for a trace only.
            if not any(request.traced for request, _ in members):
                continue
            rule = PROBABILITY_RULE
        index = None
        if len(by_rule) > 1:
            index = arrays.put(np.concatenate([np.arange(*span) for _, span in members]))
        ranked.append(RankedRows(rule, index))
    return RowGroup(
        requests=tuple(request for request, _ in own),
        spans=tuple(span for _, span in own),
        rows=rows,
        draws=any(request.temperature > 0 for request, _ in own),
        ranked=tuple(ranked),
    )
