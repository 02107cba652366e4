# SPDX-License-Identifier: Apache-2.0
"""Python programs that start within a second, although they import vLLM.

Importing vLLM takes most of a program's start, and ``vllm serve`` does it in three processes. Here
the programs, and the processes that they spawn, are forks of Python's fork server, which has
imported vLLM once. It has started no engine, threads or plugins, so what happens after the imports
is as in a new process, with two differences: `LD_PRELOAD` has no effect, and the parent of all
these processes is the fork server.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from multiprocessing import context, forkserver
from pathlib import Path
from typing import Any

import psutil

#: What the fork server imports.
_MODULES = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
)
#: The name under which the fork server imports this module in order to import `_MODULES`.
_PRELOAD = "tests.warm_imports"

#: The file for the output of this process, if it is warm, and of those that it starts.
_output: str | None = None


def preload() -> None:
    """Import vLLM. Called in the fork server only."""
    for name in _MODULES:
        importlib.import_module(name)
    # It has to find the arguments of this process before a fork replaces the environment.
    importlib.import_module("setproctitle").getproctitle()
    # Collections of garbage then skip what was imported, in every fork.
    gc.collect()
    gc.freeze()
    vars(gc)["unfreeze"] = lambda: None


class _WarmProcess(context.ForkServerProcess):
    """A process like those of the method "spawn", which start with their parent's environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.output = _output
        self.environment: dict[str, str] | None = None
        self.cores: set[int] | None = None

    def start(self) -> None:
        if self.environment is None:
            self.environment = dict(os.environ)
        self.cores = os.sched_getaffinity(0)
        super().start()

    def run(self) -> None:
        global _output
        _output = self.output
        assert self.output is not None and self.environment is not None
        assert self.cores is not None
        with open(self.output, "ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.environ.clear()
        os.environ.update(self.environment)
        os.sched_setaffinity(0, self.cores)
        vars(context)["_concrete_contexts"]["spawn"] = _CONTEXT
        # Use this process's own fork server instead of starting another.
        vars(vars(forkserver)["_forkserver"])["ensure_running"] = lambda: None
        _apply_to_imported(self.environment, self.cores)
        super().run()


def _apply_to_imported(environment: Mapping[str, str], cores: set[int]) -> None:
    """Repeat what the interpreter and modules do with environment and cores as they start."""
    import torch
    from prometheus_client import values

    sys.path[:0] = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    if bound := environment.get("GOMP_CPU_AFFINITY"):
        # OpenMP's library binds each thread to one of these, and this one to the first.
        cores = {int(core) for core in bound.split()}
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    if "PROMETHEUS_MULTIPROC_DIR" in environment:
        values.ValueClass = values.get_value_class()


class _WarmContext(context.ForkServerContext):
    Process = _WarmProcess  # type: ignore[assignment]


_CONTEXT = _WarmContext()


def _run(arguments: Sequence[str], folder: str) -> None:
    """Be ``python ARGUMENTS``, run in a folder."""
    os.chdir(folder)
    kind, *rest = arguments
    try:
        if kind == "-m":
            sys.argv = [*rest]
            sys.path.insert(0, folder)
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            sys.path.insert(0, folder)
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), vars(main))
        else:
            sys.argv = [*arguments]
            sys.path.insert(0, str(Path(kind).parent.absolute()))
            runpy.run_path(kind, run_name="__main__")
    finally:
        # As at an interpreter's end; `multiprocessing` leaves it out.
        atexit._run_exitfuncs()


class WarmProgram:
    """A running program, with those attributes of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        output: Path,
        environment: Mapping[str, str],
        folder: Path,
    ) -> None:
        """Start a program.

        Args:
            arguments: Those of ``python``: ``-m NAME``, ``-c TEXT`` or a script, and its own.
            output: File to which its standard output and errors are appended.
            environment: Its environment.
            folder: Its working directory.
        """
        output.touch()
        self.args = list(arguments)
        self._process = _WarmProcess(target=_run, args=(self.args, str(folder)))
        self._process.output = str(output)
        self._process.environment = dict(environment)
        main = sys.modules["__main__"]
        # The new process would run this process's main module again, as after "spawn".
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            _ensure_fork_server()
            self._process.start()
        finally:
            sys.modules["__main__"] = main
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, None if the program runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, return the exit status.

        Raises:
            subprocess.TimeoutExpired: If it takes longer than ``timeout`` seconds.
        """
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to the program if it runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the program with SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def processes(self) -> list[psutil.Process]:
        """Return the processes that this program, or one started after it, has started."""
        forks = psutil.Process(vars(forkserver)["_forkserver"]._forkserver_pid).children()
        own = psutil.Process(self.pid).create_time()
        return [fork for fork in forks if fork.create_time() > own]


def _ensure_fork_server() -> None:
    """Start the fork server if there is none, without the settings of tests.

    Some modules read variables as they are imported; programs that set those must start cold.
    """
    multiprocessing.set_forkserver_preload([_PRELOAD])
    saved = dict(os.environ)
    for name in saved:
        if name.startswith("VLLM_"):
            del os.environ[name]
    # No plugins: programs load them. OpenMP's variable is read as its library is loaded.
    os.environ.update(VLLM_PLUGINS="", OMP_WAIT_POLICY="PASSIVE")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(saved)
