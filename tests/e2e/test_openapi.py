# SPDX-License-Identifier: Apache-2.0
"""No request that can be made from the server's OpenAPI description gets a 5xx."""

from __future__ import annotations

from tests.e2e.openapi import check_endpoints, check_odd_values
from tests.e2e.server import Server, poll

#: Requests per endpoint and kind (valid or invalid); and, of requests with odd values, one in how
#: many is sent. `make soak` sends more.
EXAMPLES, EVERY = 40, 11


def test_no_request_gets_a_5xx(default_server: Server) -> None:
    before = len(default_server.log.read_text())
    check_endpoints(default_server, EXAMPLES)
    check_odd_values(default_server, EVERY)
    poll(lambda: default_server.gauges() == (0.0, 0.0, 0.0), "an idle server")
    assert "Traceback" not in default_server.log.read_text()[before:]
