# SPDX-License-Identifier: Apache-2.0
"""Divides the machine's cores among test processes that run at the same time.

Otherwise the threads of two engines wait for each other on all cores, which takes longer than
running one engine after the other. Processes that a test starts inherit its cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ALL_CORES = os.sched_getaffinity(0)
#: Files whose tests share `default_server`, and therefore a process.
SHARING = {f"tests/e2e/test_{name}.py" for name in ("lm_eval", "openapi", "server", "viewer")}


def _own_cores(worker: int, num_workers: int) -> set[int]:
    """Return the cores of a test process: a part, or a possibly shared one if there are too few."""
    cores = sorted(ALL_CORES)
    # A process that replaces a crashed one gets a new, higher number.
    worker %= num_workers
    if num_workers >= len(cores):
        return {cores[worker % len(cores)]}
    bounds = [one * len(cores) // num_workers for one in (worker, worker + 1)]
    return set(cores[slice(*bounds)])


# Done before any test imports PyTorch, which counts cores as it is loaded. pytest-xdist sets these
# variables; they are removed because a test may itself run pytest, which must not divide again.
_worker = os.environ.pop("PYTEST_XDIST_WORKER", None)
_num_workers = int(os.environ.pop("PYTEST_XDIST_WORKER_COUNT", 1))
if _worker is not None:
    os.sched_setaffinity(0, _own_cores(int(_worker.removeprefix("gw")), _num_workers))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests by file, but keep the files that share a server together."""
    from xdist.scheduler import LoadFileScheduling

    class ByServer(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "a shared server" if file in SHARING else file

    return ByServer(config, log) if config.option.dist == "loadfile" else None


@contextmanager
def on_all_cores() -> Iterator[None]:
    """Let processes that are started inside use all of the machine's cores."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """Let processes that a module's tests start use all of the machine's cores."""
    with on_all_cores():
        yield
