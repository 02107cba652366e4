# SPDX-License-Identifier: Apache-2.0
"""Captured block steps: replays give the tokens of eager steps, and wait for the device once."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import LLM

from tests.e2e import recorded
from tests.e2e.cases import (
    Case,
    beyond_cases,
    constrained_cases,
    drawn_cases,
    greedy_cases,
    plain_cases,
    random_prompt,
    run_staggered,
)
from tests.e2e.pretended.apart import waits
from tests.e2e.recorded import StaticPortableBackend
from tests.e2e.server import clean_environment, run_program
from tests.engines import generate, pool_is_whole, running_engine, sampling
from tests.reference import Model, load, write_checkpoint
from tests.reference.checkpoints import special_ids
from vllm_sparse_dllm import transfer
from vllm_sparse_dllm.denoise import step
from vllm_sparse_dllm.engine import graphs
from vllm_sparse_dllm.transfer import HostArrays

VOCAB, BLOCK = 320, 8
MASK = special_ids(VOCAB)["mask"]
SIZES = [1, 3, 6]
#: The page size that an engine chooses by itself on a CPU.
PAGE = 32


class Graphed:
    """An engine on a CPU that captures block steps, and a record of its replays.

    Attributes:
        llm: The engine.
        runner: Its runner.
        reference: The slow reference model.
        replayed: For each step, the size of the replayed graph, or 0 if the step ran eagerly.
        strays: Slots that a replay changed but should not have.
        finite: Whether all hidden states of replays were finite, including those of padding.
    """

    def __init__(self, llm: LLM, reference: Model) -> None:
        self.llm = llm
        self.reference = reference
        self.runner: Any = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        runner = self.runner
        old = runner.backend
        runner.backend = StaticPortableBackend(old.shape, old.page_size, old.dtype, old.device)
        runner.backend.bind_pages(runner.kv_caches)
        runner.arrays = HostArrays(runner.device, staged=True)
        runner.capture_graphs(recorded.capture, SIZES)
        self.graphs = runner.graphs
        self.replayed: list[int] = []
        self.strays: set[int] = set()
        self.finite = True
        for size, graph in zip(SIZES, self.graphs._graphs, strict=True):
            graph._replay = self._watched(size, graph, graph._replay)
        run = runner.run_step

        def run_step(*args: Any) -> Any:
            before = len(self.replayed)
            result = run(*args)
            if len(self.replayed) == before:
                self.replayed.append(0)
            return result

        runner.run_step = run_step

    def _watched(self, size: int, graph: Any, replay: Any) -> Callable[[], None]:
        return lambda: self.replay(size, graph, replay)

    def replay(self, size: int, graph: Any, replay: Any) -> None:
        """Replay a graph, and record what it did."""
        self.replayed.append(size)
        backend = self.runner.backend
        before = [pool.clone() for pool in backend._slots]
        replay()
        self.finite &= bool(torch.isfinite(graph._output).all())
        for old, new in zip(before, backend._slots, strict=True):
            changed = (old != new).any(dim=-1).any(dim=-1).any(dim=0).nonzero().flatten()
            self.strays |= set(changed.tolist()) - set(graph._slots.view.tolist())

    def eager(self, cases: list[Case]) -> list[list[int]]:
        self.runner.graphs = None
        try:
            return generate(self.llm, [c.prompt for c in cases], [c.sampling() for c in cases])
        finally:
            self.runner.graphs = self.graphs
            self.replayed.clear()


@pytest.fixture(scope="module", params=["llada", "dream"])
def graphed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Graphed]:
    path = write_checkpoint(
        tmp_path_factory.mktemp("graphs") / request.param,
        request.param,
        vocab=VOCAB,
        seed=7,
        d_model=96,
        layers=3,
        heads=4,
        kv_heads=2,
        mlp=128,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Make the host act as a device that arrays must be copied to.
        patch.setattr(graphs, "HostArrays", partial(HostArrays, staged=True))
        with running_engine(
            str(path),
            kv_cache_memory_bytes=4 << 20,
            max_model_len=256,
            max_num_batched_tokens=512,
            additional_config={
                "sparse_dllm": {"attention_backend": "portable", "block_length": BLOCK}
            },
        ) as llm:
            yield Graphed(llm, load(path))


def cases_for(graphed: Graphed, seed: int, num: int) -> list[Case]:
    """Return cases of all kinds, most of them with the block length of the graphs."""
    rng = random.Random(seed)
    guided = graphed.runner.traits.supports_guidance
    every = greedy_cases(seed, VOCAB) + drawn_cases(seed, VOCAB, guided)
    every += beyond_cases(seed, VOCAB, guided) + constrained_cases(seed, VOCAB, MASK, guided)
    every = [c for c in every if len(c.prompt) + c.max_tokens <= 250]
    cases = []
    for case in rng.sample(every, num):
        options = dict(case.options)
        if rng.random() < 0.8:
            options["block_length"] = BLOCK
        cases.append(replace(case, options=options))
    return cases


def test_tokens_are_those_of_eager_steps_and_the_reference(graphed: Graphed) -> None:
    """Holds while requests of all kinds join and leave the batch."""
    cases = cases_for(graphed, 1, 16)
    expected = graphed.eager(cases)
    assert expected == [case.expected(graphed.reference, PAGE) for case in cases]
    assert run_staggered(graphed.llm, cases, random.Random(1)) == expected
    assert not graphed.strays and graphed.finite
    assert pool_is_whole(graphed.llm)


@pytest.mark.parametrize("seed", [1, 2])
def test_batches_of_all_sizes_follow_each_other(graphed: Graphed, seed: int) -> None:
    """Almost only block steps, of requests that join, leave and may have a short last block."""
    rng = random.Random(seed)
    variants: list[dict[str, Any]] = [
        {"cache_policy": "dual"},
        {"keep_ratio": 0.4},
        {"keep_ratio": 0.7, "remasking": "entropy"},
        {"temperature": 0.7},
        {"saliency": "window", "remasking": "topk_margin"},
        {"saliency": "attention", "keep_ratio": 0.4},
        {"cfg_scale": 1.0 if graphed.runner.traits.supports_guidance else 0.0},
    ]
    cases = [
        Case(
            random_prompt(rng, rng.randint(1, 60), VOCAB),
            rng.randint(3 * BLOCK, 5 * BLOCK),
            {"block_length": BLOCK, "delay_steps": 0, **variant},
            seed=rng.randrange(2**31),
        )
        for variant in variants
    ]
    expected = graphed.eager(cases)
    assert expected == [case.expected(graphed.reference, PAGE) for case in cases]
    assert run_staggered(graphed.llm, cases, rng) == expected
    # How many requests share a step depends on timing: the runner takes several steps by itself.
    assert max(graphed.replayed) > 1
    graphed.replayed.clear()
    alone = generate(graphed.llm, [cases[0].prompt], [cases[0].sampling()])
    assert alone == expected[:1] and set(graphed.replayed) == {0, 1}
    assert not graphed.strays and graphed.finite
    assert pool_is_whole(graphed.llm)


def test_each_step_takes_the_smallest_graph_that_holds_it(graphed: Graphed) -> None:
    """Full passes and steps of too many sequences run eagerly, all others are replayed."""
    for num in range(1, 9):
        cases = [
            Case([5 + i] * (20 + 7 * i), BLOCK, {"cache_policy": "dual", "block_length": BLOCK})
            for i in range(num)
        ]
        expected = graphed.eager(cases)
        outputs = generate(graphed.llm, [c.prompt for c in cases], [c.sampling() for c in cases])
        assert outputs == expected
        size = next((size for size in SIZES if size >= num), 0)
        # One step of refreshes, or more if they exceed the budget; then block steps.
        assert graphed.replayed[0] == 0
        assert graphed.replayed[-BLOCK + 2 :] == [size] * (BLOCK - 2)
        graphed.replayed.clear()
    assert not graphed.strays and graphed.finite


@pytest.mark.parametrize(
    ("options", "is_replayed"),
    [
        ({}, True),
        ({"keep_ratio": 1.0}, True),
        ({"cache_policy": "prefix"}, False),
        ({"block_length": 2 * BLOCK}, False),
        ({"block_length": BLOCK // 2}, True),
        ({"cache_policy": "none"}, False),
        # Every block step between the refresh and the eviction, and after the eviction.
        ({"delay_steps": 0, "eviction_delay": 3}, True),
    ],
)
def test_what_is_replayed(graphed: Graphed, options: dict[str, Any], is_replayed: bool) -> None:
    case = Case(list(range(5, 65)), 16, {"block_length": BLOCK, **options})
    expected = graphed.eager([case])
    assert generate(graphed.llm, [case.prompt], [case.sampling()]) == expected
    # Only the first half of the steps counts: in the last block, `prefix` has no suffix to run.
    inner = graphed.replayed[: len(graphed.replayed) // 2]
    assert (1 in inner) == is_replayed
    if "eviction_delay" in options and graphed.runner.traits.family == "LLaDA":
        assert inner[:5] == [0, 1, 1, 0, 1]
    graphed.replayed.clear()


def test_layers_that_keep_different_numbers_run_eagerly(graphed: Graphed) -> None:
    """With granularity `page`, a layer that keeps the short last run keeps fewer positions."""
    options = {"granularity": "page", "keep_ratio": 0.4, "delay_steps": 0, "block_length": BLOCK}
    cases = [Case([i + (j * j) % 50 for j in range(101)], BLOCK, options) for i in range(12)]
    expected = graphed.eager(cases)
    seen = []
    for case, tokens in zip(cases, expected, strict=True):
        assert generate(graphed.llm, [case.prompt], [case.sampling()]) == [tokens]
        seen.append(set(graphed.replayed[1:]))
        graphed.replayed.clear()
    # All block steps of a request are replayed, or none if only some layers keep the short run.
    assert all(sizes in ({0}, {1}) for sizes in seen)
    assert {0} in seen


def test_log_probabilities_of_replayed_steps(graphed: Graphed) -> None:
    case = Case(list(range(9, 50)), 16, {"cache_policy": "dual", "block_length": BLOCK})
    params = case.sampling()
    params.logprobs = 3

    def run() -> list[dict[int, float]]:
        prompts = [{"prompt_token_ids": case.prompt}]
        (output,) = graphed.llm.generate(prompts, params, use_tqdm=False)
        assert output.outputs[0].logprobs is not None
        return [{k: v.logprob for k, v in row.items()} for row in output.outputs[0].logprobs]

    graphed.runner.graphs = None
    expected = run()
    graphed.runner.graphs = graphed.graphs
    graphed.replayed.clear()
    for own, row in zip(run(), expected, strict=True):
        assert own == pytest.approx(row, abs=1e-5)
    assert 1 in graphed.replayed


def test_a_step_is_one_copy_there_and_one_back(
    graphed: Graphed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy steps, eager or replayed, wait for nothing but a single copy back to the host."""
    there: list[int] = []
    back: list[int] = []
    others: list[str] = []
    send = transfer._Buffer.send

    def counted(self: transfer._Buffer) -> None:
        there[-1] += self.used > self.sent and self._host is not None
        send(self)

    def read_back(tensors: list[torch.Tensor]) -> list[np.ndarray]:
        back[-1] += 1
        return transfer.read_back(tensors, packed=True)

    def forbid(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            if inside:
                others.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    inside: list[bool] = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
        forbid(torch.Tensor, name)
    for name in ("from_numpy", "tensor", "as_tensor"):
        forbid(torch, name)
    monkeypatch.setattr(transfer._Buffer, "send", counted)
    monkeypatch.setattr(step, "read_back", read_back)
    run = graphed.runner.run_step

    def run_step(*args: Any) -> Any:
        there.append(0)
        back.append(0)
        inside.append(True)
        with Waiting(others):
            result = run(*args)
        inside.pop()
        return result

    replay = graphed.replay

    def checked(*args: Any) -> None:
        # Reads by the stand-in for a graph are not the step's.
        others_before = list(others)
        replay(*args)
        others[:] = others_before

    monkeypatch.setattr(graphed, "replay", checked)
    monkeypatch.setattr(graphed.runner, "run_step", run_step)
    cases = plain_cases(BLOCK)
    for own in (cases, cases[3:4]):
        prompts = [case.prompt for case in own]
        assert generate(graphed.llm, prompts, [c.sampling() for c in own]) == [
            case.expected(graphed.reference, PAGE) for case in own
        ]
    assert {0, 1} <= set(graphed.replayed)
    # The first steps may exceed the buffer, and then need more than one copy.
    assert set(there[3:]) == {1}
    assert set(back) <= {0, 1} and 1 in back
    assert others == []


class Waiting(recorded.TorchDispatchMode):
    """Notes operators that wait for the device."""

    def __init__(self, noted: list[str]) -> None:
        super().__init__()
        self._noted = noted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if waits(func, args):
            self._noted.append(str(func))
        return func(*args, **(kwargs or {}))


def test_replays_take_nothing_but_their_tensors() -> None:
    """A replay of the stand-in for a graph ignores what the captured code would do by then."""
    source, target = torch.ones(4), torch.zeros(4)
    factor = [2.0]

    def run() -> None:
        nonlocal source
        space = torch.empty(4)
        space.copy_(source * factor[0])
        target.copy_(space.view(2, 2).flatten() + 1)

    replay = recorded.capture(run)
    assert target.tolist() == [3.0] * 4
    old, source = source, torch.full((4,), 100.0)
    factor[0] = 50.0
    replay()
    assert target.tolist() == [3.0] * 4
    old.copy_(torch.arange(4.0))
    replay()
    assert target.tolist() == [1.0, 3.0, 5.0, 7.0]
    with pytest.raises(AssertionError, match="while capturing"):
        recorded.capture(lambda: print(source.sum().item()))


def test_the_user_s_sizes_reach_the_worker(graphed: Graphed) -> None:
    config = graphed.runner.model_config
    assert (config.graph_tokens, config.most_graph_tokens) == (None, None)
    config.graph_tokens = [BLOCK, 5 * BLOCK]
    again = pickle.loads(pickle.dumps(config))
    config.graph_tokens = None
    assert again.graph_tokens == [BLOCK, 5 * BLOCK]


def test_with_triton_kernels(tmp_path: Path) -> None:
    printed = run_program(
        [sys.executable, "-m", "tests.e2e.interpreted", str(tmp_path)],
        environment=clean_environment(TRITON_INTERPRET="1"),
    )
    assert "24 requests, 0 different" in printed
    assert "llada TritonBackend FusedDistribution" in printed
    assert "llada replayed graphs of 1, 2, 4 sequences" in printed
    assert "dream replayed graphs of 1, 2, 4 sequences" in printed


def test_sampling_is_still_the_request_s_own(graphed: Graphed) -> None:
    """With graphs, too, each request draws its tokens from its own generator."""
    params = [
        sampling(16, temperature=0.9, seed=i, diffusion_cache_policy="dual") for i in range(5)
    ]
    prompts = [[9 + i] * 30 for i in range(5)]
    together = generate(graphed.llm, prompts, params)
    alone = [generate(graphed.llm, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    assert together == alone
    assert {1, 6} <= set(graphed.replayed)
