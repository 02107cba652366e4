# SPDX-License-Identifier: Apache-2.0
"""Structured output: every answer follows its grammar, and nothing else about it changes."""

from __future__ import annotations

import json
import random
import string
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm import LLM, RequestOutput, SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from tests.e2e.cases import POLICIES, Case, constrained_cases, drawn_cases, greedy_cases
from tests.e2e.server import tiny_llada
from tests.engines import generate, pool_is_whole, running_engine, sampling, scheduler_of
from tests.reference import Model, load, write_checkpoint
from tests.reference import generate as reference
from tests.reference.grammars import Grammar

TINY = str(tiny_llada())
VOCAB, EOS, MASK = 1408, 1, 5
#: Without this, a weak model goes on writing blanks between tokens of JSON.
NO_BLANKS = {"backend": "guidance", "disable_any_whitespace": True}
#: Prompts that these models know from training, or do not: none asks for what a grammar wants.
PROMPTS = [[0, 3, 400, 401, 402, 2, 4], [3] * 40, list(range(400, 470))]


@dataclass(frozen=True)
class Wanted:
    """A constrained request.

    Attributes:
        kind: Field of `StructuredOutputsParams`, such as ``json``, ``regex`` or ``choice``.
        text: Value of the field: the schema, the expression or the list.
        max_tokens: Length of the canvas.
        options: vLLM's parameters, and the plugin's without ``diffusion_``.
    """

    kind: str
    text: Any
    max_tokens: int = 48
    options: dict[str, Any] = field(default_factory=dict)

    def sampling(self, **more: Any) -> SamplingParams:
        own = ("temperature", "top_p", "top_k", "min_p", "seed")
        options = {k if k in own else f"diffusion_{k}": v for k, v in self.options.items()}
        return sampling(
            self.max_tokens,
            structured_outputs=StructuredOutputsParams(**{self.kind: self.text}),
            **{"ignore_eos": False, "detokenize": True, **options, **more},
        )

    def grammar(self) -> Grammar:
        return Grammar(self.kind, self.text, TINY, VOCAB, spaces=False)

    def check(self, output: RequestOutput) -> None:
        """Check the texts of an answer without the help of grammars, except for those cut short."""
        for answer in output.outputs:
            tokens = list(answer.token_ids)
            assert MASK not in tokens
            if answer.finish_reason == "length":
                assert len(tokens) == self.max_tokens
                assert self.grammar().begins(tokens)
                # The last character may be incomplete.
                text = answer.text.rstrip("\ufffd")
                if self.kind == "regex":
                    assert regex.fullmatch(self.text, text, partial=True)
                elif self.kind == "choice":
                    assert any(choice.startswith(text) for choice in self.text)
                continue
            assert answer.finish_reason == "stop" and tokens[-1] == EOS
            if self.kind == "regex":
                assert regex.fullmatch(self.text, answer.text)
            elif self.kind == "choice":
                assert answer.text in self.text
            else:
                validator = jsonschema.Draft202012Validator(self.text)
                validator.validate(json.loads(answer.text))


def leaves() -> st.SearchStrategy[dict[str, Any]]:
    values = st.one_of(st.text(string.printable, max_size=4), st.integers(-99, 99), st.booleans())
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.lists(values, min_size=1, max_size=3).map(lambda enum: {"enum": enum}),
        st.tuples(st.integers(-200, 200), st.integers(0, 300)).map(
            lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
        ),
        st.integers(0, 3).map(lambda n: {"type": "string", "maxLength": n}),
        st.just({"type": "string", "pattern": "^[A-F]{2}[0-9]$"}),
        st.just({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}),
    )


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.text(string.ascii_letters + ' "', min_size=1, max_size=3)
    return st.dictionaries(names, inner, min_size=1, max_size=2).flatmap(
        lambda properties: st.sets(st.sampled_from(sorted(properties))).map(
            lambda required: {
                "type": "object",
                "properties": properties,
                "required": sorted(required),
                "additionalProperties": False,
            }
        )
    )


def _arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(inner, st.integers(0, 2), st.integers(0, 1)).map(
        lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
    )


SCHEMAS = st.recursive(leaves(), lambda inner: _objects(inner) | _arrays(inner), max_leaves=3)
PARTS = (
    "[a-f]{1,3}",
    "(yes|no)?",
    r"\d+",
    "x{2}",
    "[^a-z]{2}",
    "(ab|a|é)",
    ".{0,4}",
)
EXPRESSIONS = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("".join)
CHOICES = st.lists(
    st.text('ab <|>"\\é\n' + string.digits, min_size=1, max_size=8), min_size=1, max_size=4
)
GRAMMARS = st.one_of(
    st.tuples(st.just("json"), SCHEMAS),
    st.tuples(st.just("regex"), EXPRESSIONS),
    st.tuples(st.just("choice"), CHOICES),
)


def wanted(llada: bool) -> st.SearchStrategy[Wanted]:
    drawn = st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.7, 2.0]), "seed": st.integers(0, 99)},
        optional={"top_p": st.just(0.8), "top_k": st.just(7), "min_p": st.just(0.1)},
    )
    ours = st.fixed_dictionaries(
        {
            "cache_policy": st.sampled_from(POLICIES),
            "block_length": st.sampled_from([1, 5, 16, 32, 64]),
        },
        optional={"cfg_scale": st.sampled_from([0.5, 2.0])} if llada else {},
    )
    options = st.tuples(ours, st.just({}) | drawn).map(lambda pair: pair[0] | pair[1])
    return st.builds(
        lambda grammar, n, options: Wanted(*grammar, n, options),
        GRAMMARS,
        st.sampled_from([1, 6, 40]),
        options,
    )


@pytest.fixture(scope="module", params=["llada", "dream"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded LLaDA, or a Dream whose weights are random."""
    if family == "llada":
        return TINY
    folder = tmp_path_factory.mktemp("dream")
    return str(write_checkpoint(folder, "dream", d_model=128, layers=2, vocab=VOCAB))


@pytest.fixture(scope="module")
def llm(checkpoint: str) -> Iterator[LLM]:
    options = {"tokenizer": TINY, "skip_tokenizer_init": False}
    with running_engine(checkpoint, structured_outputs_config=NO_BLANKS, **options) as started:
        yield started


def answer(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[RequestOutput]:
    """Return the answers of requests that run together."""
    given_prompts = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(given_prompts, params, use_tqdm=False)


def prompts_for(requests: list[Any]) -> list[list[int]]:
    return [PROMPTS[number % len(PROMPTS)] for number in range(len(requests))]


@given(data=st.data())
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    # Batches take too long to be shrunk.
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_every_answer_follows_its_grammar(llm: LLM, family: str, data: st.DataObject) -> None:
    requests = data.draw(st.lists(wanted(family == "llada"), min_size=8, max_size=8))
    params = [request.sampling() for request in requests]
    for request, output in zip(requests, answer(llm, prompts_for(requests), params), strict=True):
        request.check(output)


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["colour", "size", "tags"],
    "additionalProperties": False,
}


def fixed_requests(family: str) -> list[Wanted]:
    """Return requests of every cache policy with each kind of grammar, some drawn or guided."""
    requests = []
    for number, policy in enumerate(POLICIES):
        ours = {"cache_policy": policy, "block_length": (4, 8, 16, 32)[number]}
        drawn = {"temperature": 1.0, "seed": 7 + number}
        requests += [
            Wanted("json", SCHEMA, 40, ours),
            Wanted("json", SCHEMA, 40, {**ours, **drawn, "top_p": 0.9}),
            Wanted("regex", r"[a-m]{2,9}-\d{3}", 20, {**ours, "block_length": 3}),
            Wanted("choice", ["yes", "no", "perhaps not"], 9, {**ours, **drawn}),
        ]
        if family == "llada":
            requests.append(Wanted("regex", "[^ ]+ [^ ]+", 16, {**ours, "cfg_scale": 1.0}))
    return requests


@pytest.fixture(scope="module")
def model(checkpoint: str) -> Model:
    return load(checkpoint)


def test_tokens_are_those_of_the_reference(llm: LLM, model: Model, family: str) -> None:
    requests = fixed_requests(family)
    if family == "llada":
        # The reference is slow with the embedded model; the random one runs all cases.
        requests = requests[1::3]
    outputs = answer(llm, prompts_for(requests), [request.sampling() for request in requests])
    for request, prompt, output in zip(requests, prompts_for(requests), outputs, strict=True):
        options = dict(request.options)
        seed = options.pop("seed", None)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        expected = reference(
            model,
            prompt,
            request.max_tokens,
            **options,
            generator=generator,
            allowed=request.grammar().allowed,
            ignore_eos=False,
            eos_id=EOS,
        )
        assert list(output.outputs[0].token_ids) == expected, request


def test_batches_with_and_without_grammars(llm: LLM, family: str) -> None:
    """Other requests, including those with penalties or traces, change no request's tokens."""
    rng, guided = random.Random(1), family == "llada"
    constrained = fixed_requests(family)[2:10]
    free = rng.sample(greedy_cases(3, VOCAB) + drawn_cases(4, VOCAB, guided), 4)
    free += rng.sample(constrained_cases(5, VOCAB, MASK, guided), 6)
    params = [*(r.sampling() for r in constrained), *(case.sampling() for case in free)]
    prompts = [*prompts_for(constrained), *(case.prompt for case in free)]
    alone = [generate(llm, [p], [s])[0] for p, s in zip(prompts, params, strict=True)]
    order = random.Random(2).sample(range(len(params)), len(params))
    for traced in order[::2]:
        params[traced].extra_args = {**(params[traced].extra_args or {}), "diffusion_trace": 1}
    together = generate(llm, [prompts[i] for i in order], [params[i] for i in order])
    assert together == [alone[i] for i in order]
    assert pool_is_whole(llm)


def add_all(llm: LLM, requests: list[Wanted]) -> None:
    """Add requests, named by their numbers."""
    for number, (prompt, request) in enumerate(zip(prompts_for(requests), requests, strict=True)):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, request.sampling())


def step_until_idle(llm: LLM) -> dict[str, RequestOutput]:
    """Run all requests to their ends; return their outputs by name."""
    finished = {}
    while llm.llm_engine.has_unfinished_requests():
        finished |= {o.request_id: o for o in llm.llm_engine.step() if o.finished}
    return finished


@pytest.mark.parametrize("after", [1, 6])
def test_a_preempted_request_repeats_its_tokens(llm: LLM, family: str, after: int) -> None:
    requests = fixed_requests(family)[:6]
    prompts = prompts_for(requests)
    expected = generate(llm, prompts, [request.sampling() for request in requests])
    engine = llm.llm_engine
    add_all(llm, requests)
    finished = {}
    while engine.has_unfinished_requests() and after:
        outputs = engine.step()
        finished |= {o.request_id: o for o in outputs if o.finished}
        after -= any(o.outputs[0].token_ids for o in outputs)
    assert scheduler_of(llm).reset_prefix_cache(reset_running_requests=True)
    finished |= step_until_idle(llm)
    tokens = [list(finished[str(n)].outputs[0].token_ids) for n in range(len(requests))]
    assert tokens == expected


def test_a_stream_is_a_token_a_step(llm: LLM) -> None:
    request = Wanted("json", SCHEMA, 40)
    [whole] = answer(llm, [PROMPTS[0]], [request.sampling()])
    params = request.sampling(output_kind=RequestOutputKind.DELTA)
    llm.llm_engine.add_request("r", {"prompt_token_ids": PROMPTS[0]}, params)
    pieces = []
    while llm.llm_engine.has_unfinished_requests():
        pieces += [output.outputs[0] for output in llm.llm_engine.step()]
    assert all(len(piece.token_ids) == 1 for piece in pieces)
    assert "".join(piece.text for piece in pieces) == whole.outputs[0].text


def test_several_answers_scored(llm: LLM) -> None:
    request = Wanted("regex", "[a-z]{4,8}", 12, {"temperature": 2.0, "seed": 3})
    [output] = answer(llm, [PROMPTS[1]], [request.sampling(n=4, logprobs=2)])
    request.check(output)
    assert len({one.text for one in output.outputs}) > 1
    for one in output.outputs:
        assert one.logprobs is not None and len(one.logprobs) == len(one.token_ids)
        # They are the model's log-probabilities, from before the grammar is applied.
        assert all(token in at for token, at in zip(one.token_ids, one.logprobs, strict=True))
        assert min(at[t].logprob for t, at in zip(one.token_ids, one.logprobs, strict=True)) < -1


def test_a_stop_token_ends_an_answer_only_where_it_may_end(llm: LLM) -> None:
    [letter] = llm.get_tokenizer().encode("a", add_special_tokens=False)
    request = Wanted("regex", "[ab]{6}a?", 20, {"temperature": 1.0, "seed": 1})
    for seed in range(4):
        params = request.sampling(stop_token_ids=[letter], seed=seed)
        [output] = answer(llm, [PROMPTS[0]], [params])
        assert regex.fullmatch("[ab]{6}", output.outputs[0].text)


def test_a_stop_token_that_the_grammar_needs_cuts_there(llm: LLM) -> None:
    """Text goes on while the grammar allows others than stop tokens, and ends when it does not."""
    tokenizer = llm.get_tokenizer()
    ordinary = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    without_b = {i for i in ordinary if "b" not in tokenizer.decode([i])}
    params = Wanted("regex", "b{3}a{3}", 20).sampling(stop_token_ids=sorted(without_b))
    [output] = answer(llm, [PROMPTS[0]], [params])
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].stop_reason in without_b
    assert regex.fullmatch("b{3}a{0,3}", output.outputs[0].text)


def test_a_stop_string_cuts_where_it_says(llm: LLM) -> None:
    request = Wanted("regex", "(ab){8}", 20)
    [output] = answer(llm, [PROMPTS[0]], [request.sampling(stop=["bab"])])
    assert output.outputs[0].text == "a" and output.outputs[0].stop_reason == "bab"


@pytest.mark.parametrize(
    ("structured", "options", "message"),
    [
        ({"regex": "("}, {}, "unclosed group"),
        ({"json": {"not": {}}}, {}, r'Unimplemented keys: \["not"\]'),
        ({"json": {"type": "array", "uniqueItems": True}}, {}, "uniqueItems"),
        ({"json": "{"}, {}, "(?i)invalid"),
        (
            {"json": json.dumps({"type": "integer", "minimum": 10**40, "maximum": 10**41})},
            {},
            "minimum in .* got 1000",
        ),
        (
            {"json": {"type": "integer", "minimum": 10**40, "maximum": 10**41}},
            {},
            r"structured_outputs must hold integers from -2\*\*63",
        ),
        (
            {"json": {"properties": {"enum": {"type": "integer", "minimum": 10**17 + 1}}}},
            {},
            "minimum in .* got 100000000000000001",
        ),
        ({"json": {"const": 2**53 + 2}}, {}, "const in .* got 9007199254740994"),
        ({"json": {"enum": ["a", {"b": [2**60]}]}}, {}, "enum in .* got 1152921504606846976"),
        (
            {"json": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}},
            {},
            "exclusiveMinimum in .* no whole number .* got 0",
        ),
        (
            {"json": {"allOf": [{"exclusiveMaximum": -1}, {"minimum": -1.5}], "type": "number"}},
            {},
            "exclusiveMaximum in .* got -1",
        ),
        (
            {"json": {"type": "object", "minProperties": 2}},
            {},
            "minProperties .* at most 1.* got 2",
        ),
        ({"json": {"x-guidance": {"lenient": True}}}, {}, "x-guidance in .* must not be set"),
        ({"json": '{"items": {"type": "integer", "maximum": 1e30}}'}, {}, r"maximum .* got 1e\+30"),
        ({"choice": []}, {}, "empty list"),
        ({"grammar": "root ::= ("}, {}, "(?i)grammar"),
        ({"grammar": " "}, {}, "empty"),
        ({"regex": "a"}, {"diffusion_threshold": 0.9}, "diffusion_threshold must be null.*0.9"),
        ({"regex": "a"}, {"diffusion_factor": 1.0}, "diffusion_factor must be null"),
        ({"regex": "a"}, {"diffusion_steps": 99}, "diffusion_steps must be null.*99"),
        ({"regex": "a"}, {"diffusion_remasking": "random"}, "diffusion_remasking must be null"),
        ({"regex": "a"}, {"diffusion_alg_temp": 0.5}, "diffusion_alg_temp must be 0.0.*0.5"),
        ({"regex": "a"}, {"diffusion_canvas": [7, MASK]}, "diffusion_canvas must not be set"),
        ({"regex": "a"}, {"ignore_eos": True}, "ignore_eos must be False"),
        ({"regex": "a"}, {"min_tokens": 3}, "min_tokens must be 0.*3"),
        (
            {"regex": "a"},
            {"allowed_token_ids": [500, 501]},
            r"allowed_token_ids must hold a token that ends the text .*, got \[500, 501\]",
        ),
        ({"regex": "a"}, {"bad_words": ["<|endoftext|>"]}, r"bad_words must leave .* \[1\]\), got"),
        ({"structural_tag": "{}"}, {}, "structural_tag must be an object .* got {}"),
        ({"regex": "a", "whitespace_pattern": " "}, {}, r"structured_outputs\.whitespace_pattern"),
        ({"regex": "a", "disable_any_whitespace": True}, {}, "disable_any_whitespace must be"),
    ],
)
def test_refusals(
    llm: LLM, family: str, structured: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    if family == "dream" and "bad_words" in options:
        pytest.skip("its checkpoint has a second end of text, which no word names")
    params = StructuredOutputsParams(**structured)
    with pytest.raises(Exception, match=message) as caught:
        generate(
            llm,
            [PROMPTS[0]],
            [sampling(8, structured_outputs=params, **{"ignore_eos": False, **options})],
        )
    # An error of this class is answered with 400 by the server.
    assert any(kind.__name__ == "VLLMValidationError" for kind in type(caught.value).__mro__)
    assert pool_is_whole(llm)


def test_numbers_that_are_no_bounds(llm: LLM) -> None:
    """Names of properties, and data, are not checked as bounds."""
    schema = {"properties": {"maximum": {"const": {"maximum": 10**9}}}, "type": "object"}
    assert generate(llm, [PROMPTS[0]], [Wanted("json", schema, 4).sampling()])[0]


def test_settings_that_ask_for_nothing_are_accepted(llm: LLM) -> None:
    neutral = {"threshold": "none", "steps": None, "factor": None, "alg_temp": 0}
    plain, same = Wanted("regex", "[a-z]{5}"), Wanted("regex", "[a-z]{5}", options=neutral)
    [first, second] = generate(llm, [PROMPTS[0]] * 2, [plain.sampling(), same.sampling()])
    assert first == second


def run_beside_others(llm: LLM, params: SamplingParams) -> RequestOutput:
    """Run a request that fails, and others at the same time, which must not; return its output."""
    others = [Wanted("json", SCHEMA, 30), Wanted("choice", ["one", "two"], 9)]
    free = Case([9] * 30, 24, {"cache_policy": "sparse"})
    other_params = [*(other.sampling() for other in others), free.sampling()]
    other_prompts = [*prompts_for(others), free.prompt]
    expected = generate(llm, other_prompts, other_params)
    for number, (prompt, own) in enumerate(zip(other_prompts, other_params, strict=True)):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, own)
    llm.llm_engine.add_request("bad", {"prompt_token_ids": PROMPTS[0]}, params)
    finished = step_until_idle(llm)
    tokens = [list(finished[str(n)].outputs[0].token_ids) for n in range(len(expected))]
    assert tokens == expected
    assert pool_is_whole(llm)
    return finished["bad"]


@pytest.mark.parametrize("allowed", [[], [MASK]])
def test_a_grammar_that_allows_nothing_fails_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, allowed: list[int]
) -> None:
    manager = scheduler_of(llm).structured_output_manager
    original = manager._create_grammar

    def create(request: Any) -> Any:
        grammar = original(request)
        if request.sampling_params.structured_outputs.regex != "[abc]+":
            return grammar

        def fill(bitmask: torch.Tensor, index: int) -> None:
            row = np.zeros(32 * bitmask.shape[1], dtype=np.uint8)
            row[allowed] = 1
            bitmask[index] = torch.from_numpy(np.packbits(row, bitorder="little").view(np.int32))

        monkeypatch.setattr(grammar, "fill_bitmask", fill)
        return grammar

    monkeypatch.setattr(manager, "_create_grammar", create)
    output = run_beside_others(llm, Wanted("regex", "[abc]+").sampling())
    assert output.outputs[0].finish_reason == "error" and not output.outputs[0].token_ids


def test_constraints_that_leave_nothing_fail_their_request_alone(llm: LLM) -> None:
    """The request fails at once, or after the tokens that could be written."""
    [letter] = llm.get_tokenizer().encode("c", add_special_tokens=False)
    failures = scheduler_of(llm).figures.failures
    for options, written in (
        ({"allowed_token_ids": [500, 501, EOS]}, 0),
        ({"allowed_token_ids": [letter, EOS], "bad_words": ["zz"]}, 2),
    ):
        before = failures.get("grammar", 0)
        output = run_beside_others(llm, Wanted("regex", "[cd]{2}[ab]+").sampling(**options))
        [answer] = output.outputs
        assert answer.finish_reason == "error" and list(answer.token_ids) == [letter] * written
        names = " and ".join(options)
        assert str(answer.stop_reason).startswith(f"{names} must leave one of the tokens")
        assert str(answer.stop_reason).endswith(f"none at position {written} of the response")
        assert failures == {"grammar": before + 1}


@pytest.mark.parametrize("name", ["<|startoftext|>", "<|mask|>"])
def test_the_name_of_a_special_token_is_no_text(llm: LLM, name: str) -> None:
    """llguidance allows only the special token itself, which the text would not show: an error."""
    output = run_beside_others(llm, Wanted("choice", [name]).sampling())
    [answer] = output.outputs
    assert answer.finish_reason == "error" and not answer.token_ids
    assert "structured_outputs allows no token at position 0" in str(answer.stop_reason)


def test_a_grammar_that_its_backend_cannot_follow_says_so(llm: LLM) -> None:
    output = run_beside_others(llm, Wanted("grammar", "start: <no_such_token>").sampling())
    assert output.outputs[0].finish_reason == "error"
    assert "unknown special token" in str(output.outputs[0].stop_reason)


def test_logits_that_are_not_finite_are_not_the_grammars_fault(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    spoilt = lambda hidden: torch.full((len(hidden), VOCAB), torch.nan)  # noqa: E731
    monkeypatch.setattr(model, "compute_logits", spoilt)
    [output] = answer(llm, [PROMPTS[0]], [Wanted("regex", "[abc]+").sampling()])
    assert output.outputs[0].finish_reason == "error"
    # With a reason, the server would answer 400, as if the request were at fault.
    assert output.outputs[0].stop_reason is None
    assert pool_is_whole(llm)


def test_a_schema_holds_between_tags(llm: LLM) -> None:
    """The trigger looks like a special token but is none, and comes up often in the text."""
    tokenizer = llm.get_tokenizer()
    letters = {letter: tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "<n>/7"}
    structures = [{"begin": "<n>", "schema": {"type": "integer", "maximum": 99}, "end": "</n>"}]
    tag = json.dumps({"triggers": ["<n>"], "structures": structures})
    params = [
        Wanted("structural_tag", tag, 60).sampling(
            allowed_token_ids=[EOS, *letters.values()],
            # Makes these three come up about equally often.
            logit_bias={EOS: -100.0} | {letters[letter]: 50.0 for letter in "<n>"},
            frequency_penalty=2.0,
            temperature=2.0,
            seed=seed,
        )
        for seed in range(8)
    ]
    texts = [output.outputs[0].text for output in answer(llm, [PROMPTS[0]] * 8, params)]
    for text in texts:
        assert regex.fullmatch(r"((?!<n>).)*(<n>7{1,2}</n>((?!<n>).)*)*", text, partial=True), text
    assert any("</n>" in text for text in texts)
    assert pool_is_whole(llm)


def test_constraints_and_a_grammar_hold_together(llm: LLM) -> None:
    encode = llm.get_tokenizer().encode
    ids = [encode(letter, add_special_tokens=False)[0] for letter in "acdz"]
    params = Wanted("regex", "[abc]{9}", 20).sampling(
        allowed_token_ids=[EOS, *ids], bad_words=["a"], logit_bias={ids[3]: 100.0}
    )
    [output] = answer(llm, [PROMPTS[0]], [params])
    assert output.outputs[0].text == "c" * 9


def test_a_grammar_that_does_not_compile_fails_its_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is one that the front end does not find."""
    backend = scheduler_of(llm).structured_output_manager.backend
    original = backend.compile_grammar

    def compile_grammar(kind: Any, text: str, **options: Any) -> Any:
        if text == "[abc]+":
            raise ValueError("too large")
        return original(kind, text, **options)

    monkeypatch.setattr(backend, "compile_grammar", compile_grammar)
    output = run_beside_others(llm, Wanted("regex", "[abc]+").sampling())
    assert output.outputs[0].finish_reason == "error"
    assert "backend can follow: too large" in str(output.outputs[0].stop_reason)


@pytest.mark.parametrize("aborted", [False, True])
def test_a_slow_grammar_is_overtaken(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, aborted: bool
) -> None:
    manager = scheduler_of(llm).structured_output_manager
    original, go_on = manager._create_grammar, threading.Event()

    def create(request: Any) -> Any:
        go_on.wait(60)
        return original(request)

    slow, free = Wanted("regex", "[xy]{3}"), Case([9] * 30, 24)
    [expected] = generate(llm, [free.prompt], [free.sampling()])
    monkeypatch.setattr(manager, "_create_grammar", create)
    engine = llm.llm_engine
    engine.add_request("slow", {"prompt_token_ids": PROMPTS[0]}, slow.sampling())
    engine.add_request("free", {"prompt_token_ids": free.prompt}, free.sampling())
    finished: dict[str, RequestOutput] = {}
    while "free" not in finished:
        finished |= {o.request_id: o for o in engine.step() if o.finished}
    assert list(finished) == ["free"]
    assert list(finished["free"].outputs[0].token_ids) == expected
    if aborted:
        engine.abort_request(["slow"])
    go_on.set()
    finished |= step_until_idle(llm)
    engine.step()
    assert ("slow" in finished) != aborted
    if not aborted:
        slow.check(finished["slow"])
    assert pool_is_whole(llm)


@pytest.mark.parametrize("after", [0, 1, 5, 12])
def test_an_abort_returns_pages(llm: LLM, family: str, after: int) -> None:
    requests = fixed_requests(family)[:8]
    prompts = prompts_for(requests)
    expected = generate(llm, prompts, [request.sampling() for request in requests])
    engine = llm.llm_engine
    add_all(llm, requests)
    finished = {}
    for _ in range(after):
        finished |= {o.request_id: o for o in engine.step() if o.finished}
    engine.abort_request(["0", "3", "5"])
    finished |= step_until_idle(llm)
    engine.step()
    for number in (1, 2, 4, 6, 7):
        assert list(finished[str(number)].outputs[0].token_ids) == expected[number]
    assert pool_is_whole(llm)


# Last: these start engines of their own, which ends the one that the tests above share.
def test_without_a_tokenizer_it_is_refused() -> None:
    with running_engine(TINY) as llm, pytest.raises(Exception, match="requires a tokenizer"):
        generate(llm, [PROMPTS[0]], [Wanted("regex", "a").sampling(detokenize=False)])


@pytest.mark.parametrize("backend", ["xgrammar", "outlines"])
def test_other_backends(backend: str) -> None:
    """Users may choose them; engine settings for the order of commits are then ignored, too."""
    with running_engine(
        TINY,
        skip_tokenizer_init=False,
        structured_outputs_config={"backend": backend},
        additional_config={"sparse_dllm": {"threshold": 0.5, "remasking": "random"}},
    ) as llm:
        requests = [
            Wanted("choice", ["yes", "no"]),
            Wanted("regex", "[<|>a-z]{15}", 20),
            # With these backends, the name of a special token is ordinary text.
            *(
                Wanted("regex", "[<|>a-z]{15}", 20, {"temperature": 2.0, "seed": seed})
                for seed in range(6)
            ),
            Wanted("choice", ["<|mask|>"]),
        ]
        outputs = answer(llm, prompts_for(requests), [request.sampling() for request in requests])
        for request, output in zip(requests, outputs, strict=True):
            request.check(output)
        assert pool_is_whole(llm)
