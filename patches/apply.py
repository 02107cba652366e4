# SPDX-License-Identifier: Apache-2.0
"""Apply or revert patches of this folder to an installed vLLM.

``python patches/apply.py ray-on-cpu`` applies a patch to the vLLM of the Python that runs it,
``--revert`` takes it out again, ``--check`` only says whether it could be done. Nothing is
changed unless all patches that are named fit.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    """Return the names of the available patches."""
    return sorted(path.stem for path in FOLDER.glob("*.patch"))


def installed_in() -> Path:
    """Return the folder that contains the package ``vllm``.

    Raises:
        SystemExit: If there is no such package.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: {sys.executable} has no vllm")
    return Path(spec.origin).resolve().parents[1]


def apply(patches: list[str], target: Path, revert: bool, check: bool) -> str | None:
    """Apply patches to the files in ``target``.

    Returns:
        Why they do not fit, None if they do.
    """
    command = ["git", "apply", *(["--reverse"] if revert else []), *(["--check"] if check else [])]
    # As one patch: given several, git applies the first before it checks the second.
    together = "".join((FOLDER / f"{name}.patch").read_text("utf-8") for name in patches)
    # Do not take an environment inside a repository as part of it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(target.parent)}
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        environment.pop(name, None)
    try:
        done = subprocess.run(
            command, input=together, cwd=target, env=environment, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "the program git, which does it, is not installed"
    return None if done.returncode == 0 else done.stderr.strip()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, usage="apply.py [options] PATCH...")
    parser.add_argument("patches", nargs="+", metavar="PATCH", choices=names())
    parser.add_argument("--revert", action="store_true", help="take the patches out again")
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--target", type=Path, help="the folder that vllm/ lies in")
    given = parser.parse_args(arguments)
    target = given.target.resolve() if given.target else installed_in()
    if not target.is_dir():
        parser.error(f"there is no folder {target}")
    trouble = apply(given.patches, target, given.revert, given.check)
    if trouble is not None:
        print(f"error: not {'reverted' if given.revert else 'applied'}: {trouble}", file=sys.stderr)
        return 1
    verb = "fits" if given.check else "reverted in" if given.revert else "applied to"
    print(f"{', '.join(given.patches)}: {verb} {target / 'vllm'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
