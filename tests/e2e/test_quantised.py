# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: the right modules are quantised, and compute with the right weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel

from tests.engines import running_engine
from tests.reference import write_checkpoint
from tests.reference.quantised import gptq_weight, quantise
from vllm_sparse_dllm.models.dream import DreamModel
from vllm_sparse_dllm.models.llada import LLaDAModelLM

VOCAB = 256
SIZES = {"d_model": 128, "layers": 2, "heads": 4, "mlp": 192, "vocab": VOCAB}
PROMPT = [(7 * n) % 200 for n in range(45)]
HEADS = {"llada": "model.transformer.ff_out", "dream": "lm_head"}
SPARED = {
    "llada": tuple(f"model.transformer.blocks.0.{name}_proj" for name in "qkv"),
    "dream": tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
}


def first_token(path: Path) -> torch.Tensor:
    """Return the log-probabilities ``[vocab]`` of a response's only token."""
    params = SamplingParams(
        max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=-1
    )
    prompt: Any = {"prompt_token_ids": PROMPT}
    with running_engine(str(path), dtype="bfloat16", max_logprobs=-1) as llm:
        [output] = llm.generate([prompt], params, use_tqdm=False)[0].outputs
    assert output.logprobs is not None
    [row] = output.logprobs
    # The mask token's log-probability is minus infinity.
    found = torch.full((VOCAB,), torch.nan)
    for token, one in row.items():
        found[token] = one.logprob
    return found


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the correlation of two rows of log-probabilities."""
    known = one.isfinite() & other.isfinite()
    assert known.sum() >= VOCAB - 1
    return torch.corrcoef(torch.stack([one[known], other[known]]))[0, 1].item()


def _unpack(kernel: CPUWNA16LinearKernel, layer: Any) -> None:
    layer.meant = gptq_weight(layer.qweight.data, layer.scales.data)


def _multiply(
    kernel: CPUWNA16LinearKernel, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.meant.to(x.dtype), bias)


@pytest.mark.parametrize("spared", [False, True])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_four_bits(
    tmp_path: Path, family: str, spared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ, of all or only some layers; vLLM's kernel, which needs AVX-512, is replaced."""
    monkeypatch.setattr(CPUWNA16LinearKernel, "process_weights_after_loading", _unpack)
    monkeypatch.setattr(CPUWNA16LinearKernel, "apply_weights", _multiply)
    plain = write_checkpoint(tmp_path / "plain", family, **SIZES)
    quantised, same = quantise(plain, tmp_path, "gptq", SPARED[family] if spared else ())
    expected = first_token(same)
    assert likeness(first_token(quantised), expected) > 0.999
    assert likeness(first_token(plain), expected) < 0.99


@pytest.mark.parametrize("spared", [False, True])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_eight_bits(tmp_path: Path, family: str, spared: bool) -> None:
    """Compressed-tensors' 8-bit weights and activations, with vLLM's kernel."""
    plain = write_checkpoint(tmp_path / "plain", family, **SIZES)
    other = write_checkpoint(tmp_path / "other", family, **SIZES, seed=1)
    left = (HEADS[family], *SPARED[family]) if spared else (HEADS[family],)
    quantised, same = quantise(plain, tmp_path, "int8", left)
    expected = first_token(same)
    assert likeness(first_token(quantised), expected) > 0.95
    assert likeness(first_token(other), expected) < 0.5


def test_names_in_lists_of_modules() -> None:
    """As quantisers write them: whole, in part, and LLaDA's head, which has another name."""
    given = [
        "model.transformer.blocks",
        "model.transformer.blocks.7.attn_out",
        "model.transformer.blocks.7.q_proj",
        "ff_proj",
        "ff_out",
        "model.transformer.ff_out",
        "lm_head",
    ]
    assert LLaDAModelLM.hf_to_vllm_mapper.get_rename_mapper().apply_list(given) == [
        "layers",
        "layers.7.self_attn.o_proj",
        "layers.7.self_attn.q_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
        "lm_head",
        "no.lm_head",
    ]
    assert DreamModel.hf_to_vllm_mapper.get_rename_mapper().apply_list(
        ["model.layers", "model.layers.7.self_attn.q_proj", "lm_head"]
    ) == ["layers", "layers.7.self_attn.q_proj", "lm_head"]


def test_a_quantised_head_is_named(tmp_path: Path) -> None:
    """The error names the head; quantisers do not spare LLaDA's by default, because of its name."""
    plain = write_checkpoint(tmp_path / "plain", "llada", **SIZES)
    quantised, _ = quantise(plain, tmp_path, "int8", head=True)
    message = r"ff_out\.weight_scale that this model has not: lm_head is not quantised in vLLM"
    with pytest.raises(ValueError, match=message), running_engine(str(quantised)):
        pass


def test_tensors_without_a_use(tmp_path: Path) -> None:
    """Scales of a KV cache and biases of zeros are ignored; other biases are refused."""
    from safetensors.torch import load_file, save_file

    plain = write_checkpoint(tmp_path / "plain", "dream", **SIZES)
    quantised, _ = quantise(plain, tmp_path, "int8", ("lm_head",))
    file = quantised / "model.safetensors"
    layer = "model.layers.1."
    tensors = load_file(file)
    expected = first_token(quantised)
    tensors |= {
        f"{layer}self_attn.k_scale": torch.ones(1),
        f"{layer}self_attn.v_proj.v_scale": torch.ones(1),
        f"{layer}self_attn.k_proj.output_scale": torch.ones(1),
        f"{layer}self_attn.prob_output_scale": torch.ones(1),
        f"{layer}self_attn.o_proj.bias": torch.zeros(SIZES["d_model"]),
    }
    save_file(tensors, file, metadata={"format": "pt"})
    assert likeness(first_token(quantised), expected) > 0.9999
    tensors[f"{layer}self_attn.o_proj.bias"][3] = 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    with (
        pytest.raises(ValueError, match=r"o_proj\.bias that this model has not$"),
        running_engine(str(quantised)),
    ):
        pass
