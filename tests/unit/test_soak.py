# SPDX-License-Identifier: Apache-2.0
"""The verdict of the soak test: everything that is wrong is found, and nothing else.

`tests/e2e/test_soak.py` runs a small soak.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.scripts import EXAMPLES, load

traffic, clients, run = load(EXAMPLES / "soak", "traffic", "clients", "run")

MIB = 1 << 20


def soak(**server: Any) -> Any:
    """Return a soak of a server that is idle, except for what ``server`` replaces."""
    idle = {"gauges": lambda: (0.0, 0.0, 0.0), "metric": lambda name: 0.0}
    process = SimpleNamespace(pid=os.getpid())
    return run.Soak(run.parse([]), SimpleNamespace(process=process, **{**idle, **server}))


def plan(**fields: Any) -> Any:
    return traffic.Plan(**{"number": 0, "path": "completions", "body": {}, **fields})


def choice(**fields: Any) -> dict[str, Any]:
    """Return a choice as clients record it, by default without logprobs and trace."""
    own = {"tokens": [7, 8], "text": "ab", "finish_reason": "stop", "stop_reason": None}
    return {**own, "logprobs": None, "trace": None, **fields}


def outcome(**fields: Any) -> Any:
    good = {"status": 200, "whole": True, "choices": {0: choice()}}
    return clients.Outcome(**{**good, **fields})


REFUSED = {"status": 400, "named": "diffusion_steps", "kind": "bad"}
NO_ANSWER: dict[str, Any] = {"whole": False, "choices": {}}
OUTCOMES = [
    (plan(), outcome(), True),
    (plan(), outcome(status=500, message="error", **NO_ANSWER), False),
    (plan(), outcome(status=400, message="diffusion_steps", **NO_ANSWER), False),
    (plan(), outcome(whole=False), False),
    (plan(), outcome(choices={}), False),
    (plan(), outcome(message="stuck"), False),
    (plan(manner="slow"), outcome(whole=False, message="the stream ended"), False),
    (plan(**REFUSED), outcome(status=400, message="diffusion_steps must be", **NO_ANSWER), True),
    (plan(**REFUSED), outcome(status=400, message="something else", **NO_ANSWER), False),
    (plan(**REFUSED), outcome(status=500, message="diffusion_steps", **NO_ANSWER), False),
    (plan(**REFUSED), outcome(), False),
    (plan(manner="vanish"), outcome(status=0, **NO_ANSWER), True),
    (plan(manner="vanish"), outcome(whole=False), True),
    (plan(manner="vanish"), outcome(status=0, message="ReadError", **NO_ANSWER), False),
    (plan(manner="vanish"), outcome(status=500, message="error", **NO_ANSWER), False),
]


@pytest.mark.parametrize(("given", "found", "right"), OUTCOMES)
def test_outcomes(given: Any, found: Any, right: bool) -> None:
    own = soak()
    own.results = [(given, found)]
    own.check_outcomes()
    assert bool(own.failures) != right


SCORED = {"logprobs": [-0.5, -1.0]}
TRACED = {"body": {"vllm_xargs": {"diffusion_trace": 1}}}
TRACE = {"trace": {"steps": [0, 1]}}
ANSWERS: list[tuple[Any, dict[str, Any], dict[str, Any], bool]] = [
    (plan(), {}, {}, True),
    (plan(), {"tokens": [7, 9]}, {}, False),
    (plan(), {"text": "a"}, {}, False),
    (plan(), {"finish_reason": "length"}, {}, False),
    (plan(), {"stop_reason": "b"}, {}, False),
    (plan(), {"logprobs": [-0.5, -1.0002]}, SCORED, True),
    (plan(), {"logprobs": [-0.5, -1.002]}, SCORED, False),
    (plan(), {"logprobs": [-0.5]}, SCORED, False),
    (plan(), {}, SCORED, False),
    (plan(**TRACED), TRACE, {}, True),
    (plan(**TRACED), {}, {}, False),
    (plan(**TRACED), {"trace": {"steps": [0]}}, {}, False),
    (plan(), TRACE, {}, False),
]


@pytest.mark.parametrize(("given", "own", "offline", "right"), ANSWERS)
def test_answers(given: Any, own: dict[str, Any], offline: dict[str, Any], right: bool) -> None:
    found = run.differences(given, outcome(choices={0: choice(**own)}), [choice(**offline)])
    assert bool(found) != right


def test_an_answer_that_was_not_read_to_its_end() -> None:
    offline = [choice(tokens=[7, 8, 9], text="abc")]
    for own, right in (({}, True), ({"tokens": [7, 9]}, False), ({"text": "b"}, False)):
        given = outcome(choices={0: choice(**own)}, whole=False)
        assert bool(run.differences(plan(manner="vanish"), given, offline)) != right


def test_choices_that_are_missing() -> None:
    assert run.differences(plan(), outcome(), [choice(), choice()])


@pytest.mark.parametrize(
    ("server", "right"),
    [
        ({}, True),
        ({"gauges": lambda: (1.0, 0.0, 0.0)}, False),
        ({"gauges": lambda: (0.0, 0.0, 0.1)}, False),
        ({"metric": lambda name: 1.0}, False),
    ],
)
def test_what_is_left(server: dict[str, Any], right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def poll_once(condition: Callable[[], Any], what: str) -> None:
        if not condition():
            raise TimeoutError(what)

    monkeypatch.setattr(run, "poll", poll_once)
    own = soak(**server)
    own.memory.sample(1)
    own.check_server()
    assert bool(own.failures) != right


@pytest.mark.parametrize(
    ("growth", "requests", "right"), [(0, 3000, True), (100, 3000, False), (100, 300, True)]
)
def test_memory(growth: int, requests: int, right: bool) -> None:
    """Growth in the last third, in MiB, is a failure, unless the requests are too few to judge."""
    own = soak()
    own.results = [(plan(), outcome())] * requests
    sizes = (200, 500, 500 + growth)
    own.memory.samples = [(n, sizes[min(2, 3 * n // requests)] * MIB) for n in range(requests)]
    assert own.memory.thirds() == tuple(size * MIB for size in sizes)
    own.check_server()
    assert bool(own.failures) != right
