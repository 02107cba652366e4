# SPDX-License-Identifier: Apache-2.0
"""Captured steps: the batch sizes, the user's options for them, and captures by CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.distributed.parallel_state
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.config.vllm import OptimizationLevel

from vllm_sparse_dllm.engine import worker
from vllm_sparse_dllm.engine.config import _take_over_graphs
from vllm_sparse_dllm.engine.graphs import CudaCapture, ladder
from vllm_sparse_dllm.engine.worker import DiffusionGPUWorker


def test_the_ladder() -> None:
    assert ladder(256, 32) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    assert ladder(20, 32) == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert ladder(1, 32) == [1]
    # A block longer than the largest step that is worth a capture.
    assert ladder(256, 2048) == []
    assert ladder(256, 32, most_tokens=100) == [1, 2, 3]
    assert ladder(256, 32, most_tokens=0) == []
    # vLLM's sizes are in tokens; they are rounded up to whole sequences.
    assert ladder(256, 32, tokens=[32, 64, 100, 512]) == [1, 2, 4, 16]
    assert ladder(256, 32, tokens=[1, 2, 4]) == [1]
    assert ladder(8, 32, tokens=[32, 4096]) == [1, 8]
    assert ladder(256, 32, tokens=[], most_tokens=512) == []
    assert ladder(256, 32, tokens=[0, 32]) == [1]
    for most in range(1, 200):
        sizes = ladder(most, 4)
        assert sizes[0] == 1 and sizes[-1] == most
        assert all(b - 1 - a < b / 3 for a, b in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (None, None)),
        ({"cudagraph_capture_sizes": [64, 32]}, ([64, 32], None)),
        ({"max_cudagraph_capture_size": 256}, (None, 256)),
        ({"cudagraph_mode": CUDAGraphMode.NONE}, ([], None)),
        ({"cudagraph_mode": CUDAGraphMode.NONE, "cudagraph_capture_sizes": [1]}, ([], None)),
        ({"cudagraph_mode": CUDAGraphMode.FULL}, (None, None)),
        ({"optimization_level": OptimizationLevel.O0}, ([], None)),
    ],
)
def test_what_is_asked_of_vllms_graphs_is_noted(given: dict[str, Any], expected: tuple) -> None:
    compilation = SimpleNamespace(
        cudagraph_mode=None,
        cudagraph_capture_sizes=None,
        max_cudagraph_capture_size=None,
        mode=None,
    )
    level = given.pop("optimization_level", OptimizationLevel.O2)
    vars(compilation).update(given)
    model = SimpleNamespace(graph_tokens=None, most_graph_tokens=None)
    config = SimpleNamespace(compilation_config=compilation, optimization_level=level)
    _take_over_graphs(config, model)  # type: ignore[arg-type]
    assert (model.graph_tokens, model.most_graph_tokens) == expected
    assert compilation.mode == CompilationMode.NONE
    assert compilation.cudagraph_mode == CUDAGraphMode.NONE


def test_how_cuda_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without capturing, then the capture in vLLM's context, on one pool and one stream."""
    events: list[Any] = []
    streams = iter(range(9))

    @contextmanager
    def context(device: torch.device) -> Iterator[Any]:
        events.append(("vllm", device))
        yield SimpleNamespace(stream=next(streams))
        events.append("vllm done")

    @contextmanager
    def graph(graph: Any, pool: Any, stream: Any) -> Iterator[None]:
        events.append(("capture", pool, stream))
        yield
        events.append("captured")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: next(streams))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(vllm.distributed.parallel_state, "graph_capture", context)
    device = torch.device("cuda:0")
    capture = CudaCapture(device)
    assert capture(lambda: events.append("run")) == "replay"
    once = [
        "run",
        "wait",
        ("vllm", device),
        ("capture", "the pool", 0),
        "run",
        "captured",
        "vllm done",
    ]
    assert events == once
    capture(lambda: events.append("run"))
    assert events == once * 2


@pytest.mark.parametrize("sizes", [[], [1, 2]])
def test_the_worker_captures_what_is_wanted(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int]
) -> None:
    captured: list[Any] = []

    free = iter([3 << 30, 1 << 30])
    logged: list[str] = []
    monkeypatch.setattr(worker, "_free_memory", lambda: next(free))
    monkeypatch.setattr(worker.logger, "info", lambda text, *args: logged.append(text % args))
    monkeypatch.setattr(worker, "CudaCapture", lambda device: ("capture", device))
    monkeypatch.setattr(worker, "set_random_seed", lambda seed: captured.append(seed))
    # The calls that end the warm-up of vLLM's own worker.
    ends = ("freeze_gc_heap", "maybe_attach_gc_debug_callback")
    for name in ends:
        monkeypatch.setattr(worker, name, lambda name=name: captured.append(name))
    monitor = "_maybe_activate_jit_monitor"
    monkeypatch.setattr(DiffusionGPUWorker, monitor, lambda self: captured.append(monitor))
    own = object.__new__(DiffusionGPUWorker)
    own.device = torch.device("cuda:1")
    own.model_config = SimpleNamespace(seed=5)
    own.model_runner = SimpleNamespace(graph_sizes=sizes, capture_graphs=captured.append)
    assert own.compile_or_warm_up_model().encoder == 0.0
    assert captured == [("capture", own.device), 5, monitor, *ends][0 if sizes else 1 :]
    assert len(logged) == bool(sizes)
    assert all(line.startswith("Captured block steps of 1, 2 sequences") for line in logged)
    assert all(line.endswith("they take 2.00 GiB") for line in logged)
