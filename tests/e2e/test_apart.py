# SPDX-License-Identifier: Apache-2.0
"""The engine on a device with its own memory, as a GPU has: right tokens, few copies."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.pretended.apart import Apart, DeviceTensor, apart, why_not_apart
from tests.e2e.server import clean_environment, run_program

pytestmark = pytest.mark.skipif(why_not_apart() is not None, reason=f"{why_not_apart()}")


def printed_by(folder: Path, backend: str) -> str:
    return run_program(
        [sys.executable, "-m", "tests.e2e.apart_engine", str(folder), backend],
        environment=clean_environment(TRITON_INTERPRET="1"),
    )


def test_requests_of_all_kinds(tmp_path: Path) -> None:
    printed = printed_by(tmp_path, "portable")
    assert "20 requests, 0 different" in printed
    for model in ("llada", "dream"):
        assert f"{model} PortableBackend FusedDistribution cuda:0" in printed
        # Greedy requests: each step copies to the device without waiting; each step with commits
        # copies back once, and waits for that.
        found = re.search(rf"{model} (\d+) steps, (\d+) with commits: (\{{.*\}})", printed)
        assert found is not None
        copies = {
            "queued copy from cpu to cuda": int(found[1]),
            "copy from cuda to cpu": int(found[2]),
        }
        assert found[3] == str(copies)


def test_kernels_for_the_gpu_and_replayed_steps(tmp_path: Path) -> None:
    printed = printed_by(tmp_path, "triton")
    assert "10 requests, 0 different" in printed
    for model in ("llada", "dream"):
        assert f"{model} TritonBackend FusedDistribution cuda:0" in printed
        assert f"{model} replayed" in printed


@pytest.fixture
def device() -> Iterator[Apart]:
    with apart() as device:
        yield device


def test_the_device_is_apart(device: Apart) -> None:
    """The simulated device works as the tests above assume: no mixing; copies and reads noted."""
    there = torch.arange(6, device="cuda").view(2, 3)
    assert isinstance(there, DeviceTensor) and there.device == torch.device("cuda", 0)
    assert (there + 1).tolist() == [[1, 2, 3], [4, 5, 6]]
    # A view shares its tensor's numbers, and a single number on the host is accepted.
    there[1].mul_(torch.tensor(10))
    assert there.cpu().tolist() == [[0, 1, 2], [30, 40, 50]]
    here = torch.tensor([0])
    for mixed in (
        lambda: there.index_select(0, here),
        lambda: there[here],
        lambda: there + torch.ones(3),
        lambda: torch.cat([there[0], torch.ones(3)]),
        lambda: there.index_select(0, torch.tensor(0)),
    ):
        with pytest.raises(RuntimeError, match="tensors of host and device"):
            mixed()
    with pytest.raises(RuntimeError):
        there.numpy()

    device.noted.clear()
    pinned = torch.zeros(4, dtype=torch.int64, pin_memory=True)
    there[0].copy_(pinned[1:], non_blocking=True)
    there[0].copy_(torch.zeros(3, dtype=torch.int64), non_blocking=True)
    torch.tensor([1], device="cuda")
    assert there.sum().item() and there.any()
    there[there > 30].numel()
    there.nonzero()
    notes = [note.split("(")[0].split(", ")[0] for note in device.noted]
    assert notes == [
        "queued copy from cpu to cuda",
        "copy from cpu to cuda",
        "copy from cpu to cuda",
        "aten._local_scalar_dense.default",
        "aten._local_scalar_dense.default",
        "aten.index.Tensor",
        "aten.nonzero.default",
    ]
