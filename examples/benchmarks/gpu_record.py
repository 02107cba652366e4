# SPDX-License-Identifier: Apache-2.0
"""What runs of the GPU benchmark gave, and joined."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from programs import Job
from session import Measurement


@dataclass
class Record:
    """Everything that was measured, of one run or of several.

    Attributes:
        runs: What each run was: command, card, versions, options; its rates of the machine; what
            its engines say of themselves, and the groups that they ran.
        measurements: Rates; ``notes`` have ``run`` (index into `runs`), ``floor`` (least seconds
            of the run), and ``beside`` (bytes of weights and pool that the peak includes).
        steps: Block steps and full passes, seconds, and what they are compared with.
        memory: Peaks over the weights, bytes, with a pool for one request alone.
        skipped: What was asked for and not measured, and why.
    """

    runs: list[Job] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    steps: list[Job] = field(default_factory=list)
    memory: list[Job] = field(default_factory=list)
    skipped: list[Job] = field(default_factory=list)

    def as_json(self) -> Job:
        return {
            "runs": self.runs,
            "measurements": [one.as_json() for one in self.measurements],
            "steps": self.steps,
            "memory": self.memory,
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, content: Job) -> Record:
        """Return what `as_json` wrote down.

        Raises:
            KeyError, TypeError: If it did not.
        """
        return cls(
            content["runs"],
            [Measurement.from_json(one) for one in content["measurements"]],
            content["steps"],
            content["memory"],
            content["skipped"],
        )

    def add(self, other: Record) -> None:
        """Take in what other runs gave, as the later ones, unless they are here already."""
        if all(run in self.runs for run in other.runs):
            return
        first = len(self.runs)
        turns = max((one.turn for one in self.measurements), default=0)
        self.runs += other.runs
        for one in other.measurements:
            one.turn += turns
            one.notes["run"] += first
            self.measurements.append(one)
        for name in ("steps", "memory", "skipped"):
            for entry in getattr(other, name):
                getattr(self, name).append(entry | {"run": entry["run"] + first})


def read(file: Path) -> Record:
    """Return what a run wrote.

    Raises:
        OSError: If the file cannot be read.
        KeyError, TypeError, ValueError: If it is no such file.
    """
    return Record.from_json(json.loads(file.read_text(encoding="utf-8")))


def merge(records: Iterable[Record]) -> Record:
    """Return what several runs gave, as one."""
    merged = Record()
    for record in records:
        merged.add(record)
    return merged


def find(measurements: list[Measurement], like: Measurement, contender: str) -> Measurement | None:
    """Return what a contender did in the same turn, on the same requests."""
    for one in measurements:
        if (one.turn, one.contender) == (like.turn, contender):
            return one
    return None
