# SPDX-License-Identifier: Apache-2.0
"""Report the measurements as Markdown, JSON and, if matplotlib is installed, plots."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from probes import FORWARD_DETAILS, PARTS
from programs import Job
from session import Measurement
from tables import Target, table, targets_table

MIB = 2**20
#: Settings that the published `sparse` leaves at their defaults.
SCHEDULE = ("delay_steps", "eviction_delay", "refresh_interval", "suffix_window")
#: Settings that determine the steps of a response.
SAME_WORK = ("block_length", "steps", "threshold", "factor")


def _find(
    group: list[Measurement], like: Measurement, program: str, policy: str, same: bool
) -> Measurement | None:
    """Return the measurement of a program and policy to compare with.

    With ``same``, it must have the same settings; otherwise it must not use a threshold.
    """
    for other in group:
        if other.program == program and other.settings["cache_policy"] == policy:
            if same and other.settings != like.settings:
                continue
            if not same and other.settings.get("threshold"):
                continue
            return other
    return None


def _published(group: list[Measurement], like: Measurement) -> Measurement | None:
    """Return the engine's published ``sparse`` that otherwise did the same work."""
    if like.program != "engine":
        return None
    for other in group:
        if (
            other.program == "engine"
            and other.settings["cache_policy"] == "sparse"
            and not any(name in other.settings for name in SCHEDULE)
            and other.concurrency == like.concurrency
            and all(other.settings.get(n) == like.settings.get(n) for n in SAME_WORK)
            # Policies that keep all keys have no keep ratio.
            and like.settings.get("keep_ratio", other.settings["keep_ratio"])
            == other.settings["keep_ratio"]
        ):
            return other
    return None


def _times(one: Measurement, other: Measurement | None) -> str:
    return f"{one.speed_up(other):.2f}" if other is not None and other is not one else ""


def _settings(one: Measurement) -> str:
    shown = {k: v for k, v in one.settings.items() if k != "cache_policy" and v is not None}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def sweep_table(measurements: list[Measurement]) -> str:
    """Return the table of a sweep."""
    rows = []
    for one in measurements:
        group = [other for other in measurements if other.turn == one.turn]
        policy = one.settings["cache_policy"]
        same = _find(group, one, "baseline", policy, same=True) if one.program == "engine" else None
        scaled = f" (× {one.scale:g})" if one.scale > 1 else ""
        rows.append(
            [
                f"{one.prompt:,}",
                str(one.concurrency),
                one.contender,
                _settings(one),
                f"{one.rate:.2f}{scaled}",
                f"{one.spread:.0%}",
                _times(one, same),
                _times(one, _find(group, one, "baseline", "none", same=False)),
                _times(one, _find(group, one, "engine", "none", same=False)),
                _times(one, _published(group, one)),
                f"{one.peak_memory / MIB:,.0f}",
                "" if one.accuracy is None else f"{one.accuracy:.0%}",
                {None: "", True: "yes", False: "no"}[one.same_tokens],
            ]
        )
    head = (
        "prompt|at once|contender|settings|tokens/s|spread|× baseline, same policy|"
        "× baseline none|× engine none|× engine sparse|peak MiB|right|baseline's tokens"
    )
    return table(head.split("|"), rows)


def breakdown_table(breakdowns: list[Job]) -> str:
    """Return a table of steps, with a column for each part."""
    rows = []
    for one in breakdowns:
        for kind, step in one["kinds"].items():
            label = [one["policy"], f"{one['prompt']:,}", f"{step['num_requests']}", kind]
            values = [step["seconds"], *(step["parts"][part] for part in PARTS)]
            share = f"{step['outside']:.1%}"
            rows.append([*label, *(f"{1e3 * value:.2f}" for value in values), share])
    head = ["policy", "prompt", "requests", "step", "all", *PARTS, "not the model"]
    return table(head, rows)


def transport_table(breakdowns: list[Job]) -> str:
    """Return a table that compares the engine core in the same process and in another one."""
    rows = []
    for one in breakdowns:
        transport = one["transport"]
        times = [transport["one_process"], transport["two_processes"]]
        a_step = (times[1] - times[0]) / transport["num_steps"]
        rows.append(
            [
                one["policy"],
                f"{one['prompt']:,}",
                str(one["requests"]),
                str(transport["num_steps"]),
                *(f"{time:.3f}" for time in times),
                f"{1e3 * a_step:.2f}",
            ]
        )
    head = "policy|prompt|requests|steps|one process, s|two processes, s|difference a step, ms"
    return table(head.split("|"), rows)


def details_table(breakdowns: list[Job]) -> str:
    """Return a table of forward passes, with a column for each part."""
    rows = []
    for one in breakdowns:
        for kind, step in one["kinds"].items():
            if step["details"]:
                label = [one["policy"], f"{one['prompt']:,}", f"{step['num_requests']}", kind]
                values = [step["details"][part] for part in FORWARD_DETAILS]
                rows.append([*label, *(f"{1e3 * value:.2f}" for value in values)])
    names = ["rest" if name == "forward" else name for name in FORWARD_DETAILS]
    return table(["policy", "prompt", "requests", "step", *names], rows)


def ceilings_table(ceilings: Job) -> str:
    """Return the table of measured rates."""
    rows = []
    for count, entry in ceilings["gemm"].items():
        for name, walk in entry["walk"].items():
            hot = entry["hot"][name]
            shape = ceilings["shape"]
            layer = sum(seconds for product, seconds in hot.items() if product != "head")
            seconds = shape["layers"] * layer + hot["head"]
            rows.append(
                [
                    count,
                    name,
                    f"{entry['walk_flops'] / seconds / 1e9:,.0f}",
                    f"{entry['walk_flops'] / walk / 1e9:,.0f}",
                    f"{walk * 1e3:.2f}",
                ]
            )
    head = ["rows", "by", "GFLOP/s, hot", "GFLOP/s, all weights", "ms, all weights"]
    rates = ", ".join(
        f"{name} {rate / 1e9:.1f} GB/s" for name, rate in ceilings["bandwidths"].items()
    )
    return f"Memory bandwidth: {rates}.\n\n" + table(head, rows)


def markdown(result: Job, measurements: list[Measurement], targets: list[Target]) -> str:
    """Return the whole report."""
    about = result["about"]
    parts = [
        "# Benchmark\n",
        f"{about['model']}, {about['dtype']}, {about['cores']} cores ({about['processor']}); "
        f"responses of {about['response']} positions, {about['repeats']} runs each in turn, "
        "medians. A rate with (× n) was measured over fewer steps of the same cost.\n",
    ]
    without = (program.get("without_cpu_kernels") for program in about["programs"].values())
    if reason := next(filter(None, without), None):
        parts.append(f"Without the plugin's own CPU kernels: {reason}.\n")
    if any(program.get("float32_products") for program in about["programs"].values()):
        parts.append(
            f"This processor multiplies no {about['dtype']}: the engine does it in float32, plain "
            "PyTorch several times slower. `--dtype float32` compares like with like.\n"
        )
    if about["quick"]:
        parts.append("Quick mode: it shows that the benchmark works, its figures mean nothing.\n")
    if targets:
        parts += ["## What must hold\n", targets_table(targets)]
    for sweep in dict.fromkeys(one.sweep for one in measurements):
        chosen = [one for one in measurements if one.sweep == sweep]
        parts += [f"## {sweep.capitalize()}\n", sweep_table(chosen)]
    if result["breakdowns"]:
        parts += ["## Engine steps, ms\n", breakdown_table(result["breakdowns"])]
        parts += ["## Transport\n", transport_table(result["breakdowns"])]
        parts += ["## Forward passes, ms (with probes in them)\n"]
        parts += [details_table(result["breakdowns"])]
    if result["cache"]:
        rows = [
            [f"{one['prompt']:,}", one["policy"], f"{one['bytes'] / MIB:.2f}"]
            for one in result["cache"]
        ]
        parts += ["## KV memory of a request\n", table(["prompt", "policy", "MiB"], rows)]
    if result["ceilings"]:
        parts += ["## The machine\n", ceilings_table(result["ceilings"])]
    if result["floors"]:
        rows = [
            [
                one["step"],
                f"{one['prompt']:,}",
                str(one["requests"]),
                *(f"{1e3 * one[name]:.2f}" for name in ("memory", "linear", "attention", "floor")),
            ]
            for one in result["floors"]
        ]
        head = ["step", "prompt", "requests", "weights", "products", "attention", "floor"]
        parts += ["## Floors, ms\n", table(head, rows)]
    return "\n".join(parts)


def write(
    folder: Path, result: Job, measurements: list[Measurement], targets: list[Target]
) -> list[Path]:
    """Write report, data and plots, return the files."""
    content = result | {
        "measurements": [one.as_json() for one in measurements],
        "targets": [one.as_json() for one in targets],
    }
    text, data = folder / "benchmark.md", folder / "benchmark.json"
    text.write_text(markdown(result, measurements, targets), encoding="utf-8")
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [text, data, *_plots(folder, measurements, result["breakdowns"])]


def _plots(folder: Path, measurements: list[Measurement], breakdowns: list[Job]) -> list[Path]:
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        return []
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    ticker: Any = importlib.import_module("matplotlib.ticker")

    files: list[Path] = []

    def save(figure: Any, name: str) -> None:
        files.append(folder / f"{name}.png")
        figure.tight_layout()
        figure.savefig(files[-1], dpi=150)
        pyplot.close(figure)

    for sweep, attribute, label in (
        ("context", "prompt", "prompt, tokens"),
        ("concurrency", "concurrency", "requests at once"),
    ):
        lines: dict[str, list[tuple[int, float]]] = {}
        for one in measurements:
            if one.sweep == sweep:
                lines.setdefault(one.contender, []).append((getattr(one, attribute), one.rate))
        if not lines:
            continue
        figure, axes = pyplot.subplots(figsize=(6, 4))
        # One colour per policy, dashed for the baseline.
        policies = list(dict.fromkeys(name.partition(" ")[2] for name in lines))
        for name, points in lines.items():
            style = "--" if name.startswith("baseline") else "-"
            colour = f"C{policies.index(name.partition(' ')[2])}"
            axes.plot(
                *zip(*sorted(points), strict=True), style, marker="o", color=colour, label=name
            )
        axes.set(xlabel=label, ylabel="tokens/s", xscale="log", yscale="log")
        values = sorted({x for points in lines.values() for x, _ in points})
        axes.minorticks_off()
        axes.set_xticks(values, labels=[f"{value:,}" for value in values])
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:g}")
        axes.legend()
        save(figure, sweep)
    bars = [
        (f"{one['policy']} {kind}\n{step['num_requests']} at once", step["parts"])
        for one in breakdowns
        for kind, step in one["kinds"].items()
    ]
    if bars:
        figure, axes = pyplot.subplots(figsize=(max(6, len(bars)), 4))
        bottom = [0.0] * len(bars)
        for part in PARTS:
            heights = [1e3 * parts[part] for _, parts in bars]
            axes.bar([name for name, _ in bars], heights, bottom=bottom, label=part)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.set(ylabel="ms a step")
        axes.legend(fontsize="small")
        save(figure, "steps")
    return files
