# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels without a GPU: in the interpreter, and through the compiler.

Each runs in a process of its own, since Triton chooses between the two when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_sparse_dllm.denoise.fused import greedy_distribution
from vllm_sparse_dllm.kernels import interpreted, why_unavailable

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def run(*arguments: str, **environment: str) -> str:
    """Run a Python module of this checkout, which must succeed; return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_kernels_equal_their_twins() -> None:
    printed = run(
        "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels", TRITON_INTERPRET="1"
    )
    assert " passed" in printed and "skipped" not in printed


def test_kernels_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    """They fit into its registers and shared memory, and attention uses its matrix units."""
    some = "of 128, 4096|of 128, groups of 7, split True|scores|statistics"
    printed = run("tests.kernels.compiled", some, TRITON_CACHE_DIR=str(tmp_path))
    assert ", 0 do not fit" in printed
    for line in printed.splitlines():
        if line.startswith(("full attention", "paged attention")):
            assert "mma" in line.rpartition(",")[2]


def test_the_interpreter_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has kernels only in the interpreter; a device that is neither CPU nor CUDA has none."""
    assert not interpreted()
    assert why_unavailable(CPU) == "there are no Triton kernels for the device 'cpu'"
    assert greedy_distribution(CPU) is None
    assert why_unavailable(torch.device("cuda")) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_unavailable(CPU) is None
    assert why_unavailable(torch.device("xpu")) is not None
