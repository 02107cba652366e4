# SPDX-License-Identifier: Apache-2.0
"""The kernels of cpu.cpp: what PyTorch and vLLM do on a CPU in several passes over memory.

They are compiled for the machine at hand when the first is asked for, in a few seconds, and kept
in vLLM's cache directory. Where that cannot be (an older processor, no compiler), and for dtypes
other than bfloat16, callers go on with PyTorch's and vLLM's operators.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

#: ``0`` in this variable of the environment: do without them.
VARIABLE = "VLLM_SPARSE_DLLM_CPU_KERNELS"
SOURCE = Path(__file__).with_name("cpu.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC")
TIMEOUT = 120.0

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
_SIGNATURES: dict[str, tuple[type, ...]] = {
    "rotate": (_POINTER, *(_SIZE,) * 4, _POINTER, _POINTER),
    "silu_and_mul": (_POINTER, _POINTER, _SIZE, _SIZE),
    "attend": (*(_POINTER, _SIZE) * 4, *(_SIZE,) * 4, *(_POINTER,) * 2, ctypes.c_float, _SIZE),
}


class CPUKernels:
    """The library's functions, on tensors of bfloat16 whose last dimension is contiguous.

    Each is the same for a row, or for a sequence and head, whatever else is in the call.

    Attributes:
        attends: Whether `attend` can run: the processor has tiles (AMX).
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.attends = library.can_attend() == 1
        for name, arguments in _SIGNATURES.items():
            if name != "attend" or self.attends:
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, None

    def rotate(
        self, x: torch.Tensor, head_size: int, positions: torch.Tensor, table: torch.Tensor
    ) -> None:
        """Turn heads by their positions, in place.

        Args:
            x: ``[rows, heads * head_size]``; rows may lie apart.
            head_size: A multiple of 32. Channel i turns with channel i + head_size / 2.
            positions: ``[rows]``, int64.
            table: ``[positions, head_size]`` cosines, then sines, float32.
        """
        _require(x, torch.bfloat16)
        _require(positions, torch.int64)
        _require(table, torch.float32)
        _require_multiple("head_size", head_size, 32)
        heads = x.shape[1] // head_size
        self._library.rotate(
            x.data_ptr(),
            x.stride(0),
            x.shape[0],
            heads,
            head_size,
            positions.data_ptr(),
            table.data_ptr(),
        )

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return ``silu(gate) * up`` of ``[rows, 2 * width]``; width is a multiple of 16."""
        _require(gate_up, torch.bfloat16)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        _require_multiple("width", width, 16)
        output = torch.empty((rows, width), dtype=gate_up.dtype)
        self._library.silu_and_mul(gate_up.contiguous().data_ptr(), output.data_ptr(), rows, width)
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
            scale: Of the scores.
        """
        for tensor in (queries, keys, values, output):
            _require(tensor, torch.bfloat16)
            if tensor.stride(1) != tensor.shape[2]:
                raise ValueError("heads of a row must lie side by side")
        _require(query_starts, torch.int64)
        _require(key_starts, torch.int64)
        _, heads, head_size = queries.shape
        _require_multiple("head_size", head_size, 32)
        self._library.attend(
            *(
                argument
                for tensor in (queries, keys, values, output)
                for argument in (tensor.data_ptr(), tensor.stride(0))
            ),
            heads,
            keys.shape[1],
            head_size,
            len(query_starts) - 1,
            query_starts.data_ptr(),
            key_starts.data_ptr(),
            scale,
            torch.get_num_threads(),
        )


def _require(tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.device.type != "cpu" or tensor.stride(-1) != 1:
        raise ValueError(
            f"needs {dtype} on the CPU with a contiguous last dimension, got {tensor.dtype} on "
            f"{tensor.device} with strides {tensor.stride()}"
        )


def _require_multiple(name: str, value: int, of: int) -> None:
    if value % of:
        raise ValueError(f"{name} must be a multiple of {of}, got {value}")


def cpu_kernels(dtype: torch.dtype) -> CPUKernels | None:
    """Return the kernels if they can be had here for a dtype."""
    if dtype != torch.bfloat16:
        return None
    loaded = _load()
    return None if isinstance(loaded, str) else loaded


def why_no_cpu_kernels(dtype: torch.dtype) -> str | None:
    """Return what keeps `cpu_kernels` from having any, None if it has them."""
    if dtype != torch.bfloat16:
        return f"they are of bfloat16, not {str(dtype).removeprefix('torch.')}"
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


@cache
def _load() -> CPUKernels | str:
    """Return the kernels, or why there are none."""
    reason = _why_not()
    if reason is not None:
        return reason
    try:
        return CPUKernels(ctypes.CDLL(str(build())))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{error} {(getattr(error, 'stderr', None) or '')[-2000:]}".strip()


def _why_not() -> str | None:
    if os.environ.get(VARIABLE, "1") == "0":
        return f"{VARIABLE} is 0"
    if not torch.cpu._is_avx512_bf16_supported():
        return "the processor has no AVX-512 with bfloat16"
    if _compiler() is None:
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    if _openmp() is None:
        return "PyTorch has loaded no OpenMP library"
    return None


def _compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def _openmp() -> str | None:
    """Return the OpenMP library of this process.

    The kernels are linked with that one: a second would bring threads of its own.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    paths = (line.partition("/")[2] for line in lines)
    wanted = ("libgomp", "libiomp", "libomp")
    return next((f"/{path}" for path in paths if Path(path).name.startswith(wanted)), None)


def build() -> Path:
    """Compile the library unless that has been done, and return where it is.

    Raises:
        OSError: If no directory can be written.
        subprocess.SubprocessError: If the compiler fails.
    """
    compiler, openmp = _compiler(), _openmp()
    assert compiler is not None and openmp is not None
    parts = (
        SOURCE.read_text(encoding="utf-8"),
        _run(compiler, "--version"),
        # What the compiler makes of "native" is the machine's; another needs its own.
        _processor(),
        openmp,
        *FLAGS,
    )
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = _directory() / f"cpu-{name}.so"
    if not library.exists():
        # Several workers may be at it: each writes its own, and the last one stays.
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            compiled, linked = Path(directory, "cpu.o"), Path(directory, "cpu.so")
            _run(compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled))
            _run(compiler, "-shared", str(compiled), openmp, "-o", str(linked))
            linked.replace(library)
    return library


def _directory() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    root = Path(os.environ.get("VLLM_CACHE_ROOT", Path(cache_home, "vllm"))).expanduser()
    directory = root / "vllm_sparse_dllm"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _run(*command: str) -> str:
    run = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT)
    return run.stdout
