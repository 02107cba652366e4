# SPDX-License-Identifier: Apache-2.0
"""Test processes that run at the same time divide the machine's cores.

Without that the threads of two engines wait for each other on all cores, which takes longer than
one engine after the other. What a test starts inherits the cores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

ALL_CORES = os.sched_getaffinity(0)


def _own_cores(worker: int, num_workers: int) -> set[int]:
    """Return a test process's share, or a core that it shares where there are too few."""
    cores = sorted(ALL_CORES)
    if num_workers >= len(cores):
        return {cores[worker % len(cores)]}
    share = len(cores) // num_workers
    return set(cores[worker * share : (worker + 1) * share])


# Before any test imports PyTorch, which counts cores as it is loaded. pytest-xdist sets these.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.sched_setaffinity(
        0,
        _own_cores(
            int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")),
            int(os.environ["PYTEST_XDIST_WORKER_COUNT"]),
        ),
    )


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """Give what a module's tests start all of the machine's cores."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    yield
    os.sched_setaffinity(0, own)
