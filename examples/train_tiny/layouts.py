# SPDX-License-Identifier: Apache-2.0
"""Write checkpoint directories in the public Hugging Face layouts of LLaDA and Dream."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from network import Network, Shape
from safetensors.torch import save_file
from torch import Tensor

#: Names of the modules outside the layers, and of those in a layer: `Network`'s, by LLaDA's and
#: Dream's layouts.
_OUTER = {
    "embedding": ("model.transformer.wte", "model.embed_tokens"),
    "norm": ("model.transformer.ln_f", "model.norm"),
    "head": ("model.transformer.ff_out", "lm_head"),
}
_INNER = {
    "attention_norm": ("attn_norm", "input_layernorm"),
    "attention.q": ("q_proj", "self_attn.q_proj"),
    "attention.k": ("k_proj", "self_attn.k_proj"),
    "attention.v": ("v_proj", "self_attn.v_proj"),
    "attention.o": ("attn_out", "self_attn.o_proj"),
    "mlp_norm": ("ff_norm", "post_attention_layernorm"),
    "gate": ("ff_proj", "mlp.gate_proj"),
    "up": ("up_proj", "mlp.up_proj"),
    "down": ("ff_out", "mlp.down_proj"),
}


def public_name(name: str, family: str) -> str:
    """Return the name of a parameter of `Network` in the public layout."""
    column = ("llada", "dream").index(family)
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module][column]}.{kind}"
    _, number, inner = module.split(".", 2)
    prefix = ("model.transformer.blocks", "model.layers")[column]
    return f"{prefix}.{number}.{_INNER[inner][column]}.{kind}"


def write_checkpoint(
    path: Path, network: Network, tokenizer: Path, ids: dict[str, int], dtype: torch.dtype
) -> None:
    """Write configuration, weights and tokenizer.

    Args:
        path: The directory; created if it does not exist.
        network: The network to write.
        tokenizer: A directory whose tokenizer files are copied.
        ids: Token ids of ``bos``, ``eos`` and ``mask``.
        dtype: Dtype of the weights in the file.
    """
    path.mkdir(parents=True, exist_ok=True)
    shape = network.shape
    tensors: dict[str, Tensor] = {
        public_name(name, shape.family): parameter.detach().to(dtype).contiguous()
        for name, parameter in network.named_parameters()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = (_llada_config if shape.family == "llada" else _dream_config)(shape, ids)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(path / "config.json", config)
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"]}
    _write_json(
        path / "generation_config.json",
        generation | {"pad_token_id": ids["eos"], "mask_token_id": ids["mask"]},
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if tokenizer.resolve() != path.resolve():
            shutil.copyfile(tokenizer / name, path / name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _llada_config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "d_model": shape.width,
        "n_heads": shape.heads,
        "n_kv_heads": shape.kv_heads,
        "n_layers": shape.layers,
        "mlp_hidden_size": shape.mlp,
        "mlp_ratio": 4,
        "vocab_size": shape.vocab,
        "embedding_size": shape.vocab,
        "max_sequence_length": shape.max_positions,
        "rope": True,
        "rope_theta": shape.rope_theta,
        "rope_full_precision": True,
        "rms_norm_eps": shape.eps,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "activation_type": "silu",
        "block_type": "llama",
        "block_group_size": 1,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "multi_query_attention": None,
        "alibi": False,
        "alibi_bias_max": 8.0,
        "flash_attention": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
        "input_emb_norm": False,
        "scale_logits": False,
        "weight_tying": False,
        "init_device": "cpu",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "init_cutoff_factor": None,
        "precision": "amp_bf16",
        "mask_token_id": ids["mask"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["eos"],
        "use_cache": False,
    }


def _dream_config(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.mlp,
        "mask_token_id": ids["mask"],
        "max_position_embeddings": shape.max_positions,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pad_token_id": ids["eos"],
        "rms_norm_eps": shape.eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }
