# SPDX-License-Identifier: Apache-2.0
"""Loads a checkpoint into a decoder: names, fused projections, quantised and tied weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import WeightsMapper

from vllm_sparse_dllm.models.shape import DecoderShape

logger = init_logger("vllm." + __name__)

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


class CheckpointModule(nn.Module):
    """A model that is loaded from a checkpoint with the names of another implementation.

    Attributes:
        packed_modules_mapping: The modules that are fused into one. vLLM passes it to
            quantisation configs, which name modules as a checkpoint does.
        hf_to_vllm_mapper: Renames a checkpoint's modules to those here, before they are fused.
            It is applied to tensors and to the module lists of quantisation configs.
        shape: Sizes that the checkpoint's configuration gives.
        quantised: Whether the checkpoint has a quantisation config.
        embed_tokens: The embedding.
        lm_head: The head.
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper: ClassVar[WeightsMapper]
    shape: DecoderShape
    quantised: bool
    embed_tokens: VocabParallelEmbedding
    lm_head: ParallelLMHead

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
