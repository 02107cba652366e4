# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints, as public tools write them, and plain ones with the same weights.

The plain checkpoint has the weights that the quantised one represents, so that both give the
same tokens, except for rounding in kernels.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

#: Input channels of a weight that share a scale, in 4-bit formats.
GROUP = 32
_PROJECTION = re.compile(
    r"(model\.(?:transformer\.blocks|layers)\.\d+\.(?:\w+\.)?\w*(?:proj|out))\.weight"
)

Tensors = dict[str, Tensor]
#: Maps a weight ``[out, in]`` to its quantised tensors, by suffix, and the weight they represent.
Quantiser = Callable[[Tensor], tuple[Tensors, Tensor]]


def quantise(
    plain: Path, folder: Path, method: str, spared: tuple[str, ...] = (), head: bool = False
) -> tuple[Path, Path]:
    """Quantise a checkpoint's projections.

    Args:
        plain: A checkpoint in one file.
        folder: Folder that the two new checkpoints are written to.
        method: ``gptq`` with 4 bits, or ``int8``, which is compressed-tensors' W8A8.
        spared: Modules that are not quantised.
        head: Quantise the head too.

    Returns:
        The quantised checkpoint and the plain one with the weights that it represents.
    """
    quantiser, config = _METHODS[method]
    quantised, same = (Path(shutil.copytree(plain, folder / name)) for name in (method, "same"))
    tensors = load_file(plain / "model.safetensors")
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in tensors.items():
        match = _PROJECTION.fullmatch(name)
        module = match[1] if match else None
        if head and name in ("lm_head.weight", "model.transformer.ff_out.weight"):
            module = name.removesuffix(".weight")
        if module is None or module in spared:
            stored[name] = meant[name] = tensor
            continue
        parts, weight = quantiser(tensor.float())
        stored |= {f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()}
        meant[name] = weight.to(tensor.dtype)
    save_file(stored, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(meant, same / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((quantised / "config.json").read_text())
    settings["quantization_config"] = config(spared)
    (quantised / "config.json").write_text(json.dumps(settings))
    return quantised, same


def _four_bits(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values 0 to 15 ``[in, out]``, their scales ``[groups, out]`` and their weight."""
    grouped = weight.t().reshape(-1, GROUP, weight.shape[0])
    scales = (grouped.abs().amax(dim=1) / 7).half()
    values = (grouped / scales.float().unsqueeze(1)).round().clamp(-8, 7)
    meant = (values * scales.float().unsqueeze(1)).flatten(0, 1).t()
    return (values + 8).to(torch.int64).flatten(0, 1), scales, meant


def _packed(values: Tensor) -> Tensor:
    """Pack every eight 4-bit values along the last dimension into an int32."""
    eights = values.unflatten(-1, (-1, 8))
    words = (eights << (4 * torch.arange(8))).sum(dim=-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _gptq(weight: Tensor) -> tuple[Tensors, Tensor]:
    values, scales, meant = _four_bits(weight)
    # The format stores zero points minus 1.
    zeros = _packed(torch.full(scales.shape, 7))
    groups = torch.arange(len(values), dtype=torch.int32) // GROUP
    packed = _packed(values.t()).t()
    return {"qweight": packed, "qzeros": zeros, "scales": scales, "g_idx": groups}, meant


def gptq_weight(qweight: Tensor, scales: Tensor) -> Tensor:
    """Return the weight ``[out, in]`` that a GPTQ layer of `quantise` represents."""
    values = (qweight.unsqueeze(1) >> (4 * torch.arange(8).view(1, 8, 1))) & 15
    grouped = values.flatten(0, 1).unflatten(0, (-1, GROUP)) - 8
    return (grouped * scales.float().unsqueeze(1)).flatten(0, 1).t()


def _int8(weight: Tensor) -> tuple[Tensors, Tensor]:
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).bfloat16().float()
    values = (weight / scales).round().clamp(-128, 127)
    return {"weight": values.to(torch.int8), "weight_scale": scales}, values * scales


def _gptq_config(spared: tuple[str, ...]) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "lm_head": False,
    }


def _int8_config(spared: tuple[str, ...]) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, "dynamic": False},
                "input_activations": {**activations, "dynamic": True},
            }
        },
        "ignore": ["lm_head", *spared],
    }


_METHODS: dict[str, tuple[Quantiser, Callable[[tuple[str, ...]], dict[str, Any]]]] = {
    "gptq": (_gptq, _gptq_config),
    "int8": (_int8, _int8_config),
}
