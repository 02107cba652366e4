# SPDX-License-Identifier: Apache-2.0
"""Requests made from a server's OpenAPI description, and with odd values: none may get a 5xx."""

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
#: Most tokens of a response, so that requests that are not refused take little time.
LONGEST = 8


def served(body: Any) -> Any:
    """Return a body with the server's model name, and with a short response."""
    if not isinstance(body, dict):
        return body
    body = {**body, "model": "tiny"}
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int) and body[name] > LONGEST:
            body[name] = LONGEST
    if "max_tokens" not in body:
        body["max_tokens"] = LONGEST
    return body


#: Values that JSON can hold but schemathesis does not generate.
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


#: Stands for an odd value in `NESTED`; as a key, it is replaced by strings only.
HOLE = "<here>"
_SCHEMA = ("type", "minimum", "maxLength", "pattern", "enum", "items", "properties", "required")
_SCHEMA += ("anyOf", "$ref", "additionalProperties")
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object", "structural_tag", "_backend")
_STRUCTURED += ("disable_any_whitespace", "whitespace_pattern", "unheard_of")
_TAG = {"begin": "a", "schema": {"type": "integer"}, "end": "b"}


def _tag(structure: Any, trigger: Any = "a") -> Any:
    return {"type": "structural_tag", "structures": [structure], "triggers": [trigger]}


def _json_schema(**fields: Any) -> Any:
    given = {"name": "a", "schema": {"type": "integer"}, **fields}
    return {"response_format": {"type": "json_schema", "json_schema": given}}


def _call(**fields: Any) -> Any:
    function = {"name": "f", "arguments": "{}", **fields}
    calls = [{"id": "a", "type": "function", "function": function}]
    return {"messages": [{"role": "assistant", "content": None, "tool_calls": calls}]}


def _tool(**fields: Any) -> Any:
    function = {"name": "f", "parameters": {"type": "object"}, **fields}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "none"}


#: Fields added to a valid request of either endpoint, with an odd value in each `HOLE`.
NESTED: tuple[dict[str, Any], ...] = (
    *({"structured_outputs": {name: HOLE}} for name in _STRUCTURED),
    {"structured_outputs": {"choice": [HOLE]}},
    *({"structured_outputs": {"json": {name: HOLE}}} for name in _SCHEMA),
    {"structured_outputs": {"json": {"properties": {HOLE: {"const": HOLE}}}}},
    {"structured_outputs": {"regex": "a"}, "allowed_token_ids": [HOLE]},
    *({"response_format": {"type": "json_schema", name: HOLE}} for name in ("type", "json_schema")),
    *(_json_schema(**{name: HOLE}) for name in ("name", "schema", "strict", "description")),
    *(_json_schema(schema={"type": "object", name: HOLE}) for name in _SCHEMA),
    *({"response_format": _tag({**_TAG, name: HOLE})} for name in _TAG),
    {"response_format": _tag(HOLE)},
    {"response_format": _tag(_TAG, HOLE)},
    {"response_format": {"type": "structural_tag", "format": HOLE}},
    {"stream": True, "stream_options": {"include_usage": HOLE}},
    {"stream": True, "stream_options": {"continuous_usage_stats": HOLE}},
    {"stream": True, "stream_options": {HOLE: HOLE}},
    {"logit_bias": {"7": HOLE}},
    {"logit_bias": {HOLE: 1}},
    {"vllm_xargs": {HOLE: HOLE}},
    *({"vllm_xargs": {REQUEST_PREFIX + name: [HOLE]}} for name in ("canvas", "steps")),
    {"vllm_xargs": {REQUEST_PREFIX + "threshold": {"a": HOLE}}},
    *(
        {"repetition_detection": {"max_pattern_size": 2, "min_count": 3, name: HOLE}}
        for name in ("max_pattern_size", "min_pattern_size", "min_count", "unheard_of")
    ),
    *({name: [HOLE]} for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids")),
    {"kv_transfer_params": {"a": HOLE}},
    {"metadata": {"a": [HOLE]}},
)
NESTED_COMPLETION: tuple[dict[str, Any], ...] = ({"prompt": [HOLE]}, {"prompt": [[7], [HOLE]]})
NESTED_CHAT: tuple[dict[str, Any], ...] = (
    {"messages": [HOLE]},
    *({"messages": [{"role": "user", "content": "a", n: HOLE}]} for n in ("role", "content")),
    {"messages": [{"role": "user", "content": "a", HOLE: HOLE}]},
    {"messages": [{"role": "user", "content": [HOLE]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": HOLE}]}]},
    {"messages": [{"role": "user", "content": [{"type": HOLE, "text": "a"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": HOLE}]}]},
    {"messages": [{"role": "assistant", "content": "a", "tool_calls": HOLE}]},
    *(_call(**{name: HOLE}) for name in ("name", "arguments")),
    *(_tool(**{name: HOLE}) for name in ("name", "parameters", "description")),
    {"tools": [HOLE]},
    {**_tool(), "tool_choice": {"type": "function", "function": {"name": HOLE}}},
    {"chat_template_kwargs": {"a": HOLE}},
    {"chat_template_kwargs": {HOLE: 1}},
    {"documents": [{"title": HOLE, "text": "a"}]},
)


def filled(template: Any, value: Any) -> Any:
    """Return a template with a value in each `HOLE`."""
    if isinstance(template, dict):
        return {
            (value if key == HOLE and isinstance(value, str) else key): filled(inner, value)
            for key, inner in template.items()
        }
    if isinstance(template, list):
        return [filled(inner, value) for inner in template]
    return value if template == HOLE else template


def check_odd_values(server: Server, every: int = 1) -> None:
    """Send requests with one odd value each, in each field of each endpoint and nested in fields.

    Args:
        server: The server under test.
        every: Send only one in so many of these requests.

    Raises:
        AssertionError: If a request gets a 5xx or no complete answer.
    """
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    small = {"model": "tiny", "temperature": 1.0, "max_tokens": 4}
    requests: list[tuple[str, Any]] = []
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for path, name, question, nested in (
        (ENDPOINTS[0], "CompletionRequest", {"prompt": [7, 8, 9]}, NESTED_COMPLETION),
        (ENDPOINTS[1], "ChatCompletionRequest", chat, NESTED_CHAT),
    ):
        good = {**small, **question}
        fields = schemas[name]["properties"]
        requests += [(path, {**good, field: value}) for field in fields for value in ODD]
        requests += [
            (path, {**good, "vllm_xargs": {REQUEST_PREFIX + field: value}})
            for field in FIELDS
            for value in ODD
        ]
        requests += [
            (path, {**good, **filled(template, value)})
            for template in NESTED + nested
            for value in (*ODD, None, "x", -1)
        ]
    with ThreadPoolExecutor(16) as clients:
        found = clients.map(lambda request: _problem(server, *request), requests[::every])
        problems = [problem for problem in found if problem]
    assert not problems, f"{len(problems)} of {len(requests[::every])}:\n" + "\n".join(problems)
    assert server.healthy()


def check_response(body: Any, response: httpx.Response) -> None:
    """Check that a response is not a 5xx, and that a stream contains none and is complete.

    Raises:
        AssertionError: With the request and the response.
    """
    told = f"{body!r}\n{response.status_code} {response.text[-2000:]}"
    assert response.status_code < 500, told
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        assert '"code":5' not in response.text.replace(" ", ""), told
        assert response.text.rstrip().endswith("data: [DONE]"), told


def check_endpoints(server: Server, examples: int) -> None:
    """Send ``examples`` valid requests, and as many invalid ones, to each endpoint.

    Raises:
        AssertionError: If a request gets a 5xx or no complete answer.
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
        # Shrinking a request that fails would take minutes; the first one is enough.
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
    # httpx's own encoder refuses NaN and lone surrogates.
    content = b"" if isinstance(body, NotSet) else json.dumps(body, default=repr).encode()
    headers = {"Content-Type": "application/json", "Connection": "close"}
    response = server.client.post(path, content=content, headers=headers)
    check_response(body, response)
