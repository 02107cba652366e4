# SPDX-License-Identifier: Apache-2.0
"""Report the measurements as Markdown, within a page, and as plots if matplotlib is installed."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Json = dict[str, Any]

#: File name and caption of each sweep's plot.
PLOTS = {
    "keep": ("quality-keep.png", "Exact match against the part of the keys that is kept"),
    "parallel": ("quality-steps.png", "Exact match against tokens a step"),
}
_SECTION = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def paired_difference(
    one: Iterable[str | bool], other: Iterable[str | bool]
) -> tuple[float, float, int]:
    """Return the difference in exact match of two runs on the same items.

    Args:
        one: For each item ``1`` or True if it was right, else ``0`` or False.
        other: The same for the run to compare with; items that only one run has are ignored.

    Returns:
        The difference, its standard error, and the number of items that both answered.
    """
    pairs = list(zip(map(int, one), map(int, other), strict=False))
    mean = sum(a - b for a, b in pairs) / len(pairs)
    variance = sum((a - b - mean) ** 2 for a, b in pairs) / len(pairs)
    return mean, math.sqrt(variance / len(pairs)), len(pairs)


def _exact_match(cells: list[Json]) -> tuple[float, float, int]:
    """Return exact match, standard error and number of items of cells taken together."""
    num = sum(cell["num_items"] for cell in cells)
    value = sum(cell["num_right"] for cell in cells) / num
    variance = sum(cell["standard_error"] ** 2 * cell["num_items"] ** 2 for cell in cells)
    return value, math.sqrt(variance) / num, num


def _cells(row: Json, **where: Any) -> list[Json]:
    return [c for c in row["cells"] if all(c[key] == value for key, value in where.items())]


def _paired(row: Json, none: Json, task: str) -> tuple[str, str]:
    """Return the ``right`` digits of two rows for a task, over the items that both rows have."""
    one = other = ""
    for cell in _cells(row, task=task):
        for base in _cells(none, task=task, length=cell["length"]):
            num = min(cell["num_items"], base["num_items"])
            one += cell["right"][:num]
            other += base["right"][:num]
    return one, other


def _difference(row: Json, none: Json, task: str) -> str:
    """Return the paired difference of a task."""
    one, other = _paired(row, none, task)
    if not one or row is none:
        return ""
    mean, error, num = paired_difference(one, other)
    return f"{mean:+.3f} ± {error:.3f} ({num})"


def _none(sweeps: Json, name: str) -> Json | None:
    """Return the row that a sweep is compared with: no cache, one token a step, the same items."""
    seeds = {where: sweep.get("about", {}).get("seed") for where, sweep in sweeps.items()}
    for where in (name, "keep"):
        if seeds.get(where) != seeds[name]:
            continue
        for row in sweeps.get(where, {"rows": []})["rows"]:
            if row["settings"]["cache_policy"] == "none":
                return row
    return None


def sweep_table(sweeps: Json, name: str) -> str:
    """Return the table of one sweep of one model."""
    sweep = sweeps[name]
    columns = [(cell["task"], cell["length"]) for cell in sweep["rows"][0]["cells"]]
    tasks = list(dict.fromkeys(task for task, _ in columns))
    lengths = list(dict.fromkeys(length for _, length in columns))
    none = _none(sweeps, name)
    rows = []
    for row in sweep["rows"]:
        line = [row["name"]]
        for task, length in columns:
            (cell,) = _cells(row, task=task, length=length)
            line.append(
                f"{cell['exact_match']:.3f} ± {cell['standard_error']:.3f} ({cell['num_items']})"
            )
        if none is not None:
            line += [_difference(row, none, task) for task in tasks]
        for length in lengths:
            cells = _cells(row, length=length)
            seconds = sum(cell["seconds"] for cell in cells)
            tokens = sum(cell["tokens_per_second"] * cell["seconds"] for cell in cells)
            line.append(f"{tokens / seconds:,.0f}")
        steps = sum(cell["num_steps"] for cell in row["cells"])
        tokens = sum(cell["tokens_per_step"] * cell["num_steps"] for cell in row["cells"])
        line.append(f"{tokens / steps:.2f}")
        rows.append(line)
    head = ["", *(f"{task} {length}" for task, length in columns)]
    if none is not None:
        head += [f"{task} − none" for task in tasks]
    head += [*(f"tokens/s at {length}" for length in lengths), "tokens/step"]
    return table(head, rows)


def _about(about: Json, sweep: Json) -> str:
    return (
        f"{about['dtype']}, {about['cores']} cores ({about['processor']}), items of seed "
        f"{about['seed']}, {sweep['seconds'] / 60:.1f} minutes."
    )


def section(result: Json, name: str) -> str:
    """Return the tables of one sweep, of all models that ran it."""
    parts = []
    for model, measured in result["models"].items():
        if name in measured["sweeps"]:
            sweep = measured["sweeps"][name]
            about = _about(sweep.get("about", measured["about"]), sweep)
            parts += [f"**{model}** ({about})\n", sweep_table(measured["sweeps"], name)]
    return "\n".join(parts)


def _sweep_titles(result: Json) -> dict[str, str]:
    return {
        name: sweep["title"]
        for measured in result["models"].values()
        for name, sweep in measured["sweeps"].items()
    }


def markdown(result: Json) -> str:
    """Return the whole report."""
    parts = [
        "# Quality\n",
        "Exact match ± standard error (items); differences are paired, on the same items.\n",
    ]
    if any(
        sweep.get("about", measured["about"])["quick"]
        for measured in result["models"].values()
        for sweep in measured["sweeps"].values()
    ):
        parts.append("Quick mode: it shows that all works, its figures mean little.\n")
    for name, title in _sweep_titles(result).items():
        parts += [f"## {title}\n", section(result, name)]
    return "\n".join(parts)


def update_page(page: str, result: Json, plots: Iterable[Path]) -> str:
    """Return a page with its measured parts replaced by those of the result.

    A part lies between ``<!-- measured: SWEEP -->`` and ``<!-- end -->``; parts of sweeps that the
    result does not have stay unchanged. Plots are expected next to the page.

    Raises:
        ValueError: If the result has a sweep that the page has no place for.
    """
    places = {match[2] for match in _SECTION.finditer(page)}
    measured = _sweep_titles(result)
    missing = measured.keys() - places
    files = {plot.name for plot in plots}
    if missing:
        raise ValueError(f"the page has no place for {', '.join(sorted(missing))}")

    def replace(match: re.Match[str]) -> str:
        if match[2] not in measured:
            return match[0]
        parts = [match[1], section(result, match[2])]
        file, shows = PLOTS.get(match[2], ("", ""))
        if file in files:
            parts.append(f"![{shows}]({file})\n")
        return "\n".join([*parts, match[3]])

    return _SECTION.sub(replace, page)


def merge(results: Iterable[Json]) -> Json:
    """Merge several results into one; of several runs of a model's sweep, the last one counts.

    Each sweep of the merged result has its own ``about``.
    """
    merged: Json = {"models": {}}
    for result in results:
        for model, measured in result["models"].items():
            own = merged["models"].setdefault(model, {"about": measured["about"], "sweeps": {}})
            own["about"] = measured["about"]
            for name, sweep in measured["sweeps"].items():
                own["sweeps"][name] = {"about": measured["about"], **sweep}
    return merged


def write_plots(folder: Path, result: Json) -> list[Path]:
    """Write the plots and return their files; none without matplotlib."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        return []
    matplotlib.use("Agg")
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    files = []
    for sweep, draw in (("keep", _draw_keep), ("parallel", _draw_steps)):
        models = {
            m: d["sweeps"][sweep] for m, d in result["models"].items() if sweep in d["sweeps"]
        }
        if not models:
            continue
        tasks = list(
            dict.fromkeys(c["task"] for s in models.values() for c in s["rows"][0]["cells"])
        )
        size = (4.2 * len(tasks), 3.4 * len(models))
        figure, axes = pyplot.subplots(
            len(models), len(tasks), figsize=size, sharey=True, sharex=True, squeeze=False
        )
        for line, (model, own) in zip(axes, models.items(), strict=True):
            for axis, task in zip(line, tasks, strict=True):
                draw(axis, own["rows"], task)
                axis.set(title=f"{model}, {task}", ylim=(-0.03, 1.03))
            line[0].set_ylabel("exact match")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize="small")
        figure.set_layout_engine("constrained")
        files.append(folder / PLOTS[sweep][0])
        figure.savefig(files[-1], dpi=110)
        pyplot.close(figure)
    return files


def _series(rows: list[Json]) -> dict[str, list[Json]]:
    found: dict[str, list[Json]] = {}
    for row in rows:
        found.setdefault(row["series"], []).append(row)
    return found


def _draw_keep(axis: Any, rows: list[Json], task: str) -> None:
    """Draw exact match against the keep ratio.

    Rows differ in how many items they answered, and items differ in difficulty. To make series
    comparable, each is drawn by its difference to `none` on the items that both answered.
    """
    none = next(row for row in rows if row["settings"]["cache_policy"] == "none")
    base = _exact_match(_cells(none, task=task))[0]
    for number, (series, own) in enumerate(_series(rows).items()):
        colour = f"C{number}"
        points = [
            (row["settings"].get("keep_ratio"), *paired_difference(*_paired(row, none, task))[:2])
            for row in own
        ]
        if points[0][0] is None:
            axis.axhline(base + points[0][1], linestyle=":", color=colour, label=series)
            continue
        style = "--" if own[0]["control"] else "-"
        axis.errorbar(
            [ratio for ratio, _, _ in points],
            [base + difference for _, difference, _ in points],
            [error for _, _, error in points],
            linestyle=style,
            marker="o",
            markersize=3,
            color=colour,
            label=series,
        )
    axis.set_xlabel("part of the keys that is kept")


def _draw_steps(axis: Any, rows: list[Json], task: str) -> None:
    for number, (series, own) in enumerate(_series(rows).items()):
        points = []
        for row in own:
            cells = _cells(row, task=task)
            steps = sum(cell["num_steps"] for cell in cells)
            tokens = sum(cell["tokens_per_step"] * cell["num_steps"] for cell in cells)
            points.append((tokens / steps, *_exact_match(cells)[:2]))
        points.sort()
        axis.errorbar(
            *zip(*points, strict=True),
            linestyle="-",
            marker="o",
            markersize=3,
            color=f"C{number}",
            label=series,
        )
    axis.set(xlabel="tokens a step", xscale="log")
    axis.minorticks_off()
    axis.set_xticks([1, 2, 4, 8, 16, 32], labels=["1", "2", "4", "8", "16", "32"])
