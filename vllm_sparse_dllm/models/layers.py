# SPDX-License-Identifier: Apache-2.0
"""The bidirectional decoder that LLaDA and Dream share, built from vLLM's parallel layers.

The layers make no decisions: which tokens are run, which keys they see and which rows the last
layer keeps is all in the step's `ForwardPlan`.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import maybe_prefix

from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.attention.module import BidirectionalAttention
from vllm_sparse_dllm.attention.plan import ForwardPlan
from vllm_sparse_dllm.kernels.cpu import kernels_for
from vllm_sparse_dllm.models.cpu_products import choose_products
from vllm_sparse_dllm.models.fused import FusedRMSNorm, silu_and_mul
from vllm_sparse_dllm.models.loading import CheckpointModule
from vllm_sparse_dllm.models.shape import DecoderShape

#: Most rows that go through the feed-forward layer at a time on CPU, where its intermediate
#: results are the widest. If SwiGLU takes several passes over memory, these cost more than the
#: matrix products once the results no longer fit the caches (`_CACHED_ROWS`); if it is one pass,
#: only their memory matters (`_MOST_ROWS`).
_CACHED_ROWS, _MOST_ROWS = 512, 4096


class Rotary(nn.Module):
    """Rotary position embedding, in float32 where the checkpoint asks for full precision."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.full_precision = shape.rope_full_precision
        self.head_size = shape.head_size
        self._table: torch.Tensor | None = None
        self.rope = get_rope(
            shape.head_size,
            max_position=shape.max_positions,
            is_neox_style=True,
            rope_parameters={"rope_theta": shape.rope_theta, "rope_type": "default"},
            dtype=torch.float32 if self.full_precision else None,
        )

    def forward(
        self, positions: torch.Tensor, qk: torch.Tensor, q_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys that are stored side by side; may overwrite them.

        Args:
            positions: ``[tokens]``.
            qk: ``[tokens, q_size + k_size]``.
            q_size: Columns that are queries.

        Returns:
            Queries and keys.
        """
        sizes = [q_size, qk.shape[-1] - q_size]
        kernels = kernels_for(qk, self.head_size, 32)
        if kernels is not None:
            if self._table is None:
                self._table = self.rope.cos_sin_cache.float()
            kernels.rotate(qk, self.head_size, positions, self._table)
            q, k = qk.split(sizes, dim=-1)
            return q, k
        if self.full_precision and qk.dtype != torch.float32:
            # Queries and keys are widened by one copy, and narrowed by one.
            wide = qk.float()
            q, k = wide.split(sizes, dim=-1)
            rotated = self.rope(positions, q, k)
            if rotated[0] is not q:
                # Some of vLLM's implementations (`custom_ops`) do not rotate in place.
                wide = torch.cat(rotated, dim=-1)
            q, k = wide.to(qk.dtype).split(sizes, dim=-1)
            return q, k
        q, k = self.rope(positions, *qk.split(sizes, dim=-1))
        return q, k


class SelfAttention(nn.Module):
    def __init__(
        self,
        shape: DecoderShape,
        layer_index: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        if shape.num_heads % tp_size:
            raise ValueError(
                f"tensor_parallel_size={tp_size} must divide the {shape.num_heads} attention heads"
            )
        self.head_size = shape.head_size
        self.num_heads = shape.num_heads // tp_size
        self.num_kv_heads = max(1, shape.num_kv_heads // tp_size)
        self.qkv_proj = QKVParallelLinear(
            shape.hidden_size,
            shape.head_size,
            shape.num_heads,
            shape.num_kv_heads,
            bias=shape.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            shape.hidden_size,
            shape.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.attention = BidirectionalAttention(
            layer_index,
            AttentionShape(self.num_heads, self.num_kv_heads, shape.head_size),
            total_heads=shape.num_heads,
        )

    def forward(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        rotary: Rotary,
        plan: ForwardPlan,
        last: bool,
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden)
        q_size, kv_size = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        qk, v = qkv.split([q_size + kv_size, kv_size], dim=-1)
        q, k = rotary(positions, qk, q_size)
        output = self.attention(
            q.view(-1, self.num_heads, self.head_size),
            k.view(-1, self.num_kv_heads, self.head_size),
            v.view(-1, self.num_kv_heads, self.head_size),
            plan,
            last,
        )
        output, _ = self.o_proj(output)
        return output


class FeedForward(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(
        self, shape: DecoderShape, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            shape.hidden_size,
            [shape.intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            shape.intermediate_size,
            shape.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.shape[0]
        one_pass = kernels_for(hidden, self.down_proj.input_size_per_partition, 16) is not None
        most = _MOST_ROWS if one_pass else _CACHED_ROWS
        if hidden.device.type != "cpu" or rows <= most:
            return self._run(hidden)
        output = torch.empty_like(hidden)
        num_parts = -(-rows // most)
        for part, target in zip(hidden.chunk(num_parts), output.chunk(num_parts), strict=True):
            target.copy_(self._run(part))
        return output

    def _run(self, hidden: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden)
        output, _ = self.down_proj(silu_and_mul(gate_up))
        return output


class DecoderLayer(nn.Module):
    def __init__(
        self,
        shape: DecoderShape,
        layer_index: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.input_norm = FusedRMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = SelfAttention(shape, layer_index, quant_config, f"{prefix}.self_attn")
        self.post_attention_norm = FusedRMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = FeedForward(shape, quant_config, f"{prefix}.mlp")

    def forward(
        self,
        positions: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        rotary: Rotary,
        plan: ForwardPlan,
        last: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_norm(hidden)
        else:
            hidden, residual = self.input_norm.add_norm(hidden, residual)
        hidden = self.self_attn(positions, hidden, rotary, plan, last)
        if last:
            residual = residual.index_select(0, plan.last_rows)
        hidden, residual = self.post_attention_norm.add_norm(hidden, residual)
        return self.mlp(hidden), residual


class DiffusionDecoder(CheckpointModule):
    """Embedding, bidirectional decoder layers, final norm and head.

    Subclasses define how a checkpoint is read: `shape_of` and `hf_to_vllm_mapper`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        self.quantised = quant_config is not None
        self.shape = shape = self.shape_of(vllm_config)
        if get_pp_group().world_size > 1:
            raise ValueError("pipeline_parallel_size must be 1 for diffusion models")
        self.embed_tokens = VocabParallelEmbedding(
            shape.embedding_rows,
            shape.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "embed_tokens"),
        )
        self.rotary = Rotary(shape)
        self.layers = nn.ModuleList(
            DecoderLayer(shape, index, quant_config, maybe_prefix(prefix, f"layers.{index}"))
            for index in range(shape.num_layers)
        )
        self.norm = FusedRMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.lm_head = ParallelLMHead(
            shape.embedding_rows,
            shape.hidden_size,
            quant_config=quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if shape.tie_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        self.logits_processor = LogitsProcessor(shape.embedding_rows)
        dtype = vllm_config.model_config.dtype
        assert isinstance(dtype, torch.dtype)
        choose_products(self, dtype)

    @classmethod
    def shape_of(cls, vllm_config: VllmConfig) -> DecoderShape:
        """Read and check the checkpoint's configuration."""
        raise NotImplementedError

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: ForwardPlan | None = None,
    ) -> torch.Tensor:
        """Run one ragged batch.

        Args:
            input_ids: ``[tokens]`` token ids of all sequences, one after the other.
            positions: ``[tokens]`` positions of the tokens in their sequences.
            plan: The step's plan; required.

        Returns:
            ``[len(plan.last_rows), hidden]`` normalised hidden states of the rows that the
            step asked for.
        """
        if plan is None:
            raise ValueError("a diffusion model runs with a ForwardPlan")
        hidden = self.embed_tokens(input_ids)
        residual: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            last = index == len(self.layers) - 1
            hidden, residual = layer(positions, hidden, residual, self.rotary, plan, last)
        assert residual is not None
        hidden, _ = self.norm.add_norm(hidden, residual)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return ``[rows, vocab]`` logits."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        return None if logits is None else logits[..., : self.shape.vocab_size]
