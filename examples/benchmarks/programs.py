# SPDX-License-Identifier: Apache-2.0
"""Programs under measurement: separate processes, driven one at a time over pipes.

A program reads jobs, one line of JSON each, from its standard input and writes one line of JSON
for each to a pipe that nothing else in it uses; output of libraries goes to its log. Between jobs
it waits without using CPU time, so programs that are compared can all stay loaded.
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

from vllm_sparse_dllm.engine.omp_waiting import WAITING

FOLDER = Path(__file__).parent
#: Settings for glibc's malloc to keep freed memory for the next pass, as in the engine's worker.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
#: How long OpenMP's threads spin before they sleep; by default as the engine sets it.
SPIN_COUNT = os.environ.get("GOMP_SPINCOUNT", WAITING["GOMP_SPINCOUNT"])
#: What vLLM prepends to each line of another process's log.
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?([A-Z]+ \S+ \S+ \[\S+\] )?")
#: Lines that give a reason: the last of a traceback, and pydantic's description of a bad value.
_REASON = re.compile(r"[\w.]*(Error|Exception|OutOfResources)\b|Fatal |.* \[type=\w+, ")
#: Number of lines from the end of a log that error messages include.
_TAIL = 15
Job = dict[str, Any]
#: Number of starts of this process's programs, by their logs.
_starts: Counter[Path] = Counter()


class ProgramError(RuntimeError):
    """A program ended, reported a failed job, or did not answer in time."""


class StartError(ProgramError):
    """A program did not start, or there is no time to start it; its jobs are not to blame."""


def reasons(text: str, most: int = 4) -> list[str]:
    """Return the last lines of a log or message that say why something failed, without repeats."""
    lines = (_PREFIX.sub("", line) for line in text.splitlines())
    found = dict.fromkeys(line.strip() for line in lines if _REASON.match(line))
    return list(found)[-most:]


class Program:
    """A started program.

    Args:
        script: Name of a file in this folder.
        arguments: Command-line arguments.
        log: File for the output; the number of the start is added to its name.
        environment: Environment variables on top of those that all programs get.
    """

    def __init__(
        self,
        script: str,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        # The log of a program that crashed must survive its next start.
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
        """Wait until the program takes jobs; return what it reports about itself.

        Args:
            limit: Seconds after which the program is killed.

        Raises:
            ProgramError: If it failed, or took longer.
        """
        if self._ready is None:
            self._ready = self._reply(limit)
        return self._ready

    def run(self, job: Job, limit: float = math.inf) -> Job:
        """Run a job and return the program's reply.

        Args:
            job: The job to run.
            limit: Seconds after which the program is killed.

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
            # Its traceback reaches the log after its reply, as it ends.
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
        """End the program by closing its standard input."""
        if self._process.stdin is not None:
            # A program that has ended can no longer receive what is still buffered.
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._kill()
        self._replies.close()

    def _kill(self) -> None:
        """Kill the program and all processes that it started."""
        for process in process_tree(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        # A process that is blocked in a driver ends only once the driver releases it.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)


def _environment(reply_pipe: int, own: dict[str, str]) -> dict[str, str]:
    environment = dict(os.environ)
    # A test may have set it for engines in its own process.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # Threads that wait long must not take a core from the program being measured; threads that wait
    # for less than a millisecond keep spinning. All programs get the same settings.
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPIN_COUNT}
    environment |= KEEP_MEMORY
    environment["BENCHMARK_REPLY_PIPE"] = str(reply_pipe)
    return environment | own


def serve(make_handler: Callable[[], tuple[Job, Callable[[Job], Job]]]) -> None:
    """Run this process as a program: load, report that it is ready, and do jobs until input ends.

    Args:
        make_handler: Loads the program; returns what it reports about itself, and a function that
            does a job.
    """
    # No child, forked or spawned, must keep the pipe open: its closing tells the driver that this
    # process has ended.
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
    """Run this process as a program whose command line has a checkpoint, a dtype and a device.

    Args:
        description: The program's docstring.
        load: As ``make_handler`` of `serve`, but takes the parsed command line.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dummy", action="store_true", help="random weights, none are read")
    arguments = parser.parse_args()
    serve(lambda: load(arguments))


def num_cores() -> int:
    """Return the number of cores that this process is allowed to use."""
    return len(os.sched_getaffinity(0))


def process_tree(root: int | None = None) -> list[int]:
    """Return the ids of a process, by default this one, and of all its descendants."""
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
    """Reset the peak memory of this process and its descendants; return False if not permitted."""
    try:
        for process in process_tree():
            Path(f"/proc/{process}/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Return the sum of the processes' peaks of resident memory, in bytes."""
    peaks = (_status(process).get("VmHWM", "0 kB") for process in process_tree())
    return sum(int(peak.split()[0]) * 1024 for peak in peaks)


def _status(process: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # the process has ended
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
