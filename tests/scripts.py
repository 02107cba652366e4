# SPDX-License-Identifier: Apache-2.0
"""Imports scripts of ``examples/`` as modules."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(folder: Path, *names: str) -> list[ModuleType]:
    """Import scripts by bare name, as they import each other, leaving none in `sys.modules`."""
    path, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file and EXAMPLES in Path(file).parents:
                del sys.modules[name]
