# SPDX-License-Identifier: Apache-2.0
"""Entry points through which the package registers with vLLM."""

from __future__ import annotations

import os
import re

#: The release of vLLM whose internals this package knows.
VLLM_RELEASE = "0.32"
#: Environment variable that enables Ray workers without a GPU; ``1`` or unset.
RAY_ON_CPU = "VLLM_SPARSE_DLLM_RAY_ON_CPU"


def platform() -> str | None:
    """Return the platform to use in place of vLLM's own, None for vLLM's.

    The ``vllm.platform_plugins`` entry point. vLLM calls it in every process before it has chosen
    a platform; an exception raised here appears only in a debug log.
    """
    if os.environ.get(RAY_ON_CPU) != "1" or not supports_this_vllm():
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "vllm_sparse_dllm.engine.ray_platform.RayCPUPlatform"


def announce(variable: str) -> None:
    """Register one of the package's environment variables with vLLM.

    vLLM then does not warn about the name and passes the variable on to its workers.
    """
    from vllm import envs

    envs.environment_variables.setdefault(variable, lambda: os.getenv(variable))


def supports_this_vllm() -> bool:
    """Return whether the installed vLLM is of the release that this package is made for.

    What is registered depends on vLLM's internals, and vLLM loads plugins for every model and
    command: with another release, an error here would break all of them.
    """
    import vllm
    from vllm.logger import init_logger

    release = re.match(r"(\d+\.\d+)(\.|$)", vllm.__version__)
    # A build from source may not know its version: 0.0 or 0.1 then, or no number.
    if release is None or release[1] in (VLLM_RELEASE, "0.0", "0.1"):
        return True
    init_logger("vllm." + __name__).error(
        "vllm_sparse_dllm is made for vLLM %s.x and stays out of vLLM %s: diffusion models are "
        "not available. Install vllm==%s.*",
        VLLM_RELEASE,
        vllm.__version__,
        VLLM_RELEASE,
    )
    return False


def register() -> None:
    """Register models, configurations, cache and admission with vLLM.

    The ``vllm.general_plugins`` entry point. vLLM calls it in every process it starts, possibly
    more than once.
    """
    if not supports_this_vllm():
        return
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_sparse_dllm.cache.block_manager import register_block_manager
    from vllm_sparse_dllm.engine.config import DiffusionConfigHook
    from vllm_sparse_dllm.frontend import admission
    from vllm_sparse_dllm.kernels.native import VARIABLE
    from vllm_sparse_dllm.models.configs import (
        DREAM_ARCHITECTURE,
        LLADA_ARCHITECTURE,
        DreamConfig,
        LLaDAConfig,
    )
    from vllm_sparse_dllm.models.tokenizer import register_tokenizer

    announce(VARIABLE)
    AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig, exist_ok=True)
    AutoConfig.register(DreamConfig.model_type, DreamConfig, exist_ok=True)
    register_tokenizer()
    # By name, so that model code is imported only when a model is used.
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
