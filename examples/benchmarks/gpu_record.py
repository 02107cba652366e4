# SPDX-License-Identifier: Apache-2.0
"""What runs of the GPU benchmark gave: joined, judged, and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu_cases import SCALES, SCHEDULES, Scale
from programs import Job
from session import Measurement
from tables import Target, table, targets_table

GIB = 2**30
#: The card of the targets, in its name.
CARD = "H100"


@dataclass
class Record:
    """Everything that was measured, of one run or of several.

    Attributes:
        runs: What each run was: command, card, versions, options; its rates of the machine.
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
            "targets": [one.as_json() for one in check_targets(self)],
        }

    @classmethod
    def from_json(cls, content: Job) -> Record:
        """Return what `as_json` wrote down; targets are worked out anew."""
        return cls(
            content["runs"],
            [Measurement.from_json(one) for one in content["measurements"]],
            content["steps"],
            content["memory"],
            content["skipped"],
        )

    def add(self, other: Record) -> None:
        """Take in what other runs gave, as the later ones."""
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


def merge(files: Iterable[Path]) -> Record:
    """Return what several runs wrote, as one."""
    record = Record()
    for file in files:
        record.add(Record.from_json(json.loads(file.read_text(encoding="utf-8"))))
    return record


# Targets.


def check_targets(record: Record) -> list[Target]:
    """Return the figures that must hold on one H100 with LLaDA-8B, by the latest measurements.

    Where only the small model ran, its figures stand in their place and are not judged.
    """
    sizes = {run["size"] for run in record.runs if run["family"] == "llada"}
    size = "public" if "public" in sizes or not sizes else min(sizes)
    return list(_Targets(record, size, SCALES[size]))


@dataclass
class _Targets:
    record: Record
    size: str
    scale: Scale

    def __iter__(self) -> Iterator[Target]:
        scale, name = self.scale, "LLaDA-8B" if self.size == "public" else f"LLaDA {self.size}"
        for schedule in ("sparse", *SCHEDULES):
            yield self._rate(f"{name}, one request, context {scale.short:,}", schedule, 1, 120.0)
        for context, bound in ((scale.medium, 15.0), (scale.large, 25.0)):
            for schedule in ("sparse", *SCHEDULES):
                yield self._over_none(name, schedule, context, bound)
        for schedule in ("sparse", *SCHEDULES):
            figure = f"{name}, {scale.many} requests, context {scale.short:,}"
            yield self._rate(figure, schedule, scale.many, 2000.0)
        yield self._step(name)
        yield self._memory(name)

    def _counts(self, run: int) -> bool:
        """Return whether a run was of this model."""
        about = self.record.runs[run]
        return (about["family"], about["size"]) == ("llada", self.size)

    def _latest(self, entries: list[Job], **wanted: Any) -> Job | None:
        """Return the last entry of this model with these values, None if there is none."""
        for one in reversed(entries):
            if self._counts(one["run"]) and wanted.items() <= one.items():
                return one
        return None

    def _target(
        self,
        figure: str,
        bound: float,
        run: int | None = None,
        value: float | None = None,
        note: str = "",
        at_least: bool = True,
    ) -> Target:
        if run is None:
            return Target(figure, bound, None, at_least)
        name = self.record.runs[run]["machine"]["name"]
        judged = self.size == "public" and CARD in name
        note = "; ".join(filter(None, (f"run {run + 1}, {name}", note)))
        return Target(figure, bound, value, at_least, note, judged)

    def _measurements(self, contender: str, prompt: int, requests: int) -> Iterator[Measurement]:
        """Yield what a contender did, the latest first."""
        wanted = (f"engine {contender}", prompt, requests)
        for one in reversed(self.record.measurements):
            if (
                self._counts(one.notes["run"])
                and (one.contender, one.prompt, one.concurrency) == wanted
            ):
                yield one

    def _rate(self, figure: str, schedule: str, requests: int, bound: float) -> Target:
        one = next(self._measurements(schedule, self.scale.short, requests), None)
        figure = f"{figure}, {schedule}: tokens/s"
        if one is None:
            return self._target(figure, bound)
        note = f"the roofline allows {_most(one):,.0f}"
        return self._target(figure, bound, one.notes["run"], one.rate, note)

    def _over_none(self, name: str, schedule: str, context: int, bound: float) -> Target:
        figure = f"{name}, one request, context {context:,}: {schedule} over none"
        one = none = None
        for none in self._measurements("none", context, 1):
            one = find(self.record.measurements, none, f"engine {schedule}")
            if one is not None:
                break
        if one is None or none is None:
            return self._target(figure, bound)
        note = f"{one.rate:.2f} and {none.rate:.2f} tokens/s; rooflines {_most(one):.2f} and "
        note += f"{_most(none):.2f}: {_most(one) / _most(none):.1f} ×"
        return self._target(figure, bound, one.notes["run"], one.speed_up(none), note)

    def _step(self, name: str) -> Target:
        scale = self.scale
        one = self._latest(self.record.steps, prompt=scale.short, requests=1)
        figure = (
            f"{name}, block step of one request, context {scale.short:,}, over weights / bandwidth"
        )
        if one is None:
            return self._target(figure, 1.3, at_least=False)
        ratio = one["block_step"] / one["weights"]
        note = f"{1e3 * one['block_step']:.2f} and {1e3 * one['weights']:.2f} ms"
        return self._target(figure, 1.3, one["run"], ratio, note, at_least=False)

    def _memory(self, name: str) -> Target:
        context = self.scale.large
        figure = f"{name}, one request, context {context:,}, sparse: peak memory over weights, GiB"
        one = self._latest(self.record.memory, prompt=context, contender="engine sparse")
        if one is None:
            return self._target(figure, 7.0, at_least=False)
        value = (one["peak"] - one["weights"]) / GIB
        return self._target(figure, 7.0, one["run"], value, at_least=False)


def find(measurements: list[Measurement], like: Measurement, contender: str) -> Measurement | None:
    """Return what a contender did in the same turn, on the same requests."""
    for one in measurements:
        if (one.turn, one.contender) == (like.turn, contender):
            return one
    return None


# Tables.


def _times(one: Measurement, other: Measurement | None) -> str:
    return "" if other is None or other is one else f"{one.speed_up(other):.2f}"


def _most(one: Measurement) -> float:
    """Return the tokens a second that the roofline allows."""
    return one.num_requests * one.response / one.notes["floor"]


def rates_table(measurements: list[Measurement]) -> str:
    """Return the table of rates; those of one turn ran in turn on the same requests."""
    rows = []
    for one in measurements:
        policy = one.contender.partition(" ")[2]
        scaled = f" (× {one.scale:g})" if one.scale > 1 else ""
        most = _most(one)
        beside = sum(one.notes.get("beside", {}).values())
        rows.append(
            [
                str(one.notes["run"] + 1),
                f"{one.prompt:,}",
                str(one.concurrency),
                one.contender,
                f"{one.rate:.2f}{scaled}",
                f"{len(one.seconds)}",
                f"{one.spread:.0%}",
                _times(one, find(measurements, one, "engine none")),
                _times(one, find(measurements, one, f"baseline {policy}")),
                _times(one, find(measurements, one, "baseline none")),
                f"{most:,.1f}",
                f"{one.rate / most:.0%}",
                f"{(one.peak_memory - beside) / GIB:.2f}",
                f"{one.notes.get('pages', 0) / GIB:.2f}",
            ]
        )
    head = (
        "run|context|at once|contender|tokens/s|times|spread|× engine none|× baseline, same policy|"
        "× baseline none|roofline tokens/s|of it|peak beside weights and pool, GiB|pages, GiB"
    )
    return table(head.split("|"), rows)


def steps_table(steps: list[Job]) -> str:
    """Return the table of block steps and full passes."""
    rows = [
        [
            str(one["run"] + 1),
            f"{one['prompt']:,}",
            str(one["requests"]),
            *(f"{1e3 * one[name]:.3f}" for name in ("block_step", "weights", "block_step_floor")),
            f"{one['block_step'] / one['weights']:.2f}",
            *(f"{1e3 * one[name]:.3f}" for name in ("full_pass", "full_pass_floor")),
            f"{one['full_pass'] / one['full_pass_floor']:.2f}",
        ]
        for one in steps
    ]
    head = (
        "run|context|at once|block step|weights / bandwidth|its roofline|× weights|full pass|"
        "its roofline|× roofline"
    )
    return table(head.split("|"), rows)


def memory_table(memory: list[Job]) -> str:
    """Return the table of peaks."""
    rows = [
        [
            str(one["run"] + 1),
            f"{one['prompt']:,}",
            one["contender"],
            *(f"{one[name] / GIB:.3f}" for name in ("weights", "pool", "peak")),
            f"{(one['peak'] - one['weights']) / GIB:.3f}",
        ]
        for one in memory
    ]
    head = "run|context|contender|weights|pool|peak|peak over weights"
    return table(head.split("|"), rows)


def rates_of_machine(runs: list[Job]) -> str:
    """Return the table of the machines' measured rates."""
    rows = []
    for number, run in enumerate(runs, 1):
        ceilings = run.get("ceilings")
        if ceilings is None:
            continue
        rates = (f"{name} {rate / 1e9:,.0f}" for name, rate in ceilings["bandwidths"].items())
        gemm = (
            f"{rows_}: {entry['rate'] / 1e12:,.2f}" for rows_, entry in ceilings["gemm"].items()
        )
        rows.append([str(number), ", ".join(rates), "; ".join(gemm)])
    return table(["run", "bandwidth, GB/s", "matrix products, TFLOP/s, by rows"], rows)


def runs_table(runs: list[Job]) -> str:
    """Return the table of what was run, and on what."""
    rows = []
    for number, run in enumerate(runs, 1):
        machine = run["machine"]
        versions = [f"torch {machine['torch']}", f"Python {machine['python']}"]
        versions += [f"{name} {run[name]}" for name in ("vllm", "triton") if run.get(name)]
        model = f"{run['family']} {run['size']}, {run['dtype']}"
        row = [str(number), machine["name"], ", ".join(versions), model]
        rows.append([*row, run["started"], f"`{run['command']}`"])
    return table("run|machine|versions|model|started (UTC)|command".split("|"), rows)


def markdown(record: Record) -> str:
    """Return the whole report."""
    parts = [
        "# GPU benchmark\n",
        "Random weights, one token a step. Medians of runs in turn; a rate with (× n) was measured "
        "over fewer steps of the same cost. Context: tokens of the prompt. The roofline is what "
        "the machine's measured bandwidth and matrix products allow.\n",
        "## Runs\n",
        runs_table(record.runs),
    ]
    if any(run["size"] != "public" for run in record.runs):
        parts.append(
            "Runs of a small model show that the benchmark works, their figures nothing.\n"
        )
    parts += ["## Targets, on one H100\n", targets_table(check_targets(record))]
    sweeps = dict.fromkeys(
        (record.runs[one.notes["run"]]["family"], one.sweep) for one in record.measurements
    )
    for family, sweep in sweeps:
        chosen = [
            one
            for one in record.measurements
            if (record.runs[one.notes["run"]]["family"], one.sweep) == (family, sweep)
        ]
        parts += [f"## {family}: {sweep}\n", rates_table(chosen)]
    if record.steps:
        parts += ["## Steps of sparse, ms\n", steps_table(record.steps)]
    if record.memory:
        parts += ["## Memory of one request, GiB\n", memory_table(record.memory)]
    parts += ["## The machine\n", rates_of_machine(record.runs)]
    if record.skipped:
        rows = [[str(one["run"] + 1), one["what"], one["why"]] for one in record.skipped]
        parts += ["## Not measured\n", table(["run", "what", "why"], rows)]
    return "\n".join(parts)


def write(folder: Path, record: Record) -> list[Path]:
    """Write JSON and Markdown; a file is there whole or as it was before."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(record.as_json(), indent=1) + "\n"
    files = []
    for name, text in (("gpu.json", content), ("gpu.md", markdown(record))):
        aside = folder / f".{name}"
        aside.write_text(text, encoding="utf-8")
        files.append(aside.rename(folder / name))
    return files
