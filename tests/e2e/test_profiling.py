# SPDX-License-Identifier: Apache-2.0
"""The profiled steps are really the costliest: what they run, and how large they are."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM

from tests.e2e.recorded import StaticPortableBackend
from tests.engines import count_forwards, generate, running_engine, sampling
from tests.reference import write_checkpoint
from vllm_sparse_dllm.attention.module import BidirectionalAttention
from vllm_sparse_dllm.cache.saliency import (
    SALIENCIES,
    Saliency,
    SaliencyInputs,
    register_saliency,
    unregister_saliency,
)
from vllm_sparse_dllm.engine import profiling
from vllm_sparse_dllm.engine import runner as runner_module
from vllm_sparse_dllm.engine.profiling import graph_bytes

VOCAB, LAYERS, CONTEXT, BUDGET, BLOCK = 320, 3, 200, 512, 16
#: Layers that run during profiling: the first and the last.
PROFILED = 2


@pytest.fixture(scope="module", params=["llada", "dream"])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("profiling")
    path = write_checkpoint(
        folder / request.param, request.param, d_model=96, layers=LAYERS, vocab=VOCAB, heads=3
    )
    settings = {"attention_backend": "portable", "block_length": BLOCK, "suffix_window": 8}
    with running_engine(
        str(path),
        max_model_len=CONTEXT,
        max_num_batched_tokens=BUDGET,
        additional_config={"sparse_dllm": settings},
    ) as llm:
        yield llm


def runner_of(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


class Noted(Saliency):
    """A saliency from outside the package, which is profiled like the others."""

    name = "noted"

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        self.sizes.append(sum(end - start for start, end in inputs.candidates))
        return SALIENCIES["paper"].score(inputs)


def test_what_is_profiled(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(engine)
    guided = runner.traits.supports_guidance
    params = [sampling(24), sampling(24, diffusion_cache_policy="dual")]
    expected = generate(engine, [[5] * 60, [6] * 90], params)

    passes = count_forwards(engine, monkeypatch)
    filled: list[int] = []
    evicted: list[int] = []
    logits: list[int] = []
    moved: list[int] = []
    fill, evict = BidirectionalAttention._fill, BidirectionalAttention._evict
    move, head = runner.backend.move, runner._head

    def noted_fill(self: Any, q: Any, k: Any, v: Any, task: Any, backend: Any) -> None:
        fill(self, q, k, v, task, backend)
        if task.selection is not None:
            filled.append(int(task.num_kept[self.layer_index]))

    run_model = runner._run_model
    plans: list[int] = []

    def noted_run(input_ids: Any, positions: Any, plan: Any) -> Any:
        if plan.evictions:
            plans.append(len({id(plan.cached.plan_of(layer)) for layer in range(LAYERS)}))
        return run_model(input_ids, positions, plan)

    monkeypatch.setattr(runner, "_run_model", noted_run)

    def noted_evict(self: Any, q: Any, k: Any, task: Any, backend: Any) -> None:
        evict(self, q, k, task, backend)
        evicted.append(int(task.num_kept[self.layer_index]))

    def noted_move(layer: int, keys: Any, values: Any, entries: Any, *args: Any) -> None:
        moved.append(len(entries))
        move(layer, keys, values, entries, *args)

    def noted_head(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits.append(len(rows))
        return head(hidden, rows)

    monkeypatch.setattr(BidirectionalAttention, "_fill", noted_fill)
    monkeypatch.setattr(BidirectionalAttention, "_evict", noted_evict)
    monkeypatch.setattr(runner.backend, "move", noted_move)
    monkeypatch.setattr(runner, "_head", noted_head)
    monkeypatch.setattr(runner_module, "_MAX_LOGITS", 40 * VOCAB)
    saliency = Noted()
    register_saliency(saliency)
    try:
        num_saliencies = len(SALIENCIES)
        runner.profile_run()
    finally:
        unregister_saliency(saliency.name)

    # One row; then, for each saliency, refreshes of the whole budget, a pass that fills the cache
    # to be evicted, and its eviction beside refreshes of what remains of the budget.
    most = BUDGET - BUDGET % 2
    own = [BUDGET, CONTEXT, BUDGET] * num_saliencies
    assert passes == [1] + own + [most, 2 * CONTEXT, most] * guided
    # All positions of a context outside its block are kept, and read back for the eviction.
    assert max(filled) == max(moved) == max(evicted) == CONTEXT - BLOCK
    assert len(evicted) == PROFILED * (num_saliencies + 2 * guided)
    assert min(evicted) == CONTEXT - BLOCK
    # All layers share one plan, as in steps of real requests.
    assert plans == [1] * (num_saliencies + guided)
    assert saliency.sizes.count(CONTEXT - BLOCK) >= 2 * PROFILED
    # As many logits as can exist at a time, and as many unconditional ones; they are computed again
    # for log-probabilities.
    assert logits[-2 * (1 + guided) :] == [40] * 2 * (1 + guided)
    assert max(logits) == 40

    # Requests use the pages that were bound before profiling.
    assert generate(engine, [[5] * 60, [6] * 90], params) == expected


def test_memory_is_held_for_graphs(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(engine)
    assert graph_bytes(runner) == 0  # the backend has no static plans
    old = runner.backend
    backend = StaticPortableBackend(old.shape, old.page_size, old.dtype, old.device)
    backend.bind_pages(runner.kv_caches)
    monkeypatch.setattr(runner, "backend", backend)
    monkeypatch.setattr(runner.model_config, "enforce_eager", False)
    sizes = runner.graph_sizes
    assert sizes == [1, 2, 3, 4, 6, 8, 12, 16]  # up to `max_num_seqs`
    # At least the residual stream and the gate and up projections of all tokens.
    shape = runner.model.shape
    tokens = sizes[-1] * BLOCK
    assert graph_bytes(runner) > 4 * tokens * (shape.hidden_size + 2 * shape.intermediate_size)
    held: list[bool] = []

    def is_held() -> bool:
        num = graph_bytes(runner)
        tensors = (each for each in gc.get_objects() if type(each) is torch.Tensor)
        return any(each.dtype == torch.uint8 and each.numel() == num for each in tensors)

    for name in ("_refresh_and_evict", "_sample"):
        monkeypatch.setattr(profiling, name, lambda *args, **kwargs: held.append(is_held()))
    runner.profile_run()
    assert len(held) > 2 and all(held)
    assert not is_held()
    monkeypatch.setattr(runner.model_config, "enforce_eager", True)
    assert runner.graph_sizes == []
    assert graph_bytes(runner) == 0
