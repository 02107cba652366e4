# SPDX-License-Identifier: Apache-2.0
"""Every patch fits the pinned release, is described, and can be taken out again."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PATCHES = Path(__file__).parents[2] / "patches"
NAMES = sorted(path.stem for path in PATCHES.glob("*.patch"))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(PATCHES / "apply.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def copies(name: str, tmp_path: Path) -> dict[Path, bytes]:
    """The files that a patch changes, as vLLM has them, in a folder of their own."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    text = (PATCHES / f"{name}.patch").read_text()
    files = {}
    for path in re.findall(r"^--- a/(\S+)$", text, flags=re.MULTILINE):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(spec.origin).parents[1] / path, tmp_path / path)
        files[tmp_path / path] = (tmp_path / path).read_bytes()
    assert files
    return files


def test_fits_the_installed_release(name: str) -> None:
    done = run("--check", name)
    assert done.returncode == 0, done.stderr


def test_goes_in_and_out(name: str, copies: dict[Path, bytes], tmp_path: Path) -> None:
    target = ("--target", str(tmp_path), name)
    assert run(*target).returncode == 0
    assert all(path.read_bytes() != before for path, before in copies.items())
    for path in copies:
        compile(path.read_text(), str(path), "exec")
    again = run(*target)
    assert again.returncode == 1 and "not applied" in again.stderr
    assert run("--revert", *target).returncode == 0
    assert {path: path.read_bytes() for path in copies} == copies
    assert run("--revert", *target).returncode == 1


def test_in_a_repository_by_a_relative_path(
    name: str, copies: dict[Path, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an environment inside a checkout: git must not take the checkout for the target."""
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "--quiet"], check=True)
    (tmp_path / "packages").mkdir()
    (tmp_path / "vllm").rename(tmp_path / "packages" / "vllm")
    assert run("--target", "packages", name).returncode == 0
    for path, before in copies.items():
        assert (tmp_path / "packages" / path.relative_to(tmp_path)).read_bytes() != before


def test_all_or_none(name: str, copies: dict[Path, bytes], tmp_path: Path) -> None:
    done = run("--target", str(tmp_path), name, name)
    assert done.returncode == 1 and "not applied" in done.stderr
    assert {path: path.read_bytes() for path in copies} == copies


def test_a_folder_that_is_not_there(name: str, tmp_path: Path) -> None:
    done = run("--target", str(tmp_path / "none"), name)
    assert done.returncode == 2 and "there is no folder" in done.stderr


def test_a_folder_without_vllm(name: str, tmp_path: Path) -> None:
    done = run("--target", str(tmp_path), name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: not applied: ") and "Traceback" not in done.stderr


def test_without_git(name: str, tmp_path: Path) -> None:
    done = run("--check", name, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "error: not applied: the program git, which does it, is not installed\n"


def test_is_described(name: str) -> None:
    assert f"| `{name}.patch` |" in (PATCHES / "README.md").read_text(encoding="utf-8")
