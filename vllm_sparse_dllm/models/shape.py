# SPDX-License-Identifier: Apache-2.0
"""Sizes of a checkpoint's decoder, and the shapes of its tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecoderShape:
    """What the shared decoder has to know about a checkpoint.

    Attributes:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layer.
        num_layers: Decoder layers.
        num_heads: Query heads, over all tensor-parallel ranks.
        num_kv_heads: Key/value heads, over all tensor-parallel ranks.
        vocab_size: Token ids.
        embedding_rows: Rows of the checkpoint's embedding and head, at least ``vocab_size``.
        max_positions: Positions of the rotary table.
        rope_theta: Base of the rotary frequencies.
        rope_full_precision: Whether to rotate queries and keys in float32.
        rms_norm_eps: Epsilon of the norms.
        qkv_bias: Whether the q, k, v projections have biases.
        tie_embeddings: Whether the head is the embedding table.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    embedding_rows: int
    max_positions: int
    rope_theta: float
    rope_full_precision: bool
    rms_norm_eps: float
    qkv_bias: bool
    tie_embeddings: bool

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def tensor_shape(self, parameter: str, shard: int | str | None) -> tuple[int, ...]:
        """Return the shape that a checkpoint's tensor must have.

        Args:
            parameter: Name of the ``weight`` or ``bias`` that the tensor is loaded into.
            shard: Which part of a fused parameter the tensor is, else None.
        """
        hidden = self.hidden_size
        heads = self.num_heads if shard == "q" else self.num_kv_heads
        module, _, kind = parameter.rpartition(".")
        shapes = {
            "embed_tokens": (self.embedding_rows, hidden),
            "lm_head": (self.embedding_rows, hidden),
            "qkv_proj": (heads * self.head_size, hidden),
            "o_proj": (hidden, hidden),
            "gate_up_proj": (self.intermediate_size, hidden),
            "down_proj": (hidden, self.intermediate_size),
        }
        # The others are norms.
        shape = shapes.get(module.rpartition(".")[2], (hidden,))
        return shape[:1] if kind == "bias" else shape
