# SPDX-License-Identifier: Apache-2.0
"""Bidirectional attention of a few queries per sequence over its pages.

The query heads that share a key head are packed into one tile, so that each key is read once
for all of them and the tile is tall enough for the tensor cores. If there are few sequences, their
keys are split among programs, and a second kernel joins the partial softmaxes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_sparse_dllm.kernels.common import TileConfig, attend_tile, head_strides

#: Numbers of packed rows on both sides of the threshold in `choose_config`: one for each result.
ROW_COUNTS = (32, 33)

#: Fewer keys are not worth a program of their own.
_LEAST_KEYS = 128
_MOST_SPLITS = 32
_ROWS_TO_JOIN = tl.constexpr(8)


def choose_config(head_size: int, dtype: torch.dtype, num_rows: int) -> TileConfig:
    """Return launch parameters.

    Args:
        head_size: Channels of a head.
        dtype: Dtype of queries and pages.
        num_rows: Most packed rows of a sequence. Has no effect in float32, so that sums do not
            depend on the batch.
    """
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 1)
    return TileConfig(32 if num_rows <= 32 else 64, 64, 4, 2 if head_size > 128 else 3)


def choose_splits(num_programs: int, num_keys: int, dtype: torch.dtype, num_cores: int) -> int:
    """Return the number of programs that the keys of a tile are split among.

    Args:
        num_programs: Tiles times key heads.
        num_keys: Most keys of a sequence.
        dtype: In float32 nothing is split: sums must not depend on the batch.
        num_cores: Multiprocessors of the device; the aim is two programs for each.
    """
    if dtype == torch.float32 or num_programs == 0:
        return 1
    most = min(_MOST_SPLITS, -(-num_keys // _LEAST_KEYS))
    return max(1, min(most, -(-2 * num_cores // num_programs)))


@triton.jit
def _keys_of_a_split(num_keys, num_splits, BLOCK_N: tl.constexpr, LEAST: tl.constexpr):
    # Depends on the sequence's own length, so that short sequences keep whole tiles.
    keys = tl.cdiv(tl.cdiv(num_keys, num_splits), BLOCK_N) * BLOCK_N
    return tl.maximum(keys, LEAST)


@triton.jit(do_not_specialize=["table_width", "num_splits"])
def paged_attention_kernel(
    q,
    key_slots,
    value_slots,
    output,
    partial,
    statistics,
    tiles,
    query_start,
    key_lengths,
    page_table,
    table_width,
    q_row,
    q_head,
    slot_stride,
    slot_head,
    output_row,
    output_head,
    num_splits,
    scale,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
    SPLIT: tl.constexpr,
):
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    if sequence < 0:
        return
    kv_head = tl.program_id(1)
    num_keys = tl.load(key_lengths + sequence)
    first_key = 0
    last_key = num_keys
    if SPLIT:
        keys_of_a_split = _keys_of_a_split(num_keys, num_splits, BLOCK_N, LEAST)
        first_key = tl.program_id(2) * keys_of_a_split
        last_key = tl.minimum(first_key + keys_of_a_split, num_keys)
        if first_key >= num_keys:
            return
    first_query = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first_query
    packed = tl.load(tiles + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_N)
    own = (packed < num_queries * GROUP)[:, None] & (channels < HEAD_SIZE)[None, :]
    rows = (first_query + packed // GROUP).to(tl.int64)
    heads = kv_head * GROUP + packed % GROUP
    tile = tl.load(
        q + (rows * q_row + heads * q_head)[:, None] + channels[None, :], mask=own, other=0.0
    )
    page_table += sequence.to(tl.int64) * table_width
    key_slots += kv_head * slot_head
    value_slots += kv_head * slot_head

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for start in range(first_key, last_key, BLOCK_N):
        keys = start + columns
        valid = keys < last_key
        pages = tl.load(page_table + keys // PAGE_SIZE, mask=valid, other=0)
        slots = pages.to(tl.int64) * PAGE_SIZE + keys % PAGE_SIZE
        offsets = slots[:, None] * slot_stride + channels[None, :]
        inside = valid[:, None] & (channels < HEAD_SIZE)[None, :]
        # What follows the last key may be anything; it is never read.
        key_tile = tl.load(key_slots + offsets, mask=inside, other=0.0)
        value_tile = tl.load(value_slots + offsets, mask=inside, other=0.0)
        acc, largest, total = attend_tile(
            tile, key_tile, value_tile, acc, largest, total, valid, scale, True
        )
    if SPLIT:
        number = tl.program_id(0) * tl.num_programs(1) + kv_head
        number = (number * num_splits + tl.program_id(2)).to(tl.int64)
        lines = number * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partial + lines[:, None] * BLOCK_D + channels[None, :], acc)
        tl.store(statistics + 2 * lines, largest)
        tl.store(statistics + 2 * lines + 1, total)
    else:
        tl.store(
            output + (rows * output_row + heads * output_head)[:, None] + channels[None, :],
            (acc / total[:, None]).to(output.dtype.element_ty),
            mask=own,
        )


@triton.jit(do_not_specialize=["num_splits"])
def join_splits_kernel(
    partial,
    statistics,
    output,
    tiles,
    query_start,
    key_lengths,
    output_row,
    output_head,
    num_splits,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LEAST: tl.constexpr,
):
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    if sequence < 0:
        return
    kv_head = tl.program_id(1)
    first_query = tl.load(query_start + sequence)
    num_queries = tl.load(query_start + sequence + 1) - first_query
    num_keys = tl.load(key_lengths + sequence)
    num_used = tl.cdiv(num_keys, _keys_of_a_split(num_keys, num_splits, BLOCK_N, LEAST))
    within = tl.program_id(2) * _ROWS_TO_JOIN + tl.arange(0, _ROWS_TO_JOIN)
    packed = tl.load(tiles + 2 * tl.program_id(0) + 1) + within
    channels = tl.arange(0, BLOCK_D)
    number = (tl.program_id(0) * tl.num_programs(1) + kv_head).to(tl.int64) * num_splits

    acc = tl.zeros([_ROWS_TO_JOIN, BLOCK_D], dtype=tl.float32)
    largest = tl.full([_ROWS_TO_JOIN], float("-inf"), dtype=tl.float32)
    total = tl.zeros([_ROWS_TO_JOIN], dtype=tl.float32)
    for split in range(num_used):
        lines = (number + split) * BLOCK_M + within
        own_largest = tl.load(statistics + 2 * lines)
        new_largest = tl.maximum(largest, own_largest)
        kept = tl.exp2(largest - new_largest)
        weight = tl.exp2(own_largest - new_largest)
        total = total * kept + tl.load(statistics + 2 * lines + 1) * weight
        part = tl.load(partial + lines[:, None] * BLOCK_D + channels[None, :])
        acc = acc * kept[:, None] + part * weight[:, None]
        largest = new_largest
    rows = (first_query + packed // GROUP).to(tl.int64)
    heads = kv_head * GROUP + packed % GROUP
    tl.store(
        output + (rows * output_row + heads * output_head)[:, None] + channels[None, :],
        (acc / total[:, None]).to(output.dtype.element_ty),
        mask=(packed < num_queries * GROUP)[:, None] & (channels < HEAD_SIZE)[None, :],
    )


def work_space(
    num_tiles: int, num_kv_heads: int, num_splits: int, config: TileConfig, head_size: int
) -> tuple[int, int]:
    """Return the sizes of `paged_attention`'s ``partial`` and ``statistics``, in numbers."""
    if num_splits == 1:
        return 1, 1
    lines = num_tiles * num_kv_heads * num_splits * config.block_m
    return lines * triton.next_power_of_2(max(16, head_size)), 2 * lines


def paged_attention(
    q: torch.Tensor,
    key_slots: torch.Tensor,
    value_slots: torch.Tensor,
    output: torch.Tensor,
    tiles: torch.Tensor,
    query_start: torch.Tensor,
    key_lengths: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
    scale: float,
    config: TileConfig,
    num_splits: int,
    partial: torch.Tensor,
    statistics: torch.Tensor,
) -> None:
    """Attend, sequence by sequence.

    Args:
        q: ``[queries, heads, head_size]``.
        key_slots: ``[slots, kv_heads, head_size]`` the pool's keys.
        value_slots: ``[slots, kv_heads, head_size]`` the pool's values, laid out as the keys.
        output: ``[queries, heads, head_size]``, written.
        tiles: ``[tiles, 2]`` int32, sequence and its first packed row in the tile; tiles with a
            sequence below 0 are skipped.
        query_start: ``[sequences + 1]`` int32 first query of each sequence.
        key_lengths: ``[sequences]`` int32, at least 1 where there are queries.
        page_table: ``[sequences, width]`` int32 page ids.
        page_size: Slots of a page.
        scale: Softmax scale.
        config: Launch parameters that the tiles were made for.
        num_splits: Programs that share the keys of a tile.
        partial: float32 work space, see `work_space`.
        statistics: float32 work space.
    """
    num_tiles = tiles.shape[0]
    if num_tiles == 0:
        return
    heads, kv_heads, head_size = q.shape[1], key_slots.shape[1], q.shape[2]
    block_d = triton.next_power_of_2(max(16, head_size))
    least = max(_LEAST_KEYS, config.block_n)
    paged_attention_kernel[(num_tiles, kv_heads, num_splits)](
        q,
        key_slots,
        value_slots,
        output,
        partial,
        statistics,
        tiles,
        query_start,
        key_lengths,
        page_table,
        page_table.shape[1],
        *head_strides(q),
        *head_strides(key_slots),
        *head_strides(output),
        num_splits,
        scale * math.log2(math.e),
        GROUP=heads // kv_heads,
        PAGE_SIZE=page_size,
        HEAD_SIZE=head_size,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        LEAST=least,
        SPLIT=num_splits > 1,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if num_splits == 1:
        return
    join_splits_kernel[(num_tiles, kv_heads, config.block_m // _ROWS_TO_JOIN.value)](
        partial,
        statistics,
        output,
        tiles,
        query_start,
        key_lengths,
        *head_strides(output),
        num_splits,
        GROUP=heads // kv_heads,
        HEAD_SIZE=head_size,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        LEAST=least,
        num_warps=4,
    )
