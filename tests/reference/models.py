"""The two networks of B1 at batch size 1: every query sees every key that is present."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

KeyValue = tuple[Tensor, Tensor]  # one layer's rotated keys and its values: [kv heads, n, hd]


@dataclass(frozen=True)
class Forward:
    """One pass over n rows: logits [n, vocab]; per layer rotated q, k, and v: [heads, n, hd]."""

    logits: Tensor
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]


@dataclass(frozen=True)
class Layer:
    """The weights of one block under neutral names; biases may be None."""

    attn_norm: Tensor
    mlp_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None


@dataclass(frozen=True)
class Model:
    """A LLaDA or Dream network, and the ids and constants of its checkpoint."""

    kind: str  # "llada" or "dream"
    config: dict[str, Any]
    dtype: torch.dtype
    heads: int
    kv_heads: int
    eps: float
    theta: float
    mask_id: int
    eos_id: int
    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Tensor

    @property
    def vocab(self) -> int:
        return self.head.shape[0]

    @torch.inference_mode()
    def forward(
        self,
        ids: Sequence[int] | Tensor,
        positions: Sequence[int] | Tensor,
        extra: Sequence[KeyValue] | None = None,
    ) -> Forward:
        """Run ``ids`` at ``positions``; layer l attends to ``extra[l]``, then its own rows."""
        x = self.embedding[torch.as_tensor(ids)]
        angles = self._angles(torch.as_tensor(positions))
        qs, ks, vs = [], [], []
        for number, w in enumerate(self.layers):
            n = rms_norm(x, w.attn_norm, self.eps)
            q = self._rotate(split_heads(F.linear(n, w.q, w.q_bias), self.heads), angles)
            k = self._rotate(split_heads(F.linear(n, w.k, w.k_bias), self.kv_heads), angles)
            v = split_heads(F.linear(n, w.v, w.v_bias), self.kv_heads)
            qs.append(q)
            ks.append(k)
            vs.append(v)
            if extra is not None:
                k = torch.cat([extra[number][0], k], dim=1)
                v = torch.cat([extra[number][1], v], dim=1)
            x = x + F.linear(attention(q, k, v), w.o)
            n = rms_norm(x, w.mlp_norm, self.eps)
            x = x + F.linear(F.silu(F.linear(n, w.gate)) * F.linear(n, w.up), w.down)
        return Forward(F.linear(rms_norm(x, self.norm, self.eps), self.head), qs, ks, vs)

    __call__ = forward

    def _angles(self, positions: Tensor) -> Tensor:
        """[n, head dim] in float32, the same angles for both halves (B1)."""
        dim = self.layers[0].q.shape[0] // self.heads
        inv_freq = 1.0 / self.theta ** (torch.arange(0, dim, 2).float() / dim)
        half = positions.float()[:, None] * inv_freq[None, :]
        return torch.cat([half, half], dim=-1)

    def _rotate(self, x: Tensor, angles: Tensor) -> Tensor:
        """Half-split rotation: LLaDA in float32, Dream in the model dtype (B1)."""
        compute = torch.float32 if self.kind == "llada" else self.dtype
        x, cos, sin = x.to(compute), angles.cos().to(compute), angles.sin().to(compute)
        first, second = x.chunk(2, dim=-1)
        return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(self.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in float32, cast back, then scale in the model dtype (B1)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[n, heads * hd] -> [heads, n, hd]."""
    return x.view(len(x), heads, -1).transpose(0, 1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Not causal; query head h reads kv head h // (heads / kv heads).  -> [n, heads * hd]."""
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, dim=0), v.repeat_interleave(group, dim=0)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]  # scale 1 / sqrt(hd)
    return out.transpose(0, 1).flatten(1)


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> Model:
    """Read config.json and the safetensors (one file or shards) of a public-layout checkpoint."""
    config = json.loads((Path(path) / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors.update({name: t.to(dtype) for name, t in load_file(file).items()})
    architecture = config["architectures"][0]
    if architecture == "LLaDAModelLM":
        return _llada(config, tensors, dtype)
    if architecture == "DreamModel":
        return _dream(config, tensors, dtype)
    raise ValueError(f"unknown architecture {architecture!r}")


def _llada(config: dict[str, Any], t: dict[str, Tensor], dtype: torch.dtype) -> Model:
    def layer(i: int) -> Layer:
        b = f"model.transformer.blocks.{i}."
        return Layer(
            attn_norm=t[b + "attn_norm.weight"],
            mlp_norm=t[b + "ff_norm.weight"],
            q=t[b + "q_proj.weight"],
            k=t[b + "k_proj.weight"],
            v=t[b + "v_proj.weight"],
            o=t[b + "attn_out.weight"],
            gate=t[b + "ff_proj.weight"],
            up=t[b + "up_proj.weight"],
            down=t[b + "ff_out.weight"],
        )

    return Model(
        kind="llada",
        config=config,
        dtype=dtype,
        heads=config["n_heads"],
        kv_heads=config.get("n_kv_heads") or config["n_heads"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        mask_id=config["mask_token_id"],
        eos_id=config["eos_token_id"],
        embedding=t["model.transformer.wte.weight"],
        layers=[layer(i) for i in range(config["n_layers"])],
        norm=t["model.transformer.ln_f.weight"],
        head=t["model.transformer.ff_out.weight"],
    )


def _dream(config: dict[str, Any], t: dict[str, Tensor], dtype: torch.dtype) -> Model:
    def layer(i: int) -> Layer:
        b = f"model.layers.{i}."
        a, m = b + "self_attn.", b + "mlp."
        return Layer(
            attn_norm=t[b + "input_layernorm.weight"],
            mlp_norm=t[b + "post_attention_layernorm.weight"],
            q=t[a + "q_proj.weight"],
            k=t[a + "k_proj.weight"],
            v=t[a + "v_proj.weight"],
            o=t[a + "o_proj.weight"],
            gate=t[m + "gate_proj.weight"],
            up=t[m + "up_proj.weight"],
            down=t[m + "down_proj.weight"],
            q_bias=t[a + "q_proj.bias"],
            k_bias=t[a + "k_proj.bias"],
            v_bias=t[a + "v_proj.bias"],
        )

    return Model(
        kind="dream",
        config=config,
        dtype=dtype,
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        eps=config["rms_norm_eps"],
        theta=config["rope_theta"],
        mask_id=config["mask_token_id"],
        eos_id=config["eos_token_id"],
        embedding=t["model.embed_tokens.weight"],
        layers=[layer(i) for i in range(config["num_hidden_layers"])],
        norm=t["model.norm.weight"],
        head=t["lm_head.weight"],
    )
