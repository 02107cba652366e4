# SPDX-License-Identifier: Apache-2.0
"""Block steps that are captured once for a batch size, and replayed from then on.

On a GPU a step of few tokens takes longer to launch than to run. A block step launches the same
kernels every time, on other numbers, so it can be captured as a CUDA graph whose inputs keep
their places. What the graph computes are the hidden states of all tokens; logits and the choice
of tokens, whose shapes depend on what is masked, follow it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch

from vllm_sparse_dllm.attention.interface import AttentionBackend
from vllm_sparse_dllm.attention.plan import CachedSegment, ForwardPlan
from vllm_sparse_dllm.engine.batch import StepBatch, StepLayout
from vllm_sparse_dllm.transfer import HostArrays

#: Runs a function and returns what does the same to the same tensors again, whatever the
#: function would do by then.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

#: The model's forward pass: input ids, positions and plan to hidden states.
Forward = Callable[[torch.Tensor, torch.Tensor, ForwardPlan], torch.Tensor]

#: Tokens of the largest step that is captured by default: one of a few more keeps a GPU busy
#: for longer than its launches take.
_MOST_TOKENS = 1024
#: Slots of a captured sequence at the most. Each replay sends the page tables, 4 bytes a page of
#: all sequences; one that keeps more has enough to read to hide its launches.
MOST_SLOTS = 16_384


def ladder(
    max_sequences: int,
    block_length: int,
    tokens: Sequence[int] | None = None,
    most_tokens: int | None = None,
) -> list[int]:
    """Return the batch sizes that are captured, in sequences, ascending.

    By default the powers of 2 and what lies half way between, so that at most a third of a
    step is padding.

    Args:
        max_sequences: More are never captured.
        block_length: Tokens of a sequence.
        tokens: Sizes to capture in tokens, as vLLM has them, instead of the default ones.
        most_tokens: Tokens of the largest of the default ones.
    """
    if tokens is not None:
        sizes = {-(-size // block_length) for size in tokens if size > 0}
    else:
        most = (_MOST_TOKENS if most_tokens is None else most_tokens) // block_length
        powers = [1 << exponent for exponent in range(most.bit_length())]
        sizes = {size for power in powers for size in (power, power + power // 2)}
        sizes = {size for size in sizes if size <= most}
    return sorted({min(size, max_sequences) for size in sizes})


class BlockGraphs:
    """A captured block step for each of some batch sizes.

    Args:
        forward: The model.
        capture: The device's way to capture.
        backend: With `AttentionBackend.static_plans`, its pages bound for good.
        sizes: Of the batches, in sequences, ascending.
        block_length: Most tokens of a sequence.
        width: Most pages of a sequence.
        hidden_size: Channels of a hidden state.
    """

    def __init__(
        self,
        forward: Forward,
        capture: Capture,
        backend: AttentionBackend,
        sizes: Sequence[int],
        block_length: int,
        width: int,
        hidden_size: int,
    ) -> None:
        self.sizes = list(sizes)
        self._block_length = block_length
        self._width = width
        output = torch.zeros(
            self.sizes[-1] * block_length, hidden_size, dtype=backend.dtype, device=backend.device
        )
        # The largest first: the others find the memory they need among its own.
        self._graphs = [
            _BlockGraph(forward, capture, backend, size, block_length, width, output)
            for size in reversed(self.sizes)
        ][::-1]

    def fill(self, layout: StepLayout) -> StepBatch | None:
        """Return the batch of a layout on the smallest graph that holds it.

        Returns:
            None if no graph does: some sequence runs whole, changes what it has kept, keeps
            different numbers in different layers, or is too long; or there are too many.
        """
        cached = layout.cached
        if cached is None or layout.num_full or not cached.plain or len(cached.filled) > 1:
            return None
        if cached.lengths.max() > self._block_length or cached.page_table.shape[1] > self._width:
            return None
        index = bisect_left(self.sizes, len(cached.lengths))
        return self._graphs[index].fill(layout) if index < len(self.sizes) else None


class _BlockGraph:
    """One batch size. Tokens behind those of the sequences are padding: written nowhere."""

    def __init__(
        self,
        forward: Forward,
        capture: Capture,
        backend: AttentionBackend,
        num_sequences: int,
        block_length: int,
        width: int,
        output: torch.Tensor,
    ) -> None:
        num_tokens = num_sequences * block_length
        # Some room for what else a step sends.
        capacity = 64 * num_tokens + 4 * num_sequences * (width + 64) + (1 << 16)
        self._arrays = arrays = HostArrays(backend.device, capacity)
        self._input_ids = arrays.reserve((num_tokens,), np.int64)
        self._positions = arrays.reserve((num_tokens,), np.int64)
        self._slots = arrays.reserve((num_tokens,), np.int64)
        self._backend = backend
        self._paged = backend.static_paged_plan(num_sequences, block_length, width, arrays)
        self._plan = ForwardPlan(
            backend=backend,
            cached=CachedSegment(
                num_tokens=num_tokens,
                fresh_slots=(self._slots.view,),
                plans=(self._paged,),
                last_plan=self._paged,
            ),
            full=None,
            fills=(),
            evictions=(),
            last_rows=torch.arange(num_tokens, device=backend.device),
            num_last_cached=num_tokens,
            padded=True,
        )
        self._output = output[:num_tokens]

        def run() -> None:
            hidden = forward(self._input_ids.view, self._positions.view, self._plan)
            self._output.copy_(hidden)

        nothing = np.zeros(0, dtype=np.int64)
        self._write(nothing, nothing, nothing, nothing, nothing, np.zeros((0, 0), np.int64))
        arrays.send()
        self._replay = capture(run)

    def _write(
        self,
        input_ids: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        lengths: np.ndarray,
        filled: np.ndarray,
        page_table: np.ndarray,
    ) -> None:
        self._arrays.begin()
        for fixed, numbers, padding in (
            (self._input_ids, input_ids, 0),
            (self._positions, positions, 0),
            (self._slots, slots, -1),
        ):
            padded = np.full(fixed.view.shape, padding, dtype=np.int64)
            padded[: len(numbers)] = numbers
            fixed.write(padded)
        self._backend.rewrite_paged_plan(self._paged, lengths, filled, page_table)

    def fill(self, layout: StepLayout) -> StepBatch:
        """Return the batch of a layout that fits."""
        cached = layout.cached
        assert cached is not None
        self._write(
            layout.input_ids,
            layout.positions,
            cached.fresh[0],
            cached.lengths,
            cached.filled[0],
            cached.page_table,
        )
        return StepBatch(
            input_ids=self._input_ids.view,
            positions=self._positions.view,
            plan=self._plan,
            logits=layout.logits_rows(self._arrays, of_all_tokens=True),
            arrays=self._arrays,
            replay=self._run,
        )

    def _run(self) -> torch.Tensor:
        self._replay()
        return self._output


class CudaCapture:
    """Captures as a CUDA graph; all share one pool of memory, as they never run together.

    PyTorch gives memory of a pool to the stream that had it first and to no other, so all are
    captured on one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        from vllm.distributed.parallel_state import graph_capture

        # Once for real: what is compiled, chosen or allocated on first use is so before.
        run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # vLLM's own all-reduce has to know of the capture; the stream that comes with it is a new
        # one each time.
        with (
            graph_capture(device=self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            run()
        return graph.replay
