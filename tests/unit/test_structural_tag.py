# SPDX-License-Identifier: Apache-2.0
"""What a structural tag allows once written out for llguidance, and which tags are refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import llguidance
import llguidance.hf
import pytest
from transformers import AutoTokenizer
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.e2e.server import tiny_llada
from vllm_sparse_dllm.frontend.structural_tag import write_out

NUMBER = {"type": "integer"}
USER = "<|user|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_llada())


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> Any:
    return llguidance.hf.from_tokenizer(tokenizer, len(tokenizer))


def tag(begin: str, schema: Any = NUMBER, end: str = "") -> dict[str, Any]:
    return {"begin": begin, "schema": schema, "end": end}


def given(triggers: Any, *structures: Any, **sampling: Any) -> SamplingParams:
    text = json.dumps({"triggers": triggers, "structures": list(structures)})
    structured = StructuredOutputsParams(structural_tag=text)
    return SamplingParams(structured_outputs=structured, **sampling)


def config(backend: str = "guidance", **options: Any) -> Any:
    defaults = {"disable_any_whitespace": False, "disable_additional_properties": False}
    return SimpleNamespace(backend=backend, **{**defaults, **options})


def grammar(params: SamplingParams, tokenizer: Any, **options: Any) -> str:
    structured = write_out(params, config(**options), tokenizer).structured_outputs
    assert structured is not None and structured.structural_tag is None
    assert structured.grammar is not None
    return structured.grammar


def accepts(tokenizer: Any, tokens: Any, text: str, params: SamplingParams, **options: Any) -> bool:
    """Return whether a complete text, with special tokens encoded as such, is allowed."""
    written = llguidance.grammar_from("grammar", grammar(params, tokenizer, **options))
    matcher = llguidance.LLMatcher(tokens, written, log_level=0)
    assert not matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


ONE = (["<n>"], tag("<n>", end="</n>"))
TWO = (["<f", '"é\n'], tag("<fa>"), tag("<fb>", {"type": "boolean"}, "🙂"), tag('"é\n\\'))


@pytest.mark.parametrize(
    ("tags", "text", "allowed"),
    [
        (ONE, "", True),
        (ONE, "no tag,\nbut </n>", True),
        (ONE, "<n", True),
        (ONE, "<n>12</n>", True),
        (ONE, "a<n>-3</n><n>4</n>b", True),
        (ONE, '<n>"x"</n>', False),
        (ONE, '<n>{"a":1}</n>', False),
        (ONE, "a<n>12", False),
        (ONE, "<n>1</n><n>", False),
        (TWO, "<fa>12 <fb>true🙂 <f", False),
        (TWO, "<fa>12 <fb>true🙂 f", True),
        (TWO, "<fb>12", False),
        (TWO, "<fc", False),
        (TWO, '"é\n\\7', True),
        (TWO, '"é\n7', False),
    ],
)
def test_a_trigger_commits_to_its_tag(
    tokenizer: Any, tokens: Any, tags: Any, text: str, allowed: bool
) -> None:
    assert accepts(tokenizer, tokens, text, given(*tags)) is allowed


def test_a_special_token_may_be_a_trigger(tokenizer: Any, tokens: Any) -> None:
    """If special tokens are shown, the token itself is the trigger, but not its text."""
    params = given([USER], tag(f"{USER}n="), skip_special_tokens=False)
    assert accepts(tokenizer, tokens, f"a{USER}n=12", params)
    assert not accepts(tokenizer, tokens, f"a{USER}n=x", params)
    assert accepts(tokenizer, tokens, "<|user", params)
    with pytest.raises(ValueError, match=r"no special tokens unless skip_special_tokens.*<\|user"):
        write_out(given([USER], tag(USER)), config(), tokenizer)


def test_options_of_the_engine_hold(tokenizer: Any, tokens: Any) -> None:
    params = given(["#"], tag("#", {"type": "object", "properties": {"a": NUMBER}}))
    spaced, more = '#{"a": 1}', '#{"a":1,"b":2}'
    for text in (spaced, more):
        assert accepts(tokenizer, tokens, text, params)
    assert not accepts(tokenizer, tokens, spaced, params, disable_any_whitespace=True)
    assert not accepts(tokenizer, tokens, more, params, disable_additional_properties=True)


def test_what_is_left_as_it_is(tokenizer: Any) -> None:
    params = given(*ONE)
    before = str(params)
    assert write_out(params, config("xgrammar"), tokenizer) is params
    assert write_out(params, config(), None) is params
    for other in (None, StructuredOutputsParams(regex="a")):
        plain = SamplingParams(structured_outputs=other)
        assert write_out(plain, config(), tokenizer) is plain
    assert write_out(params, config(), tokenizer) is not params
    assert str(params) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON"),
        ("7", "must be an object with structures and triggers .* got 7"),
        ('{"type": "structural_tag", "format": {}}', "an object with structures and triggers"),
        ('{"triggers": [], "structures": [1]}', r"triggers .* list of strings, none empty.*\[\]"),
        ('{"triggers": [""], "structures": [1]}', "triggers .* none empty"),
        ('{"triggers": "ab", "structures": [1]}', "triggers .* list"),
        ('{"triggers": ["a"], "structures": []}', "structures .* not empty"),
        ('{"triggers": ["a"], "structures": [{"begin": "a", "end": ""}]}', "object schema"),
        (json.dumps({"triggers": ["a"], "structures": [tag("a", True)]}), "object schema"),
        (json.dumps({"triggers": ["a"], "structures": [tag("ba")]}), "begin .* 'ba'"),
        (
            json.dumps({"triggers": ["a"], "structures": [tag("a", {"maximum": 1e20})]}),
            "maximum in structured_outputs.structural_tag",
        ),
        (
            json.dumps({"triggers": ["a"], "structures": [tag("a", {"x-guidance": {}})]}),
            "x-guidance in structured_outputs.structural_tag",
        ),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_refusals(tokenizer: Any, text: str, message: str) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(structural_tag=text))
    with pytest.raises(Exception, match=message):
        write_out(params, config(), tokenizer)
