# SPDX-License-Identifier: Apache-2.0
"""Python programs that start within seconds, although they import vLLM.

Importing vLLM takes most of a program's start, and ``vllm serve`` does it in three processes. Here
the programs, and the processes that they spawn, are forks of Python's fork server, which has
imported vLLM once. It has loaded no plugins and started no engine, so what happens after the
imports is as in a new process, but for this:

- Variables that are read during the imports, or by the dynamic linker, have no effect; programs
  that depend on one must be started as usual.
- The fork server is the parent of all processes, and all have the same hash seed.
- Processes end without the interpreter's finalisation, after their exit handlers.
- Shared memory that a killed process leaves behind is released at the end of the test process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import types
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import context, forkserver
from pathlib import Path
from typing import Any

import psutil

#: What the fork server imports.
_MODULES = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
)
#: The name under which the fork server imports this module in order to import `_MODULES`.
_PRELOAD = "tests.warm_imports"
#: Beginnings of the names of variables that are read during the imports.
_READ_AT_IMPORT = ("TRITON_INTERPRET", "VLLM_LOGGING_", "VLLM_SPARSE_DLLM_RAY_ON_CPU")

#: In the fork server and its forks: `sys.path` without a program's folder, and the variables that
#: the imports have set.
_path: list[str] = []
_set_by_imports: dict[str, str] = {}
#: The file for the output of this process, if it is warm, and of those that it starts.
_output: str | None = None


def preload() -> None:
    """Import vLLM. Called in the fork server only."""
    before = dict(os.environ)
    _path[:] = [place for place in sys.path if place]
    for name in _MODULES:
        importlib.import_module(name)
    _set_by_imports.update(os.environ.items() - before.items())
    # It must find this process's arguments before `_WarmProcess.run` replaces the environment.
    importlib.import_module("setproctitle").getproctitle()
    # Collections of garbage then skip what was imported, in every fork.
    gc.collect()
    gc.freeze()


class _WarmProcess(context.ForkServerProcess):
    """A process like those of the method "spawn", which start with their parent's environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.output = _output
        self.environment: dict[str, str] | None = None
        self.cores: set[int] = set()

    def start(self) -> None:
        if self.environment is None:
            self.environment = dict(os.environ)
        self.cores = os.sched_getaffinity(0)
        super().start()

    def run(self) -> None:
        global _output
        _output = self.output
        assert self.output is not None and self.environment is not None
        with open(self.output, "ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        assert _PRELOAD in sys.modules, "the fork server could not import vLLM"
        with open(_pids_beside(self.output), "a") as pids:
            pids.write(f"{os.getpid()}\n")
        os.environ.clear()
        os.environ.update(_set_by_imports | self.environment)
        os.sched_setaffinity(0, self.cores)
        vars(context)["_concrete_contexts"]["spawn"] = _CONTEXT
        multiprocessing.set_start_method("spawn", force=True)
        # Use this process's own fork server instead of starting another.
        vars(vars(forkserver)["_forkserver"])["ensure_running"] = lambda: None
        if sys.version_info >= (3, 13):
            # The fork server has removed its exit handlers; this one is registered only once.
            atexit.register(weakref.finalize._exitfunc)
        _apply_to_imported(self.environment, self.cores)
        super().run()

    def _bootstrap(self, *args: Any, **kwargs: Any) -> int:
        status: int = super()._bootstrap(*args, **kwargs)  # type: ignore[misc]
        # The interpreter's end, which `multiprocessing` leaves out of forks.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        return status


def _apply_to_imported(environment: Mapping[str, str], cores: set[int]) -> None:
    """Repeat what modules do with environment and cores as they are imported."""
    import torch
    from prometheus_client import values

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or len(cores)))
    if "PROMETHEUS_MULTIPROC_DIR" in environment:
        values.ValueClass = values.get_value_class()


class _WarmContext(context.ForkServerContext):
    _name = "spawn"
    Process = _WarmProcess  # type: ignore[assignment]


_CONTEXT = _WarmContext()


def _pids_beside(output: str | Path) -> Path:
    """Return the file with the numbers of a program's processes."""
    return Path(f"{output}.pids")


def _run(arguments: Sequence[str], folder: str) -> None:
    """Do what ``python ARGUMENTS`` does in a folder."""
    os.chdir(folder)
    multiprocessing.set_start_method(None, force=True)
    kind, *rest = arguments
    own = str(Path(kind).parent.absolute()) if kind not in ("-m", "-c") else folder
    extra = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [own, *filter(None, extra), *_path]
    if kind == "-m":
        sys.argv = [*rest]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = [*arguments]
        runpy.run_path(kind, run_name="__main__")


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
            output: File for its standard output and errors.
            environment: Its environment.
            folder: Its working directory.

        Raises:
            ValueError: If the environment has a variable that is read during the imports.
        """
        for name in environment:
            if name.startswith(_READ_AT_IMPORT):
                raise ValueError(f"{name} has no effect on a warm program")
        for file in (output, _pids_beside(output)):
            file.write_bytes(b"")
        self.args = list(arguments)
        self._output = output
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
            # The fork server may have seen its end already.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End the program and its processes with SIGKILL."""
        self.send_signal(signal.SIGKILL)
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def processes(self) -> list[psutil.Process]:
        """Return the running processes that the program has started."""
        found = []
        for line in _pids_beside(self._output).read_text().split():
            with contextlib.suppress(psutil.NoSuchProcess):
                if int(line) != self.pid:
                    found.append(psutil.Process(int(line)))
        return found


def _ensure_fork_server() -> None:
    """Start the fork server if there is none, without the settings of tests."""
    if vars(vars(forkserver)["_forkserver"])["_forkserver_pid"] is not None:
        return
    multiprocessing.set_forkserver_preload([_PRELOAD])
    saved = dict(os.environ)
    for name in saved:
        if name.startswith(("VLLM_", *_READ_AT_IMPORT)):
            del os.environ[name]
    # No plugins: programs load them. OpenMP's variable is read as its library is loaded.
    os.environ.update(VLLM_PLUGINS="", OMP_WAIT_POLICY="PASSIVE")
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(saved)
