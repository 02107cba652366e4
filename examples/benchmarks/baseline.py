# SPDX-License-Identifier: Apache-2.0
"""LLaDA decoding as research code has it: plain PyTorch, one request at a time.

Written from the published algorithms for the benchmark to compare with: vanilla (arXiv
2502.09992), Fast-dLLM's dual cache (2505.22618) and Sparse-dLLM (2508.02558), each by fixed
steps or by Fast-dLLM's threshold. As in the published scripts, every forward computes logits of
all its rows over the whole vocabulary, and softmax over them: in the model's dtype, for the dual
cache in float64. It is no slower than they are; where they do avoidable work that is not part of
the method, this does not: rotary tables are computed once, cached keys are kept rotated, and a
block that holds no mask ends.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from programs import Job, num_cores, peak_memory, reset_peak_memory, serve
from safetensors.torch import load_file
from torch import nn

POLICIES = ("none", "dual", "sparse")


@dataclass(frozen=True)
class Decoding:
    """How a response is denoised.

    Attributes:
        response: Positions of the response; `block_length` divides it.
        cache_policy: ``none``, ``dual`` or ``sparse``.
        block_length: Positions of a block.
        steps: Denoising steps of the response; None for one a position. The number of blocks
            divides it.
        keep_ratio: ``sparse``: part of the keys outside the block that is kept.
        kernel_size: ``sparse``: width of the max-pool over saliency.
        threshold: Commit all positions at least this probable, instead of fixed steps.
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
        fill: Fill the caches from this pass.
        cached: Attend to the caches too.
    """

    start: int
    block: tuple[int, int]
    fill: bool = False
    cached: bool = False


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
    """Rotary positions in float32, from tables."""

    def __init__(self, head_size: int, positions: int, theta: float) -> None:
        super().__init__()
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        angles = torch.outer(torch.arange(positions, dtype=torch.float32), theta**-exponents)
        angles = torch.cat([angles, angles], dim=-1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        wide = x.float()
        end = start + x.shape[-2]
        left, right = wide.chunk(2, dim=-1)
        turned = torch.cat([-right, left], dim=-1)
        return (wide * self.cos[start:end] + turned * self.sin[start:end]).to(x.dtype)


class Block(nn.Module):
    """A decoder layer; the names are the checkpoint's."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, mlp = config["d_model"], config["mlp_hidden_size"]
        self.heads = config["n_heads"]
        self.kv_heads = config.get("n_kv_heads") or self.heads
        self.head_size = width // self.heads
        kv_width = self.kv_heads * self.head_size
        self.attn_norm = RMSNorm(width, config["rms_norm_eps"])
        self.ff_norm = RMSNorm(width, config["rms_norm_eps"])
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
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
                # The block's own place in the cache takes its fresh keys.
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
        """Return the positions outside the block that are kept, the most salient first."""
        start, end = block
        length = k.shape[2]
        others = torch.cat([torch.arange(start), torch.arange(end, length)])
        mean_query = q[:, :, start:end].mean(dim=2, keepdim=True)
        candidates = k.index_select(2, others)
        if self.kv_heads != self.heads:
            candidates = candidates.repeat_interleave(self.heads // self.kv_heads, dim=1)
        saliency = (mean_query @ candidates.transpose(2, 3)).mean(dim=(1, 2))
        kernel = decoding.kernel_size
        saliency = F.max_pool1d(saliency, kernel, stride=1, padding=kernel // 2)
        keep = int(len(others) * decoding.keep_ratio)
        return others[torch.topk(saliency, keep).indices[0]]


class LLaDA(nn.Module):
    """The network, batch 1."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width = config["d_model"]
        self.mask_token_id: int = config["mask_token_id"]
        self.wte = nn.Embedding(config["embedding_size"], width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["n_layers"]))
        self.ln_f = RMSNorm(width, config["rms_norm_eps"])
        self.ff_out = nn.Linear(width, config["embedding_size"], bias=False)
        self.rotary = Rotary(
            width // config["n_heads"], config["max_sequence_length"], config["rope_theta"]
        )

    @classmethod
    def load(cls, path: Path, dtype: torch.dtype) -> LLaDA:
        """Load a checkpoint in the public layout.

        Raises:
            ValueError: If it is not a LLaDA checkpoint.
        """
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config.get("architectures") != ["LLaDAModelLM"]:
            raise ValueError("the baseline is LLaDA only")
        with torch.device("meta"):
            model = cls(config)
        prefix = "model.transformer."
        tensors = {
            name.removeprefix(prefix): tensor.to(dtype)
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        model.load_state_dict(tensors, strict=True, assign=True)
        # Made on no device with the rest; the tables are no part of the checkpoint.
        model.rotary = Rotary(
            config["d_model"] // config["n_heads"],
            config["max_sequence_length"],
            config["rope_theta"],
        )
        return model.eval().requires_grad_(False)

    def forward(
        self, ids: torch.Tensor, this: Pass, caches: list[LayerCache], decoding: Decoding
    ) -> torch.Tensor:
        """Return ``[1, rows, vocab]`` logits of every row."""
        x = self.wte(ids)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, self.rotary, this, cache, decoding)
        return self.ff_out(self.ln_f(x))


@dataclass
class Response:
    """What a request gave.

    Attributes:
        token_ids: The response.
        num_full: Passes over all positions.
        num_block: Passes over a block.
        cache_bytes: Most bytes that the caches held.
    """

    token_ids: list[int]
    num_full: int = 0
    num_block: int = 0
    cache_bytes: int = 0


@torch.inference_mode()
def generate(model: LLaDA, prompt: list[int], decoding: Decoding) -> Response:
    """Denoise one response, block by block."""
    mask = model.mask_token_id
    ids = torch.tensor([prompt + [mask] * decoding.response])
    response = Response([])
    fill_step = {"none": -1, "dual": 0, "sparse": 1}[decoding.cache_policy]
    for number in range(decoding.num_blocks):
        start = len(prompt) + number * decoding.block_length
        block = (start, start + decoding.block_length)
        caches = [LayerCache() for _ in model.blocks]
        num_masks = int((ids[0, slice(*block)] == mask).sum())
        quota, rest = divmod(num_masks, decoding.steps_per_block)
        step = 0
        while (ids[0, slice(*block)] == mask).any():
            if 0 <= fill_step < step:
                this, first, end = Pass(start, block, cached=True), start, block[1]
                response.num_block += 1
            else:
                this, first, end = Pass(0, block, fill=step == fill_step), 0, ids.shape[1]
                response.num_full += 1
            logits = model(ids[:, first:end], this, caches, decoding)
            count = None if decoding.threshold is not None else quota + (step < rest)
            _commit(ids, logits[0], first, block[1], mask, count, decoding)
            held = sum(cache.num_bytes for cache in caches)
            response.cache_bytes = max(response.cache_bytes, held)
            step += 1
            if decoding.threshold is None and step == decoding.steps_per_block:
                break
    response.token_ids = ids[0, len(prompt) :].tolist()
    return response


def _commit(
    ids: torch.Tensor,
    logits: torch.Tensor,
    first: int,
    block_end: int,
    mask: int,
    count: int | None,
    decoding: Decoding,
) -> None:
    """Fill the surest masked positions in: ``count`` of them, or by the threshold."""
    tokens = logits.argmax(dim=-1)
    if decoding.cache_policy == "dual":
        logits = logits.to(torch.float64)
    confidence = F.softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    row_ids = ids[0, first : first + len(tokens)]
    masked = row_ids == mask
    masked[block_end - first :] = False
    confidence = confidence.masked_fill(~masked, -torch.inf)
    if count is not None:
        chosen = torch.topk(confidence, count).indices
    else:
        assert decoding.threshold is not None
        num_sure = int((confidence >= decoding.threshold).sum())
        chosen = torch.topk(confidence, max(1, num_sure)).indices
    row_ids[chosen] = tokens[chosen]


def _load(arguments: argparse.Namespace) -> tuple[Job, Any]:
    torch.set_num_threads(num_cores())
    model = LLaDA.load(arguments.model, getattr(torch, arguments.dtype))
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}

    def handle(job: Job) -> Job:
        decoding = Decoding(job["response"], **job["settings"])
        reset_peak_memory()
        start = time.perf_counter()
        responses = [generate(model, prompt, decoding) for prompt in job["prompts"]]
        seconds = time.perf_counter() - start
        return {
            "seconds": seconds,
            "tokens": [response.token_ids for response in responses],
            "num_full": sum(response.num_full for response in responses),
            "num_block": sum(response.num_block for response in responses),
            "cache_bytes": max(response.cache_bytes for response in responses),
            "peak_memory": peak_memory(),
        }

    return about, handle


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    serve(lambda: _load(arguments))


if __name__ == "__main__":
    main()
