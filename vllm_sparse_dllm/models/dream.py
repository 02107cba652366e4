# SPDX-License-Identifier: Apache-2.0
"""Dream (arXiv 2508.15487): Dream-v0 Base / Instruct 7B, Dream-Coder."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sparse_dllm.models.configs import DreamConfig, check_dream_config
from vllm_sparse_dllm.models.layers import DiffusionDecoder
from vllm_sparse_dllm.models.shape import DecoderShape


class DreamModel(DiffusionDecoder):
    """The public Dream layout (``architectures: ["DreamModel"]``)."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.": ""},
        orig_to_new_substr={
            "rotary_emb.inv_freq": None,
            ".input_layernorm.": ".input_norm.",
            ".post_attention_layernorm.": ".post_attention_norm.",
        },
    )

    @classmethod
    def shape_of(cls, vllm_config: VllmConfig) -> DecoderShape:
        config = vllm_config.model_config.hf_config
        assert isinstance(config, DreamConfig)
        check_dream_config(config)
        return DecoderShape(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            vocab_size=config.vocab_size,
            embedding_rows=config.vocab_size,
            max_positions=max(
                config.max_position_embeddings, vllm_config.model_config.max_model_len
            ),
            rope_theta=config.rope_theta,
            rope_full_precision=False,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=True,
            tie_embeddings=config.tie_word_embeddings,
        )
