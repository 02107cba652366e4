# SPDX-License-Identifier: Apache-2.0
"""LLaDA's and Dream's networks in plain PyTorch, with the caches of the baseline's policies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

POLICIES = ("none", "dual", "sparse")


@dataclass(frozen=True)
class Decoding:
    """How a response is denoised.

    Attributes:
        response: Positions of the response, a multiple of `block_length`.
        cache_policy: ``none``, ``dual`` or ``sparse``.
        block_length: Positions of a block.
        steps: Denoising steps of the response, a multiple of the number of blocks; None for one
            step per position.
        keep_ratio: For ``sparse``: share of the keys outside the block that is kept.
        kernel_size: For ``sparse``: width of the max-pool over saliency.
        threshold: Commit all positions that are at least this probable, instead of taking fixed
            steps.
    """

    response: int
    cache_policy: str = "none"
    block_length: int = 32
    steps: int | None = None
    keep_ratio: float = 0.5
    kernel_size: int = 3
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.cache_policy not in POLICIES:
            raise ValueError(f"the baseline has {', '.join(POLICIES)}, not {self.cache_policy}")
        if self.response % self.block_length or (self.steps or 0) % self.num_blocks:
            raise ValueError("blocks must divide the response and its steps")

    @property
    def num_blocks(self) -> int:
        return self.response // self.block_length

    @property
    def steps_per_block(self) -> int:
        return (self.steps or self.response) // self.num_blocks


class LayerCache:
    """Keys and values of one layer, ``[1, kv_heads, n, head_size]``, keys rotated."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        kept = (t for t in (self.keys, self.values) if t is not None)
        return sum(t.numel() * t.element_size() for t in kept)


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        start: Position of its first token.
        block: Positions [start, end) of the current block.
        fill: Whether to fill the caches from this pass.
        cached: Whether to attend to the caches too.
    """

    start: int
    block: tuple[int, int]
    fill: bool = False
    cached: bool = False


@dataclass(frozen=True)
class Shape:
    """The values that the network needs from a checkpoint's configuration.

    Attributes:
        family: ``llada`` or ``dream``.
        width: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key/value heads.
        mlp: Width of the feed-forward layer.
        layers: Decoder layers.
        vocab: Rows of the embedding and of the head.
        positions: Positions of the rotary tables.
        theta: Base of the rotary frequencies.
        eps: Epsilon of the norms.
        mask_token_id: The mask's token id.
    """

    family: str
    width: int
    heads: int
    kv_heads: int
    mlp: int
    layers: int
    vocab: int
    positions: int
    theta: float
    eps: float
    mask_token_id: int

    @classmethod
    def of(cls, path: Path) -> Shape:
        """Read a checkpoint's configuration.

        Raises:
            ValueError: If it is neither LLaDA's nor Dream's with a head of its own.
        """
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures")
        if architectures == ["LLaDAModelLM"]:
            names = "n_kv_heads mlp_hidden_size n_layers embedding_size max_sequence_length"
            family, width, heads = "llada", config["d_model"], config["n_heads"]
        elif architectures == ["DreamModel"] and not config.get("tie_word_embeddings"):
            names = "num_key_value_heads intermediate_size num_hidden_layers vocab_size"
            names += " max_position_embeddings"
            family, width = "dream", config["hidden_size"]
            heads = config["num_attention_heads"]
        else:
            raise ValueError(
                "the baseline has LLaDAModelLM and DreamModel with a head of its own, "
                f"not {architectures}"
            )
        kv_heads, *sizes = (config.get(name) for name in names.split())
        return cls(
            family,
            width,
            heads,
            kv_heads or heads,
            *sizes,
            theta=config["rope_theta"],
            eps=config["rms_norm_eps"],
            mask_token_id=config["mask_token_id"],
        )

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Rotary(nn.Module):
    """Rotary embedding from tables, in float32 (LLaDA) or in the model's dtype (Dream)."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = torch.float32 if shape.family == "llada" else dtype
        exponents = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
        positions = torch.arange(shape.positions, dtype=torch.float32)
        angles = torch.outer(positions, shape.theta**-exponents)
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        wide = x.to(self.dtype)
        end = start + x.shape[-2]
        left, right = wide.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
        return (wide * self.cos[start:end] + turned * self.sin[start:end]).to(x.dtype)


class Block(nn.Module):
    """A decoder layer; the names are LLaDA's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, mlp = shape.width, shape.mlp
        self.heads, self.kv_heads, self.head_size = shape.heads, shape.kv_heads, shape.head_size
        kv_width = self.kv_heads * self.head_size
        bias = shape.family == "dream"
        self.attn_norm = RMSNorm(width, shape.eps)
        self.ff_norm = RMSNorm(width, shape.eps)
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, kv_width, bias=bias)
        self.v_proj = nn.Linear(width, kv_width, bias=bias)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, mlp, bias=False)
        self.up_proj = nn.Linear(width, mlp, bias=False)
        self.ff_out = nn.Linear(mlp, width, bias=False)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, this: Pass, cache: LayerCache, decoding: Decoding
    ) -> torch.Tensor:
        x = x + self.attn_out(self._attend(self.attn_norm(x), rotary, this, cache, decoding))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))

    def _attend(
        self, x: torch.Tensor, rotary: Rotary, this: Pass, cache: LayerCache, decoding: Decoding
    ) -> torch.Tensor:
        batch, length, width = x.shape

        def split(projected: torch.Tensor, heads: int) -> torch.Tensor:
            return projected.view(batch, length, heads, self.head_size).transpose(1, 2)

        q = rotary(split(self.q_proj(x), self.heads), this.start)
        k = rotary(split(self.k_proj(x), self.kv_heads), this.start)
        v = split(self.v_proj(x), self.kv_heads)
        keys, values = k, v
        if this.cached:
            assert cache.keys is not None and cache.values is not None
            if decoding.cache_policy == "dual":
                # The fresh keys and values replace those of the block in the cache.
                start, end = this.block
                cache.keys[:, :, start:end] = k
                cache.values[:, :, start:end] = v
                keys, values = cache.keys, cache.values
            else:
                keys = torch.cat([cache.keys, k], dim=2)
                values = torch.cat([cache.values, v], dim=2)
        elif this.fill:
            if decoding.cache_policy == "dual":
                cache.keys, cache.values = k, v.contiguous()
            else:
                kept = self._select(q, k, this.block, decoding)
                cache.keys = k.index_select(2, kept)
                cache.values = v.index_select(2, kept)
        if self.kv_heads != self.heads:
            keys = keys.repeat_interleave(self.heads // self.kv_heads, dim=1)
            values = values.repeat_interleave(self.heads // self.kv_heads, dim=1)
        attended = F.scaled_dot_product_attention(q, keys, values)
        return attended.transpose(1, 2).reshape(batch, length, width)

    def _select(
        self, q: torch.Tensor, k: torch.Tensor, block: tuple[int, int], decoding: Decoding
    ) -> torch.Tensor:
        """Return the positions outside the block to keep, the most salient first."""
        start, end = block
        length = k.shape[2]
        positions = torch.arange(length, device=k.device)
        others = torch.cat([positions[:start], positions[end:]])
        mean_query = q[:, :, start:end].mean(dim=2, keepdim=True)
        candidates = k.index_select(2, others)
        if self.kv_heads != self.heads:
            candidates = candidates.repeat_interleave(self.heads // self.kv_heads, dim=1)
        saliency = (mean_query @ candidates.transpose(2, 3)).mean(dim=(1, 2))
        kernel = decoding.kernel_size
        saliency = F.max_pool1d(saliency, kernel, stride=1, padding=kernel // 2)
        keep = int(len(others) * decoding.keep_ratio)
        return others[torch.topk(saliency, keep).indices[0]]


#: Dream's tensor names, mapped to LLaDA's.
DREAM_NAMES = {
    "model.embed_tokens": "wte",
    "model.norm": "ln_f",
    "lm_head": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}


def _rename(name: str, family: str) -> str:
    """Return the name in `Network` of a checkpoint's tensor."""
    if family == "llada":
        return name.removeprefix("model.transformer.")
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{DREAM_NAMES[module]}.{kind}"
    number, _, module = module.removeprefix("model.layers.").partition(".")
    return f"blocks.{number}.{DREAM_NAMES[module]}.{kind}"


class Network(nn.Module):
    """The network, for a batch of 1."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.rotary: Rotary
        self.wte = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = RMSNorm(shape.width, shape.eps)
        self.ff_out = nn.Linear(shape.width, shape.vocab, bias=False)

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @classmethod
    def load(
        cls,
        path: Path,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        dummy: bool = False,
    ) -> Network:
        """Load a checkpoint in the public layout.

        Args:
            path: Its directory.
            dtype: Dtype of the weights.
            device: Where the network runs.
            dummy: Use random weights; the checkpoint then needs a configuration only.

        Raises:
            ValueError: If it is neither a LLaDA nor a Dream checkpoint.
        """
        shape = Shape.of(path)
        with torch.device("meta"):
            model = cls(shape)
        if dummy:
            model.to(dtype).to_empty(device=device)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.uniform_(-1e-3, 1e-3)
        else:
            model._read(path, dtype, device)
        with torch.device(device):
            model.rotary = Rotary(shape, dtype)
        return model.eval().requires_grad_(False)

    def _read(self, path: Path, dtype: torch.dtype, device: torch.device | str) -> None:
        tensors = {
            _rename(name, self.shape.family): tensor.to(device, dtype)
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
            # `Rotary` computes them itself.
            if not name.endswith("rotary_emb.inv_freq")
        }
        self.load_state_dict(tensors, strict=True, assign=True)

    def forward(
        self, ids: torch.Tensor, this: Pass, caches: list[LayerCache], decoding: Decoding
    ) -> torch.Tensor:
        """Return the logits of all rows, ``[1, rows, vocab]``."""
        x = self.wte(ids)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, self.rotary, this, cache, decoding)
        return self.ff_out(self.ln_f(x))
