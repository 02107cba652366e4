# SPDX-License-Identifier: Apache-2.0
"""Writing the keys and values of one pass, or some of them, straight into their slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=["gap_start", "gap_length"],
    do_not_specialize_on_alignment=["entries", "slots"],
)
def write_rows_kernel(
    keys,
    values,
    entries,
    slots,
    key_slots,
    value_slots,
    key_row,
    value_row,
    slot_stride,
    gap_start,
    gap_length,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CHOSEN: tl.constexpr,
):
    number = tl.program_id(0)
    slot = tl.load(slots + number).to(tl.int64)
    if slot < 0:
        return
    row = number.to(tl.int64)
    if CHOSEN:
        row = tl.load(entries + number).to(tl.int64)
        row += tl.where(row >= gap_start, gap_length, 0)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < WIDTH
    key = tl.load(keys + row * key_row + channels, mask=inside)
    value = tl.load(values + row * value_row + channels, mask=inside)
    tl.store(key_slots + slot * slot_stride + channels, key, mask=inside)
    tl.store(value_slots + slot * slot_stride + channels, value, mask=inside)


def write_rows(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    key_slots: torch.Tensor,
    value_slots: torch.Tensor,
    entries: torch.Tensor | None = None,
    gap: tuple[int, int] = (0, 0),
) -> None:
    """Copy keys and values into slots.

    Args:
        keys: ``[n, kv_heads, head_size]``.
        values: ``[n, kv_heads, head_size]``.
        slots: ``[m]`` target slot of each row; rows with a slot below 0 are skipped.
        key_slots: ``[slots, kv_heads, head_size]``, written.
        value_slots: ``[slots, kv_heads, head_size]``, written, laid out as ``key_slots``.
        entries: ``[m]`` rows to copy, numbered as if those of the gap did not exist; None for all
            in order.
        gap: Start and length of the range of rows that ``entries`` skips.
    """
    num, width = slots.shape[0], keys.shape[1] * keys.shape[2]
    if num == 0:
        return
    keys, values = keys.view(keys.shape[0], width), values.view(values.shape[0], width)
    block = min(2048, triton.next_power_of_2(width))
    write_rows_kernel[(num, triton.cdiv(width, block))](
        keys,
        values,
        slots if entries is None else entries,
        slots,
        key_slots,
        value_slots,
        keys.stride(0),
        values.stride(0),
        key_slots.stride(0),
        *gap,
        WIDTH=width,
        BLOCK=block,
        CHOSEN=entries is not None,
        num_warps=4,
    )
