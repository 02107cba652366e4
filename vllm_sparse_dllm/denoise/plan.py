# SPDX-License-Identifier: Apache-2.0
"""What is known of a denoising step before the network runs: who commits what, and how."""

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
class RankedRows:
    """Rows of a group that one rule ranks.

    Attributes:
        rule: It has a confidence.
        rows: ``[n]`` rows of the group, None for all.
    """

    rule: UnmaskingRule
    rows: torch.Tensor | None


@dataclass(frozen=True)
class RowGroup:
    """Rows of a chunk whose tokens are chosen the same way.

    Attributes:
        requests: Whose rows they are, in order.
        spans: Rows of each request in the group.
        rows: ``[n]`` rows of the chunk, None for all.
        draws: Whether tokens are drawn, as some request has a temperature.
        ranked: Which rule ranks which rows; a row of none has the confidence 0.
    """

    requests: tuple[Candidates, ...]
    spans: tuple[Span, ...]
    rows: torch.Tensor | None
    draws: bool
    ranked: tuple[RankedRows, ...]


@dataclass(frozen=True)
class RowChunk:
    """Rows whose logits exist at a time.

    Attributes:
        span: First row of the step, and the end.
        edits: Requests' edits, each with its rows of the chunk, and the row among the
            request's own that these begin with.
        groups: All rows, each once.
    """

    span: Span
    edits: tuple[tuple[LogitsEdit, Span, int], ...]
    groups: tuple[RowGroup, ...]


@dataclass(frozen=True)
class Criterion:
    """What counts the commits of some of the requests.

    Attributes:
        applies: ``[requests]`` whose.
        values: ``[requests]`` threshold, factor, or chance.
    """

    applies: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class StepPlan:
    """A step's requests, and what the device has to know of them.

    Attributes:
        requests: In the order of their rows.
        spans: Rows of each.
        max_rows: Logits that exist at a time.
        chunks: The rows in parts of no more.
        places: ``[2, rows]`` request of each row, and which of its rows it is.
        sizes: ``[requests]`` rows of each.
        counts: ``[requests]`` commits under fixed steps.
        threshold: Where some request has one.
        factor: Where some request has one.
        chance: Where some request's positions are committed by their own draws.
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
        max_rows: Logits that exist at a time, at least 1.
        arrays: What the plan goes to the device with; they have to be sent before it is used.
        fused: Whether tokens at temperature 0 are chosen in a way of their own, which drawn
            ones do not take part in.
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
        # A row's result must not depend on who else is in the batch: each goes its own way.
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
            # Its order is drawn later; only a trace shows how sure the model is.
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
