# SPDX-License-Identifier: Apache-2.0
"""Measure the passes of an engine, for ``run.py --measured``.

The kind of each step follows from the requests: under the policy `none` every step is a full pass
of all requests, under `sparse` with one block every step but the first is a block step. With
tensor-parallel ranks (``--engine-args '{"tensor_parallel_size": 2}'``) an all-reduce between them
is also timed, by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

# Run the engine core in this process, so that steps can be timed. Must be set before vLLM is
# imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from vllm import LLM, SamplingParams

from vllm_sparse_dllm.assets import embedded_model

BLOCK = 32
#: Number of timed steps in a run, and of untimed ones before them.
TIMED, FIRST = 2, 1
#: Rounds in which all sizes take turns, so that no size gets all of the machine's slow moments.
ROUNDS = 4
#: Number of timed all-reduces of a size, and of untimed ones before them.
REDUCED, FIRST_REDUCED = 100, 10


def step_seconds(llm: LLM, requests: int, prompt: int, policy: str, keep: float) -> list[float]:
    """Return the times of steps that run ``requests`` requests at once."""
    extra: dict[str, Any] = {"diffusion_cache_policy": policy, "diffusion_block_length": BLOCK}
    if policy == "sparse":
        extra |= {"diffusion_keep_ratio": keep, "diffusion_delay_steps": 0}
    extra["diffusion_steps"] = FIRST + TIMED + 1
    params = SamplingParams(
        temperature=0, max_tokens=BLOCK, ignore_eos=True, detokenize=False, extra_args=extra
    )
    for number in range(requests):
        ids = [10 + (number + place) % 100 for place in range(prompt)]
        llm.enqueue({"prompt_token_ids": ids}, params, use_tqdm=False)
    seconds = []
    while llm.llm_engine.has_unfinished_requests():
        start = time.perf_counter()
        llm.llm_engine.step()
        seconds.append(time.perf_counter() - start)
    if len(seconds) < FIRST + TIMED:
        raise RuntimeError(f"only {len(seconds)} steps were run")
    return seconds[FIRST : FIRST + TIMED]


def all_reduce_seconds(worker: Any, rows: int) -> float:
    """Return the median time of an all-reduce of ``rows`` hidden states; runs on every rank."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    config = worker.model_config
    states = torch.zeros(
        rows, config.hf_config.hidden_size, dtype=config.dtype, device=worker.device
    )
    seconds = []
    for _ in range(FIRST_REDUCED + REDUCED):
        start = time.perf_counter()
        tensor_model_parallel_all_reduce(states)
        if states.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[FIRST_REDUCED:])


def all_reduces(llm: LLM, rows: list[int]) -> list[tuple[int, float]]:
    """Return pairs of rows and the time of an all-reduce of them on the slowest rank."""
    run = llm.llm_engine.model_executor.collective_rpc
    return [(number, max(run(all_reduce_seconds, args=(number,)))) for number in rows]


def sizes(config: Any, dtype: torch.dtype) -> dict[str, int]:
    """Return the model's sizes under the field names of `model.Model`."""
    return {
        "element": dtype.itemsize,
        "width": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default=embedded_model(), help="default: the embedded model")
    parser.add_argument("--prompt", type=int, default=480, help="default: %(default)s")
    parser.add_argument("--keep", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument("--requests", default="1,2,4,8", help="default: %(default)s")
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_arguments()
    numbers = sorted({int(number) for number in options.requests.split(",")})
    length = options.prompt + BLOCK
    defaults = {
        "max_model_len": length,
        "max_num_seqs": max(numbers),
        "max_num_batched_tokens": length * max(numbers) + 1,
        "disable_log_stats": True,
        # Prompts are token ids.
        "skip_tokenizer_init": True,
    }
    llm = LLM(options.model, **{**defaults, **options.engine_args})
    kinds = {"full": ("none", length), "block": ("sparse", BLOCK)}
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(ROUNDS):
        for number in numbers:
            for kind, (policy, _) in kinds.items():
                found = step_seconds(llm, number, options.prompt, policy, options.keep)
                seconds[kind, number] += found
    times = {
        kind: [(n * rows, statistics.median(seconds[kind, n])) for n in numbers]
        for kind, (_, rows) in kinds.items()
    }
    ranks = llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size
    reduced = all_reduces(llm, [BLOCK * numbers[0], length * numbers[-1]]) if ranks > 1 else []
    config = llm.llm_engine.model_config
    content = {
        "model": sizes(config.hf_config, config.dtype),
        "ranks": ranks,
        "prompt": options.prompt,
        "keep": options.keep,
        **times,
        "all_reduce": reduced,
    }
    options.output.write_text(json.dumps(content, indent=1), encoding="utf-8")
    for kind, points in (*times.items(), ("all-reduce", reduced)):
        for rows, took in points:
            print(f"{kind:<12}{rows:>7} rows {1000 * took:>10.2f} ms")


if __name__ == "__main__":
    main()
