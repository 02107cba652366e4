# SPDX-License-Identifier: Apache-2.0
"""Random LLaDA and Dream checkpoints in the public Hugging Face layouts, kept in a folder.

For models that are too large to store, only configurations are written: programs then make random
weights of their own (vLLM's ``load_format`` ``dummy``).

Speed does not depend on the weights' values, but a benchmark that compares tokens needs decoding
that is not degenerate. So the weights are scaled: attention logits have a standard deviation of
`ATTENTION_STD` (a few effective keys per query), every sub-layer adds about as much as the residual
stream holds, and output logits have a standard deviation of `LOGIT_STD`. The head's rows of the
special tokens are zero, so that none of them is ever the most probable token. All values lie on the
bfloat16 grid, so float32 and bfloat16 runs use exactly the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vllm_sparse_dllm.kernels import dtype_name

ATTENTION_STD = 3.0
ATTENTION_GAIN = 1.5
FEED_FORWARD_GAIN = 0.7
MASK_SCALE = 0.3
LOGIT_STD = 4.0

FAMILIES = ("llada", "dream")


@dataclass(frozen=True)
class Size:
    """Sizes of a checkpoint. `kv_heads` applies to Dream only; LLaDA's public models are MHA.

    `specials` has the ids of ``mask``, ``eos`` and ``bos``; by default they are at the end of the
    vocabulary.
    """

    d_model: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    positions: int = 8192
    specials: Mapping[str, int] | None = None

    @property
    def special_ids(self) -> Mapping[str, int]:
        return self.specials or special_ids(self.vocab)

    def kv_heads_of(self, family: str) -> int:
        return self.heads if family == "llada" else self.kv_heads


#: Parameters of LLaDA models of these sizes: 1 million, 25 million, 207.6 million.
SIZES = {
    "tiny": Size(d_model=128, layers=4, heads=4, kv_heads=2, mlp=384, vocab=512),
    "25m": Size(d_model=512, layers=6, heads=8, kv_heads=2, mlp=1792, vocab=2048),
    "200m": Size(d_model=1024, layers=14, heads=16, kv_heads=4, mlp=3072, vocab=8192),
}
#: The public LLaDA-8B (whose `positions` are 4,096) and Dream-7B (131,072).
PUBLIC_SIZES = {
    "llada": Size(
        d_model=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        mlp=12288,
        vocab=126464,
        positions=4096,
        specials={"mask": 126336, "eos": 126081, "bos": 126080},
    ),
    "dream": Size(
        d_model=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        mlp=18944,
        vocab=152064,
        positions=131072,
        specials={"mask": 151666, "eos": 151643, "bos": 151643},
    ),
}


def special_ids(vocab: int) -> dict[str, int]:
    """Return the default ids of mask, eos and bos."""
    return {"mask": vocab - 2, "eos": vocab - 3, "bos": vocab - 4}


def mask_token_id(model: Path) -> int:
    """Return the mask's id from a checkpoint's configuration, as the engine reads it."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    number: int = config["mask_token_id"]
    return number


def checkpoint(folder: Path, family: str, size: str, dtype: str, seed: int = 0) -> Path:
    """Return the directory of a checkpoint, which is written if it does not exist yet."""
    path = folder / f"{family}-{size}-{dtype}-{seed}"
    if path.is_dir():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Written to a temporary directory and renamed, so that no incomplete checkpoint can remain.
    aside = Path(tempfile.mkdtemp(dir=folder, prefix=f".{path.name}-"))
    try:
        write_checkpoint(aside, family, SIZES[size], getattr(torch, dtype), seed)
        aside.chmod(0o755)
        os.replace(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return path


def configuration(folder: Path, family: str, size: Size, dtype: str, positions: int) -> Path:
    """Write a checkpoint without tensors, for at least ``positions``; return its directory."""
    size = replace(size, positions=max(size.positions, positions))
    path = folder / f"{family}-{size.d_model}x{size.layers}-{size.positions}"
    path.mkdir(parents=True, exist_ok=True)
    write_configuration(path, family, size, getattr(torch, dtype))
    return path


def write_checkpoint(path: Path, family: str, size: Size, dtype: torch.dtype, seed: int) -> None:
    """Write configuration and tensors into an existing directory."""
    weights = _Weights(size, family, seed)
    tensors = weights.llada() if family == "llada" else weights.dream()
    write_configuration(path, family, size, dtype)
    on_grid = {name: t.to(torch.bfloat16).to(dtype).contiguous() for name, t in tensors.items()}
    save_file(on_grid, path / "model.safetensors", metadata={"format": "pt"})


def write_configuration(path: Path, family: str, size: Size, dtype: torch.dtype) -> None:
    """Write the configuration files into an existing directory."""
    config = _llada_config(size) if family == "llada" else _dream_config(size)
    config["torch_dtype"] = dtype_name(dtype)
    ids = size.special_ids
    generation = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["eos"],
        "mask_token_id": ids["mask"],
    }
    for name, content in (("config", config), ("generation_config", generation)):
        (path / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class _Weights:
    """Random tensors under the public names."""

    def __init__(self, size: Size, family: str, seed: int) -> None:
        self.size = size
        self.head_size = size.d_model // size.heads
        self.kv_width = size.kv_heads_of(family) * self.head_size
        self.generator = torch.Generator().manual_seed(seed)

    def llada(self) -> dict[str, torch.Tensor]:
        size, d = self.size, self.size.d_model
        prefix = "model.transformer."
        tensors = {f"{prefix}wte.weight": self._embedding()}
        for layer in range(size.layers):
            block = f"{prefix}blocks.{layer}."
            tensors |= {
                f"{block}attn_norm.weight": self._gain(d),
                f"{block}ff_norm.weight": self._gain(d),
                f"{block}q_proj.weight": self._rotated(d),
                f"{block}k_proj.weight": self._rotated(self.kv_width),
                f"{block}v_proj.weight": self._linear(self.kv_width, d),
                f"{block}attn_out.weight": self._linear(d, d, ATTENTION_GAIN),
                f"{block}ff_proj.weight": self._linear(size.mlp, d),
                f"{block}up_proj.weight": self._linear(size.mlp, d),
                f"{block}ff_out.weight": self._linear(d, size.mlp, FEED_FORWARD_GAIN / 0.6),
            }
        tensors[f"{prefix}ln_f.weight"] = self._gain(d)
        tensors[f"{prefix}ff_out.weight"] = self._head()
        return tensors

    def dream(self) -> dict[str, torch.Tensor]:
        size, d = self.size, self.size.d_model
        tensors = {"model.embed_tokens.weight": self._embedding()}
        for layer in range(size.layers):
            block = f"model.layers.{layer}."
            tensors |= {
                f"{block}input_layernorm.weight": self._gain(d),
                f"{block}post_attention_layernorm.weight": self._gain(d),
                f"{block}self_attn.q_proj.weight": self._rotated(d),
                f"{block}self_attn.q_proj.bias": self._normal(d, std=0.3),
                f"{block}self_attn.k_proj.weight": self._rotated(self.kv_width),
                f"{block}self_attn.k_proj.bias": self._normal(self.kv_width, std=0.3),
                f"{block}self_attn.v_proj.weight": self._linear(self.kv_width, d),
                f"{block}self_attn.v_proj.bias": self._normal(self.kv_width, std=0.1),
                f"{block}self_attn.o_proj.weight": self._linear(d, d, ATTENTION_GAIN),
                f"{block}mlp.gate_proj.weight": self._linear(size.mlp, d),
                f"{block}mlp.up_proj.weight": self._linear(size.mlp, d),
                f"{block}mlp.down_proj.weight": self._linear(d, size.mlp, FEED_FORWARD_GAIN / 0.6),
            }
        tensors["model.norm.weight"] = self._gain(d)
        tensors["lm_head.weight"] = self._head()
        return tensors

    def _normal(self, *shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def _linear(self, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return self._normal(rows, columns, std=gain / math.sqrt(columns))

    def _gain(self, width: int) -> torch.Tensor:
        return 1.0 + self._normal(width, std=0.1)

    def _rotated(self, rows: int) -> torch.Tensor:
        """Return a query or key projection in which the fast rotary pairs are strongest.

        All masks have the same embedding, so only the rotation distinguishes neighbours.
        """
        pairs = torch.arange(self.head_size // 2, dtype=torch.float32)
        gain = 1.0 + 2.0 * torch.exp(-pairs / max(1.0, self.head_size / 8))
        gain = gain / gain.square().mean().sqrt()
        per_row = torch.cat([gain, gain]).repeat(rows // self.head_size)
        weight = self._linear(rows, self.size.d_model, math.sqrt(ATTENTION_STD))
        return weight * per_row.unsqueeze(-1)

    def _embedding(self) -> torch.Tensor:
        weight = self._normal(self.size.vocab, self.size.d_model, std=1.0)
        # So that the context decides, not the mask's own embedding.
        weight[special_ids(self.size.vocab)["mask"]] *= MASK_SCALE
        return weight

    def _head(self) -> torch.Tensor:
        weight = self._linear(self.size.vocab, self.size.d_model, LOGIT_STD)
        weight[list(special_ids(self.size.vocab).values())] = 0.0
        return weight


def _llada_config(size: Size) -> dict[str, Any]:
    ids = size.special_ids
    return {
        "model_type": "llada",
        "architectures": ["LLaDAModelLM"],
        "activation_type": "silu",
        "alibi": False,
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": size.d_model,
        "embedding_dropout": 0.0,
        "embedding_size": size.vocab,
        "eos_token_id": ids["eos"],
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_device": "cpu",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": ids["mask"],
        "max_sequence_length": size.positions,
        "mlp_hidden_size": size.mlp,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": size.heads,
        "n_kv_heads": size.heads,
        "n_layers": size.layers,
        "pad_token_id": ids["eos"],
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": size.vocab,
        "weight_tying": False,
    }


def _dream_config(size: Size) -> dict[str, Any]:
    ids = size.special_ids
    return {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "hidden_act": "silu",
        "hidden_size": size.d_model,
        "initializer_range": 0.02,
        "intermediate_size": size.mlp,
        "mask_token_id": ids["mask"],
        "max_position_embeddings": size.positions,
        "max_window_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "pad_token_id": ids["eos"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": size.vocab,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="llada")
    parser.add_argument("--size", choices=sorted(SIZES), default="200m")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        checkpoint(
            arguments.folder, arguments.family, arguments.size, arguments.dtype, arguments.seed
        )
    )


if __name__ == "__main__":
    main()
