# SPDX-License-Identifier: Apache-2.0
"""The device that a program runs on, CPU or CUDA: its name, timing of calls, and peak memory."""

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

#: On a GPU, as many calls are queued as take this long together, which hides their launches.
_QUEUED_SECONDS = 2e-3
_MOST_CALLS = 200
#: Before them, the GPU is kept busy for this long, about 2 ms, while they are all launched.
_HEAD_START_CYCLES = 4_000_000


def describe(device: torch.device) -> Job:
    """Return a report's facts about the device and the software on it."""
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
    """Return the median time of a call, over as many calls as the budget allows.

    At least 3 and at most `_MOST_CALLS` times are taken.

    Args:
        function: The function to time; called once more before, to warm up.
        budget: Seconds.
        device: The device that does its work; None for the CPU.
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
    """Return the seconds per call, measured by the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def reset_peak_memory(device: torch.device) -> None:
    """Reset the peak that `peak_memory` returns."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        programs.reset_peak_memory()


def peak_memory(device: torch.device) -> int:
    """Return the peak in bytes: tensors on a GPU; on a CPU resident memory, with the children's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return programs.peak_memory()
