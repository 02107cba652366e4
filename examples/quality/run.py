# SPDX-License-Identifier: Apache-2.0
"""Measure how cache policies affect the number of right answers, through the engine.

Reports exact match with its standard error, tokens a second and tokens a step on held-out items,
for each policy and keep ratio, and for controls that choose keys at random or know the answer.
Without options: the embedded models and all sweeps.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

# Controls are registered in this process, so the engine must run in it. Must be set before vLLM is
# imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# OpenMP reads this when PyTorch is imported.
from vllm_sparse_dllm.engine.omp_waiting import wait_shortly

wait_shortly()

import report  # noqa: E402
from controls import CONTROLS, Control, registered  # noqa: E402
from evaluate import BATCH, MODELS, Evaluator, is_model, model_path, start_engine  # noqa: E402
from sweeps import QUICK, SWEEPS, Row, Scale, Sweep, make_sweeps  # noqa: E402
from tasks import MIN_LENGTH, held_out  # noqa: E402

from vllm_sparse_dllm.assets import embedded_model, embedded_models  # noqa: E402
from vllm_sparse_dllm.cache.saliency import SALIENCIES  # noqa: E402

ROOT = Path(__file__).parents[2]
Json = dict[str, Any]
DTYPES = ("bfloat16", "float16", "float32")


@contextmanager
def running_evaluator(model: str, dtype: str, longest: int) -> Iterator[Evaluator]:
    """Run an engine in this process and release everything it holds afterwards."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = start_engine(model, dtype, longest)
    try:
        yield Evaluator(llm, Path(model))
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


class Measurement:
    """Sweeps of one model."""

    def __init__(
        self, evaluator: Evaluator, controls: dict[str, Control], scale: Scale, seed: int
    ) -> None:
        self.evaluator = evaluator
        self.controls = controls
        self.scale = scale
        self.seed = seed

    def warm_up(self) -> None:
        """Answer some items without measuring them: an engine's first requests are slow."""
        for length in self.scale.lengths:
            for policy in ("none", "sparse"):
                items = held_out(self.scale.tasks[0], length, 16, self.seed + 1)
                self.evaluator.ask(items, cache_policy=policy, steps=4)

    def run(self, sweep: Sweep) -> Json:
        """Measure a sweep, printing each row as it is done."""
        print(f"  {sweep.title}")
        start = time.perf_counter()
        rows = [self._row(row, sweep) for row in sweep.rows]
        seconds = time.perf_counter() - start
        return {"title": sweep.title, "seconds": seconds, "rows": rows}

    def _row(self, row: Row, sweep: Sweep) -> Json:
        cells = []
        control = self.controls.get(row.settings.get("saliency", ""))
        for task in sweep.tasks:
            for length in sweep.lengths:
                if control is not None:
                    items = held_out(task, length, row.num_items, self.seed)
                    control.expect(items, self.evaluator.vocabulary)
                cells.append(
                    self.evaluator.score(task, length, row.num_items, self.seed, **row.settings)
                )
        figures = ", ".join(f"{cell.task} {cell.length}: {cell}" for cell in cells)
        print(f"    {row.name}: {figures}", flush=True)
        return {
            "name": row.name,
            "series": row.series,
            "label": row.label,
            "control": control is not None,
            "settings": row.settings,
            "cells": [cell.as_json() for cell in cells],
        }


def measure(arguments: argparse.Namespace, scale: Scale) -> Json:
    """Measure all models; the results so far are written after each sweep."""
    result: Json = {"models": {}}
    sweeps = make_sweeps(scale, SALIENCIES, [control.name for control in CONTROLS])
    for name in arguments.model:
        print(name, flush=True)
        about = {
            "dtype": arguments.dtype,
            "seed": arguments.seed,
            "cores": len(os.sched_getaffinity(0)),
            "processor": _processor(),
            "quick": arguments.quick,
        }
        result["models"][Path(name).name] = measured = {"about": about, "sweeps": {}}
        longest = max(scale.lengths)
        with (
            running_evaluator(model_path(name), arguments.dtype, longest) as evaluator,
            # Only after the engine has started: on a GPU it warms up with all saliencies, on
            # prompts that the controls do not know.
            registered(arguments.seed) as controls,
        ):
            measurement = Measurement(evaluator, controls, scale, arguments.seed)
            measurement.warm_up()
            for sweep in arguments.sweeps:
                measured["sweeps"][sweep] = measurement.run(sweeps[sweep])
                write(arguments.output, result)
    return result


def write(folder: Path, result: Json) -> list[Path]:
    """Write the report as Markdown and JSON, return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / "quality.md", folder / "quality.json"
    text.write_text(report.markdown(result), encoding="utf-8")
    data.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return [text, data]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add(
        "--model",
        action="append",
        help=f"{MODELS}; may be repeated (default: all of those named; quick: the first)",
    )
    add("--quick", action="store_true", help="few items and settings: does it work?")
    add(
        "--sweeps",
        nargs="+",
        choices=SWEEPS,
        default=list(SWEEPS),
        metavar="SWEEP",
        help=f"some of {', '.join(SWEEPS)} (default: all)",
    )
    add(
        "--items",
        type=int,
        help="of a cell of none, prefix, dual and the published choice at "
        f"{' and '.join(map(str, Scale().claimed_keep_ratios))}; all others have half as many. "
        f"Multiples of {2 * BATCH} fill all batches",
    )
    add("--lengths", nargs="+", type=int, help="of prompts; side sweeps take the first")
    add("--dtype", choices=DTYPES, help="default: bfloat16; quick: float32")
    add("--seed", type=int, default=3, help="of items and controls; default: %(default)s")
    add("--output", type=Path, default=ROOT / "build" / "quality", help="default: %(default)s")
    add(
        "--results",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="report these, of earlier runs, instead of measuring",
    )
    add("--page", type=Path, help="also replace the measured parts of this page, and its plots")
    arguments = parser.parse_args(argv)
    if arguments.items is not None and arguments.items < 2:
        parser.error(f"--items must be at least 2, got {arguments.items}")
    if arguments.seed < 0:
        parser.error(f"--seed must be at least 0, got {arguments.seed}")
    lengths = arguments.lengths or []
    if any(length < MIN_LENGTH for length in lengths):
        parser.error(f"--lengths must be at least {MIN_LENGTH}, got {lengths}")
    for option, values in (("--lengths", lengths), ("--sweeps", arguments.sweeps)):
        if len(set(values)) < len(values):
            parser.error(f"{option} must name each once, got {' '.join(map(str, values))}")
    for path in filter(None, (*(arguments.results or ()), arguments.page)):
        if not path.is_file():
            parser.error(f"there is no file {path}")
    for number, path in enumerate(arguments.results or ()):
        try:
            arguments.results[number] = json.loads(path.read_text(encoding="utf-8"))
            arguments.results[number]["models"]
        except (ValueError, KeyError, TypeError):
            parser.error(f"--results must be files quality.json of earlier runs, {path} is none")
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output must be a directory, {arguments.output} is none")
    arguments.dtype = arguments.dtype or ("float32" if arguments.quick else "bfloat16")
    arguments.model = arguments.model or (
        [Path(embedded_model()).name] if arguments.quick else embedded_models()
    )
    for model in arguments.model:
        if not is_model(model):
            parser.error(f"--model must be {MODELS}, got {model!r}")
    names = [Path(model).name for model in arguments.model]
    if len(set(names)) < len(names):
        parser.error(f"--model: the report tells models apart by name, got {' '.join(names)}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    scale = QUICK if arguments.quick else Scale()
    if arguments.items is not None:
        half = arguments.items // 2
        scale = replace(scale, num_items=arguments.items, num_side_items=half)
    if arguments.lengths is not None:
        scale = replace(scale, lengths=tuple(arguments.lengths))
    given = arguments.results
    result = report.merge(given) if given else measure(arguments, scale)
    files = write(arguments.output, result)
    plots = report.write_plots(arguments.output, result)
    if not plots and report.PLOTS.keys() & set(arguments.sweeps):
        print("No plots: they need matplotlib, which `make quality` installs")
    files += plots
    if arguments.page:
        page = arguments.page.read_text(encoding="utf-8")
        plots = report.write_plots(arguments.page.parent, result)
        page = report.update_page(page, result, plots)
        arguments.page.write_text(page, encoding="utf-8")
        files += [arguments.page, *plots]
    print("Written:", *map(str, files))


if __name__ == "__main__":
    main()
