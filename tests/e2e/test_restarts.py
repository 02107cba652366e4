# SPDX-License-Identifier: Apache-2.0
"""Requests that a reset of the caches restarts: what was delivered stands, and the rest fits it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput

from tests.engines import (
    count_forwards,
    generate,
    pool_is_whole,
    running_engine,
    sampling,
    scheduler_of,
)
from tests.reference import write_checkpoint

SHAPE = {"d_model": 64, "layers": 2, "heads": 2, "mlp": 96, "vocab": 320}
PROMPT = [7, 11, 13, 17, 19, 23]
BLOCK = 8
TOKENS = 4 * BLOCK
FAMILIES = ("llada", "dream")


@pytest.fixture(scope="module", params=FAMILIES)
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two checkpoints of a family that differ in their weights only."""
    folder = tmp_path_factory.mktemp(request.param)
    return [write_checkpoint(folder / str(n), request.param, seed=n, **SHAPE) for n in range(2)]


@pytest.fixture(scope="module")
def engine(paths: list[Path]) -> Iterator[LLM]:
    with running_engine(str(paths[0])) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM, paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[LLM]:
    """The engine, which takes one step at a time."""
    monkeypatch.setattr("vllm_sparse_dllm.engine.scheduler._BURST_SECONDS", 0.0)
    yield engine
    assert pool_is_whole(engine)
    load(engine, paths[0])


def load(llm: LLM, path: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})


def params_of(**options: Any) -> SamplingParams:
    return sampling(TOKENS, diffusion_block_length=BLOCK, **options)


def reset(llm: LLM) -> None:
    assert llm.reset_prefix_cache(reset_running_requests=True)


def run_until(llm: LLM, params: SamplingParams, reached: Callable[[int], bool]) -> CompletionOutput:
    """Run a request until so many tokens are delivered, and return what the client has."""
    llm.llm_engine.add_request("r", {"prompt_token_ids": PROMPT}, params)
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if reached(len(output.outputs[0].token_ids)):
                assert not output.finished
                return copy.deepcopy(output.outputs[0])
    raise AssertionError("the request ended before")


def finish(llm: LLM) -> CompletionOutput:
    outputs = []
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    assert outputs[-1].finished
    return outputs[-1].outputs[0]


def inside_a_block(num_tokens: int) -> bool:
    return num_tokens > BLOCK and num_tokens % BLOCK > 1


def between_blocks(num_tokens: int) -> bool:
    return num_tokens > 0 and num_tokens % BLOCK == 0


OPTIONS: list[dict[str, Any]] = [
    {},
    {"diffusion_cache_policy": "none"},
    {"diffusion_cache_policy": "prefix", "diffusion_threshold": 0.3},
    {"diffusion_eviction_delay": 2, "diffusion_delay_steps": 0},
    {"diffusion_cache_policy": "dual", "diffusion_refresh_interval": 2},
    {"repetition_penalty": 1.5, "presence_penalty": 0.5},
]


@pytest.mark.parametrize("reached", [inside_a_block, between_blocks])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_new_weights_go_on_from_what_was_delivered(
    llm: LLM, paths: list[Path], options: dict[str, Any], reached: Callable[[int], bool]
) -> None:
    """The rest is what the new weights write after the delivered tokens, and nothing else."""
    delivered = list(run_until(llm, params_of(**options), reached).token_ids)
    reset(llm)
    load(llm, paths[1])
    tokens = list(finish(llm).token_ids)
    fixed = params_of(**options, diffusion_canvas=delivered)
    assert [tokens] == generate(llm, [PROMPT], [fixed])
    assert tokens[: len(delivered)] == delivered
    # What the new weights make of the prompt alone is another text.
    assert [tokens] != generate(llm, [PROMPT], [params_of(**options)])


def test_a_stop_token_of_the_new_weights_ends_the_response(llm: LLM, paths: list[Path]) -> None:
    delivered = list(run_until(llm, params_of(), inside_a_block).token_ids)
    reset(llm)
    load(llm, paths[1])
    tokens = list(finish(llm).token_ids)
    end = next(n for n in range(len(delivered), TOKENS) if tokens[n] not in tokens[:n])
    load(llm, paths[0])
    run_until(llm, params_of(stop_token_ids=[tokens[end]]), lambda n: n == len(delivered))
    reset(llm)
    load(llm, paths[1])
    output = finish(llm)
    assert output.finish_reason == "stop"
    assert list(output.token_ids) == tokens[: end + 1]


@pytest.mark.parametrize(
    "options",
    [
        *OPTIONS[1:4],
        {"diffusion_steps": TOKENS // 3},
        {"diffusion_cache_policy": "dual", "temperature": 1.0, "seed": 3},
        {"diffusion_alg_temp": 0.5, "seed": 4},
        {"diffusion_cache_policy": "none", "diffusion_remasking": "random", "seed": 5},
        {"diffusion_remasking": "origin", "diffusion_steps": 12, "seed": 6},
    ],
    ids=str,
)
def test_a_restart_between_blocks_changes_no_token(llm: LLM, options: dict[str, Any]) -> None:
    expected = generate(llm, [PROMPT], [params_of(**options)])
    run_until(llm, params_of(**options), between_blocks)
    reset(llm)
    assert [list(finish(llm).token_ids)] == expected


def test_a_pause_that_keeps_requests_restarts_them(llm: LLM) -> None:
    """As `AsyncLLM.pause_generation` and `sleep` do it."""
    expected = generate(llm, [PROMPT], [params_of()])
    run_until(llm, params_of(), between_blocks)
    core = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    core.pause_scheduler(mode="keep")
    assert not llm.llm_engine.step() and not scheduler_of(llm).running
    core.resume_scheduler()
    assert [list(finish(llm).token_ids)] == expected


def test_the_noise_of_what_was_delivered_is_not_used_again(llm: LLM) -> None:
    """As it would be if the restarted request were a new one with the same seed."""
    options = {"temperature": 2.0, "seed": 1, "diffusion_cache_policy": "none"}
    delivered = list(run_until(llm, params_of(**options), inside_a_block).token_ids)
    reset(llm)
    tokens = list(finish(llm).token_ids)
    assert tokens[: len(delivered)] == delivered
    anew = params_of(**options, diffusion_canvas=delivered)
    assert [tokens] != generate(llm, [PROMPT], [anew])


def test_delivered_blocks_are_not_run_again(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = count_forwards(llm, monkeypatch)
    dual = {"diffusion_cache_policy": "dual"}
    generate(llm, [PROMPT], [params_of(**dual)])
    undisturbed, sizes[:] = list(sizes), []
    run_until(llm, params_of(**dual), lambda n: n == 2 * BLOCK)
    reset(llm)
    finish(llm)
    assert sizes == undisturbed


def test_a_block_delivered_in_part_takes_its_part_of_the_steps(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"diffusion_cache_policy": "none", "diffusion_steps": TOKENS // 2}
    sizes = count_forwards(llm, monkeypatch)
    delivered = len(run_until(llm, params_of(**options), inside_a_block).token_ids)
    reset(llm)
    sizes.clear()
    finish(llm)
    assert len(sizes) == -(-(TOKENS - delivered) // 2)


def test_logprobs_and_trace_of_what_was_delivered_stand(
    llm: LLM, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"logprobs": 2, "diffusion_trace": 2}
    sizes = count_forwards(llm, monkeypatch)
    before = run_until(llm, params_of(**options), inside_a_block)
    num = len(before.token_ids)
    assert before.logprobs is not None
    reset(llm)
    load(llm, paths[1])
    after = finish(llm)
    assert after.logprobs is not None and len(after.logprobs) == len(after.token_ids) == TOKENS
    assert after.logprobs[:num] == before.logprobs
    assert all(token in entry for token, entry in zip(after.token_ids, after.logprobs, strict=True))
    old, new = before.diffusion_trace, after.diffusion_trace  # type: ignore[attr-defined]
    for name in ("steps", "confidences"):
        assert new[name][:num] == old[name]
        assert len(new[name]) == TOKENS
    # Passes are counted on, those of commits that were lost too.
    assert min(new["steps"][num:]) > max(old["steps"])
    assert new["nfe"] == max(new["steps"]) + 1 == len(sizes)
    steps = [change["step"] for change in new["refreshes"]]
    assert steps == sorted(set(steps))
    assert new["refreshes"][: len(old["refreshes"])] == old["refreshes"]
    # The block that was delivered in part is refreshed once more.
    blocks = [change["block"] for change in new["refreshes"]]
    assert len(blocks) == TOKENS // BLOCK + 1 and blocks[1] == blocks[2]


def test_restarts_in_quick_succession(llm: LLM) -> None:
    """Each goes on from what was delivered then; some before the request has run again."""
    tokens = list(run_until(llm, params_of(), inside_a_block).token_ids)
    for _ in range(5):
        reset(llm)
        reset(llm)
        for _ in range(3):
            for output in llm.llm_engine.step():
                assert list(output.outputs[0].token_ids)[: len(tokens)] == tokens
                tokens = list(output.outputs[0].token_ids)
    whole = list(finish(llm).token_ids)
    assert len(whole) == TOKENS and whole[: len(tokens)] == tokens


def test_an_aborted_request_leaves_nothing(llm: LLM) -> None:
    """Whether or not the runner has heard of its preemption."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    for hears in (False, True):
        run_until(llm, params_of(), inside_a_block)
        scheduler = scheduler_of(llm)
        reset(llm)
        if hears:  # as while requests are kept waiting
            seats, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, 0
            llm.llm_engine.step()
            scheduler.max_num_active_reqs = seats
            assert list(runner.preempted)
        llm.llm_engine.abort_request(["r"])
        generate(llm, [PROMPT], [params_of()])
        llm.llm_engine.step()
        assert not runner.requests and not runner.preempted
