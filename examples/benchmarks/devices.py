# SPDX-License-Identifier: Apache-2.0
"""Where a program runs, CPU or CUDA: its name, how calls are timed, how much memory they took."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import torch
from programs import Job

#: Calls on a GPU are queued until they take so long together, so that launching them is hidden.
_QUEUED_SECONDS = 2e-3
_MOST_CALLS = 200
#: A GPU is kept busy before them for so long, about 2 ms: while it is, they are all launched.
_HEAD_START_CYCLES = 4_000_000


def describe(device: torch.device) -> Job:
    """Return what a report says of the device and of what runs on it."""
    about: Job = {
        "device": device.type,
        "name": processor(),
        "memory": None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "name": properties.name,
            "memory": properties.total_memory,
            "capability": [properties.major, properties.minor],
            "cuda": torch.version.cuda,
            "multiprocessors": properties.multi_processor_count,
        }
    return about


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def median_seconds(
    function: Callable[[], Any], budget: float, device: torch.device | None = None
) -> float:
    """Return the median time of a call, of as many as the budget allows but at least three.

    Args:
        function: Called once more before.
        budget: Seconds.
        device: Where its work is done; None for the CPU.
    """
    function()
    measure, calls = _seconds, 1
    if device is not None and device.type == "cuda":
        measure = _queued_seconds
        calls = max(1, min(_MOST_CALLS, int(_QUEUED_SECONDS / _queued_seconds(function, 1))))
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 3 or (time.perf_counter() < end and len(times) < _MOST_CALLS):
        times.append(measure(function, calls))
    return statistics.median(times)


def _seconds(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _queued_seconds(function: Callable[[], Any], calls: int) -> float:
    """Return the seconds of a call by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def reset_peak_memory(device: torch.device) -> None:
    """Start the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        programs.reset_peak_memory()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes of tensors on a GPU; on a CPU of resident memory, children's too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return programs.peak_memory()
