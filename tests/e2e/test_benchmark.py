# SPDX-License-Identifier: Apache-2.0
"""The benchmark's quick mode: it runs, and its baseline and the engine give the same tokens."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import ROOT, run_program

SCRIPT = ROOT / "examples" / "benchmarks" / "run.py"


def run_quick(folder: Path, *options: str) -> dict[str, Any]:
    """Run the quick mode and return its results; the folder also gets a report."""
    command = [sys.executable, str(SCRIPT), "--quick", "--output", str(folder), *options]
    command += ["--checkpoints", str(folder / "checkpoints")]
    run_program(command)
    return json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return run_quick(folder, "--repeats", "1")


def test_every_policy_is_compared(result: dict[str, Any]) -> None:
    programs = {(m["program"], m["settings"]["cache_policy"]) for m in result["measurements"]}
    both = ("none", "dual", "sparse")
    expected = {(program, policy) for program in ("engine", "baseline") for policy in both}
    assert programs == expected | {("engine", "prefix")}
    sweeps = {m["sweep"] for m in result["measurements"]}
    assert sweeps == {"context", "concurrency", "keep ratio", "block length"}
    assert all(m["tokens_per_second"] > 0 and m["peak_memory"] > 0 for m in result["measurements"])


def test_both_give_the_same_tokens(result: dict[str, Any]) -> None:
    """In float32, equal tokens show that the times compared are of the same work."""
    compared = {
        (m["settings"]["cache_policy"], m["same_tokens"])
        for m in result["measurements"]
        if m["program"] == "engine"
    }
    assert compared == {("none", True), ("prefix", None), ("dual", True), ("sparse", True)}


def test_both_give_the_same_tokens_for_dream(tmp_path: Path) -> None:
    result = run_quick(
        tmp_path, "--family", "dream", "--sweeps", "context", "--prompts", "48", "--repeats", "1"
    )
    compared = {
        m["settings"]["cache_policy"]: m["same_tokens"]
        for m in result["measurements"]
        if m["program"] == "engine"
    }
    assert compared == {"none": True, "prefix": None, "dual": True, "sparse": True}


def test_steps_are_broken_down(result: dict[str, Any]) -> None:
    assert result["breakdowns"]
    for one in result["breakdowns"]:
        assert one["missing"] == []
        for step in one["kinds"].values():
            parts = step["parts"]
            for name in ("schedule", "batch build", "forward", "head", "denoise", "commit"):
                assert parts[name] > 0, name
            assert 0 < step["outside"] < 1
            assert step["details"]["attention"] > 0
    kinds = {(one["policy"], kind) for one in result["breakdowns"] for kind in one["kinds"]}
    assert ("sparse", "block") in kinds and ("none", "full") in kinds
    assert {kind for policy, kind in kinds if policy == "prefix"} >= {"block", "full"}


def test_memory_and_ceilings(result: dict[str, Any]) -> None:
    held = {(one["prompt"], one["policy"]): one["bytes"] for one in result["cache"]}
    for prompt in {prompt for prompt, _ in held}:
        assert held[prompt, "none"] == 0 < held[prompt, "sparse"] < held[prompt, "dual"]
    assert result["ceilings"]["bandwidth"] > 0
    assert all(entry["rate"] > 0 for entry in result["ceilings"]["gemm"].values())
    assert all(0 < one["floor"] < math.inf for one in result["floors"])


def test_report(folder: Path, result: dict[str, Any]) -> None:
    text = (folder / "benchmark.md").read_text(encoding="utf-8")
    for title in ("Context", "Concurrency", "Engine steps, ms", "KV memory", "Floors, ms"):
        assert f"## {title}" in text
    # The report says whether the plugin's own CPU kernels ran; there are none for float32.
    assert "Without the plugin's own CPU kernels: they are of bfloat16, not float32." in text
