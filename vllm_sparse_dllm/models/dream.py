# SPDX-License-Identifier: Apache-2.0
"""Dream (arXiv 2508.15487): Dream-v0 Base / Instruct 7B, Dream-Coder."""

from __future__ import annotations

import re

from vllm.config import VllmConfig

from vllm_sparse_dllm.models.configs import DreamConfig, check_dream_config
from vllm_sparse_dllm.models.layers import DecoderShape, DiffusionDecoder

_OUTER = {
    "model.embed_tokens.weight": "embed_tokens.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_INNER: dict[str, tuple[str, int | str | None]] = {
    "input_layernorm": ("input_norm", None),
    "post_attention_layernorm": ("post_attention_norm", None),
    "self_attn.q_proj": ("self_attn.qkv_proj", "q"),
    "self_attn.k_proj": ("self_attn.qkv_proj", "k"),
    "self_attn.v_proj": ("self_attn.qkv_proj", "v"),
    "self_attn.o_proj": ("self_attn.o_proj", None),
    "mlp.gate_proj": ("mlp.gate_up_proj", 0),
    "mlp.up_proj": ("mlp.gate_up_proj", 1),
    "mlp.down_proj": ("mlp.down_proj", None),
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(\w+)")


class DreamModel(DiffusionDecoder):
    """The public Dream layout (``architectures: ["DreamModel"]``)."""

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

    @classmethod
    def rename_weight(cls, name: str) -> tuple[str, int | str | None] | None:
        if name.endswith("rotary_emb.inv_freq"):
            return None
        if name in _OUTER:
            return _OUTER[name], None
        match = _LAYER.fullmatch(name)
        if match is None or match[2] not in _INNER:
            return name, None
        target, shard = _INNER[match[2]]
        return f"layers.{match[1]}.{target}.{match[3]}", shard
