# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` on the embedded model: the same answers as offline, errors, aborts, streams."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.offline import answer_all, split
from tests.e2e.questions import MIN_LENGTH, UNSURE, question
from tests.e2e.server import (
    Server,
    events,
    poll,
    tiny_llada,
)
from tests.reference import load

EOS, EOT = 1, 2
CONTEXT = 2048
Answer = dict[str, Any]


def ids(seed: int, length: int) -> list[int]:
    """Return a prompt: a question where one fits, else ordinary tokens."""
    if length >= MIN_LENGTH:
        return question(seed, length)
    rng = random.Random(seed)
    return [rng.randrange(6, 1400) for _ in range(length)]


def at(policy: str, rule: str, **options: Any) -> dict[str, Any]:
    """Return options of a policy and a rule, under the names that they have in a request."""
    own = {"cache_policy": policy, "remasking": rule}
    vllm = ("max_tokens", "ignore_eos", "temperature", "seed", "top_p", "top_k", *UNSURE)
    own |= {name: value for name, value in options.items() if name not in vllm}
    rest = {name: value for name, value in options.items() if name in vllm}
    return rest | {f"diffusion_{name}": value for name, value in own.items()}


LONG = {"ignore_eos": True}
#: 16 requests that have little in common.
MIXED: list[tuple[list[int], dict[str, Any]]] = [
    (ids(1, 5), {"max_tokens": 32}),
    (ids(2, 40), at("none", "low_confidence", max_tokens=20, block_length=7, **LONG)),
    (ids(3, 77), at("prefix", "entropy", max_tokens=33, block_length=16, steps=11, **LONG)),
    (ids(4, 128), at("dual", "topk_margin", max_tokens=64, threshold=0.6, **LONG)),
    (ids(5, 250), at("sparse", "maskgit_plus", max_tokens=48, factor=1.5, keep_ratio=0.3)),
    (ids(6, 1), at("sparse", "low_confidence", max_tokens=1)),
    (ids(7, 300), at("sparse", "entropy", max_tokens=40, kernel_size=5, delay_steps=0, **LONG)),
    (ids(8, 64), at("sparse", "random", max_tokens=32, seed=11, **LONG)),
    (ids(9, 33), at("none", "origin", max_tokens=32, seed=12, steps=8, **LONG)),
    (ids(10, 90), at("dual", "low_confidence", max_tokens=40, temperature=0.8, seed=13, **LONG)),
    (
        ids(11, 17),
        at("prefix", "maskgit_plus", max_tokens=24, temperature=1.2, top_p=0.9, seed=14, **LONG),
    ),
    (
        ids(12, 120),
        at("sparse", "topk_margin", max_tokens=50, temperature=0.5, top_k=20, seed=15, **LONG),
    ),
    (
        ids(13, 200),
        at("sparse", "low_confidence", max_tokens=70, granularity="page", keep_ratio=0.5, **LONG),
    ),
    (ids(14, 60), at("sparse", "low_confidence", max_tokens=32, cfg_scale=1.5, **LONG)),
    (ids(15, 48), at("dual", "entropy", max_tokens=36, alg_temp=0.4, seed=16, **LONG)),
    (ids(16, 150), at("none", "low_confidence", max_tokens=30, steps=90, block_length=4, **LONG)),
]
N_SAMPLES = (
    ids(17, 40),
    {"n": 3, "seed": 5, "temperature": 2.0, "frequency_penalty": 2.0, "max_tokens": 60}
    | {**UNSURE, **LONG},
)
SCORED = (ids(18, 50), at("sparse", "low_confidence", max_tokens=24, threshold=0.4, **LONG))
PLAIN = (ids(19, 36), {"max_tokens": 40, **LONG})
LEFT_TO_RIGHT = (
    ids(20, 12),
    at("none", "low_confidence", max_tokens=8, block_length=1, **UNSURE, **LONG),
)
DEFAULT_LENGTH = (ids(21, 20), {"max_tokens": 256, **LONG})
BYSTANDERS = MIXED[1:5]
#: Policies that hold pages.
POLICIES = ("prefix", "dual", "sparse")


def body(prompt: list[int], options: dict[str, Any]) -> dict[str, Any]:
    """Return a completion request that also asks for the token ids."""
    rest, extra = split(options)
    return {"prompt": prompt, "return_token_ids": True, "vllm_xargs": extra or None, **rest}


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Answer]]:
    """Return the answers of `LLM.generate` to each request alone, by ``str`` of the prompt."""
    scored = (SCORED[0], {**SCORED[1], "logprobs": 3})
    ordered = (LEFT_TO_RIGHT[0], {**LEFT_TO_RIGHT[1], "logprobs": 0})
    wanted = [*MIXED, N_SAMPLES, scored, PLAIN, ordered, DEFAULT_LENGTH]
    requests = [{"prompt": prompt, "options": options} for prompt, options in wanted]
    answers = answer_all(requests, tmp_path_factory.mktemp("offline"))
    named = {str(prompt): answer for (prompt, _), answer in zip(wanted, answers, strict=True)}
    assert len(named) == len(wanted)
    return named


@pytest.fixture(scope="module")
def server(offline: dict[str, list[Answer]], default_server: Server) -> Server:
    """The shared server, once the offline answers exist too."""
    return default_server


@pytest.fixture
def check_idle(server: Server) -> Iterator[None]:
    """Check after a test that nothing runs, waits or holds pages."""
    yield
    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), f"no work, but {server.gauges()}")


# All cores, as the server has: the offline engine, too, then has several threads.
pytestmark = pytest.mark.usefixtures("check_idle", "all_cores")


def test_the_engine_is_a_process_of_its_own_and_logs_as_vllm(server: Server) -> None:
    log = server.log.read_text()
    assert "EngineCore pid=" in log
    assert re.search(r"INFO .*Loading diffusion model", log)


def test_sixteen_clients_at_once_get_offline_tokens(
    server: Server, offline: dict[str, list[Answer]]
) -> None:
    """16 at once, every second one streamed, in two rounds: all 32 answers are as offline."""

    def ask(number: int) -> Answer:
        request = body(*MIXED[number % len(MIXED)])
        if number % 2:
            return streamed_answer(server, "completions", request)[0]
        choice = server.answer("completions", **request)["choices"][0]
        return {
            "tokens": choice["token_ids"],
            "text": choice["text"],
            "finish_reason": choice["finish_reason"],
        }

    with ThreadPoolExecutor(16) as clients:
        for start in (0, 1):
            numbers = range(start, start + 16)
            for number, answer in zip(numbers, clients.map(ask, numbers), strict=True):
                prompt, options = MIXED[number % 16]
                expected = offline[str(prompt)][0]
                assert answer == {name: expected[name] for name in answer}, options


def test_the_requests_have_little_in_common(offline: dict[str, list[Answer]]) -> None:
    """Answers differ; otherwise, one that went to the wrong client would go unnoticed."""
    answers = [tuple(offline[str(prompt)][0]["tokens"]) for prompt, _ in MIXED]
    assert len(set(answers)) >= len(MIXED) - 2
    assert len({token for tokens in answers for token in tokens}) >= 50


def streamed_answer(
    server: Server, path: str, request: dict[str, Any]
) -> tuple[Answer, list[list[int]]]:
    """Return a streamed answer, its chunks joined, and the token ids of each chunk."""
    chunks: list[list[int]] = []
    text, finish_reason = "", None
    with server.streamed(path, **request) as parts:
        for part in parts:
            for choice in part["choices"]:
                assert finish_reason is None, "a chunk after the last one"
                if path == "completions":
                    text += choice["text"]
                else:
                    text += choice["delta"].get("content") or ""
                if choice.get("token_ids"):
                    chunks.append(choice["token_ids"])
                finish_reason = choice["finish_reason"]
    tokens = [token for chunk in chunks for token in chunk]
    return {"tokens": tokens, "text": text, "finish_reason": finish_reason}, chunks


@pytest.mark.parametrize("number", [1, 2, 3, 15])
def test_a_stream_is_the_answer_in_pieces(
    server: Server, offline: dict[str, list[Answer]], number: int
) -> None:
    prompt, options = MIXED[number]
    answer, chunks = streamed_answer(server, "completions", body(prompt, options))
    expected = offline[str(prompt)][0]
    assert answer == {name: expected[name] for name in answer}
    assert len(chunks) > 1


def chat_prompt(server: Server, text: str) -> list[int]:
    """Return the token ids of a conversation of one message."""
    message = {"role": "user", "content": text}
    response = server.client.post("/tokenize", json={"model": "tiny", "messages": [message]})
    return response.json()["tokens"]


QUESTION = "file18 time52 name49 list07 get name file"


def test_chat_is_the_completion_of_the_template(server: Server) -> None:
    """Streamed or not. The model answers the question, so the template is the right one."""
    prompt = chat_prompt(server, QUESTION)
    assert prompt[:2] == [0, 3] and prompt[-2:] == [EOT, 4]
    plain = server.answer("completions", **body(prompt, {"max_tokens": 32}))["choices"][0]
    request = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32}
    chat = server.answer("chat/completions", **request, return_token_ids=True)["choices"][0]
    assert chat["token_ids"] == plain["token_ids"]
    assert chat["message"]["content"] == plain["text"]
    assert chat["finish_reason"] == "stop" and chat["token_ids"][-1] == EOS
    streamed, _ = streamed_answer(server, "chat/completions", {**request, "return_token_ids": True})
    assert streamed["tokens"] == plain["token_ids"]
    assert streamed["text"] == plain["text"]
    assert "name49" in plain["text"]


def test_greedy_is_the_default(server: Server, offline: dict[str, list[Answer]]) -> None:
    """A request that names no temperature gets the most probable tokens."""
    answer = server.answer("completions", **body(*PLAIN))["choices"][0]
    assert answer["token_ids"] == offline[str(PLAIN[0])][0]["tokens"]


def test_samples_of_one_request(server: Server, offline: dict[str, list[Answer]]) -> None:
    prompt, options = N_SAMPLES
    choices = server.answer("completions", **body(prompt, options))["choices"]
    found = [choice["token_ids"] for choice in sorted(choices, key=lambda c: c["index"])]
    assert found == [answer["tokens"] for answer in offline[str(prompt)]]
    assert len({tuple(tokens) for tokens in found}) == 3


def test_logprobs(server: Server, offline: dict[str, list[Answer]]) -> None:
    """Completions and chats give the offline values, those of the chosen tokens included."""
    prompt, options = SCORED
    expected = offline[str(prompt)][0]
    own = [
        at[str(token)] for token, at in zip(expected["tokens"], expected["logprobs"], strict=True)
    ]
    best = [sorted(at.values(), reverse=True)[:3] for at in expected["logprobs"]]

    request = {**body(prompt, options), "logprobs": 3, "return_tokens_as_token_ids": True}
    choice = server.answer("completions", **request)["choices"][0]
    found = choice["logprobs"]
    assert found["tokens"] == [f"token_id:{token}" for token in expected["tokens"]]
    assert found["token_logprobs"] == pytest.approx(own, abs=1e-4)
    for values, top in zip(best, found["top_logprobs"], strict=True):
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(values, abs=1e-4)

    chat = {
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 16,
        "logprobs": True,
        "top_logprobs": 2,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    choice = server.answer("chat/completions", **chat)["choices"][0]
    plain = body(chat_prompt(server, QUESTION), {"max_tokens": 16})
    reference = server.answer("completions", **plain, logprobs=2)["choices"][0]
    content = choice["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{t}" for t in choice["token_ids"]]
    assert [entry["logprob"] for entry in content] == pytest.approx(
        reference["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)


def test_a_logprob_is_of_the_step_that_committed_the_token(
    server: Server, offline: dict[str, list[Answer]]
) -> None:
    """With blocks of one token, that step sees all tokens before it, and masks from it on."""
    prompt, options = LEFT_TO_RIGHT
    expected = offline[str(prompt)][0]
    model = load(tiny_llada())
    canvas = prompt + [model.mask_id] * options["max_tokens"]
    own = []
    for position, token in enumerate(expected["tokens"], len(prompt)):
        logits = model.forward(canvas, range(len(canvas))).logits[position].float()
        own.append(float(logits.log_softmax(-1)[token]))
        canvas[position] = token
    values = [
        at[str(token)] for token, at in zip(expected["tokens"], expected["logprobs"], strict=True)
    ]
    assert values == pytest.approx(own, abs=1e-3)
    choice = server.answer("completions", **body(prompt, options), logprobs=0)["choices"][0]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(own, abs=1e-3)


def test_streamed_logprobs(server: Server, offline: dict[str, list[Answer]]) -> None:
    prompt, options = SCORED
    expected = offline[str(prompt)][0]
    values: list[float] = []
    with server.streamed("completions", **body(prompt, options), logprobs=1) as parts:
        for part in parts:
            for choice in part["choices"]:
                if choice["logprobs"]:
                    values += choice["logprobs"]["token_logprobs"]
    own = [
        at[str(token)] for token, at in zip(expected["tokens"], expected["logprobs"], strict=True)
    ]
    assert values == pytest.approx(own, abs=1e-4)


def test_stop_string(server: Server, offline: dict[str, list[Answer]]) -> None:
    prompt, options = PLAIN
    text = offline[str(prompt)][0]["text"]
    stop = text[len(text) // 2 :][:4]
    request = body(prompt, {**options, "stop": [stop]})
    choice = server.answer("completions", **request)["choices"][0]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    streamed, _ = streamed_answer(server, "completions", request)
    assert (streamed["text"], streamed["finish_reason"]) == (choice["text"], "stop")
    kept = server.answer("completions", **request, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == choice["text"] + stop


def test_stop_token(server: Server, offline: dict[str, list[Answer]]) -> None:
    prompt, options = PLAIN
    tokens = offline[str(prompt)][0]["tokens"]
    stop = tokens[3]
    end = tokens.index(stop) + 1
    request = body(prompt, {**options, "stop_token_ids": [stop]})
    choice = server.answer("completions", **request)["choices"][0]
    assert choice["token_ids"] == tokens[:end]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


def test_one_token(server: Server) -> None:
    answer = server.answer("completions", **body(ids(30, 9), {"max_tokens": 1, **LONG}))
    assert len(answer["choices"][0]["token_ids"]) == 1
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 1


def test_eos_ends_a_response_unless_ignored(server: Server) -> None:
    prompt = chat_prompt(server, QUESTION)
    short = server.answer("completions", **body(prompt, {"max_tokens": 32}))["choices"][0]
    whole = server.answer("completions", **body(prompt, {"max_tokens": 32, **LONG}))
    tokens = whole["choices"][0]["token_ids"]
    assert short["token_ids"] == tokens[: tokens.index(EOS) + 1]
    assert short["finish_reason"] == "stop"
    assert len(tokens) == 32 and whole["choices"][0]["finish_reason"] == "length"


def test_default_length(server: Server, offline: dict[str, list[Answer]]) -> None:
    """A chat that names no length gets 256 tokens; one that names more gets more."""
    messages = [{"role": "user", "content": QUESTION}]
    fast = {"vllm_xargs": {"diffusion_threshold": 0.5}, **LONG}
    whole = server.answer("chat/completions", messages=messages, **fast)
    assert whole["usage"]["completion_tokens"] == 256
    stopped = server.answer("chat/completions", messages=messages)
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["usage"]["completion_tokens"] <= 256
    for name in ("max_tokens", "max_completion_tokens"):
        longer = server.answer("chat/completions", messages=messages, **fast, **{name: 300})
        assert longer["usage"]["completion_tokens"] == 300
    prompt, options = DEFAULT_LENGTH
    explicit = server.answer("completions", **body(prompt, options))["choices"][0]
    assert explicit["token_ids"] == offline[str(prompt)][0]["tokens"]


def refused(name: str, named: str | None = None, **request: Any) -> Any:
    """Return a bad request and text that the refusal must contain, as a test parameter."""
    return pytest.param(request, named or name, id=f"{name}={request.get(name, '')!r}"[:40])


def refused_setting(name: str, value: Any) -> Any:
    key = f"diffusion_{name}"
    return pytest.param({"vllm_xargs": {key: value}}, key, id=f"{key}={value!r}")


BAD_SETTINGS = [
    refused_setting(name, value)
    for name, values in {
        "cache_policy": ["lru", 1, ""],
        "keep_ratio": [0, 1.01, -0.5, "half"],
        "kernel_size": [0, 2, -1, 1.5, "3"],
        "delay_steps": [-1, 0.5, "one"],
        "granularity": ["line", 1],
        "saliency": ["best", 1],
        "block_length": [0, -8, 1.5, "32"],
        "steps": [0, -1, 2.5, "all", [4]],
        "remasking": ["best", 3],
        "threshold": [0, 1.5, -1, "high"],
        "factor": [0, -1, "big"],
        "alg_temp": [-0.1, "hot"],
        "cfg_scale": [-1, "much"],
        "default_response_length": [64],
        "x": [1],
        "temperature": [1],
    }.items()
    for value in values
] + [
    pytest.param(
        {"vllm_xargs": {"diffusion_threshold": 0.5, "diffusion_factor": 1.0}},
        "diffusion_factor",
        id="threshold-and-factor",
    ),
    pytest.param(
        {"vllm_xargs": {"diffusion_threshold": 0.5, "diffusion_alg_temp": 1.0}},
        "diffusion_alg_temp",
        id="threshold-and-alg_temp",
    ),
    pytest.param({"vllm_xargs": {"foreign": 1}}, "foreign", id="foreign"),
]
BAD_PARAMETERS = [
    refused("presence_penalty", presence_penalty=2.5),
    refused("frequency_penalty", frequency_penalty=-3),
    refused("repetition_penalty", repetition_penalty=0),
    refused("repetition_penalty", repetition_penalty=1e-3),
    refused("min_p", min_p=1.5, temperature=1.0),
    refused("min_tokens", min_tokens=9),
    refused("logit_bias", logit_bias={"100000": 1}),
    refused("logit_bias", logit_bias={"x": 1}),
    refused("bad_words", bad_words=[""]),
    refused("allowed_token_ids", allowed_token_ids=[]),
    refused("allowed_token_ids", allowed_token_ids=[100_000]),
    refused("allowed_token_ids", allowed_token_ids=[EOS], min_tokens=1),
    refused("thinking_token_budget", thinking_token_budget=4),
    refused("prompt_logprobs", prompt_logprobs=1),
    refused("structured_outputs", "cannot be an empty list", structured_outputs={"choice": []}),
    refused("structured_outputs", "unclosed group", structured_outputs={"regex": "("}),
    refused(
        "response_format",
        "Unimplemented keys",
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"not": {}}},
        },
    ),
    refused("ignore_eos", structured_outputs={"regex": "a"}, ignore_eos=True),
    refused(
        "diffusion_threshold",
        structured_outputs={"regex": "a"},
        vllm_xargs={"diffusion_threshold": 0.9},
    ),
    refused("temperature", temperature=-1),
    refused("top_p", top_p=0),
    refused("top_k", top_k=-3),
    refused("top_k", top_k=2**64, temperature=1.0),
    refused("stream_interval", stream_interval=2**64),
    refused(
        "repetition_detection",
        repetition_detection={"max_pattern_size": 2**64, "min_count": 2},
    ),
    refused("structured_outputs", structured_outputs={"json": {"const": 2**64}}),
    *(
        refused("structured_outputs", "must be an object", structured_outputs=value)
        for value in ("x", "", 7, 0.5, False, ["x"], [])
    ),
    *(
        refused("structured_outputs", structured_outputs=value)
        for value in ({"json": 7}, {"regex": 7}, {"choice": "ab"}, {"grammar": ["x"]})
    ),
    *(
        refused("response_format", response_format=value)
        for value in ("x", 7, True, ["x"], {}, {"type": 7}, {"type": "json_schema"})
    ),
    *(refused("logit_bias", logit_bias=value) for value in ("x", 7, [1], {"5": "x"}, {"5": None})),
    refused("n", "n must", n=0),
    refused("seed", seed="x"),
    refused("stop_token_ids", stop_token_ids=["x"]),
    refused("max_tokens", max_tokens=0),
    refused("max_tokens", max_tokens=-1),
    refused("max_tokens", max_tokens=CONTEXT + 1),
    refused("kv_transfer_params", kv_transfer_params={"do_remote_decode": True}),
]
BAD_COMPLETIONS = [
    refused("logprobs", logprobs=1000),
    refused("logprob_token_ids", logprob_token_ids=[7], logprobs=1),
    refused("echo", "prompt_logprobs", echo=True, logprobs=1),
    refused("prompt", prompt=""),
    refused("prompt", prompt=[]),
    refused("prompt", "input tokens", prompt=[7] * (CONTEXT + 1)),
    refused("prompt", "input tokens", prompt="name " * 3 * CONTEXT),
    refused("prompt", "vocabulary", prompt=[100_000]),
]
BAD_CHATS = [
    refused("top_logprobs", "logprobs of 1000", logprobs=True, top_logprobs=1000),
    refused("messages", "conversation", messages=[]),
    refused("messages", "input tokens", messages=[{"role": "user", "content": "name " * 6000}]),
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
@pytest.mark.parametrize("value", ["x", 7, ["x"], {"include_usage": "x"}], ids=repr)
def test_stream_options_of_a_wrong_type(server: Server, path: str, value: Any) -> None:
    question = {"prompt": ids(40, 6)}
    if path != "completions":
        question = {"messages": [{"role": "user", "content": QUESTION}]}
    for stream in (True, False):
        response = server.post(path, **question, stream=stream, stream_options=value)
        assert response.status_code == 400
        assert "stream_options" in response.text


@pytest.mark.parametrize("path", ["chat/completions/batch", "responses"])
def test_other_endpoints_name_a_field_of_a_wrong_type(server: Server, path: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    question = {"input": QUESTION} if path == "responses" else {"messages": [messages]}
    response = server.post(path, **question, structured_outputs="x")
    assert response.status_code == 400
    assert "structured_outputs" in response.text


@pytest.mark.parametrize("value", ["x", [1], 5], ids=repr)
def test_the_batch_endpoint_names_parameters_of_a_wrong_type(server: Server, value: Any) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    response = server.post("chat/completions/batch", messages=[messages], vllm_xargs=value)
    assert response.status_code == 400, response.text
    assert "vllm_xargs" in response.text


def test_an_error_inside_an_endpoint_is_answered(server: Server) -> None:
    """Whatever its cause; here vLLM's own endpoint expects an object."""
    # The server closes the connection, so it must not be one that later requests use.
    headers = {"Connection": "close"}
    response = server.client.post("/scale_elastic_ep", json=[], headers=headers, timeout=60)
    assert response.status_code == 500


@pytest.mark.parametrize("field", ["diffusion_steps", "min_tokens", "guided_json", "max_tokens"])
def test_responses_refuse_misplaced_fields(server: Server, field: str) -> None:
    """Fields of other endpoints are refused; here, `max_output_tokens` sets the length."""
    response = server.post("responses", input=QUESTION, max_output_tokens=8, **{field: 4})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"].startswith(f"{field} ")
    response = server.post("responses", input=QUESTION, max_output_tokens=8)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("request_", "named"), BAD_SETTINGS + BAD_PARAMETERS + BAD_COMPLETIONS)
def test_bad_completion_is_refused(server: Server, request_: dict[str, Any], named: str) -> None:
    assert_refused(server, "completions", {"prompt": ids(40, 6), **request_}, named)


@pytest.mark.parametrize(("request_", "named"), BAD_SETTINGS + BAD_PARAMETERS + BAD_CHATS)
def test_bad_chat_is_refused(server: Server, request_: dict[str, Any], named: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    assert_refused(server, "chat/completions", {"messages": messages, **request_}, named)


def test_broken_unicode_is_refused(server: Server) -> None:
    """A lone surrogate, which JSON can spell, is refused: vLLM's tokenizer would fail on it."""
    body = {"model": "tiny", "prompt": [7, 8], "max_tokens": 4, "bad_words": ["\ud800"]}
    response = server.client.post(
        "/v1/completions",
        content=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 400, response.text
    assert "bad_words must hold" in response.json()["error"]["message"]


def assert_refused(server: Server, path: str, request: dict[str, Any], named: str) -> None:
    """Check that a request gets HTTP 400, with ``named`` in the message, streamed or not.

    vLLM finds most errors of a streamed request after it has sent the headers; the stream then
    contains only the error, with the same code and message.
    """
    request = {"max_tokens": 8, **request}
    response = server.post(path, **request)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert named in error["message"]

    streamed = server.post(path, **request, stream=True)
    if streamed.status_code == 400:
        assert named in streamed.json()["error"]["message"]
    else:
        assert streamed.status_code == 200
        (only,) = events(streamed)
        assert only["error"]["code"] == 400
        assert only["error"]["message"] == error["message"]


def test_the_server_answers_after_refusals(
    server: Server, offline: dict[str, list[Answer]]
) -> None:
    for request in BAD_SETTINGS[:8]:
        server.post("completions", prompt=ids(40, 6), **request.values[0])
    answer = server.answer("completions", **body(*PLAIN))["choices"][0]
    assert answer["token_ids"] == offline[str(PLAIN[0])][0]["tokens"]


def test_beam_search_is_refused(server: Server) -> None:
    """vLLM would search with canvases of one token, which is no beam search, so it is refused."""
    request = {"prompt": ids(40, 6), "max_tokens": 4, "n": 2}
    assert_refused(server, "completions", {**request, "use_beam_search": True}, "beam")


def test_an_abort_frees_pages_and_harms_nobody(
    server: Server, offline: dict[str, list[Answer]]
) -> None:
    """Three clients close the connection mid-stream while four others are answered."""
    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), "an idle server")
    endless = [at(policy, "low_confidence", max_tokens=1900, **LONG) for policy in POLICIES]
    seen = threading.Barrier(len(endless) + 1)
    leave = threading.Event()

    def leave_early(options: dict[str, Any]) -> None:
        with server.streamed("completions", **body(ids(41, 64), options)) as parts:
            next(parts)
            seen.wait(timeout=120)
            leave.wait(timeout=120)

    with ThreadPoolExecutor(16) as clients:
        leaving = [clients.submit(leave_early, options) for options in endless]
        seen.wait(timeout=120)
        running, _, usage = server.gauges()
        assert running == len(endless)
        assert 0 < usage <= 1
        asked = [
            clients.submit(server.answer, "completions", **body(*request)) for request in BYSTANDERS
        ]
        leave.set()
        for abort in leaving:
            abort.result()
        for answer, (prompt, _) in zip(asked, BYSTANDERS, strict=True):
            tokens = answer.result()["choices"][0]["token_ids"]
            assert tokens == offline[str(prompt)][0]["tokens"]
    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), "the pages to come back")


def test_queued_requests_finish(server: Server) -> None:
    """More clients at once than in the other tests; all are served."""
    with ThreadPoolExecutor(40) as clients:
        requests = [body(ids(100 + n, 30), {"max_tokens": 16, **LONG}) for n in range(40)]
        answers = list(clients.map(lambda r: server.answer("completions", **r), requests))
    assert all(answer["usage"]["completion_tokens"] == 16 for answer in answers)


COUNTRY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
        "size": {"enum": ["small", "large"]},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
#: `COUNTRY` as an expression that fixes order and blanks, so that even a weak model finishes it.
COMPACT = r'\{"name": "[A-Z][a-z]{1,5}", "size": "(small|large)"\}'
CONSTRAINED: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"choice": ["yes", "no", "maybe so"]}}, "yes|no|maybe so"),
    ({"structured_outputs": {"regex": r"[a-z]{3}-\d{2}"}}, r"[a-z]{3}-\d{2}"),
    ({"structured_outputs": {"grammar": 'root ::= "<" [a-c]+ ">"'}}, "<[a-c]+>"),
    (
        {"structured_outputs": {"json": {"type": "array", "items": {"const": 7}, "maxItems": 1}}},
        r"\[\s*(7\s*)?\]",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "flag", "schema": {"type": "boolean"}},
            }
        },
        "true|false",
    ),
    ({"structured_outputs": {"regex": COMPACT}, "temperature": 2.0, "seed": 5}, COMPACT),
    ({"response_format": {"type": "json_object"}}, r"\{.*\}"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "c", "schema": COUNTRY},
            }
        },
        "",
    ),
]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_structured_output(server: Server, path: str) -> None:
    """All at once, streamed and not: each answer follows its grammar, or is cut by max_tokens."""
    question: dict[str, Any] = {"prompt": ids(50, 12)}
    if path == "chat/completions":
        question = {"messages": [{"role": "user", "content": QUESTION}]}

    def text_of(choice: dict[str, Any]) -> str:
        if path == "completions":
            return choice["text"]
        return (choice.get("message") or choice["delta"]).get("content") or ""

    def ask(request: dict[str, Any]) -> tuple[str, str, str]:
        request = {"max_tokens": 64, **question, **request}
        [choice] = server.answer(path, **request)["choices"]
        with server.streamed(path, **request) as parts:
            pieces = [part["choices"][0] for part in parts if part["choices"]]
        return text_of(choice), choice["finish_reason"], "".join(map(text_of, pieces))

    with ThreadPoolExecutor(len(CONSTRAINED)) as clients:
        answers = list(clients.map(ask, [request for request, _ in CONSTRAINED]))
    for (_, pattern), (text, reason, streamed) in zip(CONSTRAINED, answers, strict=True):
        assert streamed == text
        if reason == "length":
            assert text.startswith("{") or pattern == "<[a-c]+>" or pattern.startswith(r"\[")
            continue
        assert reason == "stop"
        assert re.fullmatch(pattern or ".*", text, re.DOTALL)
        if not pattern:
            country = json.loads(text)
            assert country.keys() == {"name", "size"} and country["size"] in ("small", "large")
    # Answers are not cut if their grammar allows short texts only.
    assert sum(reason == "stop" for _, reason, _ in answers) >= 4


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_grammar_that_contradicts_other_constraints(server: Server, path: str) -> None:
    """At the third token, all samples, or the stream, end with error 400 and the reason."""
    tokens = server.client.post("/tokenize", json={"model": "tiny", "prompt": "c"}).json()["tokens"]
    request: dict[str, Any] = {"prompt": ids(51, 12), "max_tokens": 9}
    if path == "chat/completions":
        request = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 9}
    request["structured_outputs"] = {"regex": "[cd]{2}[ab]+"}
    request["allowed_token_ids"] = [EOS, *tokens]
    counted = "vllm:diffusion_request_failures_total"
    before = server.metric(counted, cause="grammar")
    reason = "allowed_token_ids must leave one of the tokens that structured_outputs allows"
    several = {"n": 3, "temperature": 1.0, "seed": 1}
    for more in ({}, several):
        response = server.post(path, **request, **more)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["message"].startswith(reason)
        assert "position 2" in response.json()["error"]["message"]
        assert response.json()["error"]["param"] == "allowed_token_ids"
    with server.streamed(path, **request) as parts:
        *pieces, last = parts
    assert last["error"]["code"] == 400 and last["error"]["message"].startswith(reason)
    choices = [piece["choices"][0] for piece in pieces]
    texts = [c.get("text") or c.get("delta", {}).get("content") or "" for c in choices]
    assert "".join(texts) in ("", "c", "cc")
    assert server.metric(counted, cause="grammar") >= before + 3
