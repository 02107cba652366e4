# SPDX-License-Identifier: Apache-2.0
"""A client: sends one request and records its outcome."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from traffic import Plan

#: A slow reader pauses this long after each piece, for the first `PAUSES` pieces.
PAUSE_SECONDS, PAUSES = 0.1, 10
#: A request counts as stuck after this long without a byte.
PATIENCE_SECONDS = 300.0


@dataclass
class Outcome:
    """The outcome of a plan.

    Attributes:
        status: HTTP status, or the code of a stream's error event; 0 if there was no answer.
        message: The error message, or what went wrong with the connection.
        choices: By index: ``tokens``, ``text``, ``finish_reason``, ``stop_reason``, ``logprobs``
            (of the tokens), ``trace``, ``chunks`` (number of pieces that have tokens).
        whole: Whether the complete answer was read.
        first_seconds: Time until the first piece of a stream, or None.
        gap_seconds: Times between the pieces of a stream.
    """

    status: int = 0
    message: str = ""
    choices: dict[int, dict[str, Any]] = field(default_factory=dict)
    whole: bool = False
    first_seconds: float | None = None
    gap_seconds: list[float] = field(default_factory=list)


def carry_out(client: httpx.Client, plan: Plan) -> Outcome:
    """Send a plan's request and read the answer in the plan's manner."""
    outcome = Outcome()
    body = {"model": "tiny", **plan.body}
    try:
        if body["stream"]:
            _read_stream(client, plan, body, outcome)
        else:
            # A client vanishes before a whole answer by not waiting for it.
            patience = 0.2 if plan.manner == "vanish" else PATIENCE_SECONDS
            timeout = httpx.Timeout(PATIENCE_SECONDS, read=patience)
            response = client.post(f"/v1/{plan.path}", json=body, timeout=timeout)
            _read_whole(response, outcome)
    except httpx.ReadTimeout:
        if plan.manner != "vanish":
            outcome.message = f"stuck: nothing came for {PATIENCE_SECONDS:.0f} s"
    except (httpx.TransportError, json.JSONDecodeError, KeyError) as error:
        outcome.message = f"{type(error).__name__}: {error}"
    return outcome


def _read_whole(response: httpx.Response, outcome: Outcome) -> None:
    outcome.status = response.status_code
    if response.status_code != 200:
        outcome.message = _message(response.text)
        return
    for choice in response.json()["choices"]:
        _add(outcome.choices, choice)
    outcome.whole = True


def _read_stream(client: httpx.Client, plan: Plan, body: dict[str, Any], outcome: Outcome) -> None:
    begun = last = time.perf_counter()
    leave_after = plan.number % 4 + 1 if plan.manner == "vanish" else None
    pieces = 0
    with client.stream("POST", f"/v1/{plan.path}", json=body, timeout=PATIENCE_SECONDS) as response:
        outcome.status = response.status_code
        if response.status_code != 200:
            outcome.message = _message(response.read().decode())
            return
        for line in response.iter_lines():
            if not line:
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                outcome.whole = True
                return
            event = json.loads(data)
            if "error" in event:
                outcome.status, outcome.message = event["error"]["code"], event["error"]["message"]
                return
            new = [_add(outcome.choices, choice) for choice in event["choices"]]
            if not any(new):
                continue
            now = time.perf_counter()
            if outcome.first_seconds is None:
                outcome.first_seconds = now - begun
            else:
                outcome.gap_seconds.append(now - last)
            last = now
            pieces += 1
            if pieces == leave_after:
                return
            if plan.manner == "slow" and pieces <= PAUSES:
                time.sleep(PAUSE_SECONDS)
        outcome.message = "the stream ended without [DONE]"


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return text


def _add(choices: dict[int, dict[str, Any]], choice: dict[str, Any]) -> bool:
    """Add a choice, or a piece of one, to ``choices``; return whether it has tokens."""
    own = choices.setdefault(
        choice["index"], {"tokens": [], "text": "", "chunks": 0, "logprobs": None, "trace": None}
    )
    part = choice.get("message") or choice.get("delta") or {}
    own["text"] += choice.get("text") or part.get("content") or ""
    tokens = choice.get("token_ids") or []
    own["tokens"] += tokens
    own["chunks"] += bool(tokens)
    scores = choice.get("logprobs")
    if scores:
        values = scores.get("token_logprobs")
        if values is None:
            values = [entry["logprob"] for entry in scores.get("content") or []]
        own["logprobs"] = (own["logprobs"] or []) + values
    if choice.get("diffusion_trace"):
        own["trace"] = choice["diffusion_trace"]
    if choice.get("finish_reason") is not None:
        own["finish_reason"] = choice["finish_reason"]
        own["stop_reason"] = choice.get("stop_reason")
    return bool(tokens)
