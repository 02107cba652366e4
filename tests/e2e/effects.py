# SPDX-License-Identifier: Apache-2.0
"""Checks over HTTP that parameters have the effect that docs/parameters.md says in its table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.e2e.questions import UNSURE
from tests.e2e.server import Server

Fragment = dict[str, Any]
Answer = dict[str, Any]

BASE: dict[str, Fragment] = {
    "completions": {"prompt": [77, 311, 316]},
    "chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}
#: The chat template of the server that rows are tried on; it prints the variables it is given.
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{{ x }}{{ reasoning_effort }}{% if tools %}{{ tools }}{% endif %}"
    "{% if documents %}{{ documents }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Row:
    """A row of the table, to be tried on one endpoint.

    Attributes:
        server: The server to ask; its chat template is `TEMPLATE`.
        path: The endpoint.
        name: The field that the row is about.
        fragment: Fields added to a request: this one, and those that make its effect visible.
    """

    server: Server
    path: str
    name: str
    fragment: Fragment

    def body(self, **changes: Any) -> Fragment:
        """Return the request; fields that are changed to None are left out."""
        base = {"max_tokens": 12, "return_token_ids": True, **BASE[self.path]}
        given = {**base, **self.fragment, **changes}
        return {name: value for name, value in given.items() if value is not None}

    def answer(self, **changes: Any) -> Answer:
        return self.server.answer(self.path, **self.body(**changes))

    def refusal(self, **changes: Any) -> str:
        """Return the message of the request's refusal, empty if it is accepted."""
        response = self.server.post(self.path, **self.body(**changes))
        return response.json()["error"]["message"] if response.status_code == 400 else ""

    def without(self) -> Answer:
        """Return the answer to the request without the field, or with its value in `BASE`."""
        return self.answer(**{self.name: BASE[self.path].get(self.name)})

    @property
    def choice(self) -> Answer:
        return self.answer()["choices"][0]

    @property
    def tokens(self) -> list[int]:
        return self.choice["token_ids"]

    @property
    def text(self) -> str:
        return text_of(self.choice)

    def parts(self, **changes: Any) -> list[Answer]:
        """Return the chunks of the streamed answer."""
        with self.server.streamed(self.path, **self.body(**changes)) as parts:
            return list(parts)

    def pieces(self, **changes: Any) -> list[str]:
        """Return the texts of the streamed answer."""
        choices = [part["choices"][0] for part in self.parts(**changes) if part["choices"]]
        return [text for text in map(text_of, choices) if text]


def text_of(choice: Answer) -> str:
    if "text" in choice:
        return choice["text"]
    return (choice.get("message") or choice.get("delta") or {}).get("content") or ""


def told(answer: Answer) -> Any:
    """Return the parts of an answer that depend only on the prompt and the response."""
    names = ("token_ids", "prompt_token_ids", "finish_reason", "stop_reason", "logprobs")
    choices = [(text_of(c), *(c.get(name) for name in names)) for c in answer["choices"]]
    return choices, answer.get("prompt_token_ids"), answer.get("prompt_text")


def changes(row: Row) -> bool:
    return told(row.answer()) != told(row.without())


def changes_nothing(row: Row) -> bool:
    return told(row.answer()) == told(row.without())


def is_accepted(row: Row) -> bool:
    """Check only that the request is answered: this model or module cannot show the effect."""
    return bool(row.answer()["choices"])


@dataclass(frozen=True)
class Effect:
    """How to try a row.

    Attributes:
        fragment: Fields added to a request.
        shown: Returns whether the answers show the effect.
    """

    fragment: Fragment
    shown: Callable[[Row], bool] = field(default=changes)


def _tool(name: str) -> Fragment:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def _ends_early(row: Row) -> bool:
    """Return whether the response ends early, because of a repetition."""
    return row.choice["finish_reason"] == "repetition" and len(row.tokens) < 12


def _seed(row: Row) -> bool:
    first, again, other = (told(row.answer(seed=seed)) for seed in (7, 7, 8))
    return first == again != other


def _scores(row: Row) -> bool:
    return row.choice["logprobs"] is not None and row.without()["choices"][0]["logprobs"] is None


def _calls(answer: Answer) -> list[str]:
    calls = answer["choices"][0]["message"].get("tool_calls") or []
    return [call["function"]["name"] for call in calls]


#: Varied tokens are drawn: a penalty keeps the surest one from coming up again and again.
DRAWN: Fragment = {"temperature": 2.0, "seed": 1, "frequency_penalty": 2.0, "max_tokens": 60}
DRAWN |= UNSURE
#: The response is one token, over and over.
FORCED: Fragment = {"logit_bias": {"500": 100}}
ENDED: Fragment = {"logit_bias": {"1": 100}}
#: A text of which each step commits a letter, or a few.
SPELLED: Fragment = {"structured_outputs": {"choice": ["a.b.c.d.e"]}}

#: Rows of both endpoints.
EFFECTS: dict[str, Effect] = {
    "n": Effect({"n": 2, **DRAWN}, lambda row: len(row.answer()["choices"]) == 2),
    "temperature": Effect(DRAWN),
    "top_p": Effect({"top_p": 1e-6, **DRAWN}),
    "top_k": Effect({"top_k": 1, **DRAWN}),
    "min_p": Effect({"min_p": 1.0, **DRAWN}),
    "seed": Effect(DRAWN, _seed),
    "max_tokens": Effect({"max_tokens": 3, "ignore_eos": True}, lambda row: len(row.tokens) == 3),
    "max_completion_tokens": Effect(
        {"max_completion_tokens": 3, "max_tokens": None, "ignore_eos": True},
        lambda row: len(row.tokens) == 3,
    ),
    "min_tokens": Effect(
        {"min_tokens": 3, **ENDED},
        lambda row: len(row.tokens) == 4 and row.without()["usage"]["completion_tokens"] == 1,
    ),
    "stop": Effect(
        {"stop": ["d", "x"], **SPELLED},
        lambda row: (row.text, row.choice["stop_reason"]) == ("a.b.c.", "d"),
    ),
    "stop_token_ids": Effect(
        {"stop_token_ids": [500, 7], **FORCED},
        lambda row: (row.tokens, row.choice["stop_reason"]) == ([500], 500),
    ),
    "ignore_eos": Effect(
        {"ignore_eos": True, **ENDED},
        lambda row: len(row.tokens) == 12 and row.without()["usage"]["completion_tokens"] == 1,
    ),
    "logit_bias": Effect(FORCED, lambda row: row.tokens == [500] * 12),
    # The model cannot favour both letters, so without the effect one of these would fail.
    "bad_words": Effect(
        {"bad_words": ["q"], "structured_outputs": {"regex": "[qz]{4}"}},
        lambda row: (
            row.text == "zzzz" and text_of(row.answer(bad_words=["z"])["choices"][0]) == "qqqq"
        ),
    ),
    "allowed_token_ids": Effect(
        {"allowed_token_ids": [7, 8, 9]}, lambda row: set(row.tokens) <= {7, 8, 9}
    ),
    "structured_outputs": Effect(SPELLED, lambda row: row.text == "a.b.c.d.e"),
    "response_format": Effect(
        {"response_format": {"type": "json_object"}}, lambda row: row.text.startswith("{")
    ),
    "presence_penalty": Effect(
        {"presence_penalty": 2.0, "frequency_penalty": 2.0, "max_tokens": 60, **UNSURE}
    ),
    "frequency_penalty": Effect({"frequency_penalty": 2.0, **UNSURE}),
    "repetition_penalty": Effect({"repetition_penalty": 50.0, **UNSURE}),
    "return_tokens_as_token_ids": Effect(
        {"return_tokens_as_token_ids": True, "logprobs": True},
        lambda row: (
            "token_id:" in json.dumps(row.choice["logprobs"])
            and "token_id:" not in json.dumps(row.without())
        ),
    ),
    "return_token_ids": Effect(
        {"return_token_ids": True},
        lambda row: bool(row.tokens) and row.without()["choices"][0]["token_ids"] is None,
    ),
    "return_prompt_text": Effect(
        {"return_prompt_text": True},
        lambda row: "hello" in row.answer()["prompt_text"] and not row.without()["prompt_text"],
    ),
    "skip_special_tokens": Effect({"skip_special_tokens": False, "logit_bias": {"3": 100}}),
    # These tokenizers put no spaces between special tokens.
    "spaces_between_special_tokens": Effect({"spaces_between_special_tokens": False}, is_accepted),
    "include_stop_str_in_output": Effect(
        {"include_stop_str_in_output": True, "stop": ["d"], **SPELLED},
        lambda row: row.text == "a.b.c.d",
    ),
    "stream": Effect(
        SPELLED, lambda row: len(row.pieces()) > 3 and "".join(row.pieces()) == row.text
    ),
    "stream_options": Effect(
        {"stream_options": {"include_usage": True}},
        lambda row: (
            row.parts()[-1]["usage"]["completion_tokens"] > 0
            and not row.parts(stream_options=None)[-1].get("usage")
        ),
    ),
    "stream_interval": Effect(
        {"stream_interval": 5, **SPELLED},
        lambda row: 1 < len(row.pieces()) < len(row.pieces(stream_interval=None)),
    ),
    "repetition_detection": Effect(
        {
            "repetition_detection": {"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 2},
            **FORCED,
        },
        _ends_early,
    ),
    "vllm_xargs": Effect(
        {"vllm_xargs": {"diffusion_steps": 2, "diffusion_trace": 1}, "ignore_eos": True},
        lambda row: row.choice["diffusion_trace"]["nfe"] == 2,
    ),
    "model": Effect(
        {"model": "tiny"},
        lambda row: (
            row.server.post(row.path, **row.body(model="absent")).status_code == 404
            and is_accepted(row)
        ),
    ),
    "prompt": Effect(
        {"prompt": [[7, 8], [9]]},
        lambda row: [c["prompt_token_ids"] for c in row.answer()["choices"]] == [[7, 8], [9]],
    ),
    "messages": Effect({"messages": [{"role": "user", "content": "a"}]}),
    # The embedded tokenizer has no special tokens to add.
    "add_special_tokens": Effect({"add_special_tokens": False}, is_accepted),
    "truncate_prompt_tokens": Effect({"truncate_prompt_tokens": 2}),
    "truncation_side": Effect({"truncation_side": "right", "truncate_prompt_tokens": 2}),
    "add_generation_prompt": Effect({"add_generation_prompt": False}),
    "continue_final_message": Effect(
        {"continue_final_message": True, "add_generation_prompt": False}
    ),
    "chat_template_kwargs": Effect({"chat_template_kwargs": {"x": " name"}}),
    "documents": Effect({"documents": [{"title": "a", "text": "b"}]}),
    "tools": Effect({"tools": [_tool("f")], "tool_choice": "none"}),
    "tool_choice": Effect(
        {"tools": [_tool("f"), _tool("g")], "tool_choice": "none"},
        # A forced call asks for a structural tag that only the backend xgrammar knows.
        lambda row: (
            not _calls(row.answer())
            and "structural_tag" in row.refusal(tool_choice=_choice("g"), max_tokens=30)
        ),
    ),
    # These models make at most one call in any case, and do not reason.
    "parallel_tool_calls": Effect({"parallel_tool_calls": False}, is_accepted),
    "include_reasoning": Effect({"include_reasoning": False}, is_accepted),
    "reasoning_effort": Effect({"reasoning_effort": "low"}),
    # `test_waiting_requests_run_by_priority` shows the effect.
    "priority": Effect({"priority": 3}, is_accepted),
    "request_id": Effect({"request_id": "mine"}, lambda row: row.answer()["id"].endswith("-mine")),
    **{
        name: Effect({name: value}, changes_nothing)
        for name, value in {
            "session_id": "mine",
            "user": "me",
            "cache_salt": "salt",
            "length_penalty": 1.5,
            "media_io_kwargs": {},
            "mm_processor_kwargs": {},
            "mm_payload": "none",
            "return_mm_kwargs": True,
            "return_token_offsets": True,
        }.items()
    },
}
#: As `EFFECTS`, for fields that differ between the two endpoints.
EFFECTS_COMPLETION: dict[str, Effect] = {
    "logprobs": Effect(
        {"logprobs": 2},
        lambda row: _scores(row) and len(row.choice["logprobs"]["top_logprobs"][0]) >= 2,
    ),
    # vLLM omits the prompt's text where it returns the prompt's ids.
    "echo": Effect(
        {"echo": True, "prompt": " file", "return_token_ids": None},
        lambda row: row.text == " file" + text_of(row.without()["choices"][0]),
    ),
}
EFFECTS_CHAT: dict[str, Effect] = {
    "logprobs": Effect({"logprobs": True}, _scores),
    "top_logprobs": Effect(
        {"logprobs": True, "top_logprobs": 2},
        lambda row: len(row.choice["logprobs"]["content"][0]["top_logprobs"]) == 2,
    ),
}


def _choice(name: str) -> Fragment:
    return {"type": "function", "function": {"name": name}}
