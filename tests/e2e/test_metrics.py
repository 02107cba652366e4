# SPDX-License-Identifier: Apache-2.0
"""Metrics of an engine in this process equal values worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY
from vllm import LLM

from tests.engines import running_engine, sampling, scheduler_of
from vllm_sparse_dllm.assets import embedded_model
from vllm_sparse_dllm.frontend import metrics
from vllm_sparse_dllm.frontend.metrics import METRICS

PREFIX = "vllm:diffusion_"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with running_engine(embedded_model(), disable_log_stats=False, max_num_seqs=2) as engine:
        yield engine


def read() -> dict[str, float]:
    """Return the values of all series, by name, or by ``name/cause`` if they have a cause."""
    values = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith(PREFIX) and not sample.name.endswith("_created"):
                name = sample.name.removeprefix(PREFIX).removesuffix("_total")
                cause = sample.labels.get("cause")
                values[f"{name}/{cause}" if cause else name] = sample.value
    return values


@pytest.fixture
def grown() -> Callable[[], dict[str, float]]:
    """Return a function that returns the changes of all series that changed in this test."""
    before = read()
    return lambda: {k: v - before[k] for k, v in read().items() if v != before[k]}


def run(llm: LLM, prompt_length: int, *options: dict[str, Any]) -> None:
    params = [sampling(own.pop("max_tokens"), **own) for own in map(dict, options)]
    prompts = [{"prompt_token_ids": [77] * prompt_length}] * len(params)
    llm.generate(prompts, params, use_tqdm=False)


def test_all_metrics_are_there_from_the_start(llm: LLM) -> None:
    names = {
        f"{metric.name.removeprefix(PREFIX)}/{cause}" if cause else metric.name[len(PREFIX) :]
        for metric in METRICS
        for cause in metric.causes or ("",)
    }
    assert read().keys() == names
    assert read()["pages"] == scheduler_of(llm).block_manager.num_pages


# For each case: options of the request, and by how much the metrics grow. Prompts have 20 tokens,
# and blocks 4 positions.
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    # Two blocks; each has a full pass, a refresh and two block steps, which commit a token each. A
    # refresh keeps half of the 24 positions outside the block.
    "sparse": (
        {"max_tokens": 8, "diffusion_cache_policy": "sparse"},
        {"full_passes": 4, "refreshes": 2, "block_steps": 4, "kept_positions": 24}
        | {"evicted_positions": 24, "finished_blocks": 2, "num_denoising_steps": 8 + 2}
        | {"num_canvas_positions": (8 + 2) * 4, "num_committed_tokens": 8},
    ),
    # Runs of a page, 32 positions, are kept whole: the 24 positions are a single run.
    "page": (
        {
            "max_tokens": 8,
            "diffusion_cache_policy": "sparse",
            "diffusion_granularity": "page",
            "diffusion_delay_steps": 0,
        },
        {"full_passes": 2, "refreshes": 2, "block_steps": 6, "kept_positions": 48}
        | {"finished_blocks": 2, "num_denoising_steps": 8 + 2}
        | {"num_canvas_positions": (8 + 2) * 4, "num_committed_tokens": 8},
    ),
    # Refreshes keep all positions before the block; those after it are no candidates.
    "prefix": (
        {"max_tokens": 8, "diffusion_cache_policy": "prefix"},
        {"full_passes": 2, "refreshes": 2, "block_steps": 6, "kept_positions": 20 + 24}
        | {"finished_blocks": 2, "num_denoising_steps": 8 + 2}
        | {"num_canvas_positions": (8 + 2) * 4, "num_committed_tokens": 8},
    ),
    # Blocks of 4 and 2, with 2 steps and 1 step, which commit 2 tokens each.
    "none": (
        {"max_tokens": 6, "diffusion_cache_policy": "none", "diffusion_steps": 3},
        {"full_passes": 3, "finished_blocks": 2, "num_denoising_steps": 3 + 2}
        | {"num_canvas_positions": 4 + 4 + 2 + 4 + 2, "num_committed_tokens": 6},
    ),
    # Two sequences, each with its own cache, share their denoising steps.
    "guided": (
        {"max_tokens": 4, "diffusion_cache_policy": "dual", "diffusion_cfg_scale": 1.0},
        {"full_passes": 1, "refreshes": 1, "block_steps": 3, "kept_positions": 2 * 20}
        | {"finished_blocks": 1, "num_denoising_steps": 4 + 1}
        | {"num_canvas_positions": (4 + 1) * 4, "num_committed_tokens": 4},
    ),
    # The refresh keeps all 24 other positions; the second block step chooses 6 of them.
    "late eviction": (
        {
            "max_tokens": 8,
            "diffusion_cache_policy": "sparse",
            "diffusion_delay_steps": 0,
            "diffusion_eviction_delay": 2,
            "diffusion_keep_ratio": 0.25,
        },
        {"full_passes": 2, "refreshes": 2, "block_steps": 6, "kept_positions": 2 * 6}
        | {"evicted_positions": 2 * 18, "finished_blocks": 2, "num_denoising_steps": 8 + 2}
        | {"num_canvas_positions": (8 + 2) * 4, "num_committed_tokens": 8},
    ),
    # The blocks end before the eviction: all positions stay, and none are counted.
    "too late eviction": (
        {
            "max_tokens": 8,
            "diffusion_cache_policy": "sparse",
            "diffusion_delay_steps": 0,
            "diffusion_eviction_delay": 4,
        },
        {"full_passes": 2, "refreshes": 2, "block_steps": 6, "finished_blocks": 2}
        | {"num_denoising_steps": 8 + 2, "num_canvas_positions": (8 + 2) * 4}
        | {"num_committed_tokens": 8},
    ),
    # The second of three blocks continues with the first one's cache; appending keys to it counts
    # neither as a refresh nor as an eviction.
    "refresh interval": (
        {
            "max_tokens": 12,
            "diffusion_cache_policy": "dual",
            "diffusion_refresh_interval": 2,
        },
        {"full_passes": 2, "refreshes": 2, "block_steps": 10, "kept_positions": 2 * 28}
        | {"finished_blocks": 3, "num_denoising_steps": 12 + 3}
        | {"num_canvas_positions": (12 + 3) * 4, "num_committed_tokens": 12},
    ),
    # The first block does not see the second, so half of 20 is kept, then half of 24.
    "suffix window": (
        {"max_tokens": 8, "diffusion_cache_policy": "sparse", "diffusion_suffix_window": 0},
        {"full_passes": 4, "refreshes": 2, "block_steps": 4, "kept_positions": 10 + 12}
        | {"evicted_positions": 10 + 12, "finished_blocks": 2, "num_denoising_steps": 8 + 2}
        | {"num_canvas_positions": (8 + 2) * 4, "num_committed_tokens": 8},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_request(llm: LLM, grown: Callable[[], dict[str, float]], name: str) -> None:
    options, expected = CASES[name]
    run(llm, 20, {"diffusion_block_length": 4, **options})
    assert grown() == expected


def test_requests_add_up(llm: LLM, grown: Callable[[], dict[str, float]]) -> None:
    """Requests at once, of which at most two run, count as the sum of what each counts alone."""
    run(llm, 20, *({"diffusion_block_length": 4, **options} for options, _ in CASES.values()))
    found = grown()
    assert found.pop("queued_request_steps/max_num_seqs") > 0
    names = set().union(*(expected for _, expected in CASES.values()))
    assert found == {
        name: sum(expected.get(name, 0) for _, expected in CASES.values()) for name in names
    }


def test_a_refused_request(llm: LLM, grown: Callable[[], dict[str, float]]) -> None:
    with pytest.raises(ValueError, match="diffusion_steps"):
        run(llm, 20, {"max_tokens": 4, "diffusion_steps": 0})
    assert grown() == {"request_failures/refused": 1}


def test_pages_held(llm: LLM) -> None:
    """All of the 20 + 44 positions, those of the block included, take two pages."""
    engine = llm.llm_engine
    params = sampling(44, diffusion_cache_policy="dual", diffusion_block_length=4)
    engine.add_request("r", {"prompt_token_ids": [77] * 20}, params)
    engine.step()
    assert read()["pages_held"] == 2
    while engine.has_unfinished_requests():
        engine.step()
    assert read()["pages_held"] == 0


def test_the_log_line(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = llm.llm_engine.logger_manager
    assert manager is not None
    lines: list[str] = []
    # vLLM's own logging, every ten seconds, must not interfere.
    monkeypatch.setattr(llm.llm_engine, "do_log_stats_with_interval", lambda: None)
    manager.log()
    monkeypatch.setattr(metrics.logger, "info", lambda text, *args: lines.append(text % args))
    run(llm, 20, {"max_tokens": 8, "diffusion_block_length": 4})
    manager.log()
    manager.log()  # nothing has happened since, so there is no line
    assert lines == [
        "Engine 000: Diffusion: 1.00 tokens committed a step, block steps: 4, full passes: 4 "
        "(refreshes: 2), pages held: 0 of 255"
    ]


def test_logits_that_are_not_finite(
    llm: LLM, grown: Callable[[], dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    core: Any = llm.llm_engine.engine_core
    model = core.engine_core.model_executor.driver_worker.worker.model_runner.model
    spoilt = lambda hidden: torch.full((len(hidden), model.shape.vocab_size), torch.nan)  # noqa: E731
    monkeypatch.setattr(model, "compute_logits", spoilt)
    run(llm, 20, {"max_tokens": 4, "diffusion_cache_policy": "none"})
    assert grown() == {
        "request_failures/logits": 1,
        "full_passes": 1,
        "num_denoising_steps": 1,
        "num_canvas_positions": 4,
    }
