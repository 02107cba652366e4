# SPDX-License-Identifier: Apache-2.0
"""Traces offline: steps, confidences, passes and kept positions equal the slow reference's."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput

from tests.e2e.cases import Case, beyond_cases, drawn_cases, greedy_cases
from tests.e2e.questions import UNSURE
from tests.engines import pool_is_whole, running_engine, sampling, scheduler_of
from tests.reference import Model, load, write_checkpoint
from tests.reference.decode import Stats, generate_with_stats
from vllm_sparse_dllm.assets import embedded_model

VOCAB = 320
SHAPE = {"d_model": 64, "layers": 2, "heads": 2, "mlp": 96}


@dataclass(frozen=True)
class Run:
    """A case, the engine's outputs without and with a trace, and the reference's results."""

    case: Case
    plain: CompletionOutput
    traced: CompletionOutput
    tokens: list[int]
    stats: Stats

    @property
    def trace(self) -> dict[str, Any]:
        return self.traced.diffusion_trace  # type: ignore[attr-defined]

    def __str__(self) -> str:
        return str(self.case)


def with_trace(params: SamplingParams, level: int) -> SamplingParams:
    clone = params.clone()
    clone.extra_args = {**(clone.extra_args or {}), "diffusion_trace": level}
    return clone


def account(model: Model, case: Case) -> tuple[list[int], Stats]:
    """Return the reference's tokens, and its record of what it did."""
    generator = None if case.seed is None else torch.Generator().manual_seed(case.seed)
    return generate_with_stats(
        model, case.prompt, case.max_tokens, page=32, generator=generator, **case.options
    )


@pytest.fixture(scope="module", params=["llada", "dream"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Run each case without and with a trace, all of them at once, so that all steps are mixed."""
    name = request.param
    path = write_checkpoint(tmp_path_factory.mktemp(name) / name, name, vocab=VOCAB, **SHAPE)
    guided = name == "llada"
    cases = greedy_cases(31, VOCAB)[::3] + drawn_cases(32, VOCAB, guided=guided)[::2]
    cases += beyond_cases(34, VOCAB, guided)[10::5]  # without the policy `none`
    random.Random(33).shuffle(cases)
    with running_engine(str(path)) as llm:
        params = [case.sampling() for case in cases]
        outputs = llm.generate(
            [{"prompt_token_ids": case.prompt} for case in cases for _ in range(2)],
            [chosen for own in params for chosen in (own, with_trace(own, 2))],
            use_tqdm=False,
        )
        assert pool_is_whole(llm)
    model = load(path)
    return [
        Run(case, plain.outputs[0], traced.outputs[0], *account(model, case))
        for case, plain, traced in zip(cases, outputs[::2], outputs[1::2], strict=True)
    ]


def test_tokens_are_the_same_with_and_without(runs: list[Run]) -> None:
    for run in runs:
        assert list(run.plain.token_ids) == list(run.traced.token_ids) == run.tokens, run
        assert not hasattr(run.plain, "diffusion_trace")


def test_each_token_has_its_step(runs: list[Run]) -> None:
    """The reference also counts steps of a schedule that commit nothing; the engine skips them."""
    exact = 0
    for run in runs:
        steps = [positions for block in run.stats.commits for positions in block]
        first = len(run.case.prompt)
        found = run.trace["steps"]
        assert len(found) == run.case.max_tokens
        if all(steps):
            exact += 1
            numbers = range(len(steps))
            assert run.trace["nfe"] == len(steps), run
        else:
            numbers = sorted(set(found))
            steps = [positions for positions in steps if positions]
            assert max(found) < run.trace["nfe"], run
            if run.case.options.get("cache_policy") == "none":  # no pass fills a cache
                assert numbers == list(range(run.trace["nfe"])), run
        expected = {p - first: n for n, own in zip(numbers, steps, strict=True) for p in own}
        assert found == [expected[offset] for offset in range(len(found))], run
    assert exact > len(runs) / 2


def test_each_token_has_its_confidence(runs: list[Run]) -> None:
    for run in runs:
        first = len(run.case.prompt)
        expected = [run.stats.confidences[first + i] for i in range(run.case.max_tokens)]
        assert run.trace["confidences"] == pytest.approx(expected, rel=1e-3, abs=1e-5), run


def test_each_change_of_the_cache_has_what_each_layer_kept(runs: list[Run]) -> None:
    num_changes: Counter[str] = Counter()
    for run in runs:
        # Under guidance, every second entry is of the unconditional canvas.
        every = slice(None, None, 2 if run.case.options.get("cfg_scale") else 1)
        kept, changes = run.stats.kept[every], run.stats.changes[every]
        refreshes = run.trace["refreshes"]
        assert [r["kind"] for r in refreshes] == changes, run
        assert [r["kept"] for r in refreshes] == [
            [sorted(layer.tolist()) for layer in layers] for layers in kept
        ], run
        for refresh in refreshes:
            start, end = refresh["block"]
            steps = run.trace["steps"][start - len(run.case.prompt) : end - len(run.case.prompt)]
            assert refresh["step"] <= max(steps)
        num_changes.update(changes)
    assert num_changes["refresh"] > len(runs)
    assert min(num_changes["append"], num_changes["evict"]) > 2


# The tests below are about what vLLM does with outputs on their way to users.


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running_engine(embedded_model(), skip_tokenizer_init=False) as engine:
        yield engine


PROMPT = {"prompt_token_ids": [77, 311, 316, 900, 45, 1200, 678]}


def test_several_samples_have_a_trace_each(llm: LLM) -> None:
    options = {"n": 3, "temperature": 2.0, "seed": 4, "diffusion_block_length": 4, **UNSURE}
    together = llm.generate(PROMPT, sampling(12, diffusion_trace=1, **options), use_tqdm=False)
    plain = llm.generate(PROMPT, sampling(12, **options), use_tqdm=False)
    traces = [output.diffusion_trace for output in together[0].outputs]
    assert [list(o.token_ids) for o in together[0].outputs] == [
        list(o.token_ids) for o in plain[0].outputs
    ]
    assert all(trace["nfe"] == 12 and sorted(trace["steps"]) == list(range(12)) for trace in traces)
    assert len({str(trace["confidences"]) for trace in traces}) == 3
    assert together[0].kv_transfer_params is None


def test_confidence_is_the_probability_of_the_step_of_commit(llm: LLM) -> None:
    options = {"temperature": 2.0, "seed": 3, "diffusion_threshold": 0.2}
    params = sampling(24, logprobs=0, diffusion_trace=1, **options)
    output = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
    probabilities = [
        math.exp(entry[token].logprob)
        for token, entry in zip(output.token_ids, output.logprobs, strict=True)
    ]
    assert output.diffusion_trace["confidences"] == pytest.approx(probabilities, rel=1e-4)


def test_a_trace_ends_with_the_tokens(llm: LLM) -> None:
    """A trace is cut with the tokens, by the engine at a token or by the front end at a string."""
    options: dict[str, Any] = {"diffusion_block_length": 8, "diffusion_steps": 6}
    options |= {"temperature": 2.0, "seed": 8, "detokenize": True, "diffusion_trace": 2, **UNSURE}
    whole = llm.generate(PROMPT, sampling(24, **options), use_tqdm=False)[0].outputs[0]
    tokens, text = list(whole.token_ids), whole.text
    middle = len(text) // 2
    for stop in ({"stop_token_ids": [tokens[11]]}, {"stop": [text[middle : middle + 4]]}):
        params = sampling(24, **options, **stop)
        output = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
        assert output.finish_reason == "stop"
        num = len(output.token_ids)
        assert 0 < num < 24
        trace = output.diffusion_trace
        for name in ("steps", "confidences"):
            assert trace[name] == whole.diffusion_trace[name][:num]
        assert trace["nfe"] == max(trace["steps"]) + 1
        assert trace["refreshes"] == [
            refresh
            for refresh in whole.diffusion_trace["refreshes"]
            if refresh["step"] < trace["nfe"]
        ]


def test_given_positions_are_not_committed(llm: LLM) -> None:
    mask = scheduler_of(llm).vllm_config.model_config.hf_config.mask_token_id
    canvas = [mask, 31, mask, mask, 33, 34, 35, 36, mask]
    params = sampling(
        12, diffusion_canvas=canvas, diffusion_block_length=4, diffusion_trace=2, logprobs=0
    )
    output = llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0]
    trace = output.diffusion_trace
    given = [i for i, token in enumerate(canvas) if token != mask]
    assert [i for i, step in enumerate(trace["steps"]) if step == -1] == given
    assert [trace["confidences"][i] for i in given] == [1.0] * len(given)
    assert sorted(step for step in trace["steps"] if step >= 0) == list(range(7))
    assert trace["nfe"] == 7
    # The second block has nothing to write, and so no refresh.
    assert [refresh["block"] for refresh in trace["refreshes"]] == [[7, 11], [15, 19]]


@pytest.mark.parametrize("value", [-1, 3, True, 1.0, "1", None])
def test_other_values_are_refused(llm: LLM, value: Any) -> None:
    with pytest.raises(ValueError, match=r"diffusion_trace must be 0, 1 or 2, got "):
        llm.generate(PROMPT, sampling(4, diffusion_trace=value), use_tqdm=False)


def test_zero_asks_for_nothing(llm: LLM) -> None:
    output = llm.generate(PROMPT, sampling(4, diffusion_trace=0), use_tqdm=False)[0].outputs[0]
    assert not hasattr(output, "diffusion_trace")
