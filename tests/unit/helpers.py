# SPDX-License-Identifier: Apache-2.0
"""Shared by several unit tests: model traits, and models for the reference's functions."""

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
    """Return the attributes of a model that the reference's decoding functions read."""
    return SimpleNamespace(kind=kind, vocab=vocab, mask_id=mask_id, eos_id=None)
