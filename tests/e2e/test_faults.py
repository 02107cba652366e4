# SPDX-License-Identifier: Apache-2.0
"""A server under faults: odd requests and clients, non-finite logits, processes that die."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.server import Server, free_port, launch, poll, start, tiny_llada
from tests.reference import load

CONTEXT = 2048
#: Token ids with a non-finite row in the embedding, and an id that makes the step fail that begins
#: its request.
NAN, INF, FAULT = 600, 601, 602
POLICIES = ("none", "prefix", "dual", "sparse")
_PLUGIN = f"""
def register():
    from vllm_sparse_dllm.engine.runner import DiffusionModelRunner

    original = DiffusionModelRunner.execute_model

    def execute_model(self, scheduler_output, *args, **kwargs):
        if any({FAULT} in new.prompt_token_ids for new in scheduler_output.scheduled_new_reqs):
            raise RuntimeError("a fault inside a step")
        return original(self, scheduler_output, *args, **kwargs)

    DiffusionModelRunner.execute_model = execute_model
"""


def faulty_plugin(folder: Path) -> dict[str, str]:
    """Write a vLLM plugin that fails at `FAULT`; return the environment that loads it."""
    (folder / "faulty.py").write_text(_PLUGIN)
    info = folder / "faulty-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nfaulty = faulty:register\n")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of a poisoned checkpoint; the last test that uses it makes it end."""
    folder = tmp_path_factory.mktemp("faults")
    model = Path(shutil.copytree(tiny_llada(), folder / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.transformer.wte.weight"][NAN] = torch.nan
    weights["model.transformer.wte.weight"][INF, 7] = torch.inf
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    started = start(folder / "server.log", model, **faulty_plugin(folder))
    yield started
    started.stop()


def ids(first: int, length: int) -> list[int]:
    """Return a prompt of ordinary tokens."""
    return [6 + (first * 97 + 31 * n) % 500 for n in range(length)]


def body(prompt: Any, max_tokens: int, **extra: Any) -> dict[str, Any]:
    """Return a completion request that also asks for the token ids."""
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": {f"diffusion_{name}": value for name, value in extra.items()} or None,
    }


def tokens_of(server: Server, request: dict[str, Any]) -> list[int]:
    return server.answer("completions", **request)["choices"][0]["token_ids"]


def wait_until_idle(server: Server) -> None:
    """Wait until nothing runs, waits or holds pages."""
    poll(lambda: server.gauges() == (0.0, 0.0, 0.0), f"no work, but {server.gauges()}")


def check_error(response: httpx.Response, streamed: bool) -> None:
    """Check that a request got an error of the server, as a stream's last event or at once."""
    if streamed:
        assert response.status_code == 200
        *_, last, done = response.text.split("\n\n")[:-1]
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 500
    else:
        assert response.status_code == 500
        assert response.json()["error"]["code"] == 500


# ------------------------------------------------------------------------------ odd requests


SPECIAL = "<|startoftext|><|mask|> a<|eot_id|><|user|><|endoftext|><|mask|>"


def test_names_of_special_tokens_are_those_tokens(server: Server) -> None:
    """A prompt with names of special tokens equals one with their ids; answers contain no mask."""
    mask = load(tiny_llada()).mask_id
    given = {"model": "tiny", "prompt": SPECIAL, "add_special_tokens": False}
    prompt = server.client.post("/tokenize", json=given).json()["tokens"]
    assert prompt.count(mask) == 2
    text = {**body(SPECIAL, 24), "add_special_tokens": False}
    for policy in POLICIES:
        text["vllm_xargs"] = {"diffusion_cache_policy": policy}
        tokens = tokens_of(server, text)
        assert tokens == tokens_of(server, body(prompt, 24, cache_policy=policy))
        assert mask not in tokens
    messages = [{"role": "user", "content": SPECIAL}]
    answer = server.answer("chat/completions", messages=messages, max_tokens=8)
    assert answer["usage"]["completion_tokens"] > 0


def test_empty_prompts(server: Server) -> None:
    """An empty prompt is refused, an empty message is not: the chat template adds tokens."""
    for empty in ("", [], [""], [[]], [[7], []]):
        response = server.post("completions", **body(empty, 4))
        assert response.status_code == 400, (empty, response.text)
        assert "prompt" in response.text
    messages = [{"role": "user", "content": ""}]
    assert server.answer("chat/completions", messages=messages, max_tokens=4)["choices"]


@pytest.mark.parametrize("policy", POLICIES)
def test_prompts_at_the_limit(server: Server, policy: str) -> None:
    """A prompt may leave room for one token: vLLM lowers max_tokens, but refuses longer prompts."""
    at_most = body(ids(1, CONTEXT - 1), 1, cache_policy=policy)
    [token] = tokens_of(server, at_most)
    assert tokens_of(server, {**at_most, "max_tokens": 2}) == [token]
    for length, message in ((CONTEXT, "max_tokens must be"), (CONTEXT + 1, "input tokens")):
        response = server.post("completions", **body(ids(1, length), 1, cache_policy=policy))
        assert response.status_code == 400
        assert message in response.json()["error"]["message"]


@pytest.mark.parametrize("stop", ["数据", "據 🙂", "é д", "🙂"])
def test_a_unicode_stop_string_across_commits(server: Server, stop: str) -> None:
    """Characters take several steps: tokens are bytes here, and a grammar commits one per step."""
    text = "ab數據 🙂 数据é дz"
    request: dict[str, Any] = {"prompt": ids(3, 9), "max_tokens": 64, "stop": [stop]}
    request["structured_outputs"] = {"choice": [text]}
    [choice] = server.answer("completions", **request)["choices"]
    assert choice["text"] == text[: text.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    with server.streamed("completions", **request) as parts:
        pieces = [part["choices"][0]["text"] for part in parts]
    assert "".join(pieces) == choice["text"]


def test_thousands_of_tiny_requests(server: Server) -> None:
    def ask(number: int) -> int:
        prompts = [[6 + (number + n) % 500] for n in range(1000)]
        answer = server.answer("completions", **body(prompts, 1))
        assert sorted(choice["index"] for choice in answer["choices"]) == list(range(1000))
        assert all(len(choice["token_ids"]) == 1 for choice in answer["choices"])
        return answer["usage"]["completion_tokens"]

    with ThreadPoolExecutor(2) as clients:
        assert list(clients.map(ask, range(2))) == [1000, 1000]
    wait_until_idle(server)


# ------------------------------------------------------------------------------- odd clients


@contextmanager
def silent_client(server: Server, **request: Any) -> Iterator[socket.socket]:
    """Send a completion request without reading its answer."""
    content = json.dumps({"model": "tiny", **request}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    url = server.client.base_url
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((url.host, url.port))
        connection.sendall(head.encode() + content)
        yield connection


def test_slow_readers_hold_nobody_up(server: Server) -> None:
    """While a client leaves megabytes unread, others are served; then it receives its answer."""
    others = [body(ids(n, 40), 48, cache_policy=policy) for n, policy in enumerate(POLICIES)]
    expected = [tokens_of(server, request) for request in others]
    count, canvas = 128, [500] * 1500
    large = body([[7]] * count, len(canvas), canvas=canvas)
    with silent_client(server, **large, logprobs=0, stream=True) as slow:
        with ThreadPoolExecutor(4) as clients:
            assert list(clients.map(lambda r: tokens_of(server, r), others)) == expected
        # The engine does not wait for readers.
        wait_until_idle(server)
        slow.settimeout(120)
        received = b"".join(iter(lambda: slow.recv(1 << 20), b""))
    # More than the connection can buffer.
    assert len(received) > 6 << 20
    assert received.count(b"data: [DONE]") == 1
    assert received.count(b'"finish_reason":"length"') == count


@pytest.mark.parametrize("stream", [False, True])
def test_vanishing_clients_leave_nothing(server: Server, stream: bool) -> None:
    requests = [body(ids(n, 64), 1900, cache_policy=policy) for n, policy in enumerate(POLICIES)]
    leave = threading.Event()

    def vanish(request: dict[str, Any]) -> None:
        with silent_client(server, **request, stream=stream):
            leave.wait(timeout=120)

    with ThreadPoolExecutor(4) as clients:
        gone = [clients.submit(vanish, request) for request in requests]
        poll(lambda: server.gauges()[0] == len(requests), "all to run")
        assert server.gauges()[2] > 0
        leave.set()
        for client in gone:
            client.result()
    wait_until_idle(server)


# --------------------------------------------------------------------- what is not finite


def test_logits_that_are_not_finite_fail_their_request_alone(server: Server) -> None:
    """They give HTTP 500 or an error event; other requests, then and later, are unchanged."""
    others = [
        body(ids(n, 40), 160, cache_policy=policy, block_length=16)
        for n, policy in enumerate(POLICIES)
    ]
    expected = [tokens_of(server, request) for request in others]
    begun = threading.Barrier(len(others) + 1)

    def ask(request: dict[str, Any]) -> list[int]:
        with server.streamed("completions", **request) as parts:
            found = list(next(parts)["choices"][0]["token_ids"])
            begun.wait(timeout=120)
            for part in parts:
                found += part["choices"][0]["token_ids"]
        return found

    with ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(ask, request) for request in others]
        begun.wait(timeout=120)
        for policy in POLICIES:
            for poison, stream in ((NAN, False), (INF, True)):
                bad = body([*ids(9, 60), poison], 40, cache_policy=policy)
                check_error(server.post("completions", **bad, stream=stream), stream)
        # Several prompts in one HTTP request fail together, even if only one is bad.
        check_error(server.post("completions", **body([ids(1, 9), [NAN]], 8)), False)
        assert [answer.result() for answer in asked] == expected
    wait_until_idle(server)
    # Again, on pages that the failed requests wrote to.
    assert [tokens_of(server, request) for request in others] == expected
    assert server.metric("vllm:diffusion_request_failures_total", cause="logits") == 9
    assert "logits" in server.log.read_text()


# ---------------------------------------------------------------------------------- deaths


def check_errors(server: Server, kill: Callable[[], Any]) -> None:
    """Check that six running requests get an error after ``kill`` is called."""

    def ask(number: int) -> httpx.Response:
        request = body(ids(number, 100), 1900, cache_policy="none")
        return server.post("completions", **request, stream=number % 2 == 1)

    with ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(ask, number) for number in range(6)]
        poll(lambda: server.gauges()[0] == len(asked), "all to run")
        kill()
        for number, answer in enumerate(asked):
            check_error(answer.result(timeout=120), number % 2 == 1)


def check_death(server: Server, kill: Callable[[], Any]) -> None:
    """Check that running requests get an error, and that the server ends with an error status."""
    processes = server.processes()
    check_errors(server, kill)
    assert server.process.wait(timeout=300) not in (0, None)
    assert re.search("engine.* died", server.log.read_text(), re.IGNORECASE)
    poll(lambda: not any(process.is_running() for process in processes), "its processes to end")


def process_of(server: Server, name: str) -> psutil.Process:
    """Return the only process of a server whose command line contains a name."""
    [process] = server.processes(name)
    return process


def test_an_exception_inside_a_step_ends_the_server(server: Server) -> None:
    """Must be the last test that uses the shared server."""
    check_death(server, lambda: check_error(server.post("completions", **body([FAULT], 4)), False))
    assert "a fault inside a step" in server.log.read_text()


@pytest.mark.parametrize(
    ("victim", "options"),
    [("EngineCore", ()), ("Worker", ()), ("EngineCore", ("--api-server-count", "2"))],
)
def test_a_killed_process_ends_the_server(
    tmp_path: Path, victim: str, options: tuple[str, ...]
) -> None:
    # One server is started as users start it: its processes are its children.
    server = start(tmp_path / "server.log", tiny_llada(), *options, cold=victim == "Worker")
    try:
        check_death(server, process_of(server, victim).kill)
    finally:
        server.stop()


def test_a_server_may_outlive_its_engine(tmp_path: Path) -> None:
    """A server that is told to outlive its engine answers with errors, and stops as usual."""
    environment = {"VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1"}
    server = start(tmp_path / "server.log", tiny_llada(), **environment)
    try:
        check_errors(server, process_of(server, "EngineCore").kill)
        for streamed in (False, True):
            response = server.post("completions", **body([7], 4), stream=streamed)
            assert response.status_code == 500
        assert server.client.get("/health").status_code == 503
    finally:
        status = server.stop()
    assert status == 0


def test_a_spoilt_checkpoint_ends_the_start(tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_llada(), tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "mlp_hidden_size": 256}))
    server = launch(tmp_path / "server.log", free_port(), model)
    try:
        assert server.process.wait(timeout=900) != 0
    finally:
        server.stop()
    log = server.log.read_text()
    assert "ff_out.weight" in log and "(256, 512)" in log and "(256, 256)" in log
