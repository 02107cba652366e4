# SPDX-License-Identifier: Apache-2.0
"""Rotary positions against the formula, for every implementation that can be in use."""

from __future__ import annotations

import pytest
import torch
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

from vllm_sparse_dllm.models.layers import Rotary
from vllm_sparse_dllm.models.shape import DecoderShape

HEAD, HEADS, KV_HEADS, THETA = 32, 4, 2, 10_000.0


def shape(full_precision: bool) -> DecoderShape:
    return DecoderShape(
        hidden_size=HEAD * HEADS,
        intermediate_size=8,
        num_layers=1,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        vocab_size=8,
        embedding_rows=8,
        max_positions=300,
        rope_theta=THETA,
        rope_full_precision=full_precision,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        tie_embeddings=False,
    )


def rotated(positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ``[tokens, heads * HEAD]`` rotated in float64, halves paired."""
    first, second = x.double().view(len(x), -1, 2, HEAD // 2).unbind(2)
    frequencies = THETA ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    angles = (positions.double()[:, None] * frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    halves = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(halves, dim=-1).view(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("full_precision", [True, False])
@pytest.mark.parametrize("way", ["own", "none", "all"])
def test_queries_and_keys_are_rotated(
    way: str, full_precision: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's kernel (where there is one) and both of vLLM's implementations agree.

    vLLM's kernel (`custom_ops` all) rotates in place; its PyTorch code (none) does not.
    """
    custom_ops = "all" if way == "own" else way
    if way != "own":
        monkeypatch.setattr("vllm_sparse_dllm.models.layers.kernels_for", lambda *arguments: None)
    # vLLM caches what it has built, regardless of the configuration.
    monkeypatch.setattr("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {})
    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=[custom_ops]))
    generator = torch.Generator().manual_seed(1)
    qk = torch.randn(6, HEAD * (HEADS + KV_HEADS), generator=generator).to(dtype)
    positions = torch.tensor([0, 1, 17, 250, 299, 3])
    expected = rotated(positions, qk).to(dtype)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with set_current_vllm_config(config):
            q, k = Rotary(shape(full_precision))(positions, qk.clone(), HEAD * HEADS)
    finally:
        torch.set_default_dtype(default)
    assert q.shape == (6, HEAD * HEADS) and k.shape == (6, HEAD * KV_HEADS)
    assert q.dtype == k.dtype == dtype
    exact = full_precision or dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else (1e-2 if exact else 5e-2)
    torch.testing.assert_close(torch.cat([q, k], dim=-1), expected, rtol=tolerance, atol=tolerance)
