# SPDX-License-Identifier: Apache-2.0
"""The quality harness in its quick mode: results are complete and consistent, pages updated."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import ROOT, run_warm
from tests.scripts import EXAMPLES, load
from vllm_sparse_dllm.cache.saliency import SALIENCIES

FOLDER = EXAMPLES / "quality"
PAGE = ROOT / "docs" / "quality.md"

Json = dict[str, Any]

controls, evaluate, report, sweeps, tasks = load(
    FOLDER, "controls", "evaluate", "report", "sweeps", "tasks"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with the report of a run, and the documentation page that it updated."""
    folder = tmp_path_factory.mktemp("quality")
    (folder / "page.md").write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = [str(FOLDER / "run.py"), "--quick", "--output", str(folder)]
    run_warm([*arguments, "--page", str(folder / "page.md")], folder / "log")
    return folder


@pytest.fixture(scope="module")
def measured(folder: Path) -> Json:
    """Return the sweeps of the only model."""
    result = json.loads((folder / "quality.json").read_text(encoding="utf-8"))
    (model,) = result["models"].values()
    return model["sweeps"]


def cells(sweep: Json, name: str) -> dict[str, Json]:
    (row,) = (row for row in sweep["rows"] if row["name"] == name)
    return {cell["task"]: cell for cell in row["cells"]}


def test_everything_is_there(measured: Json) -> None:
    names = [control.name for control in controls.CONTROLS]
    assert sweeps.RANDOM in names
    planned = sweeps.make_sweeps(sweeps.QUICK, SALIENCIES, names)
    assert measured.keys() == planned.keys() == set(sweeps.SWEEPS)
    for name, sweep in planned.items():
        assert len({row.name for row in sweep.rows}) == len(sweep.rows)
        expected = [
            (row.name, row.settings, task, length, row.num_items)
            for row in sweep.rows
            for task in sweep.tasks
            for length in sweep.lengths
        ]
        got = [
            (row["name"], row["settings"], cell["task"], cell["length"], cell["num_items"])
            for row in measured[name]["rows"]
            for cell in row["cells"]
        ]
        assert got == expected


def test_cells_fill_batches() -> None:
    """Items fill all batches, so that their number does not affect tokens a second."""
    scale = sweeps.Scale()
    assert not any(num % evaluate.BATCH for num in (scale.num_items, scale.num_side_items))


def test_figures_follow_from_the_items(measured: Json) -> None:
    for sweep in measured.values():
        for cell in (cell for row in sweep["rows"] for cell in row["cells"]):
            num, num_right = len(cell["right"]), cell["right"].count("1")
            assert (cell["num_items"], cell["num_right"]) == (num, num_right)
            value, num_tokens = num_right / num, num * tasks.RESPONSE
            assert cell["exact_match"] == pytest.approx(value)
            assert cell["standard_error"] == pytest.approx(math.sqrt(value * (1 - value) / num))
            assert cell["tokens_per_step"] == pytest.approx(num_tokens / cell["num_steps"])
            assert cell["tokens_per_second"] == pytest.approx(num_tokens / cell["seconds"])


def test_steps_are_counted(measured: Json) -> None:
    """A response takes one step per position, or fewer with a threshold."""
    rows = measured["parallel"]["rows"]
    steps = {
        row["name"]: row["cells"][0]["num_steps"] / sweeps.QUICK.num_side_items for row in rows
    }
    for series in {row["series"] for row in rows}:
        assert steps[f"{series} one a step"] == tasks.RESPONSE
        assert steps[f"{series} threshold 0.9"] < tasks.RESPONSE / 2


def test_keeping_all_without_delay_is_dual(measured: Json) -> None:
    one, other = (
        cells(measured["delay"], name)["copy"] for name in ("sparse keep 1 delay 0", "dual")
    )
    assert (one["right"], one["num_steps"]) == (other["right"], other["num_steps"])


def test_who_keeps_all_makes_no_difference(measured: Json) -> None:
    """If all positions are kept, saliencies and controls give the same answers, in float32."""
    sweep = measured["keep"]
    whole = cells(sweep, "sparse keep 1")
    for row in sweep["rows"]:
        if row["label"] == "keep 1":
            for task, cell in cells(sweep, row["name"]).items():
                assert cell["right"] == whole[task]["right"][: cell["num_items"]]


def test_knowing_what_is_asked_is_best(measured: Json) -> None:
    right = {
        name: cells(measured["keep"], f"{name} keep 0.5")["copy"]["exact_match"]
        for name in ("random", "framed", "oracle")
    }
    none = cells(measured["keep"], "none")["copy"]["exact_match"]
    assert max(right["random"], right["framed"]) < none / 2 < right["oracle"]


def test_report_has_all_tables(folder: Path, measured: Json) -> None:
    text = (folder / "quality.md").read_text(encoding="utf-8")
    for name, sweep in measured.items():
        table = report.sweep_table(measured, name)
        assert f"## {sweep['title']}\n" in text and table in text
        assert table.count("\n") == len(sweep["rows"]) + 2
        assert "copy − none" in table


def test_plots_are_drawn(folder: Path) -> None:
    page = (folder / "page.md").read_text(encoding="utf-8")
    for name in ("quality-keep.png", "quality-steps.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in page


def test_paired_differences() -> None:
    mean, error, num = report.paired_difference("1100", "101010")
    assert (mean, num) == (0.0, 4)
    assert error == pytest.approx(math.sqrt(2 / 4 / 4))
    assert report.paired_difference("11", "11") == (0.0, 0.0, 2)


def test_runs_put_together(measured: Json) -> None:
    """Each table names the seed of its items; rows are compared only on the same items."""

    def run(seed: int, *sweeps: str) -> Json:
        about = {"dtype": "float32", "seed": seed, "cores": 2, "processor": "", "quick": False}
        own = {"about": about, "sweeps": {name: measured[name] for name in sweeps}}
        return {"models": {"one": own}}

    result = report.merge([run(3, "keep", "delay"), run(4, "kernel", "parallel")])
    for name, seed, compared in (
        ("keep", 3, True),
        ("delay", 3, True),
        ("kernel", 4, False),
        ("parallel", 4, True),
    ):
        text = report.section(result, name)
        assert f"items of seed {seed}," in text
        assert ("copy − none" in text) == compared


def test_page_is_refreshed(folder: Path, measured: Json) -> None:
    """The page has a place for the table of each sweep, and nothing else on it changes."""
    before, after = (path.read_text(encoding="utf-8") for path in (PAGE, folder / "page.md"))
    for name in measured:
        assert report.sweep_table(measured, name) in after

    def written(page: str) -> list[str]:
        first, *others = page.split("<!-- measured: ")
        return [first, *(part.partition("<!-- end -->")[2] for part in others)]

    assert written(before) == written(after)


def test_page_without_a_place(measured: Json) -> None:
    result = {"models": {"one": {"about": {}, "sweeps": measured}}}
    with pytest.raises(ValueError, match="no place for delay, "):
        report.update_page("<!-- measured: keep -->\n<!-- end -->", result, [])


@pytest.mark.parametrize("task", tasks.TASKS)
def test_items_know_their_parts(task: str) -> None:
    (item,) = tasks.held_out(task, 64, 1)
    assert [item.prompt[p] for p in item.template] == [*tasks.HEAD, *tasks.TAIL]
    assert item.prompt[item.question[0]] in (" get", " copy", " reverse", " add")
    if task != "addition":
        assert {item.prompt[p] for p in item.pivots} >= set(item.answer)


def run_code(code: str, output: Path) -> str:
    """Run code that can import the scripts, in a process of its own; return what it prints."""
    return run_warm(["-c", f"import sys\nsys.path[0] = {str(FOLDER)!r}\n{code}"], output)


def test_bad_arguments(tmp_path: Path) -> None:
    """Each bad argument is reported before an engine starts."""
    cases = {
        "run": {
            "--items 1": "--items must be at least 2, got 1",
            f"--results {__file__}": f"quality.json of earlier runs, {__file__} is none",
            "--dtype int4": "invalid choice: 'int4'",
            "--seed -1": "--seed must be at least 0, got -1",
            "--lengths 8": "--lengths must be at least 32, got [8]",
            "--lengths 64 96 64": "--lengths must name each once, got 64 96 64",
            "--sweeps keep delay keep": "--sweeps must name each once, got keep delay keep",
            "--sweeps all": "argument --sweeps: invalid choice: 'all'",
            "--results nowhere.json": "there is no file nowhere.json",
            "--page nowhere.md": "there is no file nowhere.md",
            "--output README.md": "--output must be a directory, README.md is none",
            "--model tiny": "--model must be one of ",
            "--model tiny-llada --model tiny-llada": "tells models apart by name",
        },
        "evaluate": {
            "tiny": "model must be one of ",
            "tiny-llada --items 0": "--items must be at least 1, got 0",
            "tiny-llada --lengths 31": "--lengths must be from 32 to 1024, got [31]",
            "tiny-llada --settings [1]": "--settings must be a JSON object, got [1]",
            "tiny-llada --json nowhere/a.json": "--json: there is no directory nowhere",
        },
    }
    for script, lines in cases.items():
        output = run_code(
            f"import {script}\n"
            f"for line in {list(lines)!r}:\n"
            f"    try:\n        {script}.parse_arguments(line.split())\n"
            "    except SystemExit as end:\n        assert end.code == 2, line\n"
            "    else:\n        raise AssertionError(line)\n",
            tmp_path / script,
        )
        errors = [line for line in output.splitlines() if " error: " in line]
        assert len(errors) == len(lines), output
        for error, message in zip(errors, lines.values(), strict=True):
            assert message in error


def test_engines_start_without_the_controls(tmp_path: Path) -> None:
    """Engines on a GPU run all saliencies at start, and controls would not know the prompts."""
    output = run_code(
        "import run\n"
        "def start(*_):\n    print('saliencies:', *run.SALIENCIES)\n    sys.exit(0)\n"
        "run.start_engine = start\n"
        "run.main(['--quick', '--sweeps', 'keep'])\n",
        tmp_path / "output",
    )
    assert f"saliencies: {' '.join(SALIENCIES)}\n" in output
