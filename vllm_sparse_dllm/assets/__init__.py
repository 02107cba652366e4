# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that come with the package, so that nothing need be downloaded to try it.

``python -m vllm_sparse_dllm.assets [name]`` prints the path of one.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent


def embedded_models() -> list[str]:
    """Return the names of all embedded checkpoints."""
    return sorted(config.parent.name for config in _ROOT.glob("*/config.json"))


def embedded_model(name: str = "tiny-llada") -> str:
    """Return the path of an embedded checkpoint, fit for vLLM's ``model``.

    Raises:
        ValueError: If there is none of that name.
    """
    names = embedded_models()
    if name not in names:
        raise ValueError(f"embedded model must be one of {', '.join(names)}, got {name!r}")
    return str(_ROOT / name)
