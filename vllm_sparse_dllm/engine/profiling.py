# SPDX-License-Identifier: Apache-2.0
"""Runs of the costliest possible steps, before vLLM gives the remaining memory to the pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from vllm.sampling_params import SamplingParams

from vllm_sparse_dllm.cache.policies import POLICIES, StepKind
from vllm_sparse_dllm.cache.saliency import SALIENCIES
from vllm_sparse_dllm.denoise.plan import Candidates, plan_step
from vllm_sparse_dllm.denoise.rules import RULES
from vllm_sparse_dllm.denoise.step import denoise
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.batch import LogitsRows
from vllm_sparse_dllm.engine.requests import RequestState
from vllm_sparse_dllm.settings import REQUEST_PREFIX, request_settings

if TYPE_CHECKING:
    from vllm_sparse_dllm.engine.runner import DiffusionModelRunner

_NOTHING = np.zeros(0, dtype=np.int64)


def run_full_pass(runner: DiffusionModelRunner, num_tokens: int) -> None:
    """Run a full pass of about ``num_tokens`` tokens, and compute logits for its blocks."""
    states = _requests(runner, num_tokens, cache_policy="none")
    runner.run_step(states, [state.next_step() for state in states])


def profile_steps(runner: DiffusionModelRunner) -> None:
    """Run the steps that take the most memory, one after the other.

    They are: refreshes of as many tokens as a step may have, with every saliency, keeping
    everything; late evictions, which read a whole cache back, together with such refreshes; the
    same under guidance, with the engine's saliency; and sampling, in the costliest way, from as
    many logits as can exist at a time. Meanwhile as much memory is held as captured graphs will
    take.

    A pass of a single token comes first: `torch.compile` compiles separately for a single row,
    and no request should have to wait for that. The same goes for the kernels that follow the
    logits, for both dtypes.

    Only the first and the last layer run: those between take no more memory than the first, and a
    pass of 131,072 tokens through all of them would take a fast GPU an estimated quarter of a
    minute.
    """
    run_full_pass(runner, 1)
    _prepare_confidences(runner)
    budget = runner.vllm_config.scheduler_config.max_num_batched_tokens
    graphs = torch.empty(graph_bytes(runner), dtype=torch.uint8, device=runner.device)
    with _one_page(runner), _two_layers(runner):
        for saliency in SALIENCIES:
            _refresh_and_evict(runner, budget, saliency, cfg_scale=0.0)
        if runner.traits.supports_guidance:
            own = runner.engine_settings.decoding.saliency
            _refresh_and_evict(runner, budget, own, cfg_scale=1.0)
    _sample(runner)
    del graphs


def graph_bytes(runner: DiffusionModelRunner) -> int:
    """Estimate the bytes that captured graphs take: all that is alive at a time in the largest.

    Graphs share their memory, so the others need no more. What the driver takes for the graphs
    themselves is not included.
    """
    sizes = runner.graph_sizes
    if not sizes:
        return 0
    num_tokens = sizes[-1] * runner.engine_settings.decoding.block_length
    shape, heads = runner.model.shape, runner.attention_shape
    qk = (heads.num_heads + heads.num_kv_heads) * heads.head_size
    v = heads.num_kv_heads * heads.head_size
    tensor_parallel_size = runner.vllm_config.parallel_config.tensor_parallel_size
    # Residual stream, its norm, a layer's result and the output; queries, keys and values, and
    # the attention's result; gate, up and their product.
    numbers = 4 * shape.hidden_size + 2 * (qk + v)
    numbers += 3 * shape.intermediate_size // tensor_parallel_size
    # Queries and keys are rotated in float32: copies before and after.
    return num_tokens * (numbers * runner.dtype.itemsize + 2 * 4 * qk)


@contextmanager
def _one_page(runner: DiffusionModelRunner) -> Iterator[None]:
    """Bind a single page for all layers and requests, as the pool is not allocated yet."""
    shape = runner.attention_shape
    numbers = 2 * runner.cache_config.block_size * shape.num_kv_heads * shape.head_size
    page = torch.zeros(numbers * runner.dtype.itemsize, dtype=torch.int8, device=runner.device)
    runner.backend.bind_pages([page] * runner.num_layers)
    try:
        yield
    finally:
        runner.backend.bind_pages(runner.kv_caches)


@contextmanager
def _two_layers(runner: DiffusionModelRunner) -> Iterator[None]:
    """Run only the first and last layer, except in quantised models, whose layers may differ."""
    model, layers = runner.model, runner.model.layers
    if runner.vllm_config.quant_config is None:
        model.layers = nn.ModuleList([layers[0], *layers[1:][-1:]])
    try:
        yield
    finally:
        model.layers = layers


def _prepare_confidences(runner: DiffusionModelRunner) -> None:
    """Launch the device's own kernels for confidences on each dtype that logits can have."""
    if runner.greedy is None:
        return
    size, device = runner.model.shape.hidden_size, runner.device
    hidden = torch.zeros(2, size, dtype=runner.dtype, device=device)
    own = runner._head(hidden, torch.arange(2, device=device))
    for logits in (own, own.float()):
        distribution = runner.greedy(logits, runner.traits.mask_token_id)
        for rule in RULES.values():
            if rule.confidence is not None:
                rule.confidence(distribution)


def _refresh_and_evict(
    runner: DiffusionModelRunner, budget: int, saliency: str, cfg_scale: float
) -> None:
    refreshed = partial(
        _requests,
        runner,
        cache_policy="sparse",
        saliency=saliency,
        cfg_scale=cfg_scale,
        keep_ratio=1.0,
        delay_steps=0,
        suffix_window=None,
    )
    states = refreshed(budget, eviction_delay=0)
    runner.run_step(states, [state.next_step() for state in states])

    # The longest cache is evicted while others are refreshed.
    evicted = refreshed(budget, eviction_delay=1)[0]
    runner.run_step([evicted], [evicted.next_step()])
    evicted.commit(_NOTHING, _NOTHING, None)
    for sequence in evicted.sequences:
        # Layers that did not run count as holding what the first holds.
        sequence.num_kept[:] = sequence.num_kept[0]
    step = evicted.next_step()
    assert step.kind is StepKind.EVICT
    num_tokens = len(evicted.sequences) * (step.queries[1] - step.queries[0])
    states = [evicted, *refreshed(budget - num_tokens, eviction_delay=0)]
    runner.run_step(states, [state.next_step() for state in states])


def _requests(
    runner: DiffusionModelRunner, num_tokens: int, **options: object
) -> list[RequestState]:
    """Return requests whose full passes have ``num_tokens`` tokens, the longest first.

    All their pages are the same one.
    """
    settings = request_settings(
        runner.engine_settings,
        runner.traits,
        {f"{REQUEST_PREFIX}{name}": value for name, value in options.items()},
    )
    page_size = runner.cache_config.block_size
    policy = POLICIES[settings.cache_policy]
    states = []
    left = max(1, num_tokens // settings.num_sequences)
    while left > 0:
        length = min(runner.model_config.max_model_len, left)
        left -= length
        response = min(settings.block_length, length)
        canvas = Canvas(length - response, response, settings.block_length)
        states.append(
            RequestState(
                [0] * (length - response),
                settings,
                SamplingParams(max_tokens=response, temperature=0.0),
                runner.traits,
                [0] * policy.peak_pages(canvas, settings, page_size),
                page_size,
                runner.num_layers,
                torch.Generator(runner.device),
            )
        )
    return states


def _sample(runner: DiffusionModelRunner) -> None:
    """Sample from as many logits as can exist at a time, in the costliest way."""
    rows = runner.max_logits_rows
    device = runner.device
    hidden = torch.zeros(rows, runner.model.shape.hidden_size, dtype=runner.dtype, device=device)
    every = torch.arange(rows, device=device)
    num_guided = rows if runner.traits.supports_guidance else 0
    of = LogitsRows(
        rows=torch.cat([every, every[:num_guided]]),
        num=rows,
        guided_candidates=np.arange(num_guided),
        guided=every[:num_guided],
        guidance=torch.ones(num_guided, device=device),
    )
    drawn = Candidates(
        num=rows,
        count=rows,
        rule=RULES["entropy"],
        commit_probability=1.0,
        threshold=None,
        factor=None,
        temperature=1.0,
        top_p=0.9,
        top_k=1,
        alg_temp=0.0,
        generator=torch.Generator(device),
        num_logprobs=runner.model_config.max_logprobs,
    )
    kinds = [drawn]
    if runner.greedy is not None:
        # Also at temperature 0, so that the kernels for it are compiled now.
        kinds.append(replace(drawn, temperature=0.0))
    for kind in kinds:
        runner.arrays.begin()
        plan = plan_step([kind], rows, runner.arrays, runner.greedy is not None)
        runner.arrays.send()
        denoise(
            partial(runner.logits_of, hidden, of),
            plan,
            runner.traits.mask_token_id,
            runner.traits.sampler,
            runner.arrays,
            runner.greedy,
        )
