# SPDX-License-Identifier: Apache-2.0
"""What a worker tells vLLM of itself."""

from __future__ import annotations

import socket

import pytest

from vllm_sparse_dllm.engine.worker import shared_memory_name


@pytest.mark.parametrize(
    ("method", "place"),
    [
        ("tcp://10.0.0.1:1234", "1234"),
        ("tcp://[::1]:1234", "1234"),
        ("file:///tmp/some.where", "some.where"),
    ],
)
def test_memory_is_shared_by_the_ranks_of_a_machine(
    method: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []
    for host in ("a", "a", "b"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        names.append(shared_memory_name(method))
    assert names == [f"{place}-a", f"{place}-a", f"{place}-b"]
    # The name of a file in /dev/shm.
    assert not any("/" in name for name in names)
