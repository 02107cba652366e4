# SPDX-License-Identifier: Apache-2.0
"""Token for token with the Triton kernels, in the interpreter."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.e2e.server import clean_environment, run_program


def test_equals_reference(tmp_path: Path) -> None:
    printed = run_program(
        [sys.executable, "-m", "tests.e2e.interpreted", str(tmp_path)],
        environment=clean_environment(TRITON_INTERPRET="1"),
    )
    assert "llada TritonBackend FusedDistribution" in printed
    assert "18 requests, 0 different" in printed
