# SPDX-License-Identifier: Apache-2.0
"""The host arrays of a plan, and their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_sparse_dllm.transfer import HostArrays, aligned_bytes


class PackedArrays:
    """Some int32 arrays on the device, brought there by one copy that nobody waits for.

    The views keep their addresses for good: `rewrite` changes what they hold, which is what a
    captured CUDA graph reads when it is replayed.

    Args:
        shapes: Of the arrays.
        device: Where they go.
        among: Whose copy they go along with; None: they have one of their own.

    Attributes:
        views: The arrays on the device, in order; undefined until the first `rewrite`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        device: torch.device,
        among: HostArrays | None = None,
    ) -> None:
        self._own: HostArrays | None = None
        if among is None:
            size = sum(aligned_bytes(shape, np.int32) for shape in shapes)
            among = self._own = HostArrays(device, size)
        self._fixed = [among.reserve(shape, np.int32) for shape in shapes]
        self.views = tuple(fixed.view for fixed in self._fixed)

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], device: torch.device) -> PackedArrays:
        """Return arrays packed on a device."""
        packed = cls([array.shape for array in arrays], device)
        packed.rewrite(arrays)
        return packed

    def rewrite(self, arrays: Sequence[np.ndarray]) -> None:
        """Put other numbers in place of those on the device, in the order of its stream.

        Those that go along with others are there when the others are.

        Args:
            arrays: Of the shapes the object was made for.

        Raises:
            ValueError: If a shape is another.
        """
        if self._own is not None:
            self._own.begin()
        for fixed, array in zip(self._fixed, arrays, strict=True):
            fixed.write(array)
        if self._own is not None:
            self._own.send()


def pack(
    arrays: Sequence[np.ndarray], device: torch.device, among: HostArrays | None
) -> tuple[torch.Tensor, ...]:
    """Return int32 arrays on a device, brought there with others or, without, at once."""
    if among is None:
        return PackedArrays.of(arrays, device).views
    return tuple(among.put(array, np.int32) for array in arrays)


def row_tiles(row_counts: np.ndarray, tile_rows: int) -> np.ndarray:
    """Cut the rows of sequences into tiles.

    Args:
        row_counts: ``[sequences]`` rows of each; 0 is allowed.
        tile_rows: Most rows of a tile.

    Returns:
        ``[tiles, 2]`` sequence and first row of each tile, in order.
    """
    counts = -(-row_counts // tile_rows)
    sequences = np.repeat(np.arange(len(row_counts)), counts)
    numbers = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([sequences, numbers * tile_rows], axis=1)


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Return ``[n + 1]`` first rows of consecutive runs, and the end of the last."""
    return np.concatenate([[0], np.cumsum(lengths)])


def pad_sequences(
    table_shape: tuple[int, ...],
    num_queries: int,
    query_lengths: np.ndarray,
    key_lengths: np.ndarray,
    page_table: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the arrays of a plan with room for more sequences; those behind have no rows.

    Args:
        table_shape: Sequences and pages that the plan has room for.
        num_queries: Queries that it has room for in a sequence.
        query_lengths: ``[sequences]``.
        key_lengths: ``[sequences]``.
        page_table: ``[sequences, width]``.

    Returns:
        Query starts, key lengths and page table, int32.

    Raises:
        ValueError: If the plan is too small.
    """
    most = int(query_lengths.max(initial=0))
    num_sequences, width = page_table.shape
    if num_sequences > table_shape[0] or width > table_shape[1] or most > num_queries:
        raise ValueError(
            f"the plan is for {table_shape[0]} sequences of {num_queries} queries on "
            f"{table_shape[1]} pages, got {num_sequences} of at most {most} on {width}"
        )
    starts, lengths = (np.zeros(table_shape[0] + more, np.int32) for more in (1, 0))
    table = np.zeros(table_shape, np.int32)
    starts[: num_sequences + 1] = starts_of(query_lengths)
    starts[num_sequences + 1 :] = starts[num_sequences]
    lengths[:num_sequences] = key_lengths
    table[:num_sequences, :width] = page_table
    return starts, lengths, table
