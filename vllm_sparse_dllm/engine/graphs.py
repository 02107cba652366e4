# SPDX-License-Identifier: Apache-2.0
"""Block steps that are captured once per batch size and replayed from then on.

On a GPU a step of few tokens takes longer to launch than to run. A block step launches the same
kernels every time, on different data, so it can be captured as a CUDA graph whose inputs stay in
place. The graph computes the hidden states of all tokens; the logits and the choice of tokens,
whose shapes depend on what is masked, are computed outside it.
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

#: Captures a function: returns a callable that launches the same operators on the same tensors
#: again, without calling the function.
Capture = Callable[[Callable[[], None]], Callable[[], None]]

#: The model's forward pass, from input ids, positions and plan to hidden states.
Forward = Callable[[torch.Tensor, torch.Tensor, ForwardPlan], torch.Tensor]

#: Tokens of the largest step that is captured by default: a larger one keeps a GPU busy for longer
#: than its launches take.
_MOST_TOKENS = 1024
#: Most slots of a captured sequence. Each replay sends the page tables of all sequences, 4 bytes
#: per page; a sequence with more slots has enough to read to hide its launches.
MOST_SLOTS = 16_384


def ladder(
    max_sequences: int,
    block_length: int,
    tokens: Sequence[int] | None = None,
    most_tokens: int | None = None,
) -> list[int]:
    """Return the batch sizes to capture, in sequences, ascending.

    By default these are the powers of 2 and the sizes halfway between them, so that at most a
    third of a step is padding.

    Args:
        max_sequences: Most sequences of a step.
        block_length: Tokens of a sequence.
        tokens: Sizes to capture in tokens, as in vLLM's options, instead of the default sizes.
        most_tokens: Upper limit of the default sizes, in tokens.
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
    """Captured block steps, one for each of several batch sizes.

    Args:
        forward: The model's forward pass.
        capture: Captures on the device.
        backend: A backend with `AttentionBackend.static_plans`, whose pages are bound for good.
        sizes: Batch sizes in sequences, ascending.
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
        # The largest first: the others reuse its memory.
        self._graphs = [
            _BlockGraph(forward, capture, backend, size, block_length, width, output)
            for size in reversed(self.sizes)
        ][::-1]

    def fill(self, layout: StepLayout) -> StepBatch | None:
        """Return a layout as the batch of the smallest graph that holds it.

        Returns:
            None if no graph does: a sequence runs whole, changes its kept entries, keeps different
            numbers of them in different layers, or has too many tokens or pages; or there are too
            many sequences.
        """
        cached = layout.cached
        if cached is None or layout.num_full or not cached.plain or len(cached.filled) > 1:
            return None
        if cached.lengths.max() > self._block_length or cached.page_table.shape[1] > self._width:
            return None
        index = bisect_left(self.sizes, len(cached.lengths))
        return self._graphs[index].fill(layout) if index < len(self.sizes) else None


class _BlockGraph:
    """The graph of one batch size. Tokens after those of the sequences are padding, not cached."""

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
        # With room for everything else that a step sends.
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
        """Return a layout that fits as a batch of this graph."""
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
    """Captures CUDA graphs, which share one pool of memory as they never run at the same time.

    PyTorch reuses a pool's memory only on the stream that it was first allocated for, so all
    graphs are captured on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        from vllm.distributed.parallel_state import graph_capture

        # Run once without capturing, for all that is compiled, chosen or allocated on first use.
        run()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # vLLM's own all-reduce has to know of the capture. The stream that `graph_capture` offers
        # is a new one each time, so it is not used.
        with (
            graph_capture(device=self._device),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
        ):
            run()
        return graph.replay
