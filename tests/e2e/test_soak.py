# SPDX-License-Identifier: Apache-2.0
"""A small run of the soak; ``make soak`` is the whole of it."""

from __future__ import annotations

import subprocess
import sys

from tests.e2e.server import ROOT, clean_environment

SCRIPT = ROOT / "examples" / "soak" / "run.py"


def test_a_small_soak_passes() -> None:
    command = [sys.executable, str(SCRIPT), "--requests", "80", "--schema-examples", "0"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "80 requests from 32 clients" in done.stdout
