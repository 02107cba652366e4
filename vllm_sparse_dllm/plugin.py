# SPDX-License-Identifier: Apache-2.0
"""The one door to vLLM's registries: the ``vllm.general_plugins`` entry point."""

from __future__ import annotations


def register() -> None:
    """Register models, configurations, cache and admission with vLLM.

    vLLM calls this in every process it starts, possibly more than once.
    """
    from transformers import AutoConfig, AutoTokenizer
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_sparse_dllm.cache.block_manager import register_block_manager
    from vllm_sparse_dllm.engine import admission
    from vllm_sparse_dllm.engine.config import DiffusionConfigHook
    from vllm_sparse_dllm.models.configs import (
        DREAM_ARCHITECTURE,
        LLADA_ARCHITECTURE,
        DreamConfig,
        LLaDAConfig,
    )
    from vllm_sparse_dllm.models.tokenizer import DreamTokenizer

    AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig, exist_ok=True)
    AutoConfig.register(DreamConfig.model_type, DreamConfig, exist_ok=True)
    AutoTokenizer.register(DreamConfig, DreamTokenizer, exist_ok=True)
    # By name, so that nothing of the models is imported before one is used.
    models = {
        LLADA_ARCHITECTURE: "vllm_sparse_dllm.models.llada:LLaDAModelLM",
        DREAM_ARCHITECTURE: "vllm_sparse_dllm.models.dream:DreamModel",
    }
    for architecture, path in models.items():
        if architecture not in ModelRegistry.models:
            ModelRegistry.register_model(architecture, path)
        MODELS_CONFIG_MAP[architecture] = DiffusionConfigHook
    register_block_manager()
    admission.install()
