# SPDX-License-Identifier: Apache-2.0
"""The host arrays of a plan, and their transfer to the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_sparse_dllm.transfer import HostArrays, aligned_bytes


class PackedArrays:
    """Int32 arrays on the device, sent there by one asynchronous copy.

    The addresses of the views never change: `rewrite` replaces their contents, which a captured
    CUDA graph reads when it is replayed.

    Args:
        shapes: Shapes of the arrays.
        device: Device to send them to.
        among: Host arrays to send them with; None for a copy of their own.

    Attributes:
        views: The arrays on the device, in order; undefined until first rewritten and sent.
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
        """Send arrays to a device, packed into one copy."""
        packed = cls([array.shape for array in arrays], device)
        packed.rewrite(arrays)
        return packed

    def rewrite(self, arrays: Sequence[np.ndarray]) -> None:
        """Replace the contents of the arrays on the device, in the order of its stream.

        Arrays that are sent with others arrive when those are sent.

        Args:
            arrays: New contents, of the shapes given at construction.

        Raises:
            ValueError: If a shape differs.
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
    """Return int32 arrays on a device, sent with ``among`` or, if that is None, at once."""
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
    """Return ``[n + 1]``: the first rows of consecutive runs, then the end of the last one."""
    return np.concatenate([[0], np.cumsum(lengths)])


def pad_sequences(
    table_shape: tuple[int, ...],
    num_queries: int,
    query_lengths: np.ndarray,
    key_lengths: np.ndarray,
    page_table: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pad sequences to the shapes of a static plan; the added ones have no queries.

    Args:
        table_shape: Sequences, and pages of each, that the plan has room for.
        num_queries: Queries of a sequence that the plan has room for.
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
