# SPDX-License-Identifier: Apache-2.0
"""Break down an engine's recorded steps into the parts that each kind of step spends time on."""

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
            positions; ``mixed``: some of each.
        num_steps: Number of steps of this kind.
        num_requests: Requests in each step.
        num_tokens: Median number of tokens in a step.
        seconds: Median time of a step, per pass.
        parts: Median time of each part of a step, per pass.
        details: Median time of each part of the forward, per pass, from a detailed run.
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
        """Time of the model, including its head."""
        return sum(self.parts[part] for part in FORWARD_PARTS)

    @property
    def share_outside_forward(self) -> float:
        """Share of the step outside the model, computed from the parts' medians."""
        return 1 - self.forward / sum(self.parts.values())


def break_down(record: Job, detailed: Job | None = None) -> dict[str, Breakdown]:
    """Return each kind of step that occurred, from its steps with the most requests."""
    steps = _by_kind(record)
    details = _by_kind(detailed) if detailed else {}
    return {kind: _summary(kind, chosen, details.get(kind, [])) for kind, chosen in steps.items()}


def _by_kind(record: Job) -> dict[str, list[Job]]:
    steps: dict[str, list[Job]] = {}
    for step in record["steps"]:
        if not step["tokens"] or not step["num_forwards"]:
            continue
        # Under `prefix` a step on the cache runs the block and all positions after it.
        cached = [tokens <= record["response"] for tokens in step["tokens"]]
        kind = "block" if all(cached) else "mixed" if any(cached) else "full"
        steps.setdefault(kind, []).append(step)
    result: dict[str, list[Job]] = {}
    for kind, chosen in steps.items():
        most = max(len(step["tokens"]) for step in chosen)
        result[kind] = [step for step in chosen if len(step["tokens"]) == most]
    return result


def _summary(kind: str, steps: list[Job], detailed: list[Job]) -> Breakdown:
    # An engine step may run several passes, so all times are per pass.
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
    """Return the maximum bytes of pages that were held at once."""
    return max((step["cache_bytes"] for step in record["steps"]), default=0)


def as_json(kinds: dict[str, Breakdown]) -> dict[str, Any]:
    return {
        kind: vars(one) | {"forward": one.forward, "outside": one.share_outside_forward}
        for kind, one in kinds.items()
    }
