# SPDX-License-Identifier: Apache-2.0
"""The kernels of cpp/, for what PyTorch and vLLM do on a CPU in several passes over memory.

They are for bfloat16, and compiled on first use (`native`). Where that is not possible, callers
fall back to PyTorch's and vLLM's operators.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

from vllm_sparse_dllm.kernels import dtype_name, native

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_ROWS = (_POINTER, _SIZE)
_POOL = (_POINTER, _SIZE, _SIZE, _SIZE)
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "rotate": (*_ROWS, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER),
    "add_norm": (_POINTER, _POINTER, _POINTER, _SIZE, _SIZE, ctypes.c_float),
    "silu_and_mul": (_POINTER, _POINTER, _SIZE, _SIZE),
}
#: Functions that need a processor with tiles (AMX).
_TILE_SIGNATURES: dict[str, tuple[type, ...]] = {
    "attend": (
        *(*_ROWS, *_ROWS, *_ROWS, *_ROWS),
        *(_SIZE, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, ctypes.c_float, _SIZE),
    ),
    "attend_pages": (
        *(_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, *_ROWS, *_ROWS),
        *(_SIZE, _SIZE, _SIZE, _SIZE, _POINTER, ctypes.c_float),
    ),
    "write_pages": (*_POOL, *_ROWS, *_ROWS, _POINTER, _SIZE),
    "read_pages": (*_POOL, _POINTER, _SIZE, _SIZE, _POINTER),
}


@dataclass(frozen=True)
class PagePool:
    """A layer's pages, in the kernels' layout.

    Attributes:
        numbers: Flat, bfloat16: ``2 * page_size * kv_heads * head_size`` numbers per page.
        page_size: Slots of a page, a multiple of 32.
        kv_heads: Key/value heads.
        head_size: A multiple of 32.
    """

    numbers: torch.Tensor
    page_size: int
    kv_heads: int
    head_size: int

    def arguments(self) -> tuple[int, int, int, int]:
        return self.numbers.data_ptr(), self.page_size, self.kv_heads, self.head_size


class CPUKernels:
    """The library's functions, on tensors of bfloat16 whose last dimension is contiguous.

    The result for a row, or for a sequence and head, does not depend on what else is in the call.

    Attributes:
        has_tiles: Whether `attend` and the functions on pages can run.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.has_tiles = library.has_tiles() == 1
        for name, arguments in (_SIGNATURES | (_TILE_SIGNATURES if self.has_tiles else {})).items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None

    def rotate(
        self, x: torch.Tensor, head_size: int, positions: torch.Tensor, table: torch.Tensor
    ) -> None:
        """Apply the rotary position embedding to heads, in place.

        Args:
            x: ``[rows, heads * head_size]``; there may be gaps between rows.
            head_size: A multiple of 32. Channel i is rotated with channel i + head_size / 2.
            positions: ``[rows]``, int64.
            table: ``[positions, head_size]`` cosines, then sines, float32.
        """
        _require(torch.bfloat16, x)
        _require(torch.int64, positions)
        _require(torch.float32, table)
        _require_multiple("head_size", head_size, 32)
        self._library.rotate(
            *_rows(x),
            *(x.shape[0], x.shape[1] // head_size, head_size),
            *(positions.data_ptr(), table.data_ptr()),
        )

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """Add ``x`` to ``residual``, then write the sum's RMSNorm to ``x``.

        Args:
            x: ``[rows, width]``, contiguous; width is a multiple of 16.
            residual: As ``x``.
            weight: ``[width]``.
            eps: Added to the mean square.
        """
        _require(torch.bfloat16, x, residual, weight)
        rows, width = x.shape
        _require_multiple("width", width, 16)
        if not (x.is_contiguous() and residual.is_contiguous()):
            raise ValueError("rows must lie side by side")
        pointers = x.data_ptr(), residual.data_ptr(), weight.data_ptr()
        self._library.add_norm(*pointers, rows, width, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up`` of ``[rows, 2 * width]``; width is a multiple of 16."""
        _require(torch.bfloat16, gate_up)
        gate_up = gate_up.contiguous()
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        _require_multiple("width", width, 16)
        output = torch.empty((rows, width), dtype=gate_up.dtype)
        self._library.silu_and_mul(gate_up.data_ptr(), output.data_ptr(), rows, width)
        return output

    def attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        output: torch.Tensor,
        query_starts: torch.Tensor,
        key_starts: torch.Tensor,
        scale: float,
    ) -> None:
        """Write bidirectional attention, sequence by sequence, to ``output``.

        Args:
            queries: ``[n, heads, head_size]``; head_size is a multiple of 32.
            keys: ``[m, kv_heads, head_size]``.
            values: As ``keys``.
            output: As ``queries``.
            query_starts: ``[sequences + 1]`` first query of each, and ``n``; int64.
            key_starts: ``[sequences + 1]`` first key of each, and ``m``; int64. A sequence that
                has queries has keys.
            scale: Softmax scale.
        """
        _require_heads(queries, keys, values, output)
        _require(torch.int64, query_starts, key_starts)
        _, heads, head_size = queries.shape
        _require_equal("shapes of queries and output", queries.shape, output.shape)
        _require_equal("shapes of keys and values", keys.shape, values.shape)
        _require_equal("head sizes", head_size, keys.shape[2])
        _require_equal("numbers of sequences", len(query_starts), len(key_starts))
        _require_multiple("heads", heads, keys.shape[1])
        self._library.attend(
            *(*_rows(queries), *_rows(keys), *_rows(values), *_rows(output)),
            *(heads, keys.shape[1], head_size, len(query_starts) - 1),
            *(query_starts.data_ptr(), key_starts.data_ptr(), scale, torch.get_num_threads()),
        )

    def attend_pages(
        self,
        pool: PagePool,
        queries: torch.Tensor,
        output: torch.Tensor,
        query_starts: torch.Tensor,
        key_lengths: torch.Tensor,
        page_table: torch.Tensor,
        scale: float,
    ) -> None:
        """Write attention over the first slots of each sequence's pages to ``output``.

        Args:
            pool: The pages. What follows a sequence's last slot, in the same page, must not be
                NaN or infinite.
            queries: ``[n, heads, head_size]``.
            output: As ``queries``.
            query_starts: ``[sequences + 1]`` first query of each, and ``n``; int64.
            key_lengths: ``[sequences]`` slots that count; int64.
            page_table: ``[sequences, width]`` ids of pages; int32.
            scale: Softmax scale.
        """
        _require_heads(queries, output)
        _require(torch.int64, query_starts, key_lengths)
        _require(torch.int32, page_table)
        _require_equal("shapes of queries and output", queries.shape, output.shape)
        _require_equal("head sizes", queries.shape[2], pool.head_size)
        sequences = (len(query_starts) - 1, len(key_lengths), len(page_table))
        _require_equal("numbers of sequences", *sequences)
        _require_multiple("heads", queries.shape[1], pool.kv_heads)
        self._library.attend_pages(
            *(pool.numbers.data_ptr(), pool.page_size, *_rows(page_table), key_lengths.data_ptr()),
            *(*_rows(queries), *_rows(output), queries.shape[1], pool.kv_heads, pool.head_size),
            *(len(key_lengths), query_starts.data_ptr(), scale),
        )

    def write_pages(
        self, pool: PagePool, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor
    ) -> None:
        """Write keys and values ``[n, kv_heads, head_size]`` to slots ``[n]``, int64."""
        _require_heads(keys, values)
        _require(torch.int64, slots)
        shape = (len(slots), pool.kv_heads, pool.head_size)
        _require_equal("shapes of keys and values", keys.shape, values.shape, shape)
        self._library.write_pages(
            *(*pool.arguments(), *_rows(keys), *_rows(values), slots.data_ptr(), len(slots))
        )

    def read_pages(self, pool: PagePool, slots: torch.Tensor, values: bool) -> torch.Tensor:
        """Return the keys, or the values, ``[n, kv_heads, head_size]`` in slots ``[n]``, int64."""
        _require(torch.int64, slots)
        shape = (len(slots), pool.kv_heads, pool.head_size)
        output = torch.empty(shape, dtype=torch.bfloat16)
        arguments = (slots.data_ptr(), len(slots), values, output.data_ptr())
        self._library.read_pages(*pool.arguments(), *arguments)
        return output


def _rows(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.stride(0)


def _require(dtype: torch.dtype, *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        # With fewer than two numbers, strides are arbitrary.
        contiguous = tensor.numel() < 2 or tensor.stride(-1) == 1
        if tensor.dtype != dtype or tensor.device.type != "cpu" or not contiguous:
            raise ValueError(
                f"needs {dtype} on the CPU with a contiguous last dimension, got {tensor.dtype} "
                f"on {tensor.device} with strides {tensor.stride()}"
            )


def _require_multiple(name: str, value: int, of: int) -> None:
    if value % of:
        raise ValueError(f"{name} must be a multiple of {of}, got {value}")


def _require_equal(names: str, *values: object) -> None:
    if any(value != values[0] for value in values):
        raise ValueError(f"{names} must be the same, got {', '.join(map(str, values))}")


def _require_heads(*tensors: torch.Tensor) -> None:
    _require(torch.bfloat16, *tensors)
    for tensor in tensors:
        _require_multiple("head_size", tensor.shape[2], 32)
        if tensor.shape[1] > 1 and tensor.stride(1) != tensor.shape[2]:
            raise ValueError(f"heads of a row must lie side by side, strides {tensor.stride()}")


@cache
def _kernels(library: ctypes.CDLL) -> CPUKernels:
    return CPUKernels(library)


def cpu_kernels(dtype: torch.dtype) -> CPUKernels | None:
    """Return the kernels for a dtype, None if they are not available here."""
    if dtype != torch.bfloat16:
        return None
    library = native.load()
    return None if isinstance(library, str) else _kernels(library)


def kernels_for(x: torch.Tensor, width: int, multiple: int) -> CPUKernels | None:
    """Return the kernels if they support ``x`` and ``multiple`` divides ``width``, else None."""
    if x.device.type != "cpu" or width % multiple:
        return None
    return cpu_kernels(x.dtype)


def why_no_cpu_kernels(dtype: torch.dtype) -> str | None:
    """Return why `cpu_kernels`, or their attention, are not available; None if they are."""
    if dtype != torch.bfloat16:
        return f"they are of bfloat16, not {dtype_name(dtype)}"
    library = native.load()
    if isinstance(library, str):
        return library
    if _kernels(library).has_tiles:
        return None
    return "for attention there is no AMX, in the processor, the system or the compiler"
