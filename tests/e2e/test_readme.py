# SPDX-License-Identifier: Apache-2.0
"""The commands of the README, run as they are printed.

A fenced ``bash`` or ``python`` block is run unless the line above it is
``<!-- not run: reason -->``. The block under ``<!-- server -->`` is started once, with a free
port added; the ``curl`` and ``vllm bench`` blocks go to it, with that port in place of 8000.
`test_parallel` runs the blocks under ``<!-- parallel server -->`` and ``<!-- ray -->``,
`test_lm_eval` those of lm-evaluation-harness.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.server import ROOT, clean_environment, free_port, run_program

README = (ROOT / "README.md").read_text(encoding="utf-8")
_FENCE = re.compile(r"(?:<!-- ([^>]*) -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the comment above it."""

    language: str
    text: str
    comment: str

    @property
    def title(self) -> str:
        return " ".join(self.text.split())[:48]


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    return [Block(language, text, comment) for comment, language, text in _FENCE.findall(page)]


BLOCKS = blocks_of(README)
SERVERS = [block for block in BLOCKS if block.comment == "server"]
PARALLEL = [block for block in BLOCKS if block.comment.startswith("parallel server")]
RAY = [block for block in BLOCKS if block.comment == "ray"]
NOT_RUN = [block for block in BLOCKS if block.comment.startswith("not run: ")]
_RUN = [block for block in BLOCKS if not block.comment]
CURLS = [block for block in _RUN if block.text.startswith("curl ")]
BENCHMARKS = [block for block in _RUN if block.text.startswith("vllm bench ")]
SCORES = [block for block in _RUN if block.text.startswith("lm_eval ")]
COMMANDS = [block for block in _RUN if block not in CURLS + BENCHMARKS + SCORES]


def environment() -> dict[str, str]:
    """Return the variables of a shell in which the README's virtual environment is active."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    # VENV makes `make` use the virtual environment that this test runs in.
    return clean_environment(PATH=path, VENV=sys.prefix)


def titles(blocks: list[Block]) -> list[str]:
    return [block.title for block in blocks]


def test_every_block_has_its_place() -> None:
    assert len(SERVERS) == 1
    assert len(CURLS) >= 3
    assert len(BENCHMARKS) == 1
    assert len(SCORES) == 1
    assert {block.language for block in COMMANDS} == {"bash", "python"}
    assert len(PARALLEL) >= 3
    assert len(RAY) == 1
    placed = SERVERS + PARALLEL + RAY + NOT_RUN + _RUN
    assert len(placed) == len(BLOCKS), titles(BLOCKS)


@pytest.mark.parametrize("block", COMMANDS, ids=titles(COMMANDS))
def test_command(block: Block, tmp_path: Path) -> None:
    if block.language == "python":
        script = tmp_path / "example.py"
        script.write_text(block.text, encoding="utf-8")
        command = [sys.executable, str(script)]
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.text]
    output = run_program(command, environment=environment())
    if block.language == "python":
        assert "name49 file18" in output
    elif "demo" in block.text:
        assert re.search(r"sparse is [\d.]+ times as fast as none", output), output


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Start the README's server and return its port."""
    number = free_port()
    log = tmp_path_factory.mktemp("server") / "log"
    # Answers in bfloat16 depend on the machine.
    command = f"{SERVERS[0].text.strip()} --port {number} --dtype float32"
    with log.open("w") as output:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=ROOT,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 900
        while not _is_healthy(number):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield number
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("block", CURLS, ids=[str(number) for number in range(len(CURLS))])
def test_curl(block: Block, port: int) -> None:
    done = subprocess.run(
        [
            "bash",
            "-euo",
            "pipefail",
            "-c",
            block.text.replace("localhost:8000", f"localhost:{port}"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    regex = re.search(r'"regex": "(.*)"', block.text)
    if regex is not None:
        assert re.fullmatch(regex[1], _answer(done.stdout)), done.stdout
        return
    expected = "name49 file18" if "name49" in block.text else "file name object list"
    assert _answer(done.stdout) == expected, done.stdout


@pytest.mark.parametrize("block", BENCHMARKS, ids=titles(BENCHMARKS))
def test_benchmark(block: Block, port: int) -> None:
    """8 responses of 2 blocks of 32 tokens take one step per token, and one more per block."""
    command = ["bash", "-euc", block.text.replace("localhost:8000", f"localhost:{port}")]
    output = run_program(command, timeout=900, environment=environment())
    section = output.split("Diffusion Decoding")[1]
    figures = dict(re.findall(r"^(.+?):\s+([\d.]+)\s*$", section, flags=re.MULTILINE))
    assert float(figures.pop("Committed throughput (tok/s)")) > 0
    assert figures == {
        "Denoising steps per canvas": "32.00",
        "Committed per denoising step": "1.00",
        "Committed tokens": str(8 * 64),
        "Denoising steps": str(8 * 64),
        "Canvas positions evaluated": str(8 * (64 + 2) * 32),
    }


def _answer(reply: str) -> str:
    """Return the text of a reply, streamed or not."""
    if not reply.startswith("data: "):
        choice = json.loads(reply)["choices"][0]
        return (choice["text"] if "text" in choice else choice["message"]["content"]).strip()
    events = [line.removeprefix("data: ") for line in reply.splitlines() if line]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices).strip()
