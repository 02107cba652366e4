# SPDX-License-Identifier: Apache-2.0
"""A small run of the soak; ``make soak`` is the whole of it."""

from __future__ import annotations

import sys

from tests.e2e.server import ROOT, run_program

SCRIPT = ROOT / "examples" / "soak" / "run.py"


def test_a_small_soak_passes() -> None:
    command = [sys.executable, str(SCRIPT), "--requests", "80", "--schema-examples", "0"]
    assert "80 requests from 32 clients" in run_program(command, timeout=900)
