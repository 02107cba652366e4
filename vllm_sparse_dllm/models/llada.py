# SPDX-License-Identifier: Apache-2.0
"""LLaDA (arXiv 2502.09992): LLaDA-8B Base / Instruct, LLaDA-1.5."""

from __future__ import annotations

import re

from vllm.config import VllmConfig

from vllm_sparse_dllm.models.configs import LLaDAConfig, check_llada_config
from vllm_sparse_dllm.models.layers import DecoderShape, DiffusionDecoder

_OUTER = {
    "model.transformer.wte.weight": "embed_tokens.weight",
    "model.transformer.ln_f.weight": "norm.weight",
    "model.transformer.ff_out.weight": "lm_head.weight",
}
_INNER: dict[str, tuple[str, int | str | None]] = {
    "attn_norm": ("input_norm", None),
    "ff_norm": ("post_attention_norm", None),
    "q_proj": ("self_attn.qkv_proj", "q"),
    "k_proj": ("self_attn.qkv_proj", "k"),
    "v_proj": ("self_attn.qkv_proj", "v"),
    "attn_out": ("self_attn.o_proj", None),
    "ff_proj": ("mlp.gate_up_proj", 0),
    "up_proj": ("mlp.gate_up_proj", 1),
    "ff_out": ("mlp.down_proj", None),
}
_BLOCK = re.compile(r"model\.transformer\.blocks\.(\d+)\.(\w+)\.(\w+)")


class LLaDAModelLM(DiffusionDecoder):
    """The public LLaDA layout (``architectures: ["LLaDAModelLM"]``)."""

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

    @classmethod
    def rename_weight(cls, name: str) -> tuple[str, int | str | None] | None:
        if name in _OUTER:
            return _OUTER[name], None
        match = _BLOCK.fullmatch(name)
        if match is None or match[2] not in _INNER:
            return name, None
        target, shard = _INNER[match[2]]
        return f"layers.{match[1]}.{target}.{match[3]}", shard
