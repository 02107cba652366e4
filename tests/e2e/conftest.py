# SPDX-License-Identifier: Apache-2.0
"""A server that several files of tests share; `tests/conftest.py` keeps them in one process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.conftest import ALL_CORES
from tests.e2e.server import Server, running_server, tiny_llada

#: Lets pages that were opened from a file ask the server.
ALLOW_FILES = ("--allowed-origins", '["null"]')
NAMES = ("--served-model-name", "tiny", "tiny-llada")


@pytest.fixture(scope="session")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Return a server of the embedded model with the plugin's defaults and all cores.

    Tests leave it idle, and do not rely on its counters being zero. It is ended with SIGTERM.
    """
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALL_CORES)
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(log, tiny_llada(), *NAMES, *ALLOW_FILES) as started:
        os.sched_setaffinity(0, own)
        yield started
