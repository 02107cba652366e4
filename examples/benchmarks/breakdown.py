# SPDX-License-Identifier: Apache-2.0
"""From an engine's record of its steps to what a step of each kind spends its time on."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from probes import FORWARD_DETAILS, FORWARD_PARTS, PARTS
from programs import Job


@dataclass(frozen=True)
class Breakdown:
    """Steps of one kind.

    Attributes:
        kind: ``block``: all requests run a step on their caches; ``full``: all run all
            positions; ``mixed``.
        num_steps: Steps of this kind.
        num_requests: Requests in each.
        num_tokens: Tokens in each, the median.
        seconds: Time of a step, the median.
        parts: Part to time, medians.
        details: Part of the forward to time, medians, from a detailed run.
    """

    kind: str
    num_steps: int
    num_requests: int
    num_tokens: float
    seconds: float
    parts: dict[str, float]
    details: dict[str, float]

    @property
    def forward(self) -> float:
        """The model's time, its head included."""
        return sum(self.parts[part] for part in FORWARD_PARTS)

    @property
    def share_outside_forward(self) -> float:
        """Part of the step that is not the model's: the sum of the other parts' medians."""
        return 1 - self.forward / sum(self.parts.values())


def break_down(record: Job, detailed: Job | None = None) -> dict[str, Breakdown]:
    """Return the kinds of steps that occurred, each with as many requests as ever ran at once."""
    steps = _by_kind(record)
    details = _by_kind(detailed) if detailed else {}
    return {kind: _summary(kind, chosen, details.get(kind, [])) for kind, chosen in steps.items()}


def _by_kind(record: Job) -> dict[str, list[Job]]:
    steps: dict[str, list[Job]] = {}
    for step in record["steps"]:
        if not step["tokens"] or not step["num_forwards"]:
            continue
        # Under `prefix` a step on the cache runs the block and all behind it.
        cached = [tokens <= record["response"] for tokens in step["tokens"]]
        kind = "block" if all(cached) else "mixed" if any(cached) else "full"
        steps.setdefault(kind, []).append(step)
    result: dict[str, list[Job]] = {}
    for kind, chosen in steps.items():
        most = max(len(step["tokens"]) for step in chosen)
        result[kind] = [step for step in chosen if len(step["tokens"]) == most]
    return result


def _summary(kind: str, steps: list[Job], detailed: list[Job]) -> Breakdown:
    # Several passes may run in one engine step: everything is per pass.
    def medians(chosen: list[Job], names: tuple[str, ...]) -> dict[str, float]:
        return {
            name: statistics.median(
                step["seconds"].get(name, 0.0) / step["num_forwards"] for step in chosen
            )
            for name in names
        }

    return Breakdown(
        kind=kind,
        num_steps=len(steps),
        num_requests=len(steps[0]["tokens"]),
        num_tokens=statistics.median(sum(step["tokens"]) for step in steps),
        seconds=statistics.median(step["total"] / step["num_forwards"] for step in steps),
        parts=medians(steps, PARTS),
        details=medians(detailed, FORWARD_DETAILS) if detailed else {},
    )


def cache_bytes(record: Job) -> int:
    """Return the most bytes of pages that were held at once."""
    return max((step["cache_bytes"] for step in record["steps"]), default=0)


def as_json(kinds: dict[str, Breakdown]) -> dict[str, Any]:
    return {
        kind: vars(one) | {"forward": one.forward, "outside": one.share_outside_forward}
        for kind, one in kinds.items()
    }
