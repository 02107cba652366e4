# SPDX-License-Identifier: Apache-2.0
"""The bidirectional decoder that LLaDA and Dream share, built from vLLM's parallel layers.

The layers make no decisions: which tokens are run, which keys they see and which rows the last
layer keeps is all in the step's `ForwardPlan`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from vllm_sparse_dllm.attention.interface import AttentionShape
from vllm_sparse_dllm.attention.module import BidirectionalAttention
from vllm_sparse_dllm.attention.plan import ForwardPlan
from vllm_sparse_dllm.kernels.cpu import kernels_for
from vllm_sparse_dllm.models.cpu_products import choose_products
from vllm_sparse_dllm.models.fused import FusedRMSNorm, silu_and_mul

logger = init_logger("vllm." + __name__)

#: Most rows that go through the feed-forward layer at a time on CPU, where its intermediate
#: results are the widest. If SwiGLU takes several passes over memory, these cost more than the
#: matrix products once the results no longer fit the caches (`_CACHED_ROWS`); if it is one pass,
#: only their memory matters (`_MOST_ROWS`).
_CACHED_ROWS, _MOST_ROWS = 512, 4096

#: For each projection the fused module that holds it, and vLLM's name of the shard.
_PLACES: dict[str, tuple[str, int | str]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
#: Tensors of quantised checkpoints that this model does not use: the order of channels, which
#: vLLM's kernels ignore, and the scales of a quantised KV cache (pages are not quantised).
_UNUSED = re.compile(
    r".*\.(g_idx|(?P<cache>([qkv]|kv|prob)_(scale|zero_point)|[qkv]_proj\.output_scale|"
    r"prob_output_scale|q\.scale|[kv]_cache\.scale))"
)


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


class DiffusionDecoder(nn.Module):
    """Embedding, bidirectional decoder layers, final norm and head.

    Subclasses define how a checkpoint is read: `shape_of` and `hf_to_vllm_mapper`.

    Attributes:
        packed_modules_mapping: The modules that are fused into one. vLLM passes it to
            quantisation configs, which name modules as a checkpoint does.
        hf_to_vllm_mapper: Renames a checkpoint's modules to those here, before they are fused.
            It is applied to tensors and to the module lists of quantisation configs.
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper: ClassVar[WeightsMapper]

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

    @classmethod
    def place_of(cls, name: str) -> tuple[str, int | str | None] | None:
        """Map a tensor's name to (parameter, shard of a fused parameter), None to skip it."""
        mapped = cls.hf_to_vllm_mapper.map_name(name)
        if mapped is None:
            return None
        path, _, kind = mapped.rpartition(".")
        parent, _, module = path.rpartition(".")
        if module not in _PLACES:
            return mapped, None
        fused, shard = _PLACES[module]
        return f"{parent}.{fused}.{kind}", shard

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

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint.

        Raises:
            ValueError: If a tensor is unknown or does not have the shape that the configuration
                implies, a parameter is missing from the checkpoint, or a tied head differs from
                the embedding.
        """
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        tied: dict[str, torch.Tensor] = {}
        shards: dict[str, set[int | str]] = {}
        for name, tensor in weights:
            target = self.place_of(name)
            if target is None:
                continue
            parameter_name, shard = target
            head = parameter_name.startswith("lm_head.")
            parameter = parameters.get(parameter_name)
            if parameter is None and self.quantised and self._is_unused(name, tensor):
                continue
            if parameter is None and not (head and self.shape.tie_embeddings):
                raise ValueError(
                    f"the checkpoint has a tensor {name} that this model has not"
                    + self._hint(parameter_name)
                )
            self._check_shape(name, tensor, parameter_name, shard)
            if self.shape.tie_embeddings and (head or parameter_name.startswith("embed_tokens.")):
                tied[name] = tensor
                if head:
                    continue
            loader: Any = getattr(parameter, "weight_loader", default_weight_loader)
            try:
                if shard is None:
                    loader(parameter, tensor)
                else:
                    loader(parameter, tensor, shard)
                    shards.setdefault(parameter_name, set()).add(shard)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(
                    f"tensor {name} of shape {tuple(tensor.shape)} does not fit this "
                    f"model's {parameter_name}: {error}"
                ) from error
            loaded.add(parameter_name)
        if len(tied) > 1 and not torch.equal(*tied.values()):
            raise ValueError(
                f"config.json ties the head to the embedding, but tensors {' and '.join(tied)} "
                "differ"
            )
        missing = [name for name in parameters if name not in loaded]
        for name, seen in shards.items():
            wanted: set[int | str] = {"q", "k", "v"} if ".qkv_proj." in name else {0, 1}
            missing += [f"{name} ({part})" for part in sorted(map(str, wanted - seen))]
        if self.shape.tie_embeddings:
            missing = [name for name in missing if not name.startswith("lm_head.")]
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        return loaded

    def _hint(self, parameter_name: str) -> str:
        """Return advice on a tensor of a module that is quantised in the checkpoint only."""
        name, _, kind = parameter_name.rpartition(".")
        module = dict(self.named_modules()).get(name)
        plain = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)
        if kind == "bias" or not self.quantised:
            return ""
        if not isinstance(getattr(module, "quant_method", None), plain):
            return ""
        return f": {name} is not quantised in vLLM, so the quantiser has to leave it out"

    @staticmethod
    def _is_unused(name: str, tensor: torch.Tensor) -> bool:
        """Return whether a tensor that has no place here may be left out."""
        # Some tools write biases of zeros to layers that have none.
        if name.endswith(".bias"):
            return not tensor.any()
        match = _UNUSED.fullmatch(name)
        if match is not None and match["cache"]:
            logger.warning_once(
                "The checkpoint's scales of a quantised KV cache are not used: pages are in the "
                "model's dtype"
            )
        return match is not None

    def process_tied_head(self) -> None:
        """Let a head tied to the embedding take over weights that were reloaded.

        vLLM's reloading sees such a head as a layer that was not loaded, which would keep its old
        packed weights.
        """
        method = self.lm_head.quant_method
        unquantised = isinstance(method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        if self.shape.tie_embeddings and unquantised:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
            self.lm_head.quant_method.process_weights_after_loading(self.lm_head)

    def _check_shape(
        self, name: str, tensor: torch.Tensor, parameter_name: str, shard: int | str | None
    ) -> None:
        # vLLM's loaders take only the part of a tensor that they need, so one that is too large
        # would go unnoticed. Quantised weights have shapes of their own.
        if self.quantised:
            return
        expected = self.shape.tensor_shape(parameter_name, shard)
        if tuple(tensor.shape) != expected:
            raise ValueError(
                f"tensor {name} of the checkpoint has the shape {tuple(tensor.shape)}, but by its "
                f"config.json it must have {expected}"
            )
