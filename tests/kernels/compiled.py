# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for a Hopper GPU, without having one: ``python -m tests.kernels.compiled``.

Prints for each binary the registers of a thread, the bytes that spill from them, the shared memory
of a program, and the matrix instructions. Fails if anything spills or does not fit.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_sparse_dllm.kernels import (
    full_attention,
    paged_attention,
    pages,
    saliency,
    token_statistics,
)

HOPPER = GPUTarget("cuda", 90, 32)
#: Bytes of shared memory available to a program on an H100.
SHARED_MEMORY = 227 << 10
_CUDA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """A kernel with the parameters of a launch.

    Attributes:
        name: Name in the output.
        kernel: The kernel.
        types: Types of its arguments in order; ``:16`` marks multiples of 16.
        constants: Its compile-time constants.
        warps: Warps of a program.
        stages: Tiles in flight.
    """

    name: str
    kernel: Any
    types: str
    constants: dict[str, Any]
    warps: int
    stages: int = 3


def attention_cases() -> Iterator[Case]:
    for head_size, group in ((128, 1), (128, 7), (64, 1), (256, 4), (96, 1)):
        constants: dict[str, Any] = {
            "GROUP": group,
            "HEAD_SIZE": head_size,
            "BLOCK_D": triton.next_power_of_2(head_size),
        }
        for queries in (32, 4096) if (head_size, group) != (128, 7) else ():
            config = full_attention.choose_config(head_size, torch.bfloat16, queries)
            yield Case(
                f"full attention, heads of {head_size}, {queries} queries",
                full_attention.full_attention_kernel,
                "*bf16 *bf16 *bf16 *bf16 *i32 *i32 *i32" + " i32:16" * 8 + " fp32",
                constants | {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
                config.num_warps,
                config.num_stages,
            )
        paged = paged_attention.choose_config(head_size, torch.bfloat16, 32 * group)
        constants |= {"BLOCK_M": paged.block_m, "BLOCK_N": paged.block_n, "LEAST": 128}
        for split in (False, True):
            yield Case(
                f"paged attention, heads of {head_size}, groups of {group}, split {split}",
                paged_attention.paged_attention_kernel,
                "*bf16 *bf16 *bf16 *bf16 *fp32 *fp32 *i32 *i32 *i32 *i32 i32"
                + " i32:16" * 6
                + " i32 fp32",
                constants | {"PAGE_SIZE": 16, "SPLIT": split},
                paged.num_warps,
                paged.num_stages,
            )
        yield Case(
            f"join of splits, heads of {head_size}",
            paged_attention.join_splits_kernel,
            "*fp32 *fp32 *bf16 *i32 *i32 *i32 i32:16 i32:16 i32",
            constants,
            4,
        )


def other_cases() -> Iterator[Case]:
    width = 4096
    yield Case(
        "page writes",
        pages.write_rows_kernel,
        "*bf16 *bf16 *i64 *i64 *bf16 *bf16 i32:16 i32:16 i32:16 i32 i32",
        {"WIDTH": width, "BLOCK": 2048, "CHOSEN": True},
        4,
    )
    yield Case(
        "mean query",
        saliency.mean_query_kernel,
        "*bf16 *bf16 i32 i32:16 i32:16",
        {"GROUP": 1, "HEAD_SIZE": 128, "BLOCK_D": 128, "BLOCK_M": 16},
        4,
    )
    yield Case(
        "scores of keys",
        saliency.key_scores_kernel,
        "*bf16 *bf16 *bf16 i32 i32 i32 i32 i32:16",
        {"WIDTH": width, "BLOCK_N": 8, "BLOCK_W": 512},
        4,
    )
    yield Case(
        "pooling",
        saliency.max_pool_kernel,
        "*bf16 *bf16 i32 i32 i32",
        {"RUN_LENGTH": 1, "BLOCK": 256},
        4,
    )
    tiles = {"PIECE": 16384, "BLOCK": 2048}
    yield Case(
        "token statistics",
        token_statistics.statistics_kernel,
        "*bf16 *fp32 *i32 i32:16 i32 i32",
        tiles,
        8,
    )
    yield Case(
        "join of pieces",
        token_statistics.join_pieces_kernel,
        "*fp32 *i32 *i64 *fp32 i32 i32",
        {"BLOCK": 8},
        1,
    )
    yield Case(
        "entropy",
        token_statistics.entropy_kernel,
        "*bf16 *i64 *fp32 *fp32 *fp32 i32:16 i32",
        tiles,
        8,
    )


def compile_case(case: Case) -> Any:
    """Return the compiled kernel."""
    names = [name for name in case.kernel.arg_names if name not in case.constants]
    signature, hints = {}, {}
    for name, kind in zip(names, case.types.split(), strict=True):
        kind, _, multiple = kind.partition(":")
        signature[name] = kind
        if multiple or kind.startswith("*"):
            # Tensors begin at multiples of 16 bytes.
            hints[(case.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(case.constants, "constexpr")
    constants = {(case.kernel.arg_names.index(n),): v for n, v in case.constants.items()}
    signature = {name: signature[name] for name in case.kernel.arg_names}
    source = ASTSource(case.kernel, signature, constants, hints)
    return triton.compile(
        source, target=HOPPER, options={"num_warps": case.warps, "num_stages": case.stages}
    )


def resources(binary: bytes) -> tuple[int, int]:
    """Return the registers of a thread, and its bytes in memory (stack and local)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        report = subprocess.run(
            [_CUDA / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack, local = (
        int(number) for number in re.findall(r"\b(?:REG|STACK|LOCAL):(\d+)", report)
    )
    return registers, stack + local


def main() -> int:
    failed = 0
    cases = [*attention_cases(), *other_cases()]
    if len(sys.argv) > 1:
        cases = [case for case in cases if re.search(sys.argv[1], case.name)]
    for case in cases:
        compiled = compile_case(case)
        registers, spilled = resources(compiled.asm["cubin"])
        shared = compiled.metadata.shared
        matrix = sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", compiled.asm["ptx"])))
        fits = not spilled and shared <= SHARED_MEMORY
        failed += not fits
        print(
            f"{case.name}: {registers} registers, {spilled} spilled, {shared} bytes shared, "
            f"{' '.join(matrix) or 'no matrix instructions'}{'' if fits else ' DOES NOT FIT'}"
        )
    print(f"{len(cases)} kernels, {failed} do not fit")
    return failed


if __name__ == "__main__":
    sys.exit(main())
