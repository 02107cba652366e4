# SPDX-License-Identifier: Apache-2.0
"""Constraints and infilling: the reference's tokens, whatever else runs; and refusals."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import BeamSearchParams

from tests.e2e.cases import Case, constrained_cases, drawn_cases, greedy_cases, run_staggered
from tests.e2e.parameters import ACCEPTED_OFFLINE, REFUSED_OFFLINE
from tests.engines import count_forwards, generate, pool_is_whole, running_engine, sampling
from tests.reference import Model, load, write_checkpoint
from tests.unit.test_readme import PARAMETERS, code, table
from vllm_sparse_dllm.assets import embedded_model

VOCAB = 320
SHAPE = {"d_model": 128, "layers": 2, "heads": 4, "mlp": 256, "vocab": VOCAB}
MODELS = pytest.mark.parametrize("model", ["llada", "dream"])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        model: write_checkpoint(folder / model, model, seed=7, **SHAPE)
        for model in ("llada", "dream")
    }


@dataclass(frozen=True)
class Run:
    """An engine's responses to cases that ran all at once, with plain requests among them."""

    reference: Model
    cases: list[Case]
    outputs: list[list[int]]


def _cases(model: str, mask: int) -> list[Case]:
    guided = model == "llada"
    return constrained_cases({"llada": 31, "dream": 32}[model], VOCAB, mask, guided)


@pytest.fixture(scope="module")
def runs(checkpoints: dict[str, Path]) -> dict[str, Run]:
    found = {}
    for model, path in checkpoints.items():
        reference = load(path)
        cases = _cases(model, reference.mask_id)
        plain = random.Random(1).sample(greedy_cases(33, VOCAB), 12)
        mixed = [*cases, *plain]
        random.Random(2).shuffle(mixed)
        with running_engine(str(path)) as llm:
            outputs = generate(llm, [c.prompt for c in mixed], [c.sampling() for c in mixed])
            assert pool_is_whole(llm)
        found[model] = Run(reference, mixed, outputs)
    return found


@MODELS
def test_equals_reference(runs: dict[str, Run], model: str) -> None:
    run = runs[model]
    different = [
        str(case)
        for case, output in zip(run.cases, run.outputs, strict=True)
        if output != case.expected(run.reference)
    ]
    assert not different


def check_promises(case: Case, output: list[int], mask: int) -> None:
    """Check that an answer keeps the constraints of its request."""
    options = case.options
    given = options.get("canvas", [])
    fixed = {i: t for i, t in enumerate(given) if t != mask}
    own = [token for i, token in enumerate(output) if i not in fixed]
    assert mask not in output
    assert all(output[i] == token for i, token in fixed.items())
    if "allowed_token_ids" in options:
        assert set(own) <= set(options["allowed_token_ids"])
    for word in options.get("bad_words", []):
        for start in range(len(output) - len(word) + 1):
            if not {*range(start, start + len(word))} <= fixed.keys():
                assert output[start : start + len(word)] != word
    if "stop_ids" in options:
        assert len(output) >= options["min_tokens"]


@MODELS
def test_what_is_promised_holds(runs: dict[str, Run], model: str) -> None:
    """Answers contain no bad word and only allowed tokens, with fixed tokens in their places."""
    run = runs[model]
    for case, output in zip(run.cases, run.outputs, strict=True):
        check_promises(case, output, run.reference.mask_id)
    promised = {"allowed_token_ids", "bad_words", "canvas", "stop_ids"}
    assert sum(bool(case.options.keys() & promised) for case in run.cases) > 30


# The tests from here on share one engine, and have fewer cases.


@pytest.fixture(scope="module")
def llada(checkpoints: dict[str, Path]) -> Iterator[LLM]:
    with running_engine(str(checkpoints["llada"])) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(checkpoints: dict[str, Path]) -> Model:
    return load(checkpoints["llada"])


def _mixed(mask: int) -> list[Case]:
    own = random.Random(4).sample(constrained_cases(41, VOCAB, mask, guided=True), 12)
    return [*own, *random.Random(5).sample(drawn_cases(42, VOCAB, guided=True), 4)]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_company_and_bursts_change_no_token(
    llada: LLM, reference: Model, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr("vllm_sparse_dllm.engine.scheduler._BURST_SECONDS", seconds)
    cases = _mixed(reference.mask_id)
    alone = [generate(llada, [case.prompt], [case.sampling()])[0] for case in cases]
    assert run_staggered(llada, cases, random.Random(6)) == alone


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_preemption_breaks_no_promise(
    llada: LLM, reference: Model, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr("vllm_sparse_dllm.engine.scheduler._BURST_SECONDS", seconds)
    cases = _mixed(reference.mask_id)
    for case, output in zip(
        cases, run_staggered(llada, cases, random.Random(6), preempt=True), strict=True
    ):
        check_promises(case, output, reference.mask_id)
        stops = set(case.options.get("stop_ids", ()))
        assert len(output) == case.max_tokens or output[-1] in {*stops, reference.eos_id}
        assert stops.isdisjoint(output[:-1])
    assert pool_is_whole(llada)


def test_few_logits_at_a_time_change_no_token(
    llada: LLM, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = _mixed(reference.mask_id)
    prompts, params = [c.prompt for c in cases], [c.sampling() for c in cases]
    expected = generate(llada, prompts, params)
    monkeypatch.setattr("vllm_sparse_dllm.engine.runner._MAX_LOGITS", 3 * VOCAB)
    assert generate(llada, prompts, params) == expected


# ------------------------------------------------------------------------------------- infilling


def test_blocks_without_masks_are_not_run(
    llada: LLM, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = reference.mask_id
    canvas = [*range(8), *[mask] * 8, *range(8), *[mask] * 4, *range(12), *[mask] * 2]
    options = {"block_length": 8, "cache_policy": "dual", "canvas": canvas}
    case = Case([9, 8, 7], 48, options)
    sizes = count_forwards(llada, monkeypatch)
    assert generate(llada, [case.prompt], [case.sampling()]) == [case.expected(reference)]
    # Blocks 1, 3 and 5 run, with 8, 4 and 8 masks: one step per token, each block's first a full
    # pass.
    assert sizes == [51, *[8] * 7, 51, *[8] * 3, 51, *[8] * 7]


def test_a_canvas_without_masks_is_its_own_answer(
    llada: LLM, reference: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request without masks takes no forward pass, and gets the same answer beside others."""
    given = list(range(40, 60))
    sizes = count_forwards(llada, monkeypatch)
    whole = sampling(20, diffusion_canvas=given)
    assert generate(llada, [[3, 4]], [whole]) == [given]
    assert sizes == []
    case = Case([5] * 9, 16, {})
    together = generate(llada, [[3, 4], case.prompt], [whole, case.sampling()])
    assert together == [given, case.expected(reference)]


def test_a_stop_token_of_the_canvas_ends_the_response(llada: LLM, reference: Model) -> None:
    mask, eos = reference.mask_id, reference.eos_id
    for canvas in ([mask, 7, mask, eos, mask, 8], [eos, mask], [5, 6, eos, 9]):
        for ignored in (False, True):
            options = {"canvas": canvas, "ignore_eos": ignored, "block_length": 4}
            case = Case([11, 12, 13], 24, options)
            (output,) = generate(llada, [case.prompt], [case.sampling()])
            assert output == case.expected(reference)
            assert (len(output) == canvas.index(eos) + 1) != ignored
    params = sampling(8, stop_token_ids=[7], diffusion_canvas=[mask, mask, 7, mask])
    assert generate(llada, [[11]], [params])[0][2:] == [7]


def test_fixed_tokens_stream_in_order(llada: LLM, reference: Model) -> None:
    """A fixed token is streamed as soon as everything before it is final."""
    mask = reference.mask_id
    canvas = [21, 22, mask, 24, 25, mask, mask, 28]
    engine = llada.llm_engine
    params = sampling(10, diffusion_canvas=canvas, diffusion_block_length=2)
    engine.add_request("r", {"prompt_token_ids": [1, 2, 3]}, params)
    seen = []
    while engine.has_unfinished_requests():
        seen += [list(output.outputs[0].token_ids) for output in engine.step()]
    whole = seen[-1]
    assert len(whole) == 10 and [whole[i] for i in (0, 1, 3, 4, 7)] == [21, 22, 24, 25, 28]
    assert all(part == whole[: len(part)] for part in seen)
    # Blocks of two: all of the first is fixed, and the third position makes the next two final.
    assert [len(part) for part in seen if part][:2] == [5, 6]


@pytest.mark.parametrize("logprobs", [0, 1, 3])
@pytest.mark.parametrize("company", [None, 0, 5])
def test_a_fixed_token_is_certain(
    llada: LLM, reference: Model, logprobs: int, company: int | None
) -> None:
    """Of rank 1 and without alternatives, whatever the others in the batch ask for."""
    mask = reference.mask_id
    given = {"logprobs": logprobs, "diffusion_canvas": [mask, 31, mask, 33]}
    params = [sampling(6, **given), sampling(6, flat_logprobs=True, **given)]
    if company is not None:
        params.append(sampling(6, logprobs=company))
    prompts = [{"prompt_token_ids": [1, 2]}] * len(params)
    output, flat, *_ = llada.generate(prompts, params, use_tqdm=False)
    tokens, entries = output.outputs[0].token_ids, output.outputs[0].logprobs
    assert tokens[1] == 31 and tokens[3] == 33
    assert entries is not None
    for index, (token, at) in enumerate(zip(tokens, entries, strict=True)):
        assert token in at
        if index in (1, 3):
            assert {t: (p.logprob, p.rank) for t, p in at.items()} == {token: (0.0, 1)}
        else:
            assert len(at) in (logprobs, logprobs + 1) and at[token].logprob < 0
    own = flat.outputs[0].logprobs
    assert isinstance(own, FlatLogprobs)
    assert list(own) == entries
    sizes = [end - start for start, end in zip(own.start_indices, own.end_indices, strict=True)]
    assert sizes == [1 if index in (1, 3) else logprobs + 1 for index in range(6)]


def test_samples_of_one_canvas(llada: LLM, reference: Model) -> None:
    canvas = [reference.mask_id, 31, reference.mask_id]
    drawn = {"temperature": 1.0, "diffusion_canvas": canvas}
    params = sampling(5, n=3, seed=8, **drawn)
    (output,) = llada.generate([{"prompt_token_ids": [1, 2]}], params, use_tqdm=False)
    answers = [list(sample.token_ids) for sample in output.outputs]
    assert len(set(map(tuple, answers))) == 3
    assert all(answer[1] == 31 and len(answer) == 5 for answer in answers)
    one_each = [sampling(5, seed=seed, **drawn) for seed in (8, 9, 10)]
    assert generate(llada, [[1, 2]] * 3, one_each) == answers


def test_the_largest_seeds(llada: LLM) -> None:
    params = sampling(4, n=2, seed=2**64 - 2, temperature=1.0)
    (output,) = llada.generate([{"prompt_token_ids": [1, 2]}], params, use_tqdm=False)
    assert [len(sample.token_ids) for sample in output.outputs] == [4, 4]


def test_requests_without_a_seed_have_noise_of_their_own(llada: LLM) -> None:
    params = [sampling(24, temperature=2.0)] * 3
    assert len(set(map(tuple, generate(llada, [[1, 2]] * 3, params)))) == 3


def test_logprobs_are_of_the_logits_before_constraints(llada: LLM) -> None:
    prompt = {"prompt_token_ids": [1, 2]}
    (plain,) = llada.generate([prompt], sampling(1, logprobs=3), use_tqdm=False)
    assert plain.outputs[0].logprobs is not None
    first, other = list(plain.outputs[0].logprobs[0].items())[:2]
    for options in ({"allowed_token_ids": [other[0]]}, {"logit_bias": {other[0]: 100.0}}):
        params = sampling(1, logprobs=1, **options)
        (forced,) = llada.generate([prompt], params, use_tqdm=False)
        assert forced.outputs[0].token_ids == [other[0]] and forced.outputs[0].logprobs is not None
        found = forced.outputs[0].logprobs[0]
        for token, expected in (first, other):
            assert found[token].logprob == pytest.approx(expected.logprob, abs=1e-5)


def test_default_length_with_a_canvas(llada: LLM, reference: Model) -> None:
    """A canvas does not change the default length: the model writes the rest."""
    params = sampling(1, diffusion_canvas=[7, 8], diffusion_threshold=0.01)
    params.max_tokens = None
    # After the second prompt, the context has room for no more than 12.
    long, short = generate(llada, [[1, 2], [1] * 500], [params] * 2)
    assert len(long) == 256 and len(short) == 12
    assert long[:2] == short[:2] == [7, 8]


def test_mask_ids_of_a_prompt_are_text(llada: LLM, reference: Model) -> None:
    """Mask ids in a prompt look like masks to the model, but are never replaced by tokens."""
    mask = reference.mask_id
    prompts = [[5, mask, 6, mask, mask], [mask, 9, 9], [7] * 40 + [mask] * 30]
    for policy in ("none", "prefix", "dual", "sparse"):
        cases = [Case(prompt, 16, {"cache_policy": policy}) for prompt in prompts]
        cases += [replace(case, options={**case.options, "cfg_scale": 0.5}) for case in cases]
        outputs = llada.generate(
            [{"prompt_token_ids": case.prompt} for case in cases],
            [case.sampling() for case in cases],
            use_tqdm=False,
        )
        for case, output in zip(cases, outputs, strict=True):
            assert output.prompt_token_ids == case.prompt
            tokens = list(output.outputs[0].token_ids)
            assert tokens == case.expected(reference) and mask not in tokens


# -------------------------------------------------------------------------------------- refusals

#: Parameters that cannot be honoured, and a pattern of the message. MASK stands for the mask id.
MASK = "mask"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "allowed: the mask id": ({"allowed_token_ids": [MASK]}, "allowed_token_ids must hold a token"),
    "allowed: none": ({"allowed_token_ids": []}, "allowed_token_ids"),
    "allowed: outside": ({"allowed_token_ids": [5, VOCAB]}, "allowed_token_ids"),
    "allowed: no integer": ({"allowed_token_ids": [5.5]}, "allowed_token_ids must be integers"),
    "allowed: bad words": (
        {"allowed_token_ids": [5, 6], "words": [[5, 6]]},
        "allowed_token_ids must hold a token",
    ),
    "allowed: stop tokens": (
        {"allowed_token_ids": [5, 6], "stop_token_ids": [5, 6], "min_tokens": 2},
        "allowed_token_ids must hold a token",
    ),
    "bad words: all": ({"words": [[i] for i in range(VOCAB)]}, "got all tokens"),
    "bad words: outside": ({"words": [[VOCAB]]}, "bad_words must be of tokens"),
    "bad words: many": (
        {"words": [[i % 9] * 64 for i in range(65)]},
        "at most 4096 tokens.*got 4160",
    ),
    "bad words: no tokenizer": ({"bad_words": ["x"]}, "bad_words needs a tokenizer"),
    "bias: not finite": ({"logit_bias": {5: float("nan")}}, "logit_bias must be numbers"),
    "bias: huge": ({"logit_bias": {5: 1e30}}, "logit_bias must be numbers"),
    "bias: no number": ({"logit_bias": {5: "much"}}, "logit_bias must be numbers"),
    "bias: outside": ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
    "repetition: small": ({"repetition_penalty": 1e-3}, "repetition_penalty must be from 0.01"),
    "repetition: large": ({"repetition_penalty": 1e3}, "repetition_penalty must be from 0.01"),
    "min_tokens": ({"min_tokens": 300, "max_tokens": None}, "min_tokens must be at most"),
    "canvas: long": ({"diffusion_canvas": [5] * 9}, "diffusion_canvas must have at most"),
    "canvas: outside": ({"diffusion_canvas": [5, VOCAB]}, f"got {VOCAB} at 1"),
    "canvas: negative": ({"diffusion_canvas": [5, -1]}, "got -1 at 1"),
    "canvas: empty": ({"diffusion_canvas": []}, "diffusion_canvas must be a list of token ids"),
    "canvas: text": ({"diffusion_canvas": ["a"]}, "diffusion_canvas must be a list of token ids"),
    "canvas: floats": ({"diffusion_canvas": [5.0]}, "diffusion_canvas must be a list of token"),
    "canvas: early stop": (
        {"diffusion_canvas": [5, 6, 7], "stop_token_ids": [6], "min_tokens": 2},
        "diffusion_canvas must hold no stop token before min_tokens=2, got 6 at 1",
    ),
    "seed: beyond 64 bits": (
        {"n": 2, "seed": 2**64 - 1, "temperature": 1.0},
        f"seed must be at most .*{2**64 - 2} with n=2.* got {2**64 - 1}",
    ),
    "prompt_logprobs": ({"prompt_logprobs": 1}, "prompt_logprobs .* must be None, got 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused(llada: LLM, reference: Model, name: str) -> None:
    options, message = REFUSED[name]
    options = {"max_tokens": 8, **options}
    if options.get("allowed_token_ids") == [MASK]:
        options["allowed_token_ids"] = [reference.mask_id]
    words, length = options.pop("words", None), options.pop("max_tokens")
    params = sampling(length or 16, **{**options, "min_tokens": 0})
    params.min_tokens = options.get("min_tokens", 0)
    params.max_tokens = length
    params._bad_words_token_ids = words
    with pytest.raises((ValueError, VLLMValidationError), match=message):
        generate(llada, [[1, 2, 3]], [params])
    assert generate(llada, [[1, 2, 3]], [sampling(4)])  # nothing is left behind


# Last: they start engines of their own, which end the one that the tests above share.
def test_all_logprobs_of_a_fixed_token(checkpoints: dict[str, Path]) -> None:
    with running_engine(str(checkpoints["llada"]), max_logprobs=-1) as llm:
        params = sampling(3, logprobs=-1, diffusion_canvas=[31])
        (output,) = llm.generate([{"prompt_token_ids": [1, 2]}], params, use_tqdm=False)
        entries = output.outputs[0].logprobs
    assert entries is not None
    assert [len(at) for at in entries] == [1, VOCAB, VOCAB]
    assert entries[0][31].rank == 1


def test_more_logprobs_than_there_are_tokens(checkpoints: dict[str, Path]) -> None:
    """The limit, and a request within it, may exceed the vocabulary."""
    with running_engine(str(checkpoints["llada"]), max_logprobs=2 * VOCAB) as llm:
        params = [sampling(3, logprobs=num) for num in (VOCAB + 1, 2 * VOCAB, 1)]
        outputs = llm.generate([{"prompt_token_ids": [1, 2]}] * 3, params, use_tqdm=False)
    widths = [{len(at) for at in output.outputs[0].logprobs or ()} for output in outputs]
    assert widths == [{VOCAB}, {VOCAB}, {1}]


def test_every_row_of_the_table_offline() -> None:
    """Each field of `SamplingParams` is accepted or refused as docs/parameters.md says."""
    rows = table("parameters", PARAMETERS)
    answers = {str(code(r["parameter"])): r["answer"] for r in rows if "S" in r["of"].split()}
    assert ACCEPTED_OFFLINE.keys() | REFUSED_OFFLINE.keys() == answers.keys()
    prompt = {"prompt_token_ids": [77, 311, 316]}
    with running_engine(embedded_model(), skip_tokenizer_init=False) as llm:
        for name, fragment in ACCEPTED_OFFLINE.items():
            assert answers[name] in ("honoured", "no effect")
            params = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **fragment})
            (output,) = llm.generate([prompt], params, use_tqdm=False)
            assert all(sample.token_ids for sample in output.outputs), name
        for name, (value, message) in REFUSED_OFFLINE.items():
            assert answers[name] == "refused"
            params = SamplingParams(temperature=0.0, max_tokens=4, **{name: value})
            with pytest.raises((ValueError, VLLMValidationError), match=message):
                llm.generate([prompt], params, use_tqdm=False)
        beam = BeamSearchParams(beam_width=2, max_tokens=4)
        with pytest.raises(ValueError, match="use_beam_search"):
            llm.beam_search([prompt], beam)
