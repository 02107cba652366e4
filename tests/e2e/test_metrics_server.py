# SPDX-License-Identifier: Apache-2.0
"""Metrics and traces over HTTP, from a server with two API processes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.offline import split
from tests.e2e.questions import UNSURE
from tests.e2e.server import ROOT, Server, poll, running_server, tiny_llada
from vllm_sparse_dllm.frontend.metrics import METRICS

Answer = dict[str, Any]
PROMPT = [77, 311, 316, 900, 45, 1200, 678]
PREFIX = "vllm:diffusion_"
LAYERS = 4
#: Options of a request, without the trace.
REQUESTS: dict[str, dict[str, Any]] = {
    "fixed steps": {"max_tokens": 24, "ignore_eos": True, "diffusion_block_length": 8},
    "threshold": {"max_tokens": 40, "ignore_eos": True, "diffusion_threshold": 0.5},
    "samples": {"max_tokens": 16, "ignore_eos": True, "n": 2, "seed": 3, "temperature": 1.5},
    "stop string": {"max_tokens": 24, "diffusion_block_length": 8, "stop": ["e"], "seed": 3}
    | {"temperature": 1.5},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(log, tiny_llada(), "--api-server-count", "2") as started:
        yield started


def body(name: str, trace: int | None = None) -> dict[str, Any]:
    rest, extra = split(REQUESTS[name])
    if trace is not None:
        extra["diffusion_trace"] = trace
    return {"prompt": PROMPT, "return_token_ids": True, "vllm_xargs": extra or None, **rest}


def collected(parts: Iterator[dict[str, Any]]) -> dict[int, Answer]:
    """Return the choices of a stream, by index, with their chunks joined."""
    choices: dict[int, Answer] = {}
    for part in parts:
        for choice in part["choices"]:
            own = choices.setdefault(choice["index"], {"text": "", "token_ids": []})
            assert "diffusion_trace" not in own, "a chunk after the last one"
            own["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            own["token_ids"] += choice.get("token_ids") or []
            if choice["finish_reason"] is not None:
                own["diffusion_trace"] = choice["diffusion_trace"]
            else:
                assert "diffusion_trace" not in choice
    return choices


def approx(trace: dict[str, Any]) -> dict[str, Any]:
    return {**trace, "confidences": pytest.approx(trace["confidences"], rel=1e-4)}


@pytest.mark.parametrize("name", REQUESTS)
def test_completions(server: Server, name: str) -> None:
    """Each choice has its trace, streamed or not; `test_trace` checks what is in it."""
    answer = server.answer("completions", **body(name, 2), logprobs=0)
    assert answer["kv_transfer_params"] is None
    with server.streamed("completions", **body(name, 2)) as parts:
        streamed = collected(parts)
    plain = server.answer("completions", **body(name))["choices"]
    assert len(answer["choices"]) == len(streamed) == len(plain) == REQUESTS[name].get("n", 1)
    for index, choice in enumerate(answer["choices"]):
        tokens, trace = choice["token_ids"], choice["diffusion_trace"]
        assert tokens == plain[index]["token_ids"]
        assert "diffusion_trace" not in plain[index]
        assert trace.keys() == {"nfe", "steps", "confidences", "refreshes"}
        assert len(trace["steps"]) == len(tokens) > 0
        assert trace["nfe"] == max(trace["steps"]) + 1
        probabilities = [math.exp(value) for value in choice["logprobs"]["token_logprobs"]]
        assert trace["confidences"] == pytest.approx(probabilities, rel=1e-3)
        for refresh in trace["refreshes"]:
            start, end = refresh["block"]
            assert len(PROMPT) <= start < end and refresh["step"] < trace["nfe"]
            assert len(refresh["kept"]) == LAYERS
        assert streamed[index] == {
            "text": choice["text"],
            "token_ids": tokens,
            "diffusion_trace": approx(trace),
        }


def test_chat(server: Server) -> None:
    request = {
        "messages": [{"role": "user", "content": " file18 the42 name49 get name file"}],
        "max_tokens": 32,
        "n": 2,
        "temperature": 1.0,
        "seed": 1,
        "return_token_ids": True,
    }
    plain = server.answer("chat/completions", **request)["choices"]
    request["vllm_xargs"] = {"diffusion_trace": 1}
    choices = server.answer("chat/completions", **request)["choices"]
    with server.streamed("chat/completions", **request) as parts:
        streamed = collected(parts)
    for index in range(2):
        trace = choices[index]["diffusion_trace"]
        assert trace.keys() == {"nfe", "steps", "confidences"}
        assert len(trace["steps"]) == len(choices[index]["token_ids"]) > 0
        assert max(trace["steps"]) < trace["nfe"] <= 32
        assert choices[index]["token_ids"] == plain[index]["token_ids"]
        assert streamed[index]["diffusion_trace"] == approx(trace)
        assert streamed[index]["text"] == choices[index]["message"]["content"]
        assert "diffusion_trace" not in plain[index]


def test_several_prompts(server: Server) -> None:
    request = {"prompt": [PROMPT, PROMPT[:3]], "max_tokens": 8, "ignore_eos": True, "n": 2}
    request |= {"temperature": 1e-3, "seed": 1, **UNSURE}
    request["vllm_xargs"] = {"diffusion_trace": 1, "diffusion_steps": 4}
    choices = server.answer("completions", **request)["choices"]
    with server.streamed("completions", **request) as parts:
        streamed = collected(parts)
    assert len(choices) == len(streamed) == 4
    for index, choice in enumerate(choices):
        assert choice["diffusion_trace"]["nfe"] == 4
        assert streamed[index]["diffusion_trace"] == approx(choice["diffusion_trace"])
    confidences = [choice["diffusion_trace"]["confidences"] for choice in choices]
    assert confidences[0] == pytest.approx(confidences[1], rel=1e-4)
    assert confidences[0] != pytest.approx(confidences[2], rel=1e-2)


def test_a_bad_value_is_refused(server: Server) -> None:
    response = server.post("completions", **body("fixed steps", 3))
    assert response.status_code == 400
    assert "diffusion_trace must be 0, 1 or 2, got 3" in response.text


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("responses", {"input": "hello"}),
        ("messages", {"messages": [{"role": "user", "content": "hello"}]}),
        ("chat/completions/batch", {"messages": [[{"role": "user", "content": "hello"}]]}),
    ],
)
def test_endpoints_that_cannot_tell_refuse_to(
    server: Server, path: str, content: dict[str, Any]
) -> None:
    extra = {"vllm_xargs": {"diffusion_trace": 1}, "max_tokens": 8}
    response = server.post(path, **content, **extra)
    assert response.status_code == 400, response.text
    assert "diffusion_trace must be 0 here, got 1" in response.text


def test_a_client_that_leaves_frees_its_pages(server: Server) -> None:
    """When a client leaves, its request is aborted: not all of its positions are committed."""
    length, committed = 1900, "vllm:diffusion_num_committed_tokens_total"
    request = {"prompt": PROMPT, "max_tokens": length, "ignore_eos": True}
    extra = {"diffusion_trace": 2, "diffusion_block_length": 4}
    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), "the others to end")
    before = server.metric(committed)
    with server.streamed("completions", **request, vllm_xargs=extra) as parts:
        next(parts)
    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), "the pages to come back")
    assert 0 < server.metric(committed) - before < length


def published(server: Server) -> set[str]:
    """Return the names of all samples on ``/metrics``."""
    lines = server.client.get("/metrics").text.splitlines()
    return {re.split(r"[{ ]", line)[0] for line in lines if line and not line.startswith("#")}


def test_every_metric_is_published(server: Server) -> None:
    assert published(server) >= {metric.sample for metric in METRICS}


def test_a_request_is_counted(server: Server) -> None:
    """Counts equal those of `test_metrics` and of the trace, whichever API process answers."""

    def read() -> dict[str, float]:
        return {m.name: server.metric(m.sample) for m in METRICS}

    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), "the others to end")
    before = read()
    request = {"prompt": [77] * 20, "max_tokens": 8, "ignore_eos": True}
    extra = {"diffusion_block_length": 4, "diffusion_trace": 2}
    for _ in range(2):
        trace = server.answer("completions", **request, vllm_xargs=extra)["choices"][0][
            "diffusion_trace"
        ]
        assert trace["nfe"] == 8 and len(trace["refreshes"]) == 2
    assert server.post("completions", **body("fixed steps", 3)).status_code == 400
    grown = {name: value - before[name] for name, value in read().items()}
    assert {name.removeprefix(PREFIX): value for name, value in grown.items() if value} == {
        "num_denoising_steps": 20,
        "num_canvas_positions": 80,
        "num_committed_tokens": 16,
        "full_passes": 8,
        "refreshes": 4,
        "block_steps": 8,
        "finished_blocks": 4,
        "kept_positions": 48,
        "evicted_positions": 48,
        "request_failures": 1,
    }


def test_the_dashboard_asks_for_what_is_published(server: Server) -> None:
    text = (ROOT / "examples" / "grafana" / "diffusion.json").read_text(encoding="utf-8")
    names = published(server)
    asked = set(re.findall(r"vllm:\w+", text))
    assert asked <= names
    assert {metric.sample for metric in METRICS} - asked <= {
        "vllm:diffusion_num_denoising_steps_total",
        "vllm:diffusion_num_canvas_positions_total",
    }
    labels = server.client.get("/metrics").text
    for label in ("model_name", "cause", "le"):
        assert f'{label}="' in labels
    assert json.loads(text)["templating"]["list"][1]["query"]["query"].endswith("model_name)")
