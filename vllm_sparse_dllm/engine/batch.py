# SPDX-License-Identifier: Apache-2.0
"""One ragged batch of a step: tokens, positions and the plan of what attends to what."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Protocol

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
from vllm_sparse_dllm.cache.policies import StepKind, num_to_keep
from vllm_sparse_dllm.cache.saliency import CanvasView
from vllm_sparse_dllm.cache.selection import Selection
from vllm_sparse_dllm.engine.requests import NextStep, RequestState, Sequence
from vllm_sparse_dllm.transfer import HostArrays


@dataclass(frozen=True)
class LogitsRows:
    """The rows whose logits a step needs.

    Attributes:
        rows: ``[rows]`` rows of the hidden states: the candidates of each request in order, then
            the unconditional rows of guided requests.
        num: Number of candidates.
        guided_candidates: ``[guided rows]`` host array, the candidates that are guided,
            ascending, in the order of their unconditional rows.
        guided: The same on the device.
        guidance: ``[guided rows]`` guidance weights.
    """

    rows: torch.Tensor
    num: int
    guided_candidates: np.ndarray
    guided: torch.Tensor
    guidance: torch.Tensor


@dataclass(frozen=True)
class StepBatch:
    """A step's inputs. They are on the device once `arrays` has been sent.

    Attributes:
        input_ids: ``[tokens]``.
        positions: ``[tokens]``.
        plan: What attends to what.
        logits: Rows whose logits are needed.
        arrays: Arrays that carry the inputs to the device.
        replay: Replays a captured graph on these inputs and returns the hidden states; None if
            the model has to be run.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    plan: ForwardPlan
    logits: LogitsRows
    arrays: HostArrays
    replay: Callable[[], torch.Tensor] | None = None


@dataclass
class _Entry:
    """A sequence's part of the batch.

    Attributes:
        request: Index of its request.
        sequence: The sequence.
        step: What it runs.
        first_token: Index of its first token in the batch.
        num_rows: Rows of hidden states that its candidates need.
        first_row: Index of the first of these rows among those of the batch.
    """

    request: int
    sequence: Sequence
    step: NextStep
    first_token: int = 0
    num_rows: int = 0
    first_row: int = 0


@dataclass(frozen=True)
class CachedLayout:
    """Host arrays of the sequences that run against their pages.

    Attributes:
        lengths: ``[sequences]`` tokens of each.
        fresh: ``[layers, tokens]`` slots of the tokens' own keys, or one row for all layers.
        filled: ``[layers, sequences]`` numbers of slots that hold keys, or one row for all layers.
        last_filled: ``[sequences]`` the same for the last layer.
        page_table: ``[sequences, width]``.
        plain: Whether all are block steps that leave the kept entries unchanged.
    """

    lengths: np.ndarray
    fresh: np.ndarray
    filled: np.ndarray
    last_filled: np.ndarray
    page_table: np.ndarray
    plain: bool


class StepLayout:
    """The next steps of requests, laid out as one batch of host arrays.

    Args:
        requests: The requests to run.
        steps: The next step of each request.

    Attributes:
        input_ids: ``[tokens]``, cached sequences first.
        positions: ``[tokens]``.
        last_rows: ``[rows]`` tokens whose hidden states are needed, ascending, at least one.
        cached: The sequences that run against their pages, or None.
        num_full: Number of sequences that run whole.
    """

    def __init__(self, requests: SequenceOf[RequestState], steps: SequenceOf[NextStep]) -> None:
        self._requests = requests
        self._entries = [
            _Entry(number, sequence, step)
            for number, (request, step) in enumerate(zip(requests, steps, strict=True))
            for sequence in request.sequences
        ]
        self._cached = [e for e in self._entries if not e.step.kind.runs_all]
        self._full = [e for e in self._entries if e.step.kind.runs_all]
        ordered = self._cached + self._full
        lengths = np.array([e.step.queries[1] - e.step.queries[0] for e in ordered])
        firsts = np.cumsum(lengths) - lengths
        for entry, first in zip(ordered, firsts.tolist(), strict=True):
            entry.first_token = first
        self.input_ids = np.concatenate(
            [e.sequence.token_ids[slice(*e.step.queries)] for e in ordered]
        )
        starts = np.array([e.step.queries[0] for e in ordered])
        self.positions = np.arange(len(self.input_ids)) - np.repeat(firsts - starts, lengths)

        # Rows whose hidden states are needed after the last layer: those of the candidates, or
        # the rows before them if the model shifts logits.
        rows_of = [_logits_rows(requests[e.request], e) for e in ordered]
        counts = np.array([len(rows) for rows in rows_of])
        self.last_rows = np.concatenate(rows_of)
        if not len(self.last_rows):
            # The layers after the attention need at least one row.
            self.last_rows = np.zeros(1, dtype=np.int64)
            counts[0] = 1
        self._row_counts = counts
        first_rows = np.cumsum(counts) - counts
        for entry, rows, first in zip(ordered, rows_of, first_rows.tolist(), strict=True):
            entry.num_rows, entry.first_row = len(rows), first
        self.num_full = len(self._full)
        self.cached = None
        if self._cached:
            self.cached = _cached_layout(requests, self._cached, lengths[: len(self._cached)])

    def batch(self, backend: AttentionBackend, arrays: HostArrays) -> StepBatch:
        """Return the batch with its own plans; ``arrays`` carries it to the device."""
        num_cached = len(self._cached)
        row_counts = self._row_counts
        plan = ForwardPlan(
            backend=backend,
            cached=self._cached_segment(row_counts[:num_cached], backend, arrays),
            full=_full_segment(self._full, row_counts[num_cached:], backend, arrays),
            fills=tuple(
                _fill(self._requests[e.request], e, arrays)
                for e in self._full
                if e.step.kind is StepKind.REFRESH
            ),
            evictions=tuple(
                _eviction(self._requests[e.request], e, arrays)
                for e in self._cached
                if e.step.kind is StepKind.EVICT
            ),
            last_rows=arrays.put(self.last_rows),
            num_last_cached=int(row_counts[:num_cached].sum()),
        )
        return StepBatch(
            input_ids=arrays.put(self.input_ids),
            positions=arrays.put(self.positions),
            plan=plan,
            logits=self.logits_rows(arrays),
            arrays=arrays,
        )

    def _cached_segment(
        self, row_counts: np.ndarray, backend: AttentionBackend, arrays: HostArrays
    ) -> CachedSegment | None:
        own = self.cached
        if own is None:
            return None
        table = own.page_table
        # Layers that hold the same numbers of keys share a plan.
        distinct: dict[bytes, Any] = {}
        for keys in own.filled:
            if (name := keys.tobytes()) not in distinct:
                distinct[name] = backend.plan_paged(own.lengths, keys, table, arrays)
        return CachedSegment(
            num_tokens=int(own.lengths.sum()),
            fresh_slots=tuple(arrays.put(own.fresh)),
            plans=tuple(distinct[keys.tobytes()] for keys in own.filled),
            last_plan=backend.plan_paged(row_counts, own.last_filled, table, arrays),
        )

    def logits_rows(self, arrays: HostArrays, of_all_tokens: bool = False) -> LogitsRows:
        """Return the rows whose logits are needed.

        Args:
            arrays: Arrays that carry the result to the device.
            of_all_tokens: Whether the hidden states are of all tokens, not only ``last_rows``.
        """
        # From the order of the batch back to that of the requests, unconditional rows last.
        nothing = np.zeros(0, dtype=np.int64)
        ranges, unconditional, guided = [nothing], [nothing], [nothing]
        weights = [np.zeros(0)]
        num_rows = 0
        for entry in self._entries:
            count = entry.num_rows
            rows = np.arange(entry.first_row, entry.first_row + count)
            request = self._requests[entry.request]
            if entry.sequence is request.sequences[0]:
                ranges.append(rows)
                num_rows += count
            else:
                unconditional.append(rows)
                guided.append(np.arange(num_rows - count, num_rows))
                weights.append(np.full(count, request.settings.cfg_scale))
        rows = np.concatenate(ranges + unconditional)
        candidates = np.concatenate(guided)
        return LogitsRows(
            rows=arrays.put(self.last_rows[rows] if of_all_tokens else rows),
            num=num_rows,
            guided_candidates=candidates,
            guided=arrays.put(candidates),
            guidance=arrays.put(np.concatenate(weights), np.float32),
        )


class StaticBatches(Protocol):
    """Batches whose tensors never move, for captured graphs to be replayed on."""

    def fill(self, layout: StepLayout) -> StepBatch | None:
        """Return a layout as one of these batches, None if none fits it."""


def build_batch(
    requests: SequenceOf[RequestState],
    steps: SequenceOf[NextStep],
    backend: AttentionBackend,
    arrays: HostArrays,
    static: StaticBatches | None = None,
) -> StepBatch:
    """Lay the next steps of the requests out as one batch.

    Args:
        requests: The requests to run.
        steps: The next step of each request.
        backend: The device's attention.
        arrays: Arrays that carry the batch to the device in a new round, if none of ``static``
            fits.
        static: The batches of captured steps, which have arrays of their own.
    """
    layout = StepLayout(requests, steps)
    batch = None if static is None else static.fill(layout)
    if batch is None:
        arrays.begin()
        batch = layout.batch(backend, arrays)
    return batch


def _logits_rows(request: RequestState, entry: _Entry) -> np.ndarray:
    """Return the batch rows that predict the candidates of an entry, in their order."""
    rows = entry.step.candidates - entry.step.queries[0]
    if request.traits.shifts_logits:
        # The first row has none before it and stands for itself; in a cached step it is that of
        # the block's first position, which is committed by then.
        rows = np.maximum(rows - 1, 0)
    return rows + entry.first_token


def _cached_layout(
    requests: SequenceOf[RequestState], entries: list[_Entry], lengths: np.ndarray
) -> CachedLayout:
    own = [
        _fresh_slots(requests[entry.request], entry, length)
        for entry, length in zip(entries, lengths.tolist(), strict=True)
    ]
    # One row for all layers, unless an entry needs a row per layer.
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
    return CachedLayout(
        lengths=lengths,
        fresh=fresh,
        filled=filled if (filled != filled[0]).any() else filled[:1],
        last_filled=filled[-1],
        page_table=table,
        plain=all(e.step.kind is StepKind.CACHED for e in entries),
    )


def _fresh_slots(request: RequestState, entry: _Entry, length: int) -> np.ndarray:
    """Return the slots of an entry's own keys: ``[layers, length]``, or one row for all."""
    sequence = entry.sequence
    if entry.step.kind is not StepKind.APPEND:
        return sequence.slots[None, :length]
    queries = request.policy.queries(request.canvas, entry.step.block, request.settings)
    finished = (entry.step.queries[0], queries[0])
    targets = sequence.make_room(finished, queries)
    own = np.broadcast_to(np.arange(sequence.num_fresh), (len(targets), sequence.num_fresh))
    return sequence.slots[np.concatenate([targets, own], axis=1)]


def _full_segment(
    entries: list[_Entry], row_counts: np.ndarray, backend: AttentionBackend, arrays: HostArrays
) -> FullSegment | None:
    if not entries:
        return None
    lengths = np.array([e.step.queries[1] for e in entries])
    return FullSegment(
        plan=backend.plan_full(lengths, lengths, arrays),
        last_plan=backend.plan_full(row_counts, lengths, arrays),
    )


def _fill(request: RequestState, entry: _Entry, arrays: HostArrays) -> Fill:
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
        slots=arrays.put(sequence.slots[sequence.num_fresh : sequence.num_fresh + most]),
        selection=selection,
        num_kept=sequence.num_kept,
        positions=_kept_positions(sequence),
    )


def _eviction(request: RequestState, entry: _Entry, arrays: HostArrays) -> Eviction:
    sequence = entry.sequence
    block = entry.step.block
    # The cache is whole: all layers hold the same entries.
    num_kept = int(sequence.num_kept[0])
    first = sequence.num_fresh
    return Eviction(
        first_token=entry.first_token,
        canvas=_canvas_view(request, entry),
        candidates=request.policy.candidates(request.canvas, block, request.settings),
        slots=arrays.put(sequence.slots[first : first + num_kept]),
        selection=_selection(request, num_kept),
        num_kept=sequence.num_kept,
        positions=_kept_positions(sequence),
    )


def _selection(request: RequestState, num_candidates: int) -> Selection:
    settings = request.settings
    return Selection(
        keep=num_to_keep(num_candidates, settings),
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
