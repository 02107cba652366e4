# SPDX-License-Identifier: Apache-2.0
"""Imported at the start of every process: makes vLLM find a GPU where there is none."""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path


class _Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "vllm.third_party.pynvml":
            return spec_from_file_location(name, Path(__file__).with_name("nvml.py"))
        return None


sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
