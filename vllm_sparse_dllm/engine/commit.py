# SPDX-License-Identifier: Apache-2.0
"""What becomes of a step: commits on the canvases, and the runner's answer to the scheduler."""

from __future__ import annotations

import numpy as np

from vllm_sparse_dllm.cache.policies import StepKind
from vllm_sparse_dllm.denoise.step import Commits
from vllm_sparse_dllm.engine.figures import StepCounts
from vllm_sparse_dllm.engine.logprobs import Entry, logprobs_lists
from vllm_sparse_dllm.engine.output import DiffusionRunnerOutput
from vllm_sparse_dllm.engine.requests import NextStep, RequestState


def output_of(names: list[str]) -> DiffusionRunnerOutput:
    """Return the empty output of a step of the named requests."""
    return DiffusionRunnerOutput(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[[] for _ in names],
    )


def commit_step(
    states: list[RequestState],
    steps: list[NextStep],
    commits: Commits | None,
    output: DiffusionRunnerOutput,
    vocab_size: int,
) -> None:
    """Write a step's commits to the canvases, and what failed and was run to ``output``."""
    counts = output.counts
    nothing = np.zeros(0, dtype=np.int64)
    row = active = 0
    for state, step in zip(states, steps, strict=True):
        num, block_index = len(step.candidates), state.block_index
        _count_step(state, step, counts)
        changes = step.kind in (StepKind.REFRESH, StepKind.EVICT, StepKind.APPEND)
        if state.trace is not None and state.trace.with_kept and changes:
            kept = state.sequences[0].kept_positions
            state.trace.record_cache(step.kind.value, step.block, kept)
        if commits is None or num == 0:
            if state.trace is not None:
                state.trace.record_pass(nothing, nothing)
            state.commit(nothing, nothing, None)
        else:
            if commits.failed[active]:
                failure = state.failure(vocab_size)
                output.failed[state.request_id] = failure
            else:
                committed = commits.committed[row : row + num]
                positions = step.candidates[committed]
                if state.trace is not None:
                    assert commits.confidences is not None
                    state.trace.record_pass(
                        positions - state.canvas.prompt_length,
                        commits.confidences[row : row + num][committed],
                    )
                state.commit(
                    positions,
                    commits.tokens[row : row + num][committed],
                    commits.logprobs[active],
                )
                counts.committed += len(positions)
            row += num
            active += 1
        if state.block_index > block_index:
            counts.blocks += 1
            counts.finished_positions += step.block[1] - step.block[0]


def report(states: list[RequestState], output: DiffusionRunnerOutput) -> None:
    """Report to the scheduler the tokens that became final and each request's progress."""
    logprobs: list[list[Entry]] = []
    for index, (request_id, state) in enumerate(zip(output.req_ids, states, strict=True)):
        output.sampled_token_ids[index], own = state.take_final()
        logprobs.append(own)
        output.progress[request_id] = state.progress
        if state.trace is not None and output.sampled_token_ids[index]:
            num_new = len(output.sampled_token_ids[index])
            output.traces[request_id] = state.trace.take(num_new)
    if any(logprobs):
        output.logprobs = logprobs_lists(logprobs)


def _count_step(state: RequestState, step: NextStep, counts: StepCounts) -> None:
    counts.full_passes += step.kind.runs_all
    counts.refreshes += step.kind is StepKind.REFRESH
    counts.block_steps += not step.kind.runs_all
    counts.positions += step.block[1] - step.block[0]
    if step.kind is state.policy.choice(state.settings):
        spans = state.policy.candidates(state.canvas, step.block, state.settings)
        num_candidates = sum(end - start for start, end in spans)
        for sequence in state.sequences:
            # With granularity `page`, a layer that keeps the short last run has fewer positions.
            num_kept = int(sequence.num_kept.max())
            counts.kept += num_kept
            counts.evicted += num_candidates - num_kept
