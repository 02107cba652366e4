# SPDX-License-Identifier: Apache-2.0
"""One ragged batch of a step: tokens, positions and the plan of what attends to what."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionBackend
from vllm_sparse_dllm.attention.plan import (
    CachedSegment,
    Eviction,
    Fill,
    ForwardPlan,
    FullSegment,
)
from vllm_sparse_dllm.cache.policies import StepKind
from vllm_sparse_dllm.cache.saliency import CanvasView
from vllm_sparse_dllm.cache.selection import Selection
from vllm_sparse_dllm.engine.requests import NextStep, RequestState, Sequence


@dataclass(frozen=True)
class StepBatch:
    """A step's inputs.

    Attributes:
        input_ids: ``[tokens]``.
        positions: ``[tokens]``.
        plan: What attends to what.
        logits_rows: ``[rows]`` of the hidden states that are asked for: the candidates of
            each request in order, then the unconditional rows of guided requests.
        guided: ``[guided rows]`` rows of the candidates that are guided, in the order of
            their unconditional rows.
        guidance: ``[guided rows]`` their weights.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    plan: ForwardPlan
    logits_rows: torch.Tensor
    guided: torch.Tensor
    guidance: torch.Tensor


@dataclass
class _Entry:
    """A sequence's part of the batch."""

    request: int
    sequence: Sequence
    step: NextStep
    first_token: int = 0


def build_batch(
    requests: SequenceOf[RequestState],
    steps: SequenceOf[NextStep],
    backend: AttentionBackend,
) -> StepBatch:
    """Lay the next steps of the requests out as one batch."""
    entries = [
        _Entry(number, sequence, step)
        for number, (request, step) in enumerate(zip(requests, steps, strict=True))
        for sequence in request.sequences
    ]
    cached = [e for e in entries if not e.step.kind.runs_all]
    full = [e for e in entries if e.step.kind.runs_all]
    ordered = cached + full
    lengths = np.array([e.step.queries[1] - e.step.queries[0] for e in ordered])
    firsts = np.cumsum(lengths) - lengths
    for entry, first in zip(ordered, firsts.tolist(), strict=True):
        entry.first_token = first
    input_ids = np.concatenate([e.sequence.token_ids[slice(*e.step.queries)] for e in ordered])
    starts = np.array([e.step.queries[0] for e in ordered])
    positions = np.arange(len(input_ids)) - np.repeat(firsts - starts, lengths)

    # Rows whose hidden states are needed after the last layer: the candidates' own, one
    # before for a model that shifts.
    rows_of = [_logits_rows(requests[e.request], e) for e in ordered]
    row_counts = np.array([len(rows) for rows in rows_of])
    last_rows = np.concatenate(rows_of)
    if not len(last_rows):
        # The layers behind the attention want at least one row.
        last_rows = np.zeros(1, dtype=np.int64)
        row_counts[0] = 1
    last_firsts = np.cumsum(row_counts) - row_counts

    device = backend.device

    def to_device(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(
            device, non_blocking=True
        )

    plan = ForwardPlan(
        backend=backend,
        cached=_cached_segment(
            requests,
            cached,
            lengths[: len(cached)],
            row_counts[: len(cached)],
            backend,
            to_device,
        ),
        full=_full_segment(full, row_counts[len(cached) :], backend),
        fills=tuple(
            _fill(requests[e.request], e, to_device)
            for e in full
            if e.step.kind is StepKind.REFRESH
        ),
        evictions=tuple(
            _eviction(requests[e.request], e, to_device)
            for e in cached
            if e.step.kind is StepKind.EVICT
        ),
        last_rows=to_device(last_rows),
        num_last_cached=int(row_counts[: len(cached)].sum()),
    )

    # Back from the batch's order to the requests', unconditional rows last.
    ranges: list[np.ndarray] = []
    unconditional: list[np.ndarray] = []
    guided: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    place = {id(e): i for i, e in enumerate(ordered)}
    num_rows = 0
    for entry in entries:
        index = place[id(entry)]
        count = len(rows_of[index])
        rows = np.arange(last_firsts[index], last_firsts[index] + count)
        request = requests[entry.request]
        if entry.sequence is request.sequences[0]:
            ranges.append(rows)
            num_rows += count
        else:
            unconditional.append(rows)
            guided.append(np.arange(num_rows - count, num_rows))
            weights.append(np.full(count, request.settings.cfg_scale))
    empty = np.zeros(0)
    return StepBatch(
        input_ids=to_device(input_ids),
        positions=to_device(positions),
        plan=plan,
        logits_rows=to_device(np.concatenate(ranges + unconditional)),
        guided=to_device(np.concatenate(guided) if guided else empty),
        guidance=torch.from_numpy(np.concatenate(weights) if weights else empty).to(
            device, torch.float32
        ),
    )


def _logits_rows(request: RequestState, entry: _Entry) -> np.ndarray:
    """Return the batch rows that predict the candidates of an entry, in their order."""
    rows = entry.step.candidates - entry.step.queries[0]
    if request.traits.shifts_logits:
        # In a cached step the block's first position keeps its own row; it is filled by then.
        rows = np.maximum(rows - 1, 0)
    return rows + entry.first_token


def _cached_segment(
    requests: SequenceOf[RequestState],
    entries: list[_Entry],
    lengths: np.ndarray,
    row_counts: np.ndarray,
    backend: AttentionBackend,
    to_device: Callable[[np.ndarray], torch.Tensor],
) -> CachedSegment | None:
    if not entries:
        return None
    own = [
        _fresh_slots(requests[entry.request], entry, length)
        for entry, length in zip(entries, lengths.tolist(), strict=True)
    ]
    # One row for all layers, unless some entry has one for each.
    num_rows = max(len(slots) for slots in own)
    fresh = np.concatenate(
        [np.broadcast_to(slots, (num_rows, slots.shape[1])) for slots in own], axis=1
    )
    width = max(len(e.sequence.page_ids) for e in entries)
    table = np.zeros((len(entries), width), dtype=np.int64)
    for row, entry in zip(table, entries, strict=True):
        row[: len(entry.sequence.page_ids)] = entry.sequence.page_ids
    num_fresh = np.array([e.sequence.num_fresh for e in entries])
    filled = np.stack([e.sequence.num_kept for e in entries], axis=1) + num_fresh
    layers = filled if (filled != filled[0]).any() else filled[:1]
    return CachedSegment(
        num_tokens=int(lengths.sum()),
        fresh_slots=tuple(to_device(slots) for slots in fresh),
        plans=tuple(backend.plan_paged(lengths, keys, table) for keys in layers),
        last_plan=backend.plan_paged(row_counts, filled[-1], table),
    )


def _fresh_slots(request: RequestState, entry: _Entry, length: int) -> np.ndarray:
    """Return ``[layers, length]`` slots of the own keys of an entry; ``[1, ...]`` for all."""
    sequence = entry.sequence
    if entry.step.kind is not StepKind.APPEND:
        return sequence.slots[None, :length]
    queries = request.policy.queries(request.canvas, entry.step.block, request.settings)
    finished = (entry.step.queries[0], queries[0])
    targets = sequence.make_room(finished, queries)
    own = np.broadcast_to(np.arange(sequence.num_fresh), (len(targets), sequence.num_fresh))
    return sequence.slots[np.concatenate([targets, own], axis=1)]


def _full_segment(
    entries: list[_Entry], row_counts: np.ndarray, backend: AttentionBackend
) -> FullSegment | None:
    if not entries:
        return None
    lengths = np.array([e.step.queries[1] for e in entries])
    return FullSegment(
        plan=backend.plan_full(lengths, lengths),
        last_plan=backend.plan_full(row_counts, lengths),
    )


def _fill(
    request: RequestState, entry: _Entry, to_device: Callable[[np.ndarray], torch.Tensor]
) -> Fill:
    canvas, settings, policy = request.canvas, request.settings, request.policy
    sequence, block = entry.sequence, entry.step.block
    spans = policy.candidates(canvas, block, settings)
    start, end = policy.queries(canvas, block, settings)
    sequence.num_fresh = end - start
    if sequence.positions is not None:
        sequence.positions[:] = -1
    num_candidates = sum(end - start for start, end in spans)
    selection = None
    most = num_candidates
    if policy.selects and policy.choice(settings) is StepKind.REFRESH:
        selection = _selection(request, num_candidates)
        most = policy.num_kept(num_candidates, settings, request.page_size)
    return Fill(
        first_token=entry.first_token,
        length=entry.step.queries[1],
        canvas=_canvas_view(request, entry),
        candidates=spans,
        slots=to_device(sequence.slots[sequence.num_fresh : sequence.num_fresh + most]),
        selection=selection,
        num_kept=sequence.num_kept,
        positions=_kept_positions(sequence),
    )


def _eviction(
    request: RequestState, entry: _Entry, to_device: Callable[[np.ndarray], torch.Tensor]
) -> Eviction:
    sequence = entry.sequence
    block = entry.step.block
    # The cache is whole: all layers hold the same entries.
    num_kept = int(sequence.num_kept[0])
    first = sequence.num_fresh
    return Eviction(
        first_token=entry.first_token,
        canvas=_canvas_view(request, entry),
        candidates=request.policy.candidates(request.canvas, block, request.settings),
        slots=to_device(sequence.slots[first : first + num_kept]),
        selection=_selection(request, num_kept),
        num_kept=sequence.num_kept,
        positions=_kept_positions(sequence),
    )


def _selection(request: RequestState, num_candidates: int) -> Selection:
    settings = request.settings
    return Selection(
        keep=int(num_candidates * settings.keep_ratio),
        kernel_size=settings.kernel_size,
        saliency=settings.saliency,
        run_length=request.page_size if settings.granularity == "page" else 1,
    )


def _canvas_view(request: RequestState, entry: _Entry) -> CanvasView:
    first = request.canvas.prompt_length
    start, end = entry.step.block
    return CanvasView(
        request_id=request.request_id,
        token_ids=entry.sequence.token_ids,
        prompt_length=first,
        block=entry.step.block,
        masked=request.masked[start - first : end - first],
    )


def _kept_positions(sequence: Sequence) -> np.ndarray | None:
    if sequence.positions is None:
        return None
    return sequence.positions[:, sequence.num_fresh :]
