# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels against plain PyTorch, and what happens where there are none."""

from __future__ import annotations

import ctypes
import math
import pwd
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.twins import attention
from vllm_sparse_dllm.attention.cpu_tiles import TileBackend
from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.kernels import native
from vllm_sparse_dllm.kernels.cpu import CPUKernels, PagePool, cpu_kernels, why_no_cpu_kernels

BF16 = torch.bfloat16


def need_the_library() -> None:
    """Skip the test where the library cannot be compiled."""
    reason = native.why_not()
    if reason is not None:
        pytest.skip(reason)


def available(tiles: bool = False) -> CPUKernels:
    """Return the kernels; skip the test where the machine has none."""
    need_the_library()
    kernels = cpu_kernels(BF16)
    assert kernels is not None  # without a reason against it, the library must compile
    if tiles and not kernels.has_tiles:
        pytest.skip("the processor has no tiles")
    return kernels


@pytest.fixture
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have the library looked for anew, in an empty cache directory; return the directory."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(native, "load", native.load.__wrapped__)
    return tmp_path


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


@pytest.mark.parametrize("head_size", [32, 64, 96, 128])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_rotate(rows: int, head_size: int) -> None:
    kernels = available()
    heads, half = 3, head_size // 2
    # Values lie beside queries and keys, and must stay unchanged.
    row = randn(1, rows, (heads + 1) * head_size)
    before = row.clone()
    positions = torch.randperm(90, generator=torch.Generator().manual_seed(2))[:rows]
    angles = torch.rand(90, half, generator=torch.Generator().manual_seed(3)) * 7
    kernels.rotate(
        row[:, : heads * head_size],
        head_size,
        positions,
        torch.cat([angles.cos(), angles.sin()], dim=-1),
    )
    a, b = before.double().view(rows, heads + 1, 2, half)[:, :heads].unbind(2)
    cos, sin = (f(angles.double())[positions].unsqueeze(1) for f in (torch.cos, torch.sin))
    expected = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1)
    # Rounded once.
    torch.testing.assert_close(row[:, :-head_size], expected.to(BF16), rtol=8e-3, atol=1e-6)
    assert torch.equal(row[:, -head_size:], before[:, -head_size:])


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 48), (130, 512)])
def test_add_norm(rows: int, width: int) -> None:
    x, residual = randn(8, rows, width), randn(9, rows, width) * 5
    weight = randn(10, width)
    expected = x + residual
    wide = expected.double()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 0.25) * weight.double()
    available().add_norm(x, residual, weight, 0.25)
    assert torch.equal(residual, expected)
    torch.testing.assert_close(x, normed.to(BF16), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (7, 48), (130, 512)])
def test_silu_and_mul(rows: int, width: int) -> None:
    gate_up = randn(4, rows, 2 * width) * 6
    expected = F.silu(gate_up[:, :width].double()) * gate_up[:, width:].double()
    result = available().silu_and_mul(gate_up)
    torch.testing.assert_close(result, expected.to(BF16), rtol=8e-3, atol=1e-30)


def test_silu_of_what_is_not_finite() -> None:
    gates = [math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0, -0.0, -88.0, -105.0, 1e-30]
    gate = torch.tensor(gates + [1.0] * 6).to(BF16).unsqueeze(0)
    result = available().silu_and_mul(torch.cat([gate, torch.ones_like(gate)], dim=-1))
    expected = F.silu(gate.float()).to(BF16)
    torch.testing.assert_close(result, expected, rtol=8e-3, atol=1e-30, equal_nan=True)


SEQUENCE = st.tuples(st.integers(0, 90), st.integers(1, 700))


@given(
    st.lists(SEQUENCE, min_size=1, max_size=4),
    st.sampled_from([(2, 2, 64), (4, 2, 64), (3, 1, 32), (2, 1, 128), (1, 1, 96)]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_attend(sequences: list[tuple[int, int]], shape: tuple[int, int, int], seed: int) -> None:
    """Any lengths, with several and partial tiles, on rows that are not contiguous."""
    kernels = available(tiles=True)
    heads, kv_heads, size = shape
    num_queries, num_keys = (sum(lengths) for lengths in zip(*sequences, strict=True))
    # The larger the keys, the more one weight dominates all others.
    row = randn(seed, num_keys, 3 * kv_heads * size)
    keys, values = (
        part.view(num_keys, kv_heads, size) for part in row.split(kv_heads * size, dim=-1)[:2]
    )
    keys *= seed % 5
    queries = randn(seed + 1, num_queries, 2 * heads * size)[:, : heads * size]
    queries = queries.unflatten(-1, (heads, size))
    output = torch.full(queries.shape, math.nan, dtype=BF16)
    query_starts, key_starts = (
        torch.tensor([0, *lengths]).cumsum(0) for lengths in zip(*sequences, strict=True)
    )
    kernels.attend(queries, keys, values, output, query_starts, key_starts, size**-0.5)
    for number in range(len(sequences)):
        q = slice(*query_starts[number : number + 2].tolist())
        k = slice(*key_starts[number : number + 2].tolist())
        expected = attention(queries[q], keys[k], values[k])
        # Weights are in bfloat16: an error of up to 2 ** -9 of the largest value each.
        torch.testing.assert_close(output[q].double(), expected, rtol=0.0, atol=0.03)
        alone = torch.empty_like(output[q])
        lengths = [torch.tensor([0, end]) for end in (q.stop - q.start, k.stop - k.start)]
        kernels.attend(queries[q], keys[k], values[k], alone, *lengths, size**-0.5)
        assert torch.equal(alone, output[q])


@given(
    st.lists(st.tuples(st.integers(0, 70), st.integers(1, 400)), min_size=1, max_size=4),
    st.sampled_from([(2, 2, 64, 32), (4, 2, 32, 64), (2, 1, 128, 32)]),
    st.integers(0, 99),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_pages(
    sequences: list[tuple[int, int]], shape: tuple[int, int, int, int], seed: int
) -> None:
    """Keys are written and read in any order; pages are in any order and partly filled."""
    kernels = available(tiles=True)
    heads, kv_heads, size, page_size = shape
    counts = [-(-keys // page_size) for _, keys in sequences]
    generator = torch.Generator().manual_seed(seed)
    page_ids = torch.randperm(sum(counts) + 2, generator=generator)[: sum(counts)].int()
    table = torch.zeros(len(sequences), max(counts), dtype=torch.int32)
    for row, pages in zip(table, page_ids.split(counts), strict=True):
        row[: len(pages)] = pages
    pool = PagePool(
        torch.full(((sum(counts) + 2) * 2 * page_size * kv_heads * size,), 7.0, dtype=BF16),
        page_size,
        kv_heads,
        size,
    )
    num_queries = sum(queries for queries, _ in sequences)
    queries = randn(seed, num_queries, 2 * heads * size)[:, : heads * size]
    queries = queries.unflatten(-1, (heads, size))
    output = torch.full(queries.shape, math.nan, dtype=BF16)
    written = []
    for row, (_, num_keys) in zip(table, sequences, strict=True):
        keys, values = randn(seed + 1, num_keys, 2 * kv_heads, size).chunk(2, dim=1)
        positions = torch.arange(num_keys)
        slots = row[positions // page_size].long() * page_size + positions % page_size
        order = torch.randperm(num_keys, generator=generator)
        kernels.write_pages(pool, keys[order], values[order], slots[order])
        written.append((keys, values, slots))
    starts = torch.tensor([0, *(number for number, _ in sequences)]).cumsum(0)
    lengths = torch.tensor([number for _, number in sequences])
    kernels.attend_pages(pool, queries, output, starts, lengths, table, size**-0.5)
    for number, (keys, values, slots) in enumerate(written):
        assert torch.equal(kernels.read_pages(pool, slots, values=False), keys)
        assert torch.equal(kernels.read_pages(pool, slots, values=True), values)
        own = slice(*starts[number : number + 2].tolist())
        expected = attention(queries[own], keys, values)
        torch.testing.assert_close(output[own].double(), expected, rtol=0.0, atol=0.03)
        # The same as with keys in rows, bit for bit.
        whole = torch.empty_like(output[own])
        ends = [torch.tensor([0, end]) for end in (own.stop - own.start, len(slots))]
        kernels.attend(queries[own], keys, values, whole, *ends, size**-0.5)
        assert torch.equal(whole, output[own])


def test_no_sequences_are_nothing_to_do() -> None:
    available(tiles=True)
    backend = TileBackend(AttentionShape(2, 1, 64), 32, BF16, torch.device("cpu"))
    backend.bind_pages([torch.zeros(2 * 32 * 64, dtype=BF16).view(torch.int8)])
    none = np.zeros(0, dtype=np.int64)
    queries = torch.empty(0, 2, 64, dtype=BF16)
    keys, output = queries[:, :1], torch.empty_like(queries)
    backend.attend_full(queries, keys, keys, output, backend.plan_full(none, none))
    plan = backend.plan_paged(none, none, np.zeros((0, 0), dtype=np.int64))
    backend.attend_paged(0, queries, output, plan)


def test_attend_is_the_same_with_any_number_of_threads() -> None:
    """With more threads than heads, a sequence's queries are split, which changes no bit."""
    kernels = available(tiles=True)
    q, k, v = (randn(seed, 500, 1, 64) for seed in range(3))
    starts = torch.tensor([0, 500])
    outputs = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(torch.empty_like(q))
            kernels.attend(q, k, v, outputs[-1], starts, starts, 0.125)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("magnitude", [1e2, 1e3, 1e5, 1e9, 1e15])
def test_attend_with_scores_beyond_all_exponentials(magnitude: float) -> None:
    kernels = available(tiles=True)
    q, k = randn(6, 40, 1, 32) * magnitude, randn(5, 600, 1, 32) * magnitude
    v = randn(7, 600, 1, 32)
    output = torch.empty_like(q)
    kernels.attend(q, k, v, output, torch.tensor([0, 40]), torch.tensor([0, 600]), 1.0)
    expected = attention(q.double() * 32**0.5, k, v)
    torch.testing.assert_close(output.double(), expected, rtol=0.0, atol=0.03)


def test_wrong_tensors_are_refused() -> None:
    kernels = available()
    x, table = randn(1, 3, 64), torch.zeros(9, 32)
    positions = torch.arange(3)
    with pytest.raises(ValueError, match="bfloat16 on the CPU"):
        kernels.rotate(x.float(), 32, positions, table)
    with pytest.raises(ValueError, match="int64"):
        kernels.rotate(x, 32, positions.int(), table)
    with pytest.raises(ValueError, match="head_size must be a multiple of 32, got 16"):
        kernels.rotate(x, 16, positions, table)
    with pytest.raises(ValueError, match="width must be a multiple of 16, got 8"):
        kernels.silu_and_mul(randn(1, 3, 16))
    with pytest.raises(ValueError, match="contiguous last dimension"):
        kernels.silu_and_mul(x.t())
    with pytest.raises(ValueError, match="rows must lie side by side"):
        kernels.add_norm(x[:, :32], x[:, :32], x[0, :32], 1e-5)


def test_what_does_not_go_together_is_refused() -> None:
    """With shapes that do not match, the kernels would read and write out of bounds."""
    kernels = available(tiles=True)
    q, k, starts = randn(1, 3, 4, 64), randn(2, 3, 2, 64), torch.tensor([0, 3])
    for queries, keys, output, key_starts, message in (
        (q, k, q[:2], starts, "shapes of queries and output"),
        (q, k[:, :, :32], q, starts, "shapes of keys and values"),
        (q[:, :, :32].contiguous(), k, q[:, :, :32].contiguous(), starts, "head sizes"),
        (q, k, q, torch.tensor([0, 3, 3]), "numbers of sequences"),
        (q[:, :3].contiguous(), k, q[:, :3].contiguous(), starts, "heads must be a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.attend(queries, keys.contiguous(), k, output, starts, key_starts, 1.0)
    pool = PagePool(torch.zeros(2 * 32 * 2 * 64, dtype=BF16), 32, 2, 64)
    lengths, table = torch.tensor([3]), torch.zeros(1, 1, dtype=torch.int32)
    for queries, output, key_lengths, message in (
        (q, q[:2], lengths, "shapes of queries and output"),
        (q[:, :, :32].contiguous(), q[:, :, :32].contiguous(), lengths, "head sizes"),
        (q, q, lengths.repeat(2), "numbers of sequences"),
        (q[:, :3].contiguous(), q[:, :3].contiguous(), lengths, "heads must be a multiple of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.attend_pages(pool, queries, output, starts, key_lengths, table, 1.0)
    for keys, slots in ((k[:2], 3), (k, 4), (q, 3)):
        with pytest.raises(ValueError, match="shapes of keys and values"):
            kernels.write_pages(pool, keys, k, torch.arange(slots))


def test_other_dtypes_have_none() -> None:
    assert cpu_kernels(torch.float32) is None
    assert why_no_cpu_kernels(torch.float16) == "they are of bfloat16, not float16"


def missing(anew: Path) -> str:
    """Return why there are no kernels."""
    assert cpu_kernels(BF16) is None
    assert not list(anew.rglob("*.so"))
    reason = why_no_cpu_kernels(BF16)
    assert reason is not None
    return reason


def test_they_can_be_switched_off(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIABLE, "0")
    assert f"{native.VARIABLE} is 0" in missing(anew)


def test_an_older_processor_has_none(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert "no AVX-512" in missing(anew)


def test_a_processor_without_tiles_has_all_but_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = available()
    monkeypatch.setattr(kernels, "has_tiles", False)
    reason = why_no_cpu_kernels(BF16)
    assert reason is not None and "for attention there is no AMX" in reason
    assert cpu_kernels(BF16) is kernels
    found = TileBackend.why_not(AttentionShape(2, 1, 64), 32, BF16, torch.device("cpu"))
    assert found == f"its kernels: {reason}"


def test_without_a_compiler_there_are_none(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("PATH", str(anew))
    assert "no C++ compiler" in missing(anew)


def test_a_compiler_that_fails_is_quoted(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = anew / "g++"
    compiler.write_text(
        # Not in UTF-8, as messages of compilers in other languages may be.
        "#!/bin/sh\n[ $1 = --version ] && exit 0\nprintf 'no such flag \\374' >&2\nexit 1"
    )
    compiler.chmod(0o755)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setenv("PATH", f"{anew}:/usr/bin:/bin")
    assert "no such flag" in missing(anew)


def test_what_cannot_be_linked_leaves_no_library(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a compiler whose OpenMP code calls functions that PyTorch's library lacks."""
    need_the_library()
    (anew / "kernel.cpp").write_text(
        'extern "C" { void __kmpc_fork_call(); int has_tiles() { __kmpc_fork_call(); return 0; } }'
    )
    monkeypatch.setattr(native, "SOURCES", anew)
    assert "__kmpc_fork_call" in missing(anew)


def test_a_directory_that_cannot_be_written_means_none(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_the_library()
    (anew / "file").write_text("")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(anew / "file"))
    assert "Not a directory" in missing(anew)


def test_without_a_home_a_directory_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container whose user has no name; like vLLM, the path then keeps its `~`."""

    def getpwuid(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    monkeypatch.chdir(tmp_path)
    assert native._directory() == Path("~/.cache/vllm/vllm_sparse_dllm")
    assert native._directory().is_dir()


def test_workers_that_compile_at_once_get_one_library(anew: Path) -> None:
    need_the_library()
    with ThreadPoolExecutor(3) as pool:
        libraries = {future.result() for future in [pool.submit(native.build) for _ in range(3)]}
    assert list(anew.rglob("*")) == [anew / "vllm_sparse_dllm", *libraries]
    compiled = libraries.pop()
    before = compiled.stat().st_mtime_ns
    assert native.build() == compiled and compiled.stat().st_mtime_ns == before


def test_the_openmp_library_is_pytorchs_whatever_else_is_loaded(tmp_path: Path) -> None:
    """Other packages load their own copies of the library, with threads of their own."""
    own = native._openmp()
    if own is None:
        pytest.skip("PyTorch uses no OpenMP library")
    # In the list of loaded libraries, later ones come before it.
    ctypes.CDLL(shutil.copy(own, tmp_path / "libgomp-another.so.1"))
    assert native._openmp() == own


@pytest.mark.parametrize("source", [path.name for path in native.SOURCES.glob("*.cpp")])
@pytest.mark.parametrize("flags", [[], ["-mno-amx-bf16"]])
def test_the_sources_have_no_warnings(source: str, flags: list[str], tmp_path: Path) -> None:
    """With and without tiles; the disabled warnings are those that GCC 12's headers cause."""
    need_the_library()
    compiler = native.find_compiler()
    assert compiler is not None
    run = subprocess.run(
        [compiler, *native.FLAGS, *flags, "-Wall", "-Wextra", "-Wno-uninitialized"]
        + ["-Wno-maybe-uninitialized", "-c", str(native.SOURCES / source)]
        + ["-o", str(tmp_path / "object.o")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and run.stderr == ""
