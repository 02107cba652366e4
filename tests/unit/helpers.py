# SPDX-License-Identifier: Apache-2.0
"""What several unit tests share: model traits, and the reference's view of a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm_sparse_dllm.denoise.traits import ModelTraits
from vllm_sparse_dllm.models.configs import DreamConfig, LLaDAConfig, model_traits


def traits_of(kind: str, mask_id: int = 3) -> ModelTraits:
    """Return the traits of a small LLaDA or Dream checkpoint."""
    config = {"llada": LLaDAConfig, "dream": DreamConfig}[kind](mask_token_id=mask_id)
    return model_traits(config)


def reference_model(kind: str, vocab: int, mask_id: int) -> Any:
    """Return what the reference's decoding functions read of a model."""
    return SimpleNamespace(kind=kind, vocab=vocab, mask_id=mask_id, eos_id=None)
