# SPDX-License-Identifier: Apache-2.0
"""Programs under measurement: processes of their own, driven one at a time over pipes.

A program reads jobs, one line of JSON each, from its standard input and writes one line of JSON
for each to a pipe that nothing else in it knows; what libraries print goes to its log. Between
jobs it waits and takes no CPU time, so programs that are compared can all stay loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_sparse_dllm.engine.waiting import WAITING

FOLDER = Path(__file__).parent
#: What the engine tells glibc's malloc in its worker: to keep what is freed for the next pass.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
#: How long OpenMP's threads spin before they sleep: what the engine sets where it is unset.
SPIN_COUNT = os.environ.get("GOMP_SPINCOUNT", WAITING["GOMP_SPINCOUNT"])
Job = dict[str, Any]


class ProgramError(RuntimeError):
    """A program ended, or answered that a job failed."""


class Program:
    """A started program.

    Args:
        script: File in this folder.
        arguments: Command line.
        log: Where its output goes.
        environment: Variables on top of those that all programs get.
    """

    def __init__(
        self,
        script: str,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = log.stem
        self.log = log
        read_end, write_end = os.pipe()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(FOLDER / script), *arguments],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(write_end, environment or {}),
                pass_fds=(write_end,),
            )
        os.close(write_end)
        self._replies = os.fdopen(read_end, encoding="utf-8")
        self._ready: Job | None = None

    def wait_until_ready(self) -> Job:
        """Wait until the program takes jobs; return what it says of itself."""
        if self._ready is None:
            self._ready = self._reply()
        return self._ready

    def run(self, job: Job) -> Job:
        """Have a job done."""
        self.wait_until_ready()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(job) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("ended") from None
        return self._reply()

    def _reply(self) -> Job:
        line = self._replies.readline()
        if not line:
            raise self._error("ended")
        reply = json.loads(line)
        if "error" in reply:
            raise ProgramError(f"{self.name}: {reply['error']}; its log is {self.log}")
        return reply

    def _error(self, what: str) -> ProgramError:
        tail = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
        return ProgramError(f"{self.name} {what}; its log {self.log} ends with:\n{tail}")

    def stop(self) -> None:
        """End the program: it has no more jobs."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._replies.close()


def _environment(reply_pipe: int, own: dict[str, str]) -> dict[str, str]:
    environment = dict(os.environ)
    # A test may have set it for engines of its own.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Threads that wait long must not take a core from whoever is measured; those that wait for
    # less than a millisecond stay awake, in all programs alike.
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPIN_COUNT}
    environment |= KEEP_MEMORY
    environment["BENCHMARK_REPLY_PIPE"] = str(reply_pipe)
    return environment | own


def serve(make_handler: Callable[[], tuple[Job, Callable[[Job], Job]]]) -> None:
    """Be a program: load, say so, and do jobs until there are no more.

    Args:
        make_handler: Loads; returns what the program says of itself, and what does a job.
    """
    # Children must not hold the pipe: its end tells the driver that this process has ended.
    pipe = int(os.environ.pop("BENCHMARK_REPLY_PIPE"))
    os.set_inheritable(pipe, False)
    with os.fdopen(pipe, "w", encoding="utf-8") as replies:

        def reply(content: Job) -> None:
            replies.write(json.dumps(content) + "\n")
            replies.flush()

        try:
            start = time.perf_counter()
            about, handle = make_handler()
            reply({**about, "start_seconds": time.perf_counter() - start})
            for line in sys.stdin:
                reply(handle(json.loads(line)))
        except Exception as error:
            # The driver reads this before the traceback is in the log.
            reply({"error": f"{type(error).__name__}: {error}"})
            raise


def serve_model(
    description: str | None,
    load: Callable[[argparse.Namespace], tuple[Job, Callable[[Job], Job]]],
) -> None:
    """Be a program that is given a checkpoint, a dtype and a device on its command line.

    Args:
        description: The program's docstring.
        load: As `serve`'s, of the command line.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dummy", action="store_true", help="random weights, none are read")
    arguments = parser.parse_args()
    serve(lambda: load(arguments))


def num_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0))


def process_tree() -> list[int]:
    """Return the ids of this process and of all that it started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            status = _status(int(entry.name))
            if "PPid" in status:
                parents.setdefault(int(status["PPid"]), []).append(int(entry.name))
    tree = [os.getpid()]
    for process in tree:
        tree += parents.get(process, [])
    return tree


def reset_peak_memory() -> bool:
    """Start the peak anew for this process and its children; False if not allowed."""
    try:
        for process in process_tree():
            Path(f"/proc/{process}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Return the sum of the peaks of resident memory, in bytes."""
    peaks = (_status(process).get("VmHWM", "0 kB") for process in process_tree())
    return sum(int(peak.split()[0]) * 1024 for peak in peaks)


def _status(process: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has ended
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
