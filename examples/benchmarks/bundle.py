# SPDX-License-Identifier: Apache-2.0
"""Write one archive that runs `gpu.py` on a machine with PyTorch and transformers, but no vLLM.

The archive holds the Python files of the installed vLLM, this plugin, the benchmark, and those
packages vLLM imports that the machine lacks. vLLM's compiled operators are left out: the plugin's
Triton kernels and PyTorch's operators replace them (``--native-ops``). Packages with compiled parts
are copied if the machine has this Python version, and otherwise fetched as wheels for its version.
``run.sh`` in the archive starts the benchmark; its arguments are those of `gpu.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Name of the archive's top folder.
NAME = "gpu-benchmark"
#: Distributions that the machine is assumed to have: PyTorch, Triton, transformers and what all
#: their versions require.
PRESENT = (
    *("torch", "triton", "transformers", "filelock", "fsspec", "hf-xet", "huggingface-hub"),
    *("jinja2", "markupsafe", "mpmath", "networkx", "numpy", "packaging", "pyyaml", "regex"),
    *("safetensors", "setuptools", "sympy", "tokenizers", "tqdm", "typing-extensions"),
)
#: Distributions that vLLM, this plugin and the benchmark import when they run a batch, found by
#: running them where nothing else is installed. What these require is bundled too.
NEEDED = (
    *("aiohttp", "cachetools", "cbor2", "cloudpickle", "compressed-tensors", "einops", "fastapi"),
    *("llguidance", "msgspec", "openai", "oss-harmony", "partial-json-parser", "pillow"),
    *("prometheus-client", "psutil", "py-cpuinfo", "pybase64", "pydantic", "pyzmq", "requests"),
    *("uvloop", "xgrammar"),
)
#: Replacements for compiled parts of vLLM's CUDA build that are imported unconditionally.
_STAND_INS = {
    # Modules query the capabilities of these operators at import.
    "_C_stable_libtorch.py": '''# SPDX-License-Identifier: Apache-2.0
"""In place of vLLM's compiled operators: there are none, say those that can be asked."""

import torch

_LIBRARY = torch.library.Library("_C", "FRAGMENT")
for _name in (
    "cutlass_scaled_mm_supports_fp8",
    "cutlass_scaled_mm_supports_block_fp8",
    "cutlass_group_gemm_supported",
):
    _LIBRARY.define(f"{_name}(int cuda_device_capability) -> bool")
    _LIBRARY.impl(_name, lambda capability: False, "CompositeExplicitAutograd")
''',
    # vLLM's own package cannot be imported without its library.
    "vllm_flash_attn/__init__.py": '''# SPDX-License-Identifier: Apache-2.0
"""In place of vLLM's FlashAttention: it can be asked what is supported, which is nothing."""

from vllm.vllm_flash_attn.flash_attn_interface import (  # noqa: F401
    compile_flash_attn_varlen_func_from_specs,
    fa_version_unsupported_reason,
    flash_attn_varlen_func,
    get_scheduler_metadata,
    is_fa_version_supported,
)
''',
}
_RUN = """#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the benchmark from this folder; arguments are those of gpu.py.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here/site${PYTHONPATH:+:$PYTHONPATH}"
# Nothing is to be fetched or told.
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
exec "${PYTHON:-python3}" "$here/benchmarks/gpu.py" --native-ops --output "$here/results" "$@"
"""
#: Platform tags of wheels, oldest first; pip matches them literally.
_PLATFORMS = tuple(
    f"{name}_x86_64"
    for name in ("manylinux1", "manylinux2014", *(f"manylinux_2_{n}" for n in range(5, 40)))
)


#: Allowed endings of the archive's name, which determine the compression.
ENDINGS = (".tar.xz", ".tar.gz", ".tar.bz2", ".tar")


class BundleError(RuntimeError):
    """Something that the archive needs is not installed here, or cannot be downloaded."""


def canonical(name: str) -> str:
    """Return the canonical spelling of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def required_by(names: Iterable[str], present: Collection[str] = ()) -> set[str]:
    """Return installed distributions and all that they require, without extras.

    Args:
        names: The distributions to start from.
        present: Canonical names of distributions to leave out, with what only they require.
    """
    found: set[str] = set()
    waiting = [canonical(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in present:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # A requirement of another platform, or of another build of PyTorch.
            continue
        found.add(name)
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                match = re.match(r"[A-Za-z0-9._-]+", requirement)
                assert match is not None
                waiting.append(canonical(match[0]))
    return found


def read_names(file: Path) -> set[str]:
    """Return the names in a text file, separated by white space or commas."""
    names = re.split(r"[\s,]+", file.read_text(encoding="utf-8"))
    return {canonical(name) for name in names if name}


def installed_files(name: str) -> list[tuple[Path, Path]]:
    """Return the files of a distribution: the path of each, and its path relative to the site.

    Raises:
        BundleError: If the distribution is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise BundleError(f"{name} is not installed here") from None
    return [
        (Path(str(distribution.locate_file(file))), Path(str(file)))
        for file in distribution.files or ()
        if ".." not in file.parts and "__pycache__" not in file.parts
    ]


def is_compiled(files: Iterable[tuple[Path, Path]]) -> bool:
    return any(".so" in target.suffixes for _, target in files)


def copy_distribution(name: str, site: Path) -> None:
    """Copy an installed distribution without its tests."""
    for source, target in installed_files(name):
        if source.is_file() and not {"tests", "test"} & set(target.parts):
            _copy(source, site / target)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def copy_vllm(site: Path) -> None:
    """Copy vLLM's Python files and write its metadata, as a build for no particular device."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise BundleError("vLLM is not installed here")
    package = Path(spec.origin).parent
    for source in package.rglob("*.py"):
        _copy(source, site / "vllm" / source.relative_to(package))
    for name, text in _STAND_INS.items():
        (site / "vllm" / name).write_text(text, encoding="utf-8")
    # With "cpu" in its version, vLLM would ignore GPUs.
    version = importlib.metadata.version("vllm").partition("+")[0]
    _write_metadata(site, "vllm", version)


def copy_plugin(site: Path) -> None:
    """Copy this checkout's plugin (Python files only) and the entry points for vLLM to find it."""
    package = ROOT / "vllm_sparse_dllm"
    for source in package.rglob("*.py"):
        _copy(source, site / source.relative_to(ROOT))
    try:
        distribution = importlib.metadata.distribution("vllm-sparse-dllm")
    except importlib.metadata.PackageNotFoundError:
        raise BundleError("vllm-sparse-dllm is not installed here") from None
    about = _write_metadata(site, "vllm_sparse_dllm", distribution.version)
    entry_points = distribution.read_text("entry_points.txt") or ""
    (about / "entry_points.txt").write_text(entry_points, encoding="utf-8")


def _write_metadata(site: Path, name: str, version: str) -> Path:
    """Write the metadata of an installed distribution; return the metadata's folder."""
    about = site / f"{name}-{version}.dist-info"
    about.mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (about / "METADATA").write_text(text, encoding="utf-8")
    return about


def fetch_wheels(names: Iterable[str], python: str, site: Path) -> None:
    """Download and unpack wheels for another Python version, in the versions installed here."""
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
        done = subprocess.run([*command, *platforms, *pins], check=False)
        if done.returncode:
            raise BundleError(f"no wheels for Python {python} of {', '.join(pins)}")
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)


def missing(present: set[str]) -> list[str]:
    """Return the distributions that the archive must contain."""
    return sorted(required_by(NEEDED, present))


def build(output: Path, python: str, present: set[str]) -> list[str]:
    """Write the archive.

    Args:
        output: The file; its name determines the compression.
        python: The machine's Python version, such as ``3.12``.
        present: Canonical names of the distributions that the machine has.

    Returns:
        The distributions that the archive contains.
    """
    travelling = missing(present)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder) / NAME
        site = top / "site"
        copy_vllm(site)
        copy_plugin(site)
        wheels = []
        for name in travelling:
            if python != here and is_compiled(installed_files(name)):
                wheels.append(name)
            else:
                copy_distribution(name, site)
        if wheels:
            fetch_wheels(wheels, python, site)
        for script in Path(__file__).parent.glob("*.py"):
            _copy(script, top / "benchmarks" / script.name)
        runner = top / "run.sh"
        runner.write_text(_RUN, encoding="utf-8")
        runner.chmod(0o755)
        output.parent.mkdir(parents=True, exist_ok=True)
        compression = output.suffix.removeprefix(".").removeprefix("tar")
        with tarfile.open(output, f"w:{compression}") as archive:
            archive.add(top, NAME)
    return travelling


def _archive(text: str) -> Path:
    if not text.endswith(ENDINGS):
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(ENDINGS)}, got {text}")
    return Path(text)


def _python(text: str) -> str:
    match = re.fullmatch(r"3\.(\d+)", text)
    if match is None or int(match[1]) < 11:
        raise argparse.ArgumentTypeError(f"must be 3.11 or newer, as 3.12, got {text}")
    return text


def _names(text: str) -> set[str]:
    try:
        return read_names(Path(text))
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise argparse.ArgumentTypeError(f"must be a file of names, got {text}: {why}") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--output", type=_archive, default=ROOT / "build" / f"{NAME}.tar.xz")
    add("--python", type=_python, default="3.12", help="the machine's version (default: 3.12)")
    add(
        "--present",
        type=_names,
        default=set(PRESENT),
        metavar="FILE",
        help=f"names of the packages that it has (default: {', '.join(PRESENT)})",
    )
    arguments = parser.parse_args()
    try:
        travelling = build(arguments.output, arguments.python, arguments.present)
    except BundleError as error:
        sys.exit(f"{parser.prog}: error: {error}")
    size = arguments.output.stat().st_size / 2**20
    print(f"{arguments.output}: {size:.1f} MiB, with {', '.join(travelling) or 'no packages'}")


if __name__ == "__main__":
    main()
