# SPDX-License-Identifier: Apache-2.0
"""A server with engine settings, one request at a time and priorities; all request parameters."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.effects import (
    BASE,
    EFFECTS,
    EFFECTS_CHAT,
    EFFECTS_COMPLETION,
    TEMPLATE,
    Effect,
    Row,
    changes_nothing,
    is_accepted,
)
from tests.e2e.parameters import REFUSED, REFUSED_CHAT, REFUSED_COMPLETION
from tests.e2e.questions import UNSURE
from tests.e2e.server import Server, poll, running_server, tiny_llada
from tests.reference import load
from tests.unit.test_readme import PARAMETERS, code, table

PROMPT = [77, 311, 316]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs one request at a time, the lowest priority value first."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "template.jinja").write_text(TEMPLATE)
    settings = {"sparse_dllm": {"default_response_length": 40, "cache_policy": "dual"}}
    options = ["--additional-config", json.dumps(settings), "--max-num-seqs", "1"]
    options += ["--scheduling-policy", "priority"]
    options += ["--chat-template", str(folder / "template.jinja")]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with running_server(folder / "server.log", tiny_llada(), *options) as started:
        yield started


def test_default_length_is_a_setting(server: Server) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = server.answer("chat/completions", messages=messages, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 40
    longer = server.answer("chat/completions", messages=messages, ignore_eos=True, max_tokens=50)
    assert longer["usage"]["completion_tokens"] == 50


def test_waiting_requests_run_by_priority(server: Server) -> None:
    """Three requests wait for a running one; then they run by priority, not in order of arrival."""
    order: list[int] = []
    lock = threading.Lock()

    def ask(priority: int) -> dict[str, Any]:
        request = {"prompt": PROMPT, "max_tokens": 96, "ignore_eos": True}
        answer = server.answer("completions", **request, priority=priority)
        with lock:
            order.append(priority)
        return answer

    holder = {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True}
    with ThreadPoolExecutor(4) as clients:
        with server.streamed("completions", **holder) as parts:
            next(parts)
            waiting = []
            for number, priority in enumerate((5, 9, 1), 1):
                waiting.append(clients.submit(ask, priority))
                poll(lambda n=number: server.gauges()[1] == n, "the request to wait")
            assert server.gauges()[0] == 1
        for answer in waiting:
            assert answer.result()["usage"]["completion_tokens"] == 96
    assert order == [1, 5, 9]
    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), "the pages to come back")


@pytest.mark.parametrize("value", [2**70, -(2**70), 2**64])
def test_priorities_beyond_what_can_be_sent(server: Server, value: int) -> None:
    """Values that vLLM's processes cannot exchange are refused, in the field and in the header."""
    request = {"prompt": PROMPT, "max_tokens": 2}
    response = server.post("completions", **request, priority=value)
    assert response.status_code == 400 and "priority" in response.text
    content = {"model": "tiny", **request}
    for given, status in ((str(value), 400), (str(2**63), 200), ("9" * 5000, 200)):
        headers = {"X-Vllm-Priority": given}
        response = server.client.post("/v1/completions", json=content, headers=headers)
        assert response.status_code == status, response.text
    # Refused requests leave nothing behind.
    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), "the pages to come back")


# ------------------------------------------------ every row of docs/parameters.md, over HTTP

MESSAGES = [{"role": "user", "content": "hello"}]
LETTERS = {"completions": "C", "chat/completions": "H"}
OWN_EFFECTS = {"completions": EFFECTS_COMPLETION, "chat/completions": EFFECTS_CHAT}
OWN_REFUSED = {"completions": REFUSED_COMPLETION, "chat/completions": REFUSED_CHAT}


def fields_of(path: str) -> set[str]:
    """Return the fields of an endpoint that are in the table."""
    rows = table("parameters", PARAMETERS)
    return {str(code(row["parameter"])) for row in rows if LETTERS[path] in row["of"].split()}


def effects(path: str) -> dict[str, Effect]:
    return {name: f for name, f in EFFECTS.items() if name in fields_of(path)} | OWN_EFFECTS[path]


def refused(path: str) -> dict[str, tuple[dict[str, Any], str]]:
    return {name: f for name, f in REFUSED.items() if name in fields_of(path)} | OWN_REFUSED[path]


@pytest.mark.parametrize("path", BASE)
def test_every_row_is_tried(path: str) -> None:
    assert effects(path).keys() | refused(path).keys() == fields_of(path)
    answers = {code(r["parameter"]): r["answer"] for r in table("parameters", PARAMETERS)}
    for name, effect in effects(path).items():
        without = effect.shown in (changes_nothing, is_accepted)
        assert answers[name] == "honoured" or (answers[name] == "no effect" and without)
    wrong = {name for name in refused(path) if answers[name] != "refused"}
    assert wrong <= {"echo", "chat_template"}


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path in BASE for name in effects(path)]
)
def test_honoured_rows(server: Server, path: str, name: str) -> None:
    """Answers show the effect that the table says a parameter has."""
    effect = effects(path)[name]
    assert effect.shown(Row(server, path, name, effect.fragment))


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path in BASE for name in refused(path)]
)
def test_refused_rows(server: Server, path: str, name: str) -> None:
    fragment, named = refused(path)[name]
    response = server.post(path, **BASE[path], max_tokens=4, **fragment)
    assert response.status_code == 400, response.text
    assert named in response.json()["error"]["message"]


# ---------------------------------------------------------- constraints and infilling, over HTTP


def tokens_of(server: Server, **request: Any) -> list[int]:
    """Return the token ids of a completion of `PROMPT`."""
    given = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
    return server.answer("completions", **{**given, **request})["choices"][0]["token_ids"]


def test_constraints_act(server: Server) -> None:
    plain = tokens_of(server)
    first = plain[0]
    assert tokens_of(server, logit_bias={"500": 100}) == [500] * 12
    assert first not in tokens_of(server, logit_bias={str(first): -100})
    # Biases are clipped to 100, so neither of two tokens can be favoured further.
    pairs = [{"500": a, "501": b} for a, b in ((100, 100), (1000, 100), (100, 1000))]
    even, *others = (tokens_of(server, logit_bias=pair) for pair in pairs)
    assert others == [even, even]
    assert set(tokens_of(server, allowed_token_ids=[500, 501, 502])) <= {500, 501, 502}
    pushed = {"allowed_token_ids": [500, 501, 502, 503], "logit_bias": {"500": 80}}
    penalised = tokens_of(server, **pushed, presence_penalty=2.0, frequency_penalty=2.0)
    assert tokens_of(server, **pushed) == [500] * 12 == penalised
    weak = {"allowed_token_ids": list(range(500, 520))}
    once, penalty = tokens_of(server, **weak), {"frequency_penalty": 2.0, "presence_penalty": 2.0}
    assert len(set(tokens_of(server, **weak, **penalty))) > len(set(once))
    sharp = {"temperature": 2.0, "seed": 3}
    assert tokens_of(server, **sharp, min_p=1.0) == tokens_of(server, **sharp, top_k=1)


def test_bad_words_act(server: Server) -> None:
    question = {"messages": [{"role": "user", "content": " file18 the42 name49 get name file"}]}
    chat = {**question, "max_tokens": 8, "return_token_ids": True}
    content = server.answer("chat/completions", **chat)["choices"][0]["message"]["content"]
    # A word of one token, and one of two tokens, which may be committed in either order.
    for bad in (content[5:7], content[5:12]):
        other = server.answer("chat/completions", **chat, bad_words=[bad])
        assert bad in content and bad not in other["choices"][0]["message"]["content"]


def test_min_tokens_acts(server: Server) -> None:
    """Without ``min_tokens``, the answer ends early."""
    chat = {"messages": MESSAGES, "max_tokens": 40}
    early = server.answer("chat/completions", **chat)["usage"]["completion_tokens"]
    assert early < 30
    late = server.answer("chat/completions", **chat, min_tokens=early + 3)
    assert late["usage"]["completion_tokens"] > early + 3


def test_echo(server: Server) -> None:
    request = {"prompt": " file name", "max_tokens": 4, "ignore_eos": True}
    text = server.answer("completions", **request)["choices"][0]["text"]
    assert server.answer("completions", **request, echo=True)["choices"][0]["text"] == (
        " file name" + text
    )
    only = server.answer("completions", prompt=" file name", max_tokens=0, echo=True)
    assert only["choices"][0]["text"] == " file name"
    with server.streamed("completions", **request, echo=True) as parts:
        assert "".join(part["choices"][0]["text"] for part in parts) == " file name" + text
    # The request of lm-evaluation-harness for log-likelihoods.
    for length in (0, 1):
        asked = {**request, "max_tokens": length, "echo": True, "logprobs": 1}
        response = server.post("completions", **asked)
        assert response.status_code == 400
        assert "echo with logprobs" in response.json()["error"]["message"]


def test_infilling(server: Server) -> None:
    mask = load(tiny_llada()).mask_id
    canvas = [mask, 500, mask, mask, 501, 502]
    extra = {"diffusion_canvas": canvas}
    tokens = tokens_of(server, vllm_xargs=extra, **UNSURE)
    assert [t for t, c in zip(tokens, canvas, strict=False) if c != mask] == [500, 501, 502]
    assert len(tokens) == 12 and mask not in tokens
    request = {"prompt": PROMPT, "max_tokens": 12, "ignore_eos": True, "vllm_xargs": extra}
    request |= UNSURE
    with server.streamed("completions", **request, return_token_ids=True) as parts:
        streamed = [part["choices"][0]["token_ids"] for part in parts]
    assert [token for part in streamed for token in part] == tokens
    scored = server.answer("completions", **request, logprobs=1)["choices"][0]["logprobs"]
    assert [p == 0 for p in scored["token_logprobs"][:6]] == [c != mask for c in canvas]
    for bad, message in (
        ([500] * 13, "at most max_tokens=12 ids, got 13"),
        ([500, 10**6], "got 1000000 at 1"),
        ([500, "x"], "diffusion_canvas must be a list of token ids"),
        ("none", "diffusion_canvas must be a list of token ids"),
    ):
        response = server.post(
            "completions", **{**request, "vllm_xargs": {"diffusion_canvas": bad}}
        )
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]


def test_many_samples(server: Server) -> None:
    request = {"prompt": PROMPT, "max_tokens": 2, "temperature": 1.0, "ignore_eos": True}
    answer = server.answer("completions", **request, n=40)
    assert sorted(choice["index"] for choice in answer["choices"]) == list(range(40))
    assert answer["usage"]["completion_tokens"] == 80
    for n, message in ((16385, "16384"), (0, "n must"), (-1, "n must")):
        response = server.post("completions", **request, n=n)
        assert response.status_code == 400 and message in response.json()["error"]["message"]
    greedy = server.post("completions", prompt=PROMPT, max_tokens=2, temperature=0, n=2)
    assert greedy.status_code == 400 and "n must be 1" in greedy.json()["error"]["message"]


def test_default_requests_of_clients(server: Server) -> None:
    """Requests of the OpenAI client, and those of lm-evaluation-harness for generation, succeed."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=str(server.client.base_url) + "/v1", api_key="none")
    assert client.completions.create(model="tiny", prompt="hello").choices
    assert client.chat.completions.create(model="tiny", messages=MESSAGES).choices
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices
    client.close()
    harness = {"max_tokens": 8, "temperature": 0, "stop": ["\n\n", "Q:"], "seed": 1234}
    assert server.answer("completions", prompt=["a", " file name"], **harness)["choices"]
    assert server.answer("chat/completions", messages=MESSAGES, **harness)["choices"]


@pytest.mark.parametrize("path", BASE)
def test_fields_that_nobody_reads(server: Server, path: str) -> None:
    """Unknown fields are refused if they would change the answer, and ignored otherwise."""
    for name, value, message in (
        ("diffusion_steps", 4, "diffusion_steps must be in vllm_xargs"),
        ("best_of", 3, "best_of is not a field"),
        ("guided_choice", ["a", "b"], "guided_choice is not a field"),
        ("extra_args", {"diffusion_steps": 4}, "extra_args is not a field"),
        ("trace_decode_token_ids", [7], "trace_decode_token_ids is not a field"),
    ):
        response = server.post(path, **BASE[path], **{name: value})
        assert response.status_code == 400, (name, response.text)
        assert message in response.json()["error"]["message"]
        assert server.answer(path, **BASE[path], **{name: None})
    assert server.answer(path, **BASE[path], best_of=1, store=True, metadata={"a": "b"})
