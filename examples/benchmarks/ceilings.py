# SPDX-License-Identifier: Apache-2.0
"""Measure what the machine can do, and derive the minimum time that a step can take on it.

*Matrix products* run with the shapes of the model's layers and the rows of its steps, by PyTorch's
`linear` and, on a CPU, by the oneDNN handler that vLLM uses, in float32 where the engine does so.
`hot` repeats one weight, which may stay in the processor's caches: the ceiling of the arithmetic.
`walk` goes through all weights of a model, as a step must: the time of a step that consists of
matrix products alone. *Bandwidth* is the better of reading and of copying much more memory than
the processor's caches hold.

A step's floor is max(bytes of weights / bandwidth, its operations / hot rate).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from devices import describe, median_seconds
from programs import Job, num_cores, serve_model

from vllm_sparse_dllm.kernels import dtype_name

#: A function that multiplies activations ``[rows, in]`` by a weight.
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that determine a step's cost."""

    width: int
    kv_width: int
    mlp: int
    layers: int
    vocab: int
    family: str = "llada"

    @classmethod
    def of(cls, path: Path) -> ModelShape:
        """Read a LLaDA or Dream configuration."""
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] == "llada":
            heads, width = config["n_heads"], config["d_model"]
            kv_heads = config.get("n_kv_heads") or heads
            mlp, layers, family = config["mlp_hidden_size"], config["n_layers"], "llada"
        else:
            heads, width = config["num_attention_heads"], config["hidden_size"]
            kv_heads = config["num_key_value_heads"]
            mlp, layers = config["intermediate_size"], config["num_hidden_layers"]
            family = "dream"
        return cls(width, width // heads * kv_heads, mlp, layers, config["vocab_size"], family)

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Input and output widths of a layer's matrix products, as the engine fuses them."""
        return {
            "qkv": (self.width, self.width + 2 * self.kv_width),
            "output": (self.width, self.width),
            "gate and up": (self.width, 2 * self.mlp),
            "down": (self.mlp, self.width),
        }

    @property
    def layer_weights(self) -> int:
        return sum(inner * outer for inner, outer in self.products.values())

    @property
    def weights(self) -> int:
        """Number of weights that a step reads: all layers and the head."""
        return self.layers * self.layer_weights + self.width * self.vocab


@dataclass(frozen=True)
class StepCost:
    """Operations of a step (a multiply-add counts as two) and bytes that it reads."""

    linear: float
    attention: float
    weight_bytes: float
    cache_bytes: float


def step_cost(
    shape: ModelShape,
    rows: int,
    last_rows: float,
    keys: int,
    cached_keys: int,
    requests: int,
    element_bytes: int,
) -> StepCost:
    """Return the minimum cost of a step.

    Args:
        shape: The model.
        rows: Tokens that the step runs, over all requests.
        last_rows: Rows whose logits are needed; only they go through the last layer's
            query, output and feed-forward products and the head.
        keys: Keys that each row attends to.
        cached_keys: Keys that each request reads from its cache.
        requests: Requests in the step.
        element_bytes: Bytes of a weight.
    """
    width, kv_width = shape.width, shape.kv_width
    layer = 2.0 * rows * shape.layer_weights
    last = 2.0 * rows * width * 2 * kv_width
    last += 2.0 * last_rows * (shape.layer_weights - width * 2 * kv_width)
    head = 2.0 * last_rows * width * shape.vocab
    attended = (shape.layers - 1) * rows + last_rows
    return StepCost(
        linear=(shape.layers - 1) * layer + last + head,
        attention=4.0 * attended * keys * width,
        weight_bytes=float(element_bytes * shape.weights),
        cache_bytes=2.0 * element_bytes * shape.layers * requests * cached_keys * kv_width,
    )


@dataclass(frozen=True)
class Floor:
    """The minimum time of a step, in seconds.

    Attributes:
        memory: Time to read the weights.
        linear: Time of the matrix products with weights, at the hot rate of the step's rows.
        attention: Time of attention's operations, at the best rate of any number of rows, since
            the shapes of its products do not depend on the step's rows.
    """

    memory: float
    linear: float
    attention: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.linear + self.attention)

    @property
    def seconds_without_attention(self) -> float:
        return max(self.memory, self.linear)


def floor_of(cost: StepCost, rows: int, ceilings: Job) -> Floor:
    """Return the floor of a step of ``rows`` tokens.

    Matrix products count at the best rate measured with at most the next larger number of rows.
    Smaller numbers are included since rows can be multiplied in parts, so that the floor is never
    above what is possible.
    """
    rates = {int(measured): entry["rate"] for measured, entry in ceilings["gemm"].items()}
    enough = min((measured for measured in rates if measured >= rows), default=math.inf)
    rate = max(rate for measured, rate in rates.items() if measured <= enough)
    return Floor(
        cost.weight_bytes / ceilings["bandwidth"],
        cost.linear / rate,
        cost.attention / max(rates.values()),
    )


def best_of(one: Job, other: Job) -> Job:
    """Return the higher rates of two measurements of the same rows, since both were achieved."""
    gemm = {
        count: max(entry, other["gemm"][count], key=lambda measured: measured["rate"])
        for count, entry in one["gemm"].items()
    }
    return one | {"bandwidth": max(one["bandwidth"], other["bandwidth"]), "gemm": gemm}


def _onednn() -> Any:
    """Return vLLM's operators if its build has the oneDNN handler, else None."""
    try:
        # This loads the library for this processor; importing another one would crash.
        from vllm import _custom_ops as ops
    except ImportError:
        return None
    return ops if getattr(ops, "_supports_onednn", False) else None


def _backends(
    dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[torch.Tensor], Product]]:
    """Return, for each way to multiply, a function from a weight ``[out, in]`` to its product."""

    def of_torch(weight: torch.Tensor) -> Product:
        return lambda x: F.linear(x, weight)

    backends: dict[str, Callable[[torch.Tensor], Product]] = {"torch": of_torch}
    ops = _onednn() if device.type == "cpu" else None
    if ops is not None:
        # Imported late, since vLLM may not be installed.
        from vllm_sparse_dllm.models.cpu_products import float32_product, wants_float32_products

        if wants_float32_products(dtype):
            return backends | {"onednn, float32": float32_product}

        def of_onednn(weight: torch.Tensor) -> Product:
            handler = ops.create_onednn_mm(weight.t(), 32)
            return lambda x: ops.onednn_mm(handler, x, None)

        backends["onednn"] = of_onednn
    return backends


def bandwidth(num_bytes: int, budget: float, device: torch.device) -> dict[str, float]:
    """Return the bytes a second of reading and of copying memory."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    read = source.numel() * 4 / median_seconds(source.sum, budget / 2, device)
    seconds = median_seconds(lambda: target.copy_(source), budget / 2, device)
    return {"read": read, "copy": 2 * source.numel() * 4 / seconds}


def _walk(layers: list[dict[str, Product]], head: Product, inputs: dict[str, torch.Tensor]) -> None:
    """Run all matrix products of a step, one after the other."""
    for layer in layers:
        for product, multiply in layer.items():
            multiply(inputs[product])
    head(inputs["head"])


@torch.inference_mode()
def measure(
    shape: ModelShape, dtype: torch.dtype, rows: list[int], budget: float, device: torch.device
) -> Job:
    """Measure all ceilings.

    Args:
        shape: The model.
        dtype: Dtype of weights and activations.
        rows: Numbers of rows to measure matrix products at.
        budget: Seconds for one measurement.
        device: The device to measure.
    """

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=device)

    element_bytes = torch.empty(0, dtype=dtype).element_size()
    size = max(64 << 20, min(1 << 30, 4 * element_bytes * shape.weights))
    memory = bandwidth(size, budget * 4, device)
    gemm: dict[int, Job] = {
        count: {"hot": {}, "walk": {}, "walk_flops": 2.0 * count * shape.weights} for count in rows
    }
    for name, make in _backends(dtype, device).items():
        head = make(random(shape.vocab, shape.width).to(dtype))
        layers = [
            {
                product: make((random(outer, inner) / inner**0.5).to(dtype))
                for product, (inner, outer) in shape.products.items()
            }
            for _ in range(shape.layers)
        ]
        for count in rows:
            inputs = {
                product: random(count, inner).to(dtype)
                for product, (inner, _) in shape.products.items()
            }
            inputs["head"] = random(count, shape.width).to(dtype)
            hot: dict[str, float] = {}
            for product, multiply in {**layers[0], "head": head}.items():
                x = inputs[product]
                hot[product] = median_seconds(partial(multiply, x), budget, device)
            gemm[count]["hot"][name] = hot
            walk = partial(_walk, layers, head, inputs)
            gemm[count]["walk"][name] = median_seconds(walk, budget, device)
        del layers, head
    for count, entry in gemm.items():
        best = {
            product: min(times[product] for times in entry["hot"].values())
            for product in [*shape.products, "head"]
        }
        layer_seconds = sum(best[product] for product in shape.products)
        seconds = shape.layers * layer_seconds + best["head"]
        entry["rate"] = 2.0 * count * shape.weights / seconds
    return {
        "shape": asdict(shape),
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        "bandwidth": max(memory.values()),
        "bandwidths": memory,
        "gemm": {str(count): entry for count, entry in gemm.items()},
    }


def _load(arguments: argparse.Namespace) -> tuple[Job, Any]:
    torch.set_num_threads(num_cores())
    shape = ModelShape.of(arguments.model)
    dtype, device = getattr(torch, arguments.dtype), torch.device(arguments.device)
    # Calling this here makes importing vLLM, which takes a while, part of loading.
    about = describe(device) | {"products": list(_backends(dtype, device))}
    return about, lambda job: measure(shape, dtype, job["rows"], job["budget"], device)


if __name__ == "__main__":
    serve_model(__doc__, _load)
