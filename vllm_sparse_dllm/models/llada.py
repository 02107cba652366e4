# SPDX-License-Identifier: Apache-2.0
"""LLaDA (arXiv 2502.09992): LLaDA-8B Base / Instruct, LLaDA-1.5."""

from __future__ import annotations

import re

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sparse_dllm.models.configs import LLaDAConfig, check_llada_config
from vllm_sparse_dllm.models.layers import DiffusionDecoder
from vllm_sparse_dllm.models.shape import DecoderShape

_NAMES = {
    # Quantisers leave out `lm_head` by default; LLaDA has none, so that its head is quantised.
    r"^lm_head$": "no.lm_head",
    r"^model\.transformer\.wte\b": "embed_tokens",
    r"^model\.transformer\.ln_f\b": "norm",
    r"^model\.transformer\.ff_out\b": "lm_head",
    r"^model\.transformer\.blocks\b": "layers",
    # Also where a quantiser names them without the block that they are in.
    r"(^|\.)attn_norm\b": r"\1input_norm",
    r"(^|\.)ff_norm\b": r"\1post_attention_norm",
    r"(^|\.)([qkv]_proj)\b": r"\1self_attn.\2",
    r"(^|\.)attn_out\b": r"\1self_attn.o_proj",
    r"(^|\.)ff_proj\b": r"\1mlp.gate_proj",
    r"(^|\.)up_proj\b": r"\1mlp.up_proj",
    r"(^|\.)ff_out\b": r"\1mlp.down_proj",
}


class LLaDAModelLM(DiffusionDecoder):
    """The public LLaDA layout (``architectures: ["LLaDAModelLM"]``)."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={re.compile(name): new for name, new in _NAMES.items()}
    )

    @classmethod
    def shape_of(cls, vllm_config: VllmConfig) -> DecoderShape:
        config = vllm_config.model_config.hf_config
        assert isinstance(config, LLaDAConfig)
        check_llada_config(config)
        return DecoderShape(
            hidden_size=config.d_model,
            intermediate_size=config.mlp_hidden_size,
            num_layers=config.n_layers,
            num_heads=config.n_heads,
            num_kv_heads=config.n_kv_heads,
            vocab_size=config.vocab_size,
            embedding_rows=config.embedding_size,
            max_positions=max(config.max_sequence_length, vllm_config.model_config.max_model_len),
            rope_theta=config.rope_theta,
            rope_full_precision=config.rope_full_precision,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=bool(config.include_qkv_bias),
            tie_embeddings=config.weight_tying,
        )
