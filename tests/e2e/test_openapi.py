# SPDX-License-Identifier: Apache-2.0
"""No request that can be made from the server's OpenAPI description gets a 5xx."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.openapi import check_endpoints, check_odd_values
from tests.e2e.server import poll, running_server, tiny_llada

#: Requests an endpoint and mode, and one of how many odd values; `make soak` sends more.
EXAMPLES, EVERY = 40, 11


def test_no_request_gets_a_5xx(tmp_path: Path) -> None:
    with running_server(tmp_path / "server.log", tiny_llada()) as server:
        check_endpoints(server, EXAMPLES)
        check_odd_values(server, EVERY)
        poll(lambda: server.gauges() == (0.0, 0.0, 0.0), "an idle server")
        assert "Traceback" not in server.log.read_text()
