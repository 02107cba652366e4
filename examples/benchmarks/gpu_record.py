# SPDX-License-Identifier: Apache-2.0
"""Records of GPU benchmark runs, and merging them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from programs import Job
from session import Measurement


@dataclass
class Record:
    """The results of one or several runs.

    Attributes:
        runs: For each run: command, machine, versions, options; the machine's rates; the engines'
            reports about themselves, and the groups that ran on them.
        measurements: Rates; ``notes`` have ``run`` (index into `runs`), ``floor`` (minimum seconds
            of a run), ``beside`` (bytes of weights and pool that the peak includes) and, for the
            engine, ``pages`` (bytes of all pages that its requests hold).
        steps: Seconds of block steps and full passes, and of what they are compared with.
        memory: Peak bytes with a pool for one request alone, and the weights and pool in them.
        skipped: What was requested but not measured, and why.
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
        """Return the record that `as_json` returned as ``content``.

        Raises:
            KeyError, TypeError: If ``content`` is no such record.
        """
        return cls(
            content["runs"],
            [Measurement.from_json(one) for one in content["measurements"]],
            content["steps"],
            content["memory"],
            content["skipped"],
        )

    def add(self, other: Record) -> None:
        """Append the results of another record, unless its runs are all included already."""
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
    """Read the record that a run wrote.

    Raises:
        OSError: If the file cannot be read.
        KeyError, TypeError, ValueError: If the file is no such record.
    """
    return Record.from_json(json.loads(file.read_text(encoding="utf-8")))


def merge(records: Iterable[Record]) -> Record:
    """Merge several records into one."""
    merged = Record()
    for record in records:
        merged.add(record)
    return merged


def find(measurements: list[Measurement], like: Measurement, contender: str) -> Measurement | None:
    """Return a contender's measurement of the same turn, on the same requests; None without one."""
    for one in measurements:
        if (one.turn, one.contender) == (like.turn, contender):
            return one
    return None
