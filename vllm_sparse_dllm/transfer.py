# SPDX-License-Identifier: Apache-2.0
"""Packed transfers between host and device: many arrays or tensors in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

#: Each array starts at a multiple of this many bytes, so that a kernel can load four 32-bit
#: numbers at once.
_ALIGNMENT = 16
#: The PyTorch dtype of each supported NumPy dtype.
_DTYPES = {
    np.dtype(np.bool_): torch.bool,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def aligned_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Return the bytes that an array occupies in a buffer, padded to the alignment."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class _Buffer:
    """A buffer on the device, and the host bytes that are to replace its contents."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.tensor = torch.empty(max(capacity, _ALIGNMENT), dtype=torch.uint8, device=device)
        #: Offset of the next array, and end of the part that has been sent.
        self.used = self.sent = 0
        #: End of the arrays that never move.
        self.fixed = 0
        self._host: torch.Tensor | None = None

    @property
    def free(self) -> int:
        return self.tensor.shape[0] - self.used

    def take(self, size: int) -> int:
        start = self.used
        self.used += size
        return start

    def view(self, start: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> torch.Tensor:
        size = int(np.prod(shape)) * dtype.itemsize
        return self.tensor[start : start + size].view(_DTYPES[dtype]).view(shape)

    def write(self, start: int, array: np.ndarray) -> None:
        if self._host is None:
            self._host = torch.empty(
                self.tensor.shape, dtype=torch.uint8, pin_memory=self.tensor.device.type == "cuda"
            )
        place = self._host.numpy()[start : start + array.nbytes]
        place.view(array.dtype).reshape(array.shape)[...] = array

    def begin(self) -> None:
        # PyTorch reuses this pinned memory only once the copy from it is done.
        self._host = None
        self.used = self.fixed
        self.sent = 0

    def send(self) -> None:
        if self.used > self.sent and self._host is not None:
            part = slice(self.sent, self.used)
            self.tensor[part].copy_(self._host[part], non_blocking=True)
            self.sent = self.used


class FixedArray:
    """An array of `HostArrays` that never moves.

    Attributes:
        view: The array on the device.
    """

    def __init__(self, view: torch.Tensor, buffer: _Buffer | None, start: int) -> None:
        self.view = view
        self.written = False
        self._buffer = buffer
        self._start = start

    def write(self, array: np.ndarray) -> None:
        """Set the values that the next `HostArrays.send` copies to the device.

        Raises:
            ValueError: If the array has another shape.
        """
        shape = tuple(self.view.shape)
        if array.shape != shape:
            raise ValueError(f"an array of the plan has shape {shape}, got {array.shape}")
        self.written = True
        if self._buffer is None:
            self.view.numpy()[...] = array
        elif array.size:
            dtype = next(key for key, value in _DTYPES.items() if value == self.view.dtype)
            self._buffer.write(self._start, array.astype(dtype, copy=False))


class HostArrays:
    """Host arrays that go to the device together, in one asynchronous copy.

    `put` returns an array's place on the device at once; its values are there for everything
    launched on the current stream after `send`. `begin` starts a round, whose values replace
    those in the views returned before, in stream order. On a CPU nothing is copied: the views
    are the arrays themselves.

    Args:
        device: Device that the arrays go to.
        capacity: Bytes of a round. A round that exceeds them needs more than one copy.
        staged: Whether arrays are copied at all; None for every device but the CPU.
    """

    def __init__(
        self, device: torch.device, capacity: int = 1 << 16, staged: bool | None = None
    ) -> None:
        self.device = device
        self._staged = device.type != "cpu" if staged is None else staged
        self._capacity = capacity
        self._buffers = [_Buffer(device, capacity)] if self._staged else []
        self._fixed: list[FixedArray] = []

    def reserve(self, shape: tuple[int, ...], dtype: Any) -> FixedArray:
        """Return an array that never moves and has to be written in every round.

        Must be called before the first round.
        """
        if not self._staged:
            fixed = FixedArray(torch.zeros(shape, dtype=_DTYPES[np.dtype(dtype)]), None, 0)
        else:
            buffer, start = self._take(aligned_bytes(shape, dtype))
            fixed = FixedArray(buffer.view(start, shape, np.dtype(dtype)), buffer, start)
            buffer.fixed = buffer.used
        self._fixed.append(fixed)
        return fixed

    def begin(self) -> None:
        """Begin a round: arrays of the last one will be overwritten."""
        for fixed in self._fixed:
            fixed.written = False
        others = [buffer for buffer in self._buffers if not buffer.fixed]
        if len(others) > 1:
            # The last round did not fit one buffer: make room for another as large.
            self._capacity = 2 * sum(buffer.used for buffer in others)
            self._buffers = [buffer for buffer in self._buffers if buffer.fixed]
            self._buffers.append(_Buffer(self.device, self._capacity))
        for buffer in self._buffers:
            buffer.begin()

    def put(self, array: np.ndarray, dtype: Any = np.int64) -> torch.Tensor:
        """Return where an array will be on the device, as ``dtype``."""
        array = np.ascontiguousarray(array, dtype=dtype)
        if not self._staged:
            return torch.from_numpy(array)
        if not array.size:
            return torch.empty(array.shape, dtype=_DTYPES[array.dtype], device=self.device)
        buffer, start = self._take(aligned_bytes(array.shape, dtype))
        buffer.write(start, array)
        return buffer.view(start, array.shape, array.dtype)

    def _take(self, size: int) -> tuple[_Buffer, int]:
        for buffer in self._buffers:
            if buffer.free >= size:
                return buffer, buffer.take(size)
        buffer = _Buffer(self.device, max(size, self._capacity))
        self._buffers.append(buffer)
        return buffer, buffer.take(size)

    def send(self) -> None:
        """Copy what was put or written since the last call.

        Raises:
            RuntimeError: If a fixed array was not written in this round.
        """
        if not all(fixed.written for fixed in self._fixed):
            raise RuntimeError("an array that keeps its place was not written in this round")
        for buffer in self._buffers:
            buffer.send()


def read_back(tensors: Sequence[torch.Tensor], packed: bool | None = None) -> list[np.ndarray]:
    """Return tensors of one device as host arrays, with one copy and one wait for the device.

    On a CPU the arrays are views of the tensors.

    Args:
        tensors: Tensors of the dtypes that `HostArrays` supports.
        packed: Whether they are copied as one; None for every device but the CPU.
    """
    if packed is None:
        packed = tensors[0].device.type != "cpu"
    if not packed:
        return [tensor.numpy() for tensor in tensors]
    # The widest dtypes first, so that each tensor begins at a multiple of its item size.
    order = sorted(range(len(tensors)), key=lambda number: -tensors[number].element_size())
    parts = [_bytes_of(tensors[number]) for number in order]
    numbers = torch.cat(parts).cpu().numpy()
    arrays: dict[int, np.ndarray] = {}
    start = 0
    for number, part in zip(order, parts, strict=True):
        tensor = tensors[number]
        dtype = next(key for key, value in _DTYPES.items() if value == tensor.dtype)
        own = numbers[start : start + part.shape[0]]
        arrays[number] = own.view(dtype).reshape(tuple(tensor.shape))
        start += part.shape[0]
    return [arrays[number] for number in range(len(tensors))]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.numel():
        return tensor.new_empty(0, dtype=torch.uint8)
    return tensor.contiguous().view(-1).view(torch.uint8)
