# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without CUDA: a capture records operators and the tensors that they ran on.

A replay calls the same operators on the same tensors, without the Python code between them:
whatever that code would decide differently by then, or read from elsewhere, has no effect. Memory
that an operator only allocates is filled with NaN in a replay. Reading a number from the device
while capturing is an error, as with CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from tests.e2e.pretended.apart import waits
from vllm_sparse_dllm.attention.packing import PackedArrays, pad_sequences
from vllm_sparse_dllm.attention.portable import PortableBackend
from vllm_sparse_dllm.kernels import interpreted
from vllm_sparse_dllm.transfer import HostArrays

aten = torch.ops.aten
ALLOCATING = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """Capture a function, as an `engine.graphs.Capture`."""
    run()
    recorder = _Recorder()
    with recorder, _recorded_kernels(recorder):
        run()

    def replay() -> None:
        for call in recorder.calls:
            call()

    return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        assert not waits(func, args), f"{func} while capturing"
        results = func(*args, **kwargs)
        places = [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]

        def call() -> None:
            if func in ALLOCATING:
                if places[0].is_floating_point():
                    places[0].fill_(math.nan)
                return
            again = tree_leaves(func(*args, **kwargs))
            for place, new in zip(places, (x for x in again if torch.is_tensor(x)), strict=True):
                if place.data_ptr() != new.data_ptr():
                    place.copy_(new)

        self.calls.append(call)
        return results


@contextmanager
def _recorded_kernels(recorder: _Recorder) -> Iterator[None]:
    """Record each launch of an interpreted Triton kernel as one operator."""
    if not interpreted():
        yield
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        with _disable_current_modes():
            launch(self, *args, **kwargs)
        recorder.calls.append(lambda: launch(self, *args, **kwargs))

    GridExecutor.__call__ = recorded
    try:
        yield
    finally:
        GridExecutor.__call__ = launch


class StaticPlan:
    """A plan in fixed arrays, with room for a maximum number of sequences and pages."""

    def __init__(self, arrays: PackedArrays, num_queries: int) -> None:
        self.arrays = arrays
        self.num_queries = num_queries


class StaticPortableBackend(PortableBackend):
    """The portable backend with plans that stay in place: slow, but it runs the same operators
    whatever the plan holds."""

    static_plans = True

    def write(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        own = (slots >= 0)[:, None, None]
        for pool, rows in zip(self._slots[layer], (keys, values), strict=True):
            there = pool.index_select(0, slots.clamp(min=0))
            pool.index_copy_(0, slots.clamp(min=0), torch.where(own, rows, there))

    def static_paged_plan(
        self, num_sequences: int, num_queries: int, width: int, arrays: HostArrays | None = None
    ) -> StaticPlan:
        shapes = [(num_sequences + 1,), (num_sequences,), (num_sequences, width)]
        return StaticPlan(PackedArrays(shapes, self.device, arrays), num_queries)

    def rewrite_paged_plan(
        self,
        plan: StaticPlan,
        query_lengths: np.ndarray,
        key_lengths: np.ndarray,
        page_table: np.ndarray,
    ) -> None:
        shape = tuple(plan.arrays.views[-1].shape)
        plan.arrays.rewrite(
            pad_sequences(shape, plan.num_queries, query_lengths, key_lengths, page_table)
        )

    def attend_paged(
        self, layer: int, queries: torch.Tensor, output: torch.Tensor, plan: Any
    ) -> None:
        if not isinstance(plan, StaticPlan):
            super().attend_paged(layer, queries, output, plan)
            return
        starts, lengths, table = plan.arrays.views
        rows = torch.arange(queries.shape[0])
        page = torch.arange(self.page_size)
        for number in range(lengths.shape[0]):
            slots = (table[number][:, None] * self.page_size + page).flatten()
            keys, values = (
                pool.index_select(0, slots).transpose(0, 1)[None] for pool in self._slots[layer]
            )
            result = F.scaled_dot_product_attention(
                queries.transpose(0, 1)[None],
                keys,
                values,
                attn_mask=(torch.arange(slots.shape[0]) < lengths[number])[None],
                scale=self.scale,
                enable_gqa=self.shape.num_heads != self.shape.num_kv_heads,
            )[0].transpose(0, 1)
            own = (rows >= starts[number]) & (rows < starts[number + 1])
            output.copy_(torch.where(own[:, None, None], result, output))
