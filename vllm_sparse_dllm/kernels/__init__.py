# SPDX-License-Identifier: Apache-2.0
"""Kernels for CUDA and for CPUs, and the plain PyTorch code that some of them replace.

Only `plain`, `cpu` and `native` can be imported without Triton: `cpu` has the kernels of `cpp`,
which `native` compiles. All other modules have Triton kernels, written for CUDA; with
``TRITON_INTERPRET=1`` in the environment before Triton is imported they run on a CPU, slowly,
which is how the tests compare them with their PyTorch twins. See docs/gpu.md.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as configurations write it, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def interpreted() -> bool:
    """Return whether Triton's interpreter is switched on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_unavailable(device: torch.device) -> str | None:
    """Return what keeps the Triton kernels from running on a device, None if nothing does."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"there are no Triton kernels for the device {device.type!r}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None
