# SPDX-License-Identifier: Apache-2.0
"""Requests that schemathesis makes from a server's own OpenAPI description: none may get a 5xx."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.core import NotSet
from schemathesis.specs.openapi.schemas import OpenApiSchema

from tests.e2e.server import Server
from vllm_sparse_dllm.settings import FIELDS, REQUEST_PREFIX

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
#: Of a response, so that those which are served do not take the time.
LONGEST = 8


def served(body: Any) -> Any:
    """Return a body that is not refused for its model's name, and not long to answer."""
    if not isinstance(body, dict):
        return body
    body = {**body, "model": "tiny"}
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int) and body[name] > LONGEST:
            body[name] = LONGEST
    if "max_tokens" not in body:
        body["max_tokens"] = LONGEST
    return body


#: What JSON can hold and schemathesis does not make.
ODD: tuple[Any, ...] = (
    float("nan"),
    float("inf"),
    -float("inf"),
    2**63,
    2**64,
    -(2**70),
    1e308,
    "\ud800",
    "\0",
    "e\u0301" * 40,
    "9" * 5000,
    [],
    {},
    [[[[]]]],
    {"": None},
    True,
)


def check_odd_values(server: Server, every: int = 1) -> None:
    """Put each odd value into each field of each endpoint, one at a time.

    Args:
        server: Where to.
        every: Send only one in so many of these requests.

    Raises:
        AssertionError: If one is answered by a 5xx.
    """
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    small = {"model": "tiny", "temperature": 1.0, "max_tokens": 4}
    requests: list[tuple[str, Any]] = []
    for path, name, question in (
        (ENDPOINTS[0], "CompletionRequest", {"prompt": [7, 8, 9]}),
        (ENDPOINTS[1], "ChatCompletionRequest", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        good = {**small, **question}
        fields = schemas[name]["properties"]
        requests += [(path, {**good, field: value}) for field in fields for value in ODD]
        requests += [
            (path, {**good, "vllm_xargs": {REQUEST_PREFIX + field: value}})
            for field in FIELDS
            for value in ODD
        ]
    with ThreadPoolExecutor(16) as clients:
        found = clients.map(lambda request: _problem(server, *request), requests[::every])
        problems = [problem for problem in found if problem]
    assert not problems, f"{len(problems)} of {len(requests[::every])}:\n" + "\n".join(problems)
    assert server.healthy()


def check_response(body: Any, response: httpx.Response) -> None:
    """Check that a response is no 5xx, and that a stream holds none and ends.

    Raises:
        AssertionError: With the request and the response.
    """
    told = f"{body!r}\n{response.status_code} {response.text[-2000:]}"
    assert response.status_code < 500, told
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        assert '"code":5' not in response.text.replace(" ", ""), told
        assert response.text.rstrip().endswith("data: [DONE]"), told


def check_endpoints(server: Server, examples: int) -> None:
    """Send as many valid requests, and as many that are not, to each endpoint.

    Raises:
        AssertionError: If one is answered by a 5xx.
    """
    schema = schemathesis.openapi.from_dict(server.client.get("/openapi.json").json())
    for path in ENDPOINTS:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            _check(server, schema, path, mode, examples)


def _check(
    server: Server, schema: OpenApiSchema, path: str, mode: GenerationMode, examples: int
) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        # Shrinking a 5xx would take minutes; the first one tells enough.
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def one(case: Case) -> None:
        _send(server, path, served(case.body))

    one()
    assert server.healthy()


def _problem(server: Server, path: str, body: Any) -> str | None:
    try:
        _send(server, path, body)
    except (AssertionError, httpx.TransportError) as error:
        return f"{body!r}: {error!r}"
    return None


def _send(server: Server, path: str, body: Any) -> None:
    # Not httpx's encoder, which refuses NaN and halves of surrogate pairs.
    content = b"" if isinstance(body, NotSet) else json.dumps(body, default=repr).encode()
    headers = {"Content-Type": "application/json", "Connection": "close"}
    response = server.client.post(path, content=content, headers=headers)
    check_response(body, response)
