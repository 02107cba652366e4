# SPDX-License-Identifier: Apache-2.0
"""Programs under measurement: processes of their own, driven one at a time over pipes.

A program reads jobs, one line of JSON each, from its standard input and writes one line of JSON
for each to a pipe that nothing else in it knows; what libraries print goes to its log. Between
jobs it waits and takes no CPU time, so programs that are compared can all stay loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_sparse_dllm.engine.waiting import WAITING

FOLDER = Path(__file__).parent
#: What the engine tells glibc's malloc in its worker: to keep what is freed for the next pass.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
#: How long OpenMP's threads spin before they sleep: what the engine sets where it is unset.
SPIN_COUNT = os.environ.get("GOMP_SPINCOUNT", WAITING["GOMP_SPINCOUNT"])
#: What vLLM writes before each line of another process's log.
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ \S+ \S+ \[\S+\] )?")
#: Lines that say why: the last of a traceback, and what pydantic found wrong with a value.
_REASON = re.compile(r"[\w.]*(Error|Exception|OutOfResources)\b|Fatal |.* \[type=\w+, ")
#: Lines of a log that a message has.
_TAIL = 15
Job = dict[str, Any]
#: Starts of this process's programs, by their logs.
_starts: Counter[Path] = Counter()


class ProgramError(RuntimeError):
    """A program ended, answered that a job failed, or did not answer in time."""


class StartError(ProgramError):
    """A program did not start, or there is no time to start it: not what its jobs ask for."""


def reasons(text: str, most: int = 4) -> list[str]:
    """Return the last lines of a log or a message that say why something failed, each once."""
    lines = (_PREFIX.sub("", line) for line in text.splitlines())
    found = dict.fromkeys(line.strip() for line in lines if _REASON.match(line))
    return list(found)[-most:]


class Program:
    """A started program.

    Args:
        script: File in this folder.
        arguments: Command line.
        log: Where its output goes, with the number of the start in its name.
        environment: Variables on top of those that all programs get.
    """

    def __init__(
        self,
        script: str,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        # The log of one that crashed must outlive its next start.
        _starts[log] += 1
        log = log.with_stem(f"{log.stem}-{_starts[log]}")
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
        self._replies = os.fdopen(read_end, "rb", buffering=0)
        self._received = b""
        self._ready: Job | None = None

    def wait_until_ready(self, limit: float = math.inf) -> Job:
        """Wait until the program takes jobs; return what it says of itself.

        Args:
            limit: Seconds, after which it is ended.

        Raises:
            ProgramError: If it failed, or took longer.
        """
        if self._ready is None:
            self._ready = self._reply(limit)
        return self._ready

    def run(self, job: Job, limit: float = math.inf) -> Job:
        """Have a job done.

        Args:
            job: What the program takes.
            limit: Seconds, after which it is ended.

        Raises:
            ProgramError: If it failed, or took longer.
        """
        self.wait_until_ready(limit)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(job) + "\n").encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("ended") from None
        return self._reply(limit)

    def _reply(self, limit: float) -> Job:
        end = time.monotonic() + limit
        while b"\n" not in self._received:
            left = None if math.isinf(limit) else max(0.0, end - time.monotonic())
            if not select.select([self._replies], [], [], left)[0]:
                self._kill()
                raise self._error(f"did not answer within {limit:,.0f} s and was ended")
            part = self._replies.read(1 << 16)
            if not part:
                raise self._error("ended")
            self._received += part
        line, _, self._received = self._received.partition(b"\n")
        reply = json.loads(line)
        if "error" in reply:
            # Its traceback comes after its answer.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=5)
            raise self._error(f"failed: {reply['error']}")
        return reply

    def _log_text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def _error(self, what: str) -> ProgramError:
        text = self._log_text()
        lines = [*reasons(text), "...", *text.splitlines()[-_TAIL:]]
        return ProgramError("\n".join([f"{self.name} {what}; its log is {self.log}", *lines]))

    def stop(self) -> None:
        """End the program: it has no more jobs."""
        if self._process.stdin is not None:
            # What it did not read before it ended cannot be written any more.
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._kill()
        self._replies.close()

    def _kill(self) -> None:
        """End the program, and all that it started, at once."""
        for process in process_tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        # One that a driver holds ends when it lets go.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)


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
    # Children must not hold the pipe, those that are forked neither: its end tells the driver that
    # this process has ended.
    pipe = int(os.environ.pop("BENCHMARK_REPLY_PIPE"))
    os.set_inheritable(pipe, False)
    with os.fdopen(pipe, "w", encoding="utf-8") as replies:
        os.register_at_fork(after_in_child=replies.close)

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


def process_tree(root: int | None = None) -> list[int]:
    """Return the ids of a process, by default of this one, and of all that it started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            status = _status(int(entry.name))
            if "PPid" in status:
                parents.setdefault(int(status["PPid"]), []).append(int(entry.name))
    tree = [os.getpid() if root is None else root]
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
