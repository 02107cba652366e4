# SPDX-License-Identifier: Apache-2.0
"""A server with engine settings, one slot and priorities."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.server import Server, poll, running_server, tiny_llada

PROMPT = [77, 311, 316]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One request runs at a time, the least priority value first."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    settings = {"sparse_dllm": {"default_response_length": 40, "cache_policy": "dual"}}
    options = ["--additional-config", json.dumps(settings), "--max-num-seqs", "1"]
    options += ["--scheduling-policy", "priority"]
    with running_server(log, tiny_llada(), *options) as started:
        yield started


def test_default_length_is_a_setting(server: Server) -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = server.answer("chat/completions", messages=messages, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 40
    longer = server.answer("chat/completions", messages=messages, ignore_eos=True, max_tokens=50)
    assert longer["usage"]["completion_tokens"] == 50


def test_waiting_requests_run_by_priority(server: Server) -> None:
    """Three wait for the only slot; they run by priority, not in the order they came."""
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
