# SPDX-License-Identifier: Apache-2.0
"""Host arrays of a plan, brought to the device by one copy that nobody waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

#: Each array starts at a multiple of 16 bytes, so that a kernel may load four numbers at once.
_ALIGNMENT = 4


class PackedArrays:
    """Some int32 arrays in one tensor on the device.

    The views keep their addresses for good: `rewrite` changes what they hold, which is what a
    captured CUDA graph reads when it is replayed.

    Args:
        shapes: Of the arrays.
        device: Where they go.

    Attributes:
        views: The arrays on the device, in order; undefined until the first `rewrite`.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        self._shapes = tuple(shapes)
        self._sizes = [int(np.prod(shape)) for shape in shapes]
        self._starts = [0]
        for size in self._sizes:
            self._starts.append(self._starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
        self._tensor = torch.empty(max(1, self._starts[-1]), dtype=torch.int32, device=device)
        self.views = tuple(
            self._tensor[start : start + size].view(shape)
            for start, size, shape in zip(self._starts, self._sizes, shapes, strict=False)
        )

    @classmethod
    def of(cls, arrays: Sequence[np.ndarray], device: torch.device) -> PackedArrays:
        """Return arrays packed on a device."""
        packed = cls([array.shape for array in arrays], device)
        packed.rewrite(arrays)
        return packed

    def rewrite(self, arrays: Sequence[np.ndarray]) -> None:
        """Put other numbers in place of those on the device, in the order of its stream.

        Args:
            arrays: Of the shapes the object was made for.

        Raises:
            ValueError: If a shape is another.
        """
        # PyTorch gives pinned memory to another only when the copy from it is done.
        host = torch.empty(
            self._tensor.shape, dtype=torch.int32, pin_memory=self._tensor.device.type == "cuda"
        )
        numbers = host.numpy()
        for array, shape, size, start in zip(
            arrays, self._shapes, self._sizes, self._starts, strict=False
        ):
            if array.shape != shape:
                raise ValueError(f"an array of the plan has shape {shape}, got {array.shape}")
            numbers[start : start + size] = array.reshape(-1)
        self._tensor.copy_(host, non_blocking=True)


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
