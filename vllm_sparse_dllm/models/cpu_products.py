# SPDX-License-Identifier: Apache-2.0
"""The matrix products of a model on a CPU: vLLM's own, or products with float32 weights.

oneDNN multiplies in half precision with AVX-512. On an x86 processor without it, vLLM falls back
to PyTorch's products, which are up to seven times slower than oneDNN's in float32. There, the
weights of linear layers and of the head are therefore kept in float32 as packed by oneDNN, which
takes twice the memory, and each product is rounded once. Everything else stays in the model's
dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm import _custom_ops as ops
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
)
from vllm.platforms import current_platform

from vllm_sparse_dllm.kernels import dtype_name, native

logger = init_logger("vllm." + __name__)

#: Compiled products that a layer keeps, one for each number of rows; as many as in vLLM.
_KEPT_SHAPES = 32


def choose_products(model: nn.Module, dtype: torch.dtype) -> None:
    """Choose how the layers of a model multiply on a CPU; elsewhere vLLM's choice stands.

    Must be called before the weights are loaded: the methods set here process them afterwards.

    Args:
        model: Model built from vLLM's layers; quantised layers are left as they are.
        dtype: Dtype of the weights.
    """
    if not current_platform.is_cpu():
        return
    in_float32 = wants_float32_products(dtype)
    num_chosen = 0
    module: Any
    for module in model.modules():
        # Exact types only: subclasses have products of their own.
        method = type(getattr(module, "quant_method", None))
        if method is UnquantizedEmbeddingMethod and not isinstance(module, ParallelLMHead):
            module.quant_method = LookupMethod()
        elif in_float32 and method in _IN_FLOAT32:
            module.quant_method = _IN_FLOAT32[method]()
            num_chosen += 1
    if num_chosen:
        logger.info(
            "This processor multiplies no %s: weights are kept in float32, in twice the memory",
            dtype_name(dtype),
        )


def wants_float32_products(dtype: torch.dtype) -> bool:
    """Return whether products in ``dtype`` are slower on this CPU than in float32."""
    if not native.lacks_avx512() or not ops._supports_onednn or native.switched_off():
        return False
    # Some processors without AVX-512 have AVX2 instructions for these dtypes.
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }.get(dtype)
    return supported is not None and not supported()


def float32_product(weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return a function that multiplies rows by a weight in float32 and rounds to their dtype.

    Args:
        weight: ``[out, in]``; a copy of it is packed.

    Returns:
        A function of ``x`` ``[rows, in]`` and an optional bias ``[out]`` that returns
        ``[rows, out]``.
    """
    packed = ops.create_onednn_mm(weight.detach().float().t(), _KEPT_SHAPES)

    def multiply(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        wide_bias = None if bias is None else bias.float()
        return ops.onednn_mm(packed, x.float(), wide_bias).to(x.dtype)

    return multiply


class _Float32Method:
    """Packs a layer's weights and drops the originals; a tied embedding still holds them."""

    def process_weights_after_loading(self, layer: Any) -> None:
        multiply = float32_product(layer.weight)
        layer.cpu_linear = lambda x, weight, bias: multiply(x, bias)
        layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)


class Float32LinearMethod(_Float32Method, UnquantizedLinearMethod):
    """Float32 products for linear layers."""


class Float32HeadMethod(_Float32Method, UnquantizedEmbeddingMethod):
    """Float32 products for the head."""


class LookupMethod(UnquantizedEmbeddingMethod):
    """For the embedding, which has no products; vLLM would pack its weights for them."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Do nothing."""


_IN_FLOAT32: dict[type, Callable[[], _Float32Method]] = {
    UnquantizedLinearMethod: Float32LinearMethod,
    UnquantizedEmbeddingMethod: Float32HeadMethod,
}
