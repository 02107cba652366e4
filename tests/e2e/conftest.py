# SPDX-License-Identifier: Apache-2.0
"""A server that several test files share; `tests/conftest.py` runs these in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.conftest import on_all_cores
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
    log = tmp_path_factory.mktemp("server") / "server.log"
    with ExitStack() as stack:
        with on_all_cores():
            server = running_server(log, tiny_llada(), *NAMES, *ALLOW_FILES)
            started = stack.enter_context(server)
        yield started
