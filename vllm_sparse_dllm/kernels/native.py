# SPDX-License-Identifier: Apache-2.0
"""The library of cpp/, compiled for the machine at hand and kept in vLLM's cache directory."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

#: Environment variable: ``0`` disables the library; the default is ``1``.
VARIABLE = "VLLM_SPARSE_DLLM_CPU_KERNELS"
SOURCES = Path(__file__).with_name("cpp")
#: Not clang++: its -fopenmp generates calls to LLVM's OpenMP library; PyTorch has GNU's.
COMPILERS = ("g++", "c++")
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fPIC")
#: With -z defs, undefined symbols are an error when linking, not when loading the library.
LINK_FLAGS = ("-shared", "-Wl,-z,defs")
#: Time limit in seconds for a run of the compiler; it takes about five.
TIMEOUT = 120.0


@cache
def load() -> ctypes.CDLL | str:
    """Return the library, or the reason why it is not available here."""
    reason = why_not()
    if reason is not None:
        return reason
    try:
        return ctypes.CDLL(str(build()))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{error} {(getattr(error, 'stderr', None) or '')[-2000:]}".strip()


def why_not() -> str | None:
    """Return what keeps the library from being compiled here, None if no reason is known."""
    if switched_off():
        return f"{VARIABLE} is 0"
    if not torch.cpu._is_avx512_bf16_supported():
        return "the processor has no AVX-512 with bfloat16"
    if find_compiler() is None:
        return f"there is no C++ compiler ({', '.join(COMPILERS)})"
    if _openmp() is None:
        return "PyTorch uses no OpenMP library"
    return None


def lacks_avx512() -> bool:
    """Return whether this is an x86 processor without AVX-512."""
    return platform.machine() == "x86_64" and not torch.cpu._is_avx512_supported()


def switched_off() -> bool:
    """Return whether the user has disabled the library.

    Raises:
        ValueError: If the variable is neither 0 nor 1.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"the environment variable {VARIABLE} must be 0 or 1, got {value!r}")
    return value == "0"


def find_compiler() -> str | None:
    """Return the path of the C++ compiler, None if there is none."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def _openmp() -> str | None:
    """Return the path of PyTorch's OpenMP library; this process may have loaded others.

    The kernels are linked with that one: another would bring threads of its own.
    """
    try:
        function = ctypes.CDLL(torch._C.__file__).omp_get_max_threads
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except (OSError, AttributeError):
        return None
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    for line in lines:
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address < end:
            return f"/{line.partition('/')[2]}"
    return None


def build() -> Path:
    """Compile the library unless it exists, and return its path.

    Raises:
        OSError: If the cache directory cannot be written.
        subprocess.SubprocessError: If the compiler fails.
    """
    compiler, openmp = find_compiler(), _openmp()
    assert compiler is not None and openmp is not None
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    parts = (
        *(path.read_text(encoding="utf-8") for path in files),
        _run(compiler, "--version"),
        # -march=native means this processor; another one needs its own library.
        _processor(),
        openmp,
        *FLAGS,
        *LINK_FLAGS,
    )
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    library = _directory() / f"cpu-{name}.so"
    if not library.exists():
        # Several workers may compile it at once: each writes its own file, and the last one stays.
        with tempfile.TemporaryDirectory(dir=library.parent) as directory:
            objects = []
            for path in files:
                if path.suffix == ".cpp":
                    objects.append(str(Path(directory, path.stem).with_suffix(".o")))
                    _run(compiler, *FLAGS, "-c", str(path), "-o", objects[-1])
            linked = Path(directory, library.name)
            # Without -fopenmp, which would link a library of the compiler's choice.
            _run(compiler, *LINK_FLAGS, *objects, openmp, "-o", str(linked))
            linked.replace(library)
    return library


def _directory() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    root = os.environ.get("VLLM_CACHE_ROOT", os.path.join(cache_home, "vllm"))
    # Not Path.expanduser, which raises where there is no home directory.
    directory = Path(os.path.expanduser(root), "vllm_sparse_dllm")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


def _run(*command: str) -> str:
    run = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT
    )
    return run.stdout
