# SPDX-License-Identifier: Apache-2.0
"""Engines for tests: vLLM's `LLM` in this process, one at a time, on small checkpoints."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# In one process, so that tests can look into the engine. Must be set before vLLM is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.platforms import current_platform

from vllm_sparse_dllm.engine.scheduler import DiffusionScheduler

CACHE_BYTES = 64 << 20


def _make_starts_cheap() -> None:
    """Take out of a start what its process needs once, or only if it lives for long.

    A start and an end collect garbage eight times, and each time look through the two million
    objects that importing vLLM leaves behind: five of the seven seconds that an engine with a
    small model takes. These objects are frozen here; vLLM's own freezing and thawing, which is
    for an engine that serves, would undo that.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    # Of kernels in all modules: once in a process is enough.
    register = cache(current_platform.register_triton_kernel_overrides)
    current_platform.register_triton_kernel_overrides = register


_make_starts_cheap()


@contextmanager
def running_engine(model: str, **options: Any) -> Iterator[LLM]:
    """Start an engine on a checkpoint, in float32 unless told otherwise."""
    defaults = {
        "dtype": "float32",
        "kv_cache_memory_bytes": CACHE_BYTES,
        "max_model_len": 512,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 16,
        "disable_log_stats": True,
        "skip_tokenizer_init": True,
    }
    llm = LLM(model, **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def scheduler_of(llm: LLM) -> DiffusionScheduler:
    """Return the scheduler of an engine in this process."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert isinstance(scheduler, DiffusionScheduler)
    return scheduler


def pool_is_whole(llm: LLM) -> bool:
    """Return whether nobody holds a page or is known any more to an engine in this process."""
    scheduler = scheduler_of(llm)
    manager = scheduler.block_manager
    return (
        manager.block_pool.get_num_free_blocks() == manager.num_pages
        and not manager.req_to_blocks
        and not scheduler.tracked
        and not scheduler.requests
        and not scheduler.deferred_waiting
        and scheduler.get_kv_cache_usage() == 0.0
    )


def count_forwards(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of tokens of each forward pass."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    original = runner.model.forward
    sizes: list[int] = []

    def forward(input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        return original(input_ids, *args, **kwargs)

    monkeypatch.setattr(runner.model, "forward", forward)
    return sizes


def sampling(max_tokens: int, **options: Any) -> SamplingParams:
    """Return greedy parameters; names with the prefix ``diffusion_`` go to ``extra_args``."""
    extra = {k: v for k, v in options.items() if k.startswith("diffusion_")}
    rest = {k: v for k, v in options.items() if k not in extra}
    defaults = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
    return SamplingParams(max_tokens=max_tokens, extra_args=extra or None, **{**defaults, **rest})


def generate(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """Return the response ids of all prompts, run together."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]
