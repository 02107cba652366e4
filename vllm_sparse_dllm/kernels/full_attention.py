# SPDX-License-Identifier: Apache-2.0
"""Bidirectional attention of ragged sequences over the keys of the same pass.

One program computes a tile of queries of one head, with the online softmax. Programs of the same
head follow each other, so that its keys and values come from the cache after their first read.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_sparse_dllm.kernels.common import TileConfig, attend_tile, head_strides

#: Numbers of queries on both sides of the threshold in `choose_config`: one for each result.
QUERY_COUNTS = (64, 65)


def choose_config(head_size: int, dtype: torch.dtype, num_queries: int) -> TileConfig:
    """Return launch parameters.

    Args:
        head_size: Channels of a head.
        dtype: Dtype of queries, keys and values.
        num_queries: Most queries of a sequence. Has no effect in float32, so that sums do not
            depend on the batch.
    """
    wide = head_size > 128
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 1)
    if num_queries <= 64:
        return TileConfig(64, 64, 4, 2 if wide else 3)
    return TileConfig(128, 64, 8, 2 if wide else 3)


@triton.jit
def full_attention_kernel(
    q,
    k,
    v,
    output,
    tiles,
    query_start,
    key_start,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    output_row,
    output_head,
    scale,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    if sequence < 0:
        return
    head = tl.program_id(1)
    first_query = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first_query
    first_key = tl.load(key_start + sequence).to(tl.int64)
    num_keys = (tl.load(key_start + sequence + 1) - first_key).to(tl.int32)
    rows = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    own = (rows < num_queries)[:, None] & (channels < HEAD_SIZE)[None, :]
    rows = first_query.to(tl.int64) + rows
    tile = tl.load(
        q + rows[:, None] * q_row + head * q_head + channels[None, :], mask=own, other=0.0
    )
    k += first_key * k_row + (head // GROUP) * k_head
    v += first_key * v_row + (head // GROUP) * v_head

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Whole tiles need no mask over keys.
    whole = num_keys // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        keys = (start + columns).to(tl.int64)
        inside = (channels < HEAD_SIZE)[None, :]
        if HEAD_SIZE == BLOCK_D:
            key_tile = tl.load(k + keys[:, None] * k_row + channels[None, :])
            value_tile = tl.load(v + keys[:, None] * v_row + channels[None, :])
        else:
            key_tile = tl.load(
                k + keys[:, None] * k_row + channels[None, :], mask=inside, other=0.0
            )
            value_tile = tl.load(
                v + keys[:, None] * v_row + channels[None, :], mask=inside, other=0.0
            )
        acc, largest, total = attend_tile(
            tile, key_tile, value_tile, acc, largest, total, columns, scale, False
        )
    if whole < num_keys:
        keys = (whole + columns).to(tl.int64)
        valid = keys < num_keys
        inside = valid[:, None] & (channels < HEAD_SIZE)[None, :]
        key_tile = tl.load(k + keys[:, None] * k_row + channels[None, :], mask=inside, other=0.0)
        value_tile = tl.load(v + keys[:, None] * v_row + channels[None, :], mask=inside, other=0.0)
        acc, largest, total = attend_tile(
            tile, key_tile, value_tile, acc, largest, total, valid, scale, True
        )
    acc = acc / total[:, None]
    tl.store(
        output + rows[:, None] * output_row + head * output_head + channels[None, :],
        acc.to(output.dtype.element_ty),
        mask=own,
    )


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    tiles: torch.Tensor,
    query_start: torch.Tensor,
    key_start: torch.Tensor,
    scale: float,
    config: TileConfig,
) -> None:
    """Attend, sequence by sequence.

    Args:
        q: ``[queries, heads, head_size]``.
        k: ``[keys, kv_heads, head_size]``.
        v: ``[keys, kv_heads, head_size]``.
        output: ``[queries, heads, head_size]``, written.
        tiles: ``[tiles, 2]`` int32, sequence and its first query in the tile; tiles with a
            sequence below 0 are skipped.
        query_start: ``[sequences + 1]`` int32 first query of each sequence.
        key_start: ``[sequences + 1]`` int32 first key of each sequence; those with queries need
            at least one key.
        scale: Softmax scale.
        config: Launch parameters that the tiles were made for.
    """
    if tiles.shape[0] == 0:
        return
    heads, head_size = q.shape[1], q.shape[2]
    full_attention_kernel[(tiles.shape[0], heads)](
        q,
        k,
        v,
        output,
        tiles,
        query_start,
        key_start,
        *head_strides(q),
        *head_strides(k),
        *head_strides(v),
        *head_strides(output),
        scale * math.log2(math.e),
        GROUP=heads // k.shape[1],
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(max(16, head_size)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
