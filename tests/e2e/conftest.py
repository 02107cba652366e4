# SPDX-License-Identifier: Apache-2.0
"""A server that several test files share; `tests/conftest.py` runs these in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.conftest import ALL_CORES
from tests.e2e.server import Server, running_server, tiny_llada

#: Allows requests from pages that were opened from a file.
ALLOW_FILES = ("--allowed-origins", '["null"]')
NAMES = ("--served-model-name", "tiny", "tiny-llada")


@pytest.fixture(scope="session")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server of the embedded model with the plugin's defaults and all cores.

    Tests must leave it idle, and must not rely on its counters being zero. It is stopped with
    SIGTERM.
    """
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(log, tiny_llada(), *NAMES, *ALLOW_FILES) as started:
        os.sched_setaffinity(0, own)
        yield started
