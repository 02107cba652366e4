# SPDX-License-Identifier: Apache-2.0
"""One ragged batch of a step: tokens, positions and the plan of what attends to what."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionBackend
from vllm_sparse_dllm.attention.plan import CachedSegment, CacheFill, ForwardPlan, FullSegment
from vllm_sparse_dllm.cache.policies import StepKind
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
    cached = [e for e in entries if e.step.kind is StepKind.CACHED]
    full = [e for e in entries if e.step.kind is not StepKind.CACHED]
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
            cached, lengths[: len(cached)], row_counts[: len(cached)], backend, to_device
        ),
        full=_full_segment(full, row_counts[len(cached) :], backend),
        fills=tuple(
            _fill(requests[e.request], e, e.first_token, to_device)
            for e in full
            if e.step.kind is StepKind.REFRESH
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
    entries: list[_Entry],
    lengths: np.ndarray,
    row_counts: np.ndarray,
    backend: AttentionBackend,
    to_device: Callable[[np.ndarray], torch.Tensor],
) -> CachedSegment | None:
    if not entries:
        return None
    width = max(len(e.sequence.page_ids) for e in entries)
    table = np.zeros((len(entries), width), dtype=np.int64)
    for row, entry in zip(table, entries, strict=True):
        row[: len(entry.sequence.page_ids)] = entry.sequence.page_ids
    # Own fresh keys take a sequence's first slots, kept entries those behind them.
    num_kept = np.stack([e.sequence.num_kept for e in entries], axis=1)
    layers = num_kept if (num_kept != num_kept[0]).any() else num_kept[:1]
    fresh = [e.sequence.slots[:n] for e, n in zip(entries, lengths.tolist(), strict=True)]
    return CachedSegment(
        num_tokens=int(lengths.sum()),
        fresh_slots=to_device(np.concatenate(fresh)),
        plans=tuple(backend.plan_paged(lengths, kept + lengths, table) for kept in layers),
        last_plan=backend.plan_paged(row_counts, num_kept[-1] + lengths, table),
    )


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


def _kept_of(request: RequestState, entry: _Entry) -> list[np.ndarray] | None:
    """Return where the layers tell what they keep, if the request asks for it."""
    trace = request.trace
    if trace is None or not trace.with_kept or entry.sequence is not request.sequences[0]:
        return None
    return trace.start_refresh(entry.step.block)


def _fill(
    request: RequestState,
    entry: _Entry,
    first_token: int,
    to_device: Callable[[np.ndarray], torch.Tensor],
) -> CacheFill:
    canvas, settings, policy = request.canvas, request.settings, request.policy
    block = entry.step.block
    spans = policy.candidates(canvas, block)
    num_candidates = sum(end - start for start, end in spans)
    most = policy.num_kept(num_candidates, settings, request.page_size)
    start, end = policy.queries(canvas, block)
    num_fresh = end - start
    keep = int(num_candidates * settings.keep_ratio) if policy.selects else None
    return CacheFill(
        first_token=first_token,
        length=canvas.length,
        block=block,
        candidates=spans,
        slots=to_device(entry.sequence.slots[num_fresh : num_fresh + most]),
        keep=keep,
        kernel_size=settings.kernel_size,
        run_length=request.page_size if settings.granularity == "page" else 1,
        num_kept=entry.sequence.num_kept,
        kept=_kept_of(request, entry),
    )
