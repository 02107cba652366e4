# SPDX-License-Identifier: Apache-2.0
"""Scores of keys and their pooling; twins of the functions in `plain`.

Rounding follows the twin: the mean query, its sum over a group of heads and the scores are each
rounded to the dtype of the keys, sums are float32. So in bfloat16 the same scores tie.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_sparse_dllm.kernels import plain
from vllm_sparse_dllm.kernels.plain import SelectionKernels, Span

#: The kernel loops over the width of a window; for wider ones PyTorch's pooling is no slower.
_WIDEST_WINDOW = 256


@triton.jit(do_not_specialize=["num_queries"])
def mean_query_kernel(
    queries,
    mean,
    num_queries,
    query_row,
    query_head,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    kv_head = tl.program_id(0)
    channels = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for member in range(GROUP):
        head = queries + (kv_head * GROUP + member) * query_head
        acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        for start in range(0, num_queries, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            inside = (rows < num_queries)[:, None] & (channels < HEAD_SIZE)[None, :]
            pointers = head + rows.to(tl.int64)[:, None] * query_row + channels[None, :]
            acc += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        own = tl.sum(acc, 0) / num_queries
        total += own.to(mean.dtype.element_ty).to(tl.float32)
    tl.store(
        mean + kv_head * HEAD_SIZE + channels,
        total.to(mean.dtype.element_ty),
        mask=channels < HEAD_SIZE,
    )


@triton.jit(do_not_specialize=["num_scores", "first_start", "first_length", "second_start"])
def key_scores_kernel(
    keys,
    mean,
    scores,
    num_scores,
    first_start,
    first_length,
    second_start,
    key_row,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    numbers = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = numbers < num_scores
    rows = tl.where(
        numbers < first_length, first_start + numbers, second_start + numbers - first_length
    )
    keys += rows.to(tl.int64)[:, None] * key_row
    acc = tl.zeros([BLOCK_N, BLOCK_W], dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK_W):
        channels = start + tl.arange(0, BLOCK_W)
        inside = channels < WIDTH
        query = tl.load(mean + channels, mask=inside, other=0.0).to(tl.float32)
        key = tl.load(
            keys + channels[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        ).to(tl.float32)
        acc += key * query[None, :]
    tl.store(scores + numbers, tl.sum(acc, 1).to(scores.dtype.element_ty), mask=valid)


def key_scores(
    block_queries: torch.Tensor, keys: torch.Tensor, spans: tuple[Span, ...]
) -> torch.Tensor:
    """As `plain.key_scores`; each row of keys must be contiguous."""
    filled = [span for span in spans if span[1] > span[0]]
    if len(filled) not in (1, 2) or block_queries.dtype != keys.dtype:
        return plain.key_scores(block_queries, keys, spans)
    (start, end), (second_start, second_end) = filled[0], filled[-1]
    num = end - start + (second_end - second_start if len(filled) == 2 else 0)
    num_kv_heads, head_size = keys.shape[1], keys.shape[2]
    width = num_kv_heads * head_size
    mean = torch.empty(width, dtype=keys.dtype, device=keys.device)
    mean_query_kernel[(num_kv_heads,)](
        block_queries,
        mean,
        block_queries.shape[0],
        block_queries.stride(0),
        block_queries.stride(1),
        GROUP=block_queries.shape[1] // num_kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_M=16,
        num_warps=4,
    )
    keys = keys.view(keys.shape[0], width)
    scores = torch.empty(num, dtype=keys.dtype, device=keys.device)
    block_n = 8
    key_scores_kernel[(triton.cdiv(num, block_n),)](
        keys,
        mean,
        scores,
        num,
        start,
        end - start,
        second_start,
        keys.stride(0),
        WIDTH=width,
        BLOCK_N=block_n,
        BLOCK_W=min(512, triton.next_power_of_2(width)),
        num_warps=4,
    )
    return scores


@triton.jit(do_not_specialize=["num_values", "num_pooled", "radius"])
def max_pool_kernel(
    values,
    pooled,
    num_values,
    num_pooled,
    radius,
    RUN_LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    numbers = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = numbers * RUN_LENGTH - radius
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for offset in range(RUN_LENGTH + 2 * radius):
        index = first + offset
        inside = (index >= 0) & (index < num_values)
        value = tl.load(values + index, mask=inside, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, value, propagate_nan=tl.PropagateNan.ALL)
    tl.store(pooled + numbers, largest.to(pooled.dtype.element_ty), mask=numbers < num_pooled)


def max_pool(values: torch.Tensor, kernel_size: int, run_length: int) -> torch.Tensor:
    """As `plain.max_pool`."""
    if kernel_size == 1 and run_length == 1:
        return values
    if kernel_size + run_length > _WIDEST_WINDOW:
        return plain.max_pool(values, kernel_size, run_length)
    num = values.shape[0]
    num_pooled = triton.cdiv(num, run_length)
    pooled = torch.empty(num_pooled, dtype=values.dtype, device=values.device)
    block = 256
    max_pool_kernel[(triton.cdiv(num_pooled, block),)](
        values,
        pooled,
        num,
        num_pooled,
        kernel_size // 2,
        RUN_LENGTH=run_length,
        BLOCK=block,
        num_warps=4,
    )
    return pooled


TRITON = SelectionKernels(key_scores, max_pool)
