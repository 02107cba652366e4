# SPDX-License-Identifier: Apache-2.0
"""Imports within the package: its layers, and its three axes, which must not meet."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import vllm_sparse_dllm
from vllm_sparse_dllm import settings
from vllm_sparse_dllm.attention.backends import BACKENDS
from vllm_sparse_dllm.cache.policies import POLICIES
from vllm_sparse_dllm.cache.saliency import SALIENCIES
from vllm_sparse_dllm.denoise.rules import RULES
from vllm_sparse_dllm.settings import ATTENTION_BACKENDS, CACHE_POLICIES, REMASKING_RULES

ROOT = Path(vllm_sparse_dllm.__file__).parent
PACKAGE = ROOT.name
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def imports(file: str) -> set[str]:
    """Return every module that a file imports, at the top or inside a function.

    ``from a import b`` counts as ``a`` and ``a.b``, since ``b`` may be a module. Imports for type
    checkers only count too.
    """
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def offending(file: str, *forbidden: str) -> set[str]:
    """Return what a file imports of the forbidden modules or of anything in them."""
    return {
        name
        for name in imports(file)
        if any(name == module or name.startswith(module + ".") for module in forbidden)
    }


def own(*parts: str) -> tuple[str, ...]:
    return tuple(f"{PACKAGE}.{part}" for part in parts)


#: For each part of the package, the other parts that it is allowed to import.
LAYERS: dict[str, set[str]] = {
    "__init__.py": set(),
    "assets": set(),
    "kernels": set(),
    "transfer.py": set(),
    "denoise": {"kernels", "transfer"},
    "settings.py": {"denoise"},
    "cache": {"kernels", "denoise", "settings"},
    "attention": {"kernels", "transfer", "cache"},
    "models": {"kernels", "denoise", "attention"},
    "engine": {
        *("kernels", "transfer", "denoise", "settings", "cache", "attention", "models"),
        "plugin",  # names of environment variables
    },
    "frontend": {"denoise", "settings", "cache", "models", "engine"},
    "plugin.py": {"kernels", "cache", "models", "engine", "frontend"},
}


@pytest.mark.parametrize("file", FILES)
def test_layers(file: str) -> None:
    part = file.partition("/")[0]
    parts = {name.split(".")[1] for name in imports(file) if name.startswith(PACKAGE + ".")}
    assert parts <= LAYERS[part] | {part.removesuffix(".py")}


#: Further restrictions: what single files must not import.
WALLS: dict[str, tuple[str, ...]] = {
    # Which keys a step sees.
    "cache/policies.py": (
        "torch",
        "numpy",
        "vllm",
        *own("models", "engine", "attention"),
        *own("denoise.rules", "denoise.sampling", "denoise.step", "denoise.traits"),
    ),
    "cache/saliency.py": own("models", "engine", "denoise", "attention"),
    "cache/selection.py": ("vllm", *own("models", "engine", "denoise", "attention")),
    "cache/block_manager.py": ("torch", *own("models", "engine", "denoise", "attention")),
    # Which tokens a step commits.
    "denoise/rules.py": ("vllm", *own("cache", "engine", "models", "attention")),
    "denoise/sampling.py": ("vllm", *own("cache", "engine", "models", "attention")),
    "denoise/constraints.py": ("vllm", *own("cache", "engine", "models", "attention")),
    "denoise/fused.py": ("vllm", *own("cache", "engine", "models", "attention")),
    "denoise/plan.py": ("vllm", *own("cache", "engine", "models", "attention")),
    "denoise/step.py": ("vllm", *own("cache", "engine", "models", "attention")),
    "denoise/timetable.py": ("vllm", *own("cache", "engine", "models", "attention")),
    # Which network runs.
    "models/llada.py": own("cache", "engine", "denoise"),
    "models/dream.py": own("cache", "engine", "denoise"),
    "models/layers.py": own("cache", "engine", "denoise"),
    "models/loading.py": own("attention", "cache", "engine", "denoise"),
    "models/shape.py": ("torch", "vllm", *own("attention", "cache", "engine", "denoise")),
    # Scheduling decisions, which need no tensors, attention or rules.
    "engine/scheduler.py": (
        "torch",
        "numpy",
        *own("attention", "denoise.rules", "denoise.sampling", "denoise.step"),
        *own("engine.runner", "engine.batch", "engine.requests", "engine.worker"),
        *own("engine.cpu_worker"),
    ),
    # On a GPU, vLLM's CPU worker must not replace parts of `torch.cuda`.
    "engine/worker.py": ("vllm.v1.worker.cpu_worker", *own("engine.cpu_worker")),
    # Plain data, which every process reads.
    "engine/figures.py": ("torch", "numpy", "vllm", *own("models", "attention", "cache")),
    "engine/trace.py": ("torch", "vllm", *own("models", "attention", "cache", "denoise")),
    # Devices.
    "attention/interface.py": ("vllm", *own("cache", "engine", "models", "denoise")),
    # A plan has the parameters of a choice (`Selection`, `CanvasView`), but does not choose.
    "attention/plan.py": (
        "vllm",
        *own("cache.policies", "cache.block_manager", "cache.pages"),
        *own("cache.saliency.SALIENCIES", "cache.saliency.importance"),
        *own("cache.selection.select_entries"),
        *own("engine", "models", "denoise"),
    ),
    "attention/cpu.py": own("cache", "engine", "models", "denoise"),
    "attention/portable.py": ("vllm", *own("cache", "engine", "models", "denoise")),
    "attention/slots.py": ("vllm", *own("cache", "engine", "models", "denoise")),
    "attention/packing.py": ("vllm", *own("cache", "engine", "models", "denoise")),
    # These run, and are tested, without vLLM. `flash_attn` imports vLLM's library late.
    **{
        f"attention/{name}.py": ("vllm", *own("cache", "engine", "models", "denoise"))
        for name in ("triton", "flash_attn", "xformers")
    },
    **{
        file: ("vllm", *own("attention", "cache", "engine", "models", "denoise"))
        for file in FILES
        if file.startswith("kernels/")
    },
    # Transfers between host and device, for all of these.
    "transfer.py": ("vllm", *own("attention", "cache", "engine", "models", "denoise", "kernels")),
    # All parts read the settings, which at run time import no other part.
    "settings.py": ("torch", "vllm", *own("cache", "engine", "models", "attention")),
}


@pytest.mark.parametrize("file", WALLS)
def test_axes_do_not_meet(file: str) -> None:
    assert offending(file, *WALLS[file]) == set()


def test_the_runner_takes_no_decisions() -> None:
    assert offending("engine/runner.py", *own("engine.scheduler", "frontend")) == set()


@pytest.mark.parametrize("file", [f for f in FILES if not f.startswith("models/")])
def test_nobody_but_models_names_a_model_class(file: str) -> None:
    """Adding a model takes a file and a line in the plugin."""
    allowed = own("models.llada", "models.dream") if file != "plugin.py" else ()
    assert offending(file, *allowed) == set()


@pytest.mark.parametrize("file", FILES)
def test_the_tests_and_the_reference_are_no_part_of_the_package(file: str) -> None:
    assert offending(file, "tests", "pytest", "hypothesis") == set()


def test_loggers_are_vllms() -> None:
    """Loggers outside vLLM's own print no information, and errors without vLLM's prefix."""
    names = {
        file: re.findall(r"init_logger\((.*?)\)", (ROOT / file).read_text(encoding="utf-8"))
        for file in FILES
    }
    assert sum(map(len, names.values())) > 5
    assert all(name == '"vllm." + __name__' for found in names.values() for name in found)


def test_tables_name_what_the_code_has() -> None:
    """The settings and the tables of implementations list the same names."""
    assert tuple(POLICIES) == CACHE_POLICIES
    assert tuple(RULES) == REMASKING_RULES
    assert tuple(SALIENCIES) == settings.SALIENCIES
    assert all(saliency.name == name for name, saliency in SALIENCIES.items())
    assert ("auto", *BACKENDS) == ATTENTION_BACKENDS
    assert all(policy.name == name for name, policy in POLICIES.items())
    assert all(rule.name == name for name, rule in RULES.items())


def test_the_scanner_sees_imports() -> None:
    assert offending("kernels/plain.py", "torch") == {"torch", "torch.nn.functional"}
    assert offending("denoise/timetable.py", "torch") == {"torch"}  # inside a function
    assert offending("engine/scheduler.py", *own("cache")) >= set(own("cache.policies"))
