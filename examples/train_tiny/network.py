# SPDX-License-Identifier: Apache-2.0
"""The networks of LLaDA and Dream in plain PyTorch, for training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FAMILIES = ("llada", "dream")
EMBEDDING_STD = 0.5


@dataclass(frozen=True)
class Shape:
    """Sizes and constants of a network."""

    family: str
    vocab: int
    width: int = 256
    layers: int = 4
    heads: int = 4
    #: Key/value heads; LLaDA's public models have as many as query heads, Dream's fewer.
    kv_heads: int = 4
    mlp: int = 512
    max_positions: int = 2048

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def rope_theta(self) -> float:
        return 1000000.0 if self.family == "dream" else 500000.0

    @property
    def qkv_bias(self) -> bool:
        return self.family == "dream"

    @property
    def eps(self) -> float:
        return 1e-6 if self.family == "dream" else 1e-5

    @property
    def shift(self) -> int:
        """Number of positions between the row that predicts a token and the token."""
        return 1 if self.family == "dream" else 0


class Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.eps = shape.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_size
        self.q = nn.Linear(shape.width, shape.width, bias=shape.qkv_bias)
        self.k = nn.Linear(shape.width, kv_width, bias=shape.qkv_bias)
        self.v = nn.Linear(shape.width, kv_width, bias=shape.qkv_bias)
        self.o = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], first: int) -> Tensor:
        """Return the output of positions from ``first`` on, ``[B, T - first, width]``."""
        groups = self.shape.heads // self.shape.kv_heads
        q = _rotate(self._heads(self.q(x[:, first:])), *(table[first:] for table in rotary))
        k = _rotate(self._heads(self.k(x)), *rotary).repeat_interleave(groups, 1)
        v = self._heads(self.v(x)).repeat_interleave(groups, 1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.shape.head_size)).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = Norm(shape)
        self.attention = Attention(shape)
        self.mlp_norm = Norm(shape)
        self.gate = nn.Linear(shape.width, shape.mlp, bias=False)
        self.up = nn.Linear(shape.width, shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, shape.width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], first: int) -> Tensor:
        x = x[:, first:] + self.attention(self.attention_norm(x), rotary, first)
        n = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


class Network(nn.Module):
    """A decoder without causal mask: every position attends to all."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = Norm(shape)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        half = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
        angles = torch.outer(torch.arange(shape.max_positions).float(), shape.rope_theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Draw all weights from normal distributions; biases are 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                std = 1.0 / math.sqrt(parameter.shape[1])
                if name.startswith("embedding"):
                    std = EMBEDDING_STD
                elif name.endswith(("attention.o.weight", "down.weight")):
                    std /= math.sqrt(2 * self.shape.layers)
                elif name.startswith("head"):
                    std *= 0.2
                parameter.normal_(0.0, std, generator=generator)

    def hidden_matrices(self) -> list[nn.Parameter]:
        """Return the parameters that Muon trains: the matrices of the layers."""
        return [p for p in self.blocks.parameters() if p.dim() == 2]

    def other_parameters(self) -> list[nn.Parameter]:
        hidden = {id(p) for p in self.hidden_matrices()}
        return [p for p in self.parameters() if id(p) not in hidden]

    def forward(self, ids: Tensor, tail: int) -> Tensor:
        """Return logits for the last ``tail`` positions, ``[B, tail, vocab]``.

        These are the rows that *predict* those positions: with Dream, each is the row of the
        position before.
        """
        length, shift = ids.shape[1], self.shape.shift
        first = length - tail - shift
        x = self.embedding(ids)
        rotary = self.cos[:length], self.sin[:length]
        for number, block in enumerate(self.blocks):
            # The last layer runs only where logits are wanted.
            x = block(x, rotary, first if number == len(self.blocks) - 1 else 0)
        return self.head(self.norm(x[:, : x.shape[1] - shift]))
