# SPDX-License-Identifier: Apache-2.0
"""What the engine counts: integers, summed per step, from the runner to the front end.

The runner fills a `StepCounts`, the scheduler adds what it alone knows (`EngineFigures`) and
sends the sum with vLLM's own statistics of the step; `metrics.py` publishes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Name of the figures in `SchedulerStats.kv_connector_stats`.
FIGURES = "sparse_dllm"
#: What the first of the waiting requests waits for, and all others with it; but those whose
#: grammar is not compiled yet wait for that.
QUEUE_CAUSES = ("pages", "token_budget", "max_num_seqs", "grammar")
#: Why a request ends without an answer.
FAILURE_CAUSES = ("refused", "pages", "grammar", "logits")
#: Those of them that the engine finds and that are the request's own fault.
TOLD_CAUSES = ("pages", "grammar")


@dataclass
class StepCounts:
    """What was run, summed over requests and steps; a guided request counts as one.

    Attributes:
        full_passes: Steps of a request that ran all its positions.
        refreshes: Those of them that filled its cache.
        block_steps: Steps of a request that ran against its cache.
        blocks: Blocks that were finished.
        finished_positions: Their positions.
        positions: Positions of the current block, a step of a request.
        committed: Tokens that were committed.
        kept: Positions that a layer kept, a refreshed sequence.
        evicted: Positions that a layer might have kept and did not, a refreshed sequence.
    """

    full_passes: int = 0
    refreshes: int = 0
    block_steps: int = 0
    blocks: int = 0
    finished_positions: int = 0
    positions: int = 0
    committed: int = 0
    kept: int = 0
    evicted: int = 0

    def add(self, other: StepCounts) -> None:
        """Add the counts of another step."""
        for name, number in vars(other).items():
            setattr(self, name, getattr(self, name) + number)


@dataclass
class EngineFigures:
    """What an engine counted since it last told.

    Attributes:
        steps: What was run.
        queued: Requests that waited while others ran, a step, by cause.
        failures: Requests that failed, by cause.
    """

    steps: StepCounts = field(default_factory=StepCounts)
    queued: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)

    def queue(self, cause: str, num_requests: int) -> None:
        """Count the requests that wait in this step."""
        if num_requests:
            self.queued[cause] = self.queued.get(cause, 0) + num_requests

    def fail(self, cause: str) -> None:
        """Count a failed request."""
        self.failures[cause] = self.failures.get(cause, 0) + 1

    def message(self, pages_held: int, num_pages: int) -> dict[str, Any]:
        """Return everything as plain data, with the state of the page pool."""
        return {
            "steps": vars(self.steps),
            "queued": self.queued,
            "failures": self.failures,
            "pages_held": pages_held,
            "pages": num_pages,
        }
