# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark's command line: invalid values are rejected before anything starts."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import gpu_record
import torch
from checkpoints import FAMILIES
from gpu_cases import CONTENDERS, SCALES
from options import above_0, names_of, whole_number, whole_numbers

from vllm_sparse_dllm.settings import ATTENTION_BACKENDS

ROOT = Path(__file__).parents[2]
#: Groups, in the order in which they are measured.
GROUPS = ("contexts", "steps", "long", "batches", "baseline", "memory")
#: Functions that vLLM 0.32 calls on a GPU and PyTorch 2.9 lacks: module and name.
NEEDED_OF_TORCH = (
    ("torch.accelerator", "get_memory_info"),
    ("torch._C", "_accelerator_setAllocatorSettings"),
)


def parse_arguments(description: str | None, argv: list[str] | None = None) -> argparse.Namespace:
    """Return the options; groups and contenders in the order in which they are measured.

    Args:
        description: The program's docstring.
        argv: The command line; None for that of this process.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    add = parser.add_argument
    add("--groups", type=names_of(GROUPS), default=GROUPS, help=f"of {', '.join(GROUPS)} (all)")
    add("--family", choices=FAMILIES, default="llada")
    add("--size", choices=sorted(SCALES), default="public", help="tiny: does it work?")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16; on a CPU float32")
    add("--contexts", type=whole_numbers(1), help="default: 1024,2048,4096,8192")
    add("--batches", type=whole_numbers(1), help="requests at once (default: 1,8,32,128)")
    add(
        "--contenders",
        type=names_of(CONTENDERS),
        default=CONTENDERS,
        help=f"of {', '.join(CONTENDERS)} (all)",
    )
    add("--repeats", type=whole_number(1), default=3, help="runs of each, if there is time (3)")
    add(
        "--vanilla-steps",
        type=whole_number(0),
        default=16,
        help="runs without cache do so many, of many requests fewer (16); 0: all",
    )
    add("--budget", type=above_0, default=420.0, metavar="SECONDS", help="for everything (420)")
    add("--ceilings", type=above_0, default=0.2, metavar="SECONDS", help="for each rate (0.2)")
    add("--kv-cache-gib", type=above_0, help="most memory for pages (default: what is free)")
    add(
        "--attention-backend",
        choices=ATTENTION_BACKENDS,
        help="the engine's (default: on a card triton, on a CPU its own choice)",
    )
    add("--native-ops", action="store_true", help="none of vLLM's compiled operators")
    add("--options", type=_object, default={}, metavar="JSON", help="more of vLLM's options")
    add("--output", type=Path, default=ROOT / "build" / "gpu", help="a folder (build/gpu)")
    add(
        "--merge",
        type=_record,
        nargs="+",
        metavar="FILE",
        help="join gpu.json files, run nothing",
    )
    arguments = parser.parse_args(argv)
    for name, allowed in (("groups", GROUPS), ("contenders", CONTENDERS)):
        chosen = getattr(arguments, name)
        setattr(arguments, name, [one for one in allowed if one in chosen])
    if arguments.batches and max(arguments.batches) == 1:
        # The group "contexts" already measures single requests.
        arguments.groups = [name for name in arguments.groups if name != "batches"]
        if not arguments.groups:
            parser.error("argument --batches: for --groups batches one must be above 1, got 1")
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    if arguments.device == "cuda":
        if not arguments.merge:
            _check_card(parser)
        arguments.attention_backend = arguments.attention_backend or "triton"
    try:
        # Checked here, so that of several --output only the last must be without results.
        _fresh_folder(arguments.output).mkdir(parents=True, exist_ok=True)
    except (OSError, argparse.ArgumentTypeError) as error:
        parser.error(f"argument --output: {error}")
    return arguments


def merged(options: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return options with others on top; nested objects are merged."""
    result = dict(options)
    for name, value in own.items():
        known = result.get(name)
        if isinstance(known, dict) and isinstance(value, dict):
            value = merged(known, value)
        result[name] = value
    return result


def engine_options(arguments: argparse.Namespace, page_size: int) -> dict[str, Any]:
    """Return vLLM's options.

    Args:
        arguments: The command line.
        page_size: Slots of a page.
    """
    options: dict[str, Any] = {
        "load_format": "dummy",
        "block_size": page_size,
        # The pool's size is given in bytes; vLLM only checks that this share is free.
        "gpu_memory_utilization": 0.3,
    }
    if arguments.native_ops:
        options["compilation_config"] = {"custom_ops": ["none"]}
    if arguments.attention_backend:
        backend = {"attention_backend": arguments.attention_backend}
        options["additional_config"] = {"sparse_dllm": backend}
    return merged(options, arguments.options)


def _check_card(parser: argparse.ArgumentParser) -> None:
    """Exit with an error if PyTorch finds no GPU, or lacks functions that vLLM calls."""
    if not torch.cuda.is_available():
        parser.error(
            "argument --device: cuda needs a card, and PyTorch "
            f"{torch.__version__} finds none (torch.cuda.is_available() is False); got cuda"
        )
    for module, name in NEEDED_OF_TORCH:
        if not hasattr(import_module(module), name):
            parser.error(
                f"argument --device: on cuda vLLM 0.32 calls {module}.{name}, which PyTorch "
                f"{torch.__version__} has not; PyTorch must be 2.11 or newer"
            )


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"must be a JSON object of vLLM's options by name, got {text}"
        )
    return value


def _fresh_folder(folder: Path) -> Path:
    if (folder / "gpu.json").exists():
        raise argparse.ArgumentTypeError(
            f"must be a folder without results, and {folder} has a gpu.json"
        )
    if folder.exists() and not folder.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got the file {folder}")
    return folder


def _record(text: str) -> gpu_record.Record:
    try:
        return gpu_record.read(Path(text))
    except OSError as error:
        why = error.strerror
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
    raise argparse.ArgumentTypeError(f"must be gpu.json files of this benchmark, got {text}: {why}")
