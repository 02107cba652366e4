# SPDX-License-Identifier: Apache-2.0
"""Fused elementwise operations: vLLM's compiled ones where the build has them, else PyTorch.

vLLM's own layers run these as chains of PyTorch operations on CPU, meant to be compiled;
uncompiled, the fused kernels are several times faster.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

with contextlib.suppress(ImportError):
    import vllm._C  # noqa: F401

_COMPILED = all(
    hasattr(torch.ops._C, name) for name in ("rms_norm", "fused_add_rms_norm", "silu_and_mul")
)


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
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
            return wide.to(x.dtype) * self.weight
        output = torch.empty_like(x)
        torch.ops._C.rms_norm(output, x, self.weight, self.eps)
        return output

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the norm of ``x + residual``, and the sum; both may be written in place."""
        if not _COMPILED:
            total = x + residual
            return self.forward(total), total
        torch.ops._C.fused_add_rms_norm(x, residual, self.weight, self.eps)
        return x, residual


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` of ``[rows, 2 * width]``."""
    width = gate_up.shape[-1] // 2
    if not _COMPILED or gate_up.device.type == "cpu":
        # On CPU two vectorised passes of PyTorch's are 3 to 6 times faster than vLLM's one.
        return F.silu(gate_up[..., :width]).mul_(gate_up[..., width:])
    output = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    torch.ops._C.silu_and_mul(output, gate_up)
    return output
