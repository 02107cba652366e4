# SPDX-License-Identifier: Apache-2.0
"""Code that several Triton kernels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_sparse_dllm.kernels import interpreted

#: Whether to widen the operands of products. Triton's interpreter would multiply the bits of
#: bfloat16 as integers; widened, the products are exact, as those of tensor cores are.
WIDEN_DOTS = tl.constexpr(interpreted())


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of an attention kernel.

    Attributes:
        block_m: Rows of a tile: queries; over pages, queries times the heads that share a key
            head.
        block_n: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Tiles of keys in flight.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@triton.jit
def dot(a, b):
    """Return ``a @ b`` with float32 sums; float32 operands are not rounded to tf32."""
    if WIDEN_DOTS:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attend_tile(q, k, v, acc, largest, total, valid, scale, MASKED: tl.constexpr):
    """Add a tile of keys to the online softmax of a tile of queries.

    Args:
        q: ``[m, d]`` queries.
        k: ``[n, d]`` keys.
        v: ``[n, d]`` values; they must be finite where not valid.
        acc: ``[m, d]`` float32 sums of weighted values.
        largest: ``[m]`` largest score so far, times log2(e).
        total: ``[m]`` sum of weights.
        valid: ``[n]`` which keys count, at least one of the first tile; unused unless `MASKED`.
        scale: Softmax scale times log2(e).
        MASKED: Whether to ignore keys that do not count.
    """
    scores = dot(q, tl.trans(k)) * scale
    if MASKED:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    kept = tl.exp2(largest - new_largest)
    total = total * kept + tl.sum(weights, 1)
    acc = acc * kept[:, None] + dot(weights.to(v.dtype), v)
    return acc, new_largest, total


def head_strides(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the strides of rows and heads of ``[n, heads, head_size]``.

    Raises:
        ValueError: If the channels of a head are not contiguous.
    """
    if tensor.stride(2) != 1:
        raise ValueError(f"channels must lie side by side, got strides {tensor.stride()}")
    return tensor.stride(0), tensor.stride(1)
