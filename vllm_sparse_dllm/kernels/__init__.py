# SPDX-License-Identifier: Apache-2.0
"""Kernels for CUDA and for CPUs, and the plain PyTorch of what some of them replace.

Only `plain`, `cpu` and `native` may be imported where there is no Triton: `cpu` has the kernels
of `cpp`, which `native` compiles. All others are Triton's, written for CUDA; with
``TRITON_INTERPRET=1`` in the environment before Triton is imported they run on a CPU, slowly,
which is how the tests compare them with their twins. See docs/gpu.md.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as configurations have it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def interpreted() -> bool:
    """Return whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable(device: torch.device) -> str | None:
    """Return what keeps the kernels from running on a device, None if nothing does."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"there are no Triton kernels for the device {device.type!r}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None
