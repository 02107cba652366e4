# SPDX-License-Identifier: Apache-2.0
"""Batches: a request's tokens do not depend on what else runs, or when; all pages are freed."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm import LLM

from tests.e2e.cases import Case, beyond_cases, drawn_cases, greedy_cases, run_staggered
from tests.engines import (
    count_forwards,
    generate,
    pool_is_whole,
    running_engine,
    sampling,
    scheduler_of,
)
from tests.reference import write_checkpoint
from vllm_sparse_dllm.attention.cpu import CPUBackend

VOCAB = 320


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("checkpoints")
    return {
        model: str(write_checkpoint(folder / model, model, d_model=128, layers=3, vocab=VOCAB))
        for model in ("llada", "dream")
    }


@pytest.fixture(scope="module")
def llada(checkpoints: dict[str, str]) -> Iterator[LLM]:
    with running_engine(checkpoints["llada"]) as llm:
        yield llm


def _mixed_cases(model: str) -> list[Case]:
    guided = model == "llada"
    rng = random.Random(5)
    cases = rng.sample(greedy_cases(21, VOCAB) + drawn_cases(22, VOCAB, guided), 10)
    cases += rng.sample(beyond_cases(23, VOCAB, guided), 6)
    rng.shuffle(cases)
    return cases


@pytest.mark.parametrize("model", ["llada", "dream"])
def test_tokens_do_not_depend_on_the_batch(checkpoints: dict[str, str], model: str) -> None:
    cases = _mixed_cases(model)
    prompts = [case.prompt for case in cases]
    params = [case.sampling() for case in cases]
    with running_engine(checkpoints[model], max_num_seqs=1) as llm:
        alone = generate(llm, prompts, params)
    with running_engine(checkpoints[model]) as llm:
        together = generate(llm, prompts, params)
        single = [generate(llm, [p], [s])[0] for p, s in zip(prompts[:4], params[:4], strict=True)]
        staggered = run_staggered(llm, cases, random.Random(3))
        assert pool_is_whole(llm)
    # A token budget that holds only a few full forwards.
    with running_engine(checkpoints[model], max_num_batched_tokens=640) as llm:
        crowded = generate(llm, prompts, params)
    assert together == alone
    assert single == alone[:4]
    assert staggered == alone
    assert crowded == alone


def test_pages_of_a_sparse_request(llada: LLM) -> None:
    """From its first step to its last, a request holds exactly the pages that its policy keeps."""
    engine, scheduler = llada.llm_engine, scheduler_of(llada)
    page = scheduler.block_manager.block_size
    for prompt_length, max_tokens, block, ratio in (
        (200, 32, 32, 0.5),
        (100, 64, 16, 0.3),
        (301, 33, 32, 0.9),
        (10, 5, 32, 1.0),
        (64, 40, 8, 0.01),
    ):
        params = sampling(max_tokens, diffusion_block_length=block, diffusion_keep_ratio=ratio)
        engine.add_request("r", {"prompt_token_ids": [3] * prompt_length}, params)
        length, longest = prompt_length + max_tokens, min(block, max_tokens)
        expected = math.ceil((int((length - longest) * ratio) + longest) / page)
        seen = set()
        while engine.has_unfinished_requests():
            held = [scheduler.block_manager.held_pages(name) for name in scheduler.requests]
            if scheduler.running:
                seen.update(held)
                usage = expected / scheduler.block_manager.num_pages
                assert scheduler.get_kv_cache_usage() == pytest.approx(usage)
            engine.step()
        assert seen == {expected}
        assert pool_is_whole(llada)


def test_pages_of_a_late_eviction(llada: LLM) -> None:
    """In each block, a request holds all pages from refresh to eviction, otherwise only a few."""
    engine, scheduler = llada.llm_engine, scheduler_of(llada)
    params = sampling(
        48, diffusion_block_length=24, diffusion_eviction_delay=4, diffusion_keep_ratio=0.25
    )
    engine.add_request("r", {"prompt_token_ids": [3] * 150}, params)
    held = []
    while engine.has_unfinished_requests():
        engine.step()
        held += [scheduler.block_manager.held_pages(name) for name in scheduler.requests]
    few, all_pages = math.ceil((int(174 * 0.25) + 24) / 32), math.ceil(198 / 32)
    changes = [a for a, b in zip(held, [*held[1:], None], strict=True) if a != b]
    assert changes == [few, all_pages, few, all_pages, few]
    assert pool_is_whole(llada)


def test_policy_none_holds_no_page(llada: LLM) -> None:
    engine, scheduler = llada.llm_engine, scheduler_of(llada)
    params = sampling(16, diffusion_cache_policy="none")
    engine.add_request("r", {"prompt_token_ids": [3] * 50}, params)
    while engine.has_unfinished_requests():
        engine.step()
        assert scheduler.get_kv_cache_usage() == 0.0


def test_abort_returns_pages(llada: LLM) -> None:
    """A request can be aborted at any stage, even while it waits; the others finish unharmed."""
    engine = llada.llm_engine
    cases = _mixed_cases("llada")
    alone = generate(llada, [c.prompt for c in cases], [c.sampling() for c in cases])
    rng = random.Random(9)
    for step_of_abort in (0, 1, 2, 5, 9):
        doomed = set(rng.sample(range(len(cases)), 5))
        internal: dict[int, str] = {}
        for number, case in enumerate(cases):
            internal[number] = engine.add_request(
                str(number), {"prompt_token_ids": case.prompt}, case.sampling()
            )
        results: dict[str, list[int]] = {}
        step = 0
        while engine.has_unfinished_requests():
            if step == step_of_abort:
                engine.abort_request([str(number) for number in doomed])
            for output in engine.step():
                if output.finished:
                    results[output.request_id] = list(output.outputs[0].token_ids)
            step += 1
        for number in set(range(len(cases))) - doomed:
            assert results[str(number)] == alone[number]
        engine.step()
        assert pool_is_whole(llada)


def test_no_kv_beyond_one_layer(llada: LLM) -> None:
    """Outside the pool, at most one layer's keys and values are stored; the pool is vLLM's."""
    runner = llada.llm_engine.model_executor.driver_worker.worker.model_runner
    pool = runner.kv_caches
    generate(llada, [[3] * 400], [sampling(32)])
    backend = runner.backend
    shape = backend.shape
    if isinstance(backend, CPUBackend):  # others have no scratch
        # At most the batch's tokens, rounded up to pages for each of its sequences.
        budget = llada.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        assert backend._scratch[0].shape[0] <= math.ceil(budget / backend.page_size) + 16
    layer_bytes = pool[0].numel()
    page_bytes = 2 * backend.page_size * shape.num_kv_heads * shape.head_size * 4
    assert layer_bytes == (scheduler_of(llada).block_manager.num_pages + 1) * page_bytes


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_bursts_change_no_token(
    llada: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Tokens do not depend on how many block steps the runner takes by itself."""
    cases = [case for case in _mixed_cases("llada") if case.options["cache_policy"] != "none"][:6]
    prompts, params = [c.prompt for c in cases], [c.sampling() for c in cases]
    expected = generate(llada, prompts, params)
    monkeypatch.setattr("vllm_sparse_dllm.engine.scheduler._BURST_SECONDS", seconds)
    assert generate(llada, prompts, params) == expected
    assert run_staggered(llada, cases, random.Random(1)) == expected


def test_a_burst_ends_with_its_block(llada: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is two full passes, then all its block steps in one engine step."""
    monkeypatch.setattr("vllm_sparse_dllm.engine.scheduler._BURST_SECONDS", 1e9)
    sizes = count_forwards(llada, monkeypatch)
    engine = llada.llm_engine
    engine.add_request("r", {"prompt_token_ids": [3] * 40}, sampling(64))
    forwards_of_steps = []
    while engine.has_unfinished_requests():
        before = len(sizes)
        engine.step()
        forwards_of_steps.append(len(sizes) - before)
    assert [n for n in forwards_of_steps if n] == [1, 1, 30, 1, 1, 30]


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_blocks_behind_the_end_are_not_computed(
    llada: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A request ends at the block in which a stop token becomes final, even within a burst."""
    monkeypatch.setattr("vllm_sparse_dllm.engine.scheduler._BURST_SECONDS", seconds)
    prompt = list(range(60))
    whole = generate(llada, [prompt], [sampling(64, diffusion_block_length=8)])[0]
    sizes = count_forwards(llada, monkeypatch)
    generate(llada, [prompt], [sampling(64, diffusion_block_length=8)])
    per_block = len(sizes) // 8
    for stop in (whole[3], whole[20]):
        place = whole.index(stop)
        sizes.clear()
        params = sampling(64, diffusion_block_length=8, stop_token_ids=[stop])
        assert generate(llada, [prompt], [params])[0] == whole[: place + 1]
        assert place // 8 * per_block < len(sizes) <= (place // 8 + 1) * per_block


@pytest.mark.parametrize("token_id", [-1, VOCAB, 10**12])
def test_ids_outside_the_vocabulary_are_refused(llada: LLM, token_id: int) -> None:
    with pytest.raises(ValueError, match=f"prompt_token_ids must be from 0 to .*got {token_id}"):
        generate(llada, [[3, token_id, 5]], [sampling(4)])
    assert pool_is_whole(llada)


@pytest.mark.parametrize("kernel_size", [2**63 + 1, 65537, 2])
def test_kernel_size_is_bounded(llada: LLM, kernel_size: int) -> None:
    with pytest.raises(ValueError, match="kernel_size"):
        generate(llada, [[3, 4, 5]], [sampling(4, diffusion_kernel_size=kernel_size)])


def test_few_logits_at_a_time_change_no_token(llada: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = _mixed_cases("llada")
    prompts, params = [c.prompt for c in cases], [c.sampling() for c in cases]
    expected = generate(llada, prompts, params)
    monkeypatch.setattr("vllm_sparse_dllm.engine.runner._MAX_LOGITS", 5 * VOCAB)
    assert generate(llada, prompts, params) == expected


# Last: it starts engines of its own, which ends the one that the tests above share.
def test_pool_too_small_for_all(checkpoints: dict[str, str]) -> None:
    """Requests wait until they fit, and get the same tokens; those that never fit are refused."""
    cases = [
        Case([5 + i] * 200, 32, {"cache_policy": policy})
        for i, policy in enumerate(("sparse", "dual", "sparse", "prefix", "none", "dual"))
    ]
    # Two pages each, but eight from refresh to eviction, for one request at a time.
    late = {"cache_policy": "sparse", "eviction_delay": 3, "keep_ratio": 0.1, "block_length": 16}
    cases += [Case([15 + i] * 200, 32, {**late, "refresh_interval": 1 + i % 2}) for i in range(4)]
    prompts, params = [c.prompt for c in cases], [c.sampling() for c in cases]
    with running_engine(checkpoints["llada"]) as llm:
        expected = generate(llm, prompts, params)
    # 10 pages: one dual request (8 pages) or two sparse ones (5 pages each).
    page_bytes = 2 * 32 * 128 * 4 * 3
    with running_engine(
        checkpoints["llada"], kv_cache_memory_bytes=11 * page_bytes, max_model_len=256
    ) as llm:
        assert scheduler_of(llm).block_manager.num_pages == 10
        assert generate(llm, prompts, params) == expected
        assert pool_is_whole(llm)
        for own in (
            {"diffusion_cache_policy": "dual"},
            {"diffusion_eviction_delay": 1, "diffusion_keep_ratio": 0.1},
        ):
            with pytest.raises(ValueError, match=r"needs 16 cache pages .* the pool has 10"):
                generate(llm, [[7] * 200], [sampling(32, diffusion_cfg_scale=1.0, **own)])
        assert pool_is_whole(llm)


def test_a_request_that_a_smaller_pool_never_holds(checkpoints: dict[str, str]) -> None:
    """A request that was admitted for a larger pool than the engine has fails alone."""
    with running_engine(checkpoints["llada"], kv_cache_memory_bytes=1 << 20) as llm:
        manager = scheduler_of(llm).block_manager
        llm.llm_engine.vllm_config.cache_config.num_gpu_blocks = 1000
        prompts = [[7] * 40, [9] * 400, [8] * 40]
        params = [sampling(32, diffusion_cache_policy="dual") for _ in prompts]
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        completions = [output.outputs[0] for output in outputs]
        assert [one.finish_reason for one in completions] == ["length", "error", "length"]
        assert re.fullmatch(
            rf"max_tokens=32 .* but the pool of this engine has {manager.num_pages}",
            str(completions[1].stop_reason),
        )
        assert pool_is_whole(llm)
