# SPDX-License-Identifier: Apache-2.0
"""Report the results of the GPU benchmark as Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path

from gpu_cases import GIB
from gpu_record import Record, find
from gpu_targets import check_targets, is_possible, most_rate
from programs import Job
from session import Measurement
from tables import table, targets_table


def _times(one: Measurement, other: Measurement | None) -> str:
    return "" if other is None or other is one else f"{one.speed_up(other):.2f}"


def _part(one: Measurement, most: float | None) -> str:
    """Return a rate as a share of what the roofline allows."""
    if most is None:
        return ""
    return f"{one.rate / most:.0%}" + ("" if is_possible(one) else " (impossible)")


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3f}"


def _ratio(value: float, least: float | None) -> str:
    return "" if least is None else f"{value / least:.2f}"


def rates_table(measurements: list[Measurement]) -> str:
    """Return the table of rates; contenders of one turn alternated on the same requests."""
    rows = []
    for one in measurements:
        policy = one.contender.partition(" ")[2]
        scaled = f" (× {one.scale:g})" if one.scale > 1 else ""
        most = most_rate(one)
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
                "" if most is None else f"{most:,.1f}",
                _part(one, most),
                f"{one.peak_memory / GIB:.2f}",
                f"{(one.peak_memory - beside) / GIB:.2f}",
                f"{one.notes.get('pages', 0) / GIB:.2f}",
            ]
        )
    head = (
        "run|context|at once|contender|tokens/s|times|spread|× engine none|× baseline, same policy|"
        "× baseline none|roofline tokens/s|of it|peak, GiB|of it beside weights and pool|pages, GiB"
    )
    return table(head.split("|"), rows)


def steps_table(steps: list[Job]) -> str:
    """Return the table of block steps and full passes."""
    rows = [
        [
            str(one["run"] + 1),
            f"{one['prompt']:,}",
            str(one["requests"]),
            *(_ms(one[name]) for name in ("block_step", "weights", "block_step_floor")),
            _ratio(one["block_step"], one["weights"]),
            *(_ms(one[name]) for name in ("full_pass", "full_pass_floor")),
            _ratio(one["full_pass"], one["full_pass_floor"]),
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
    """Return the table of the runs: machine, versions, model and command."""
    rows = []
    for number, run in enumerate(runs, 1):
        machine = run["machine"]
        versions = [f"torch {machine['torch']}", f"Python {machine['python']}"]
        versions += [f"{name} {run[name]}" for name in ("vllm", "triton") if run.get(name)]
        model = f"{run['family']} {run['size']}, {run['dtype']}"
        row = [str(number), machine["name"], ", ".join(versions), model]
        rows.append([*row, run["started"], f"`{run['command']}`"])
    return table("run|machine|versions|model|started (UTC)|command".split("|"), rows)


def engines_table(runs: list[Job]) -> str:
    """Return the table of the engines: groups measured on them, kernels and sizes."""
    rows = []
    for number, run in enumerate(runs, 1):
        for engine in run.get("engines", []):
            about = engine["about"]
            kernels = about["kernels"]
            rows.append(
                [
                    str(number),
                    ", ".join(engine["groups"]),
                    kernels["attention"],
                    ", ".join(map(str, kernels["graphs"])) or "none",
                    f"{about['max_num_batched_tokens']:,}",
                    str(about["page_size"]),
                    f"{about['memory']['pool'] / GIB:.2f}",
                    f"{about['start_seconds']:.0f}",
                ]
            )
    head = (
        "run|groups|attention|graphs of so many requests|most tokens of a step|slots of a page|"
        "pool, GiB|start, s"
    )
    return table(head.split("|"), rows)


def markdown(record: Record) -> str:
    """Return the whole report."""
    parts = [
        "# GPU benchmark\n",
        "Random weights, one token a step but where steps are named. Medians of runs in turn; a "
        "rate with (× n) was measured over fewer steps of the same cost. Context: tokens of the "
        "prompt. The roofline is what the machine's measured bandwidth and matrix products "
        "allow; what is faster was not what it was to be, is marked as impossible and judges "
        "nothing. On a GPU peaks are those of PyTorch's tensors.\n",
        "## Runs\n",
        runs_table(record.runs),
    ]
    if any(run["size"] != "public" for run in record.runs):
        parts.append(
            "Runs of a small model show that the benchmark works, their figures nothing.\n"
        )
    parts += ["## Engines\n", engines_table(record.runs)]
    parts += [
        "## Targets, on one H100\n",
        "Tokens a second are judged on an H100 (not PCIe, not NVL), all else on any Hopper.\n",
        targets_table(check_targets(record)),
    ]
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
    """Write JSON and Markdown, replacing each file atomically; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [one.as_json() for one in check_targets(record)]
    content = json.dumps(record.as_json() | {"targets": targets}, indent=1) + "\n"
    files = []
    for name, text in (("gpu.json", content), ("gpu.md", markdown(record))):
        aside = folder / f".{name}"
        aside.write_text(text, encoding="utf-8")
        files.append(aside.rename(folder / name))
    return files
