# SPDX-License-Identifier: Apache-2.0
"""Fused elementwise operations: compiled kernels where there are any, else PyTorch.

On CPU, vLLM's own layers run these as chains of PyTorch operations that are meant to be compiled;
fused kernels are several times faster than the uncompiled chains. On a GPU for which the build
of vLLM lacks these kernels, the chains are compiled by `torch.compile`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vllm_sparse_dllm.kernels.cpu import kernels_for

with contextlib.suppress(ImportError):
    # Registers the operators of this platform's extension, whatever that is called.
    import vllm._custom_ops  # noqa: F401

_COMPILED = all(
    hasattr(torch.ops._C, name) for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul")
)


def _compiles(device: torch.device) -> bool:
    return device.type == "cuda"


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _run(function: Callable[..., Any], x: torch.Tensor, *others: Any) -> Any:
    return (_compiled(function) if _compiles(x.device) else function)(x, *others)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def _add_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return _norm(total, weight, eps), total


def _silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    width = gate_up.shape[-1] // 2
    return F.silu(gate_up[..., :width]).mul_(gate_up[..., width:])


class FusedRMSNorm(nn.Module):
    """RMSNorm, optionally of a sum: ``norm(x)`` or ``norm(x + residual)``.

    Args:
        hidden_size: Width.
        eps: Added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of ``x`` ``[rows, hidden]``."""
        if not _COMPILED:
            return _run(_norm, x, self.weight, self.eps)
        output = torch.empty_like(x)
        torch.ops._C.rms_norm(output, x, self.weight, self.eps)
        return output

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of ``x + residual``, and the sum; may overwrite both arguments."""
        kernels = kernels_for(x, x.shape[-1], 16)
        if kernels is not None and x.is_contiguous() and residual.is_contiguous():
            kernels.add_norm(x, residual, self.weight, self.eps)
            return x, residual
        if not _COMPILED:
            return _run(_add_norm, x, residual, self.weight, self.eps)
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight, self.eps)
        return x, residual


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` of ``[rows, 2 * width]``."""
    kernels = kernels_for(gate_up, gate_up.shape[-1] // 2, 16)
    if kernels is not None:
        return kernels.silu_and_mul(gate_up)
    if not _COMPILED or gate_up.device.type == "cpu":
        # On CPU, two vectorised passes in PyTorch are 3 to 6 times faster than vLLM's single one.
        return _run(_silu_and_mul, gate_up)
    width = gate_up.shape[-1] // 2
    output = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    torch.ops._C.silu_and_mul(output, gate_up)
    return output
