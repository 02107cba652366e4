# SPDX-License-Identifier: Apache-2.0
"""Counters of the engine: integers, summed per step, on their way to the front end.

The runner fills a `StepCounts`, the scheduler adds what only it knows (`EngineFigures`) and sends
everything with vLLM's own statistics of the step; `frontend/metrics.py` publishes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Name of the figures in `SchedulerStats.kv_connector_stats`.
FIGURES = "sparse_dllm"
#: What the first waiting request waits for; all others wait behind it. Requests whose grammar is
#: still being compiled are counted separately, under ``grammar``.
QUEUE_CAUSES = ("pages", "token_budget", "max_num_seqs", "grammar")
#: Why a request ends without an answer.
FAILURE_CAUSES = ("refused", "pages", "grammar", "logits")
#: Those found by the engine and caused by the request itself; its client gets the reason.
TOLD_CAUSES = ("refused", "pages", "grammar")


@dataclass
class StepCounts:
    """What was run, summed over requests and steps; a guided request counts as one.

    Attributes:
        full_passes: Steps of a request that ran all its positions.
        refreshes: Full passes that filled the request's cache.
        block_steps: Steps of a request that ran against its cache.
        blocks: Blocks that were finished.
        finished_positions: Positions of the finished blocks.
        positions: Positions of the current block, for each step of a request.
        committed: Tokens that were committed.
        kept: Most positions that a layer kept, for each sequence and choice of what to keep.
        evicted: Candidates of these choices minus ``kept``.
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
    """What an engine counted since its last report.

    Attributes:
        steps: What was run.
        queued: Requests that waited while others ran, summed over steps, by cause.
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
