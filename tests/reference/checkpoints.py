"""Random LLaDA and Dream checkpoints in the public Hugging Face layouts.

The weights are scaled so that greedy decoding is not degenerate: attention logits have a standard
deviation of about ATTN_STD (a few effective keys per query) and LM-head logits one of LOGIT_STD;
every sub-layer adds about as much as the residual stream holds. The head rows of mask, eos and bos
are zero, so a greedy run never predicts them. All values are exact in bfloat16, so float32 and
bfloat16 runs use the same weights.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ATTN_STD = 3.0
ATTN_GAIN = 1.5
MLP_GAIN = 0.7
MASK_SCALE = 0.3
LOGIT_STD = 4.0


def special_ids(vocab: int) -> dict[str, int]:
    """The ids of mask, eos and bos in a checkpoint of this module."""
    return {"mask": vocab - 2, "eos": vocab - 3, "bos": vocab - 4}


def write_checkpoint(
    path: str | Path,
    model: str = "llada",
    *,
    d_model: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    mlp: int = 384,
    vocab: int = 512,
    max_positions: int = 4096,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tokenizer: bool = False,
) -> Path:
    """Write a checkpoint directory; kv_heads None is as in public models: LLaDA MHA, Dream GQA."""
    if model not in ("llada", "dream"):
        raise ValueError(f"model {model!r}")
    if kv_heads is None:
        kv_heads = heads if model == "llada" else max(1, heads // 2)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    sizes = {
        "d": d_model,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "mlp": mlp,
        "vocab": vocab,
        "max_positions": max_positions,
    }
    ids = special_ids(vocab)
    config = (llada_config if model == "llada" else dream_config)(sizes, ids)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    _write_json(path / "config.json", config)
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos")}
    generation["pad_token_id"] = ids["eos"]
    if model == "dream":
        generation["mask_token_id"] = ids["mask"]
    _write_json(path / "generation_config.json", generation)

    weights = Weights(seed, sizes)
    tensors = weights.llada() if model == "llada" else weights.dream()
    grid = {name: t.to(torch.bfloat16).to(dtype).contiguous() for name, t in tensors.items()}
    _write_tensors(path, grid, shards)
    if tokenizer:
        write_tokenizer(path, vocab, max_positions)
    return path


class Weights:
    """Random tensors under the names of the public checkpoints."""

    def __init__(self, seed: int, sizes: dict[str, int]) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.s = sizes
        self.head_dim = sizes["d"] // sizes["heads"]

    def llada(self) -> dict[str, Tensor]:
        d, mlp, kv = self.s["d"], self.s["mlp"], self.s["kv_heads"] * self.head_dim
        p = "model.transformer."
        t = {p + "wte.weight": self._embedding()}
        for i in range(self.s["layers"]):
            b = f"{p}blocks.{i}."
            t[b + "attn_norm.weight"] = self._gain(d)
            t[b + "ff_norm.weight"] = self._gain(d)
            t[b + "q_proj.weight"] = self._query_or_key(d)
            t[b + "k_proj.weight"] = self._query_or_key(kv)
            t[b + "v_proj.weight"] = self._linear(kv, d)
            t[b + "attn_out.weight"] = self._linear(d, d, ATTN_GAIN)
            t[b + "ff_proj.weight"] = self._linear(mlp, d)
            t[b + "up_proj.weight"] = self._linear(mlp, d)
            t[b + "ff_out.weight"] = self._linear(d, mlp, MLP_GAIN / 0.6)
        t[p + "ln_f.weight"] = self._gain(d)
        t[p + "ff_out.weight"] = self._head()
        return t

    def dream(self) -> dict[str, Tensor]:
        d, mlp, kv = self.s["d"], self.s["mlp"], self.s["kv_heads"] * self.head_dim
        t = {"model.embed_tokens.weight": self._embedding()}
        for i in range(self.s["layers"]):
            b = f"model.layers.{i}."
            t[b + "input_layernorm.weight"] = self._gain(d)
            t[b + "post_attention_layernorm.weight"] = self._gain(d)
            t[b + "self_attn.q_proj.weight"] = self._query_or_key(d)
            t[b + "self_attn.q_proj.bias"] = self._normal(d, std=0.3)
            t[b + "self_attn.k_proj.weight"] = self._query_or_key(kv)
            t[b + "self_attn.k_proj.bias"] = self._normal(kv, std=0.3)
            t[b + "self_attn.v_proj.weight"] = self._linear(kv, d)
            t[b + "self_attn.v_proj.bias"] = self._normal(kv, std=0.1)
            t[b + "self_attn.o_proj.weight"] = self._linear(d, d, ATTN_GAIN)
            t[b + "mlp.gate_proj.weight"] = self._linear(mlp, d)
            t[b + "mlp.up_proj.weight"] = self._linear(mlp, d)
            t[b + "mlp.down_proj.weight"] = self._linear(d, mlp, MLP_GAIN / 0.6)
        t["model.norm.weight"] = self._gain(d)
        t["lm_head.weight"] = self._head()
        return t

    def _normal(self, *shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def _linear(self, rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return self._normal(rows, columns, std=gain / math.sqrt(columns))

    def _gain(self, n: int) -> Tensor:
        return 1.0 + self._normal(n, std=0.1)

    def _query_or_key(self, rows: int) -> Tensor:
        """Queries and keys have std sqrt(ATTN_STD) each, so (q.k) / sqrt(head_dim) has ATTN_STD.

        The fast RoPE pairs get more of it: mask positions have equal embeddings, and only RoPE
        distinguishes neighbours.
        """
        half = self.head_dim // 2
        gain = 1.0 + 2.0 * torch.exp(-torch.arange(half).float() / max(1.0, self.head_dim / 8))
        gain = gain / gain.pow(2).mean().sqrt()
        per_row = torch.cat([gain, gain]).repeat(rows // self.head_dim)
        return self._linear(rows, self.s["d"], math.sqrt(ATTN_STD)) * per_row[:, None]

    def _embedding(self) -> Tensor:
        w = self._normal(self.s["vocab"], self.s["d"], std=1.0)
        w[special_ids(self.s["vocab"])["mask"]] *= MASK_SCALE  # let the context decide
        return w

    def _head(self) -> Tensor:
        w = self._linear(self.s["vocab"], self.s["d"], LOGIT_STD)
        w[list(special_ids(self.s["vocab"]).values())] = 0.0
        return w


def llada_config(s: dict[str, int], ids: dict[str, int]) -> dict[str, Any]:
    return {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": s["d"],
        "embedding_dropout": 0.0,
        "embedding_size": s["vocab"],
        "eos_token_id": ids["eos"],
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": ids["mask"],
        "max_sequence_length": s["max_positions"],
        "mlp_hidden_size": s["mlp"],
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": s["heads"],
        "n_kv_heads": s["kv_heads"],
        "n_layers": s["layers"],
        "pad_token_id": ids["eos"],
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": s["vocab"],
        "weight_tying": False,
    }


def dream_config(s: dict[str, int], ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "hidden_act": "silu",
        "hidden_size": s["d"],
        "initializer_range": 0.02,
        "intermediate_size": s["mlp"],
        "mask_token_id": ids["mask"],
        "max_position_embeddings": s["max_positions"],
        "max_window_layers": s["layers"],
        "model_type": "Dream",
        "num_attention_heads": s["heads"],
        "num_hidden_layers": s["layers"],
        "num_key_value_heads": s["kv_heads"],
        "pad_token_id": ids["eos"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": s["vocab"],
    }


def write_tokenizer(path: Path, vocab: int, max_positions: int) -> None:
    """A character-level tokenizer that covers all ids.

    Printable ASCII and newline have one id each; the ids after them decode to " w<id>" and are
    never produced from text; the last four are <|bos|>, <|eos|>, <|mask|>, <|unk|>. Every id
    decodes to whole characters, so streamed text never waits for further bytes.
    """
    from tokenizers import Tokenizer, decoders, models

    specials = ["<|bos|>", "<|eos|>", "<|mask|>", "<|unk|>"]  # special_ids() in ascending order
    characters = [chr(c) for c in range(32, 127)] + ["\n"]
    if vocab < len(characters) + len(specials):
        raise ValueError(f"a tokenizer needs vocab >= {len(characters) + len(specials)}")
    fillers = [f" w{i}" for i in range(len(characters), vocab - len(specials))]
    ids = {token: i for i, token in enumerate(characters + fillers + specials)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<|unk|>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "pad_token": "<|eos|>",
            "mask_token": "<|mask|>",
            "unk_token": "<|unk|>",
            "model_max_length": max_positions,
            "clean_up_tokenization_spaces": False,
            "chat_template": "<|bos|>{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
        },
    )


def _write_tensors(path: Path, tensors: dict[str, Tensor], shards: int) -> None:
    for old in [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]:
        old.unlink()
    if shards <= 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    per = math.ceil(len(names) / shards)
    groups = [names[i : i + per] for i in range(0, len(names), per)]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: tensors[name] for name in group}, path / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(path / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
