# SPDX-License-Identifier: Apache-2.0
"""The runner's state of a request: canvas, step counters, pages, and what it runs next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from vllm.sampling_params import SamplingParams

from vllm_sparse_dllm.cache.policies import POLICIES, CachePolicy, Span, StepKind
from vllm_sparse_dllm.denoise.rules import PROBABILITY_RULE, RULES, UnmaskingRule
from vllm_sparse_dllm.denoise.step import Candidates, Logprobs
from vllm_sparse_dllm.denoise.timetable import Canvas, commit_fractions, share_steps
from vllm_sparse_dllm.denoise.traits import ModelTraits
from vllm_sparse_dllm.engine.trace import CommitTrace
from vllm_sparse_dllm.settings import DecodingSettings


class Sequence:
    """One canvas and its pages. A request has one, under guidance two.

    Attributes:
        token_ids: ``[L]`` ids; the response starts as mask ids.
        page_ids: ``[pages]`` of the pool.
        slots: ``[pages * page_size]`` slots of the pages, in order.
        num_kept: ``[layers]`` kept entries; they follow the own fresh keys' slots.
    """

    def __init__(
        self, token_ids: np.ndarray, page_ids: np.ndarray, page_size: int, num_layers: int
    ) -> None:
        self.token_ids = token_ids
        self.page_ids = page_ids
        self.slots = (page_ids[:, None] * page_size + np.arange(page_size)).reshape(-1)
        self.num_kept = np.zeros(num_layers, dtype=np.int64)


@dataclass(frozen=True)
class NextStep:
    """What a request runs in its next step.

    Attributes:
        kind: Full, refresh or cached.
        block: Positions [start, end) of the current block.
        queries: Positions that are run.
        candidates: ``[n]`` masked positions that may be committed, ascending; may be empty.
        count: How many of them are committed under fixed steps.
    """

    kind: StepKind
    block: Span
    queries: Span
    candidates: np.ndarray
    count: int


class RequestState:
    """A running request.

    Args:
        prompt: Token ids of the prompt.
        settings: The request's settings, checked at admission.
        sampling: vLLM's parameters of the request.
        traits: The model.
        page_ids: Pages of all sequences of the request.
        page_size: Slots of a page.
        num_layers: Decoder layers.
        generator: The request's own noise.
        num_delivered: Tokens that were delivered before a preemption; they are computed
            again, identically, and not delivered twice.
    """

    def __init__(
        self,
        prompt: list[int],
        settings: DecodingSettings,
        sampling: SamplingParams,
        traits: ModelTraits,
        page_ids: list[int],
        page_size: int,
        num_layers: int,
        generator: torch.Generator,
        num_delivered: int = 0,
    ) -> None:
        assert sampling.max_tokens is not None
        self.settings = settings
        self.sampling = sampling
        self.traits = traits
        self.generator = generator
        self.policy: CachePolicy = POLICIES[settings.cache_policy]
        self.canvas = Canvas(len(prompt), sampling.max_tokens, settings.block_length)
        self.steps_of_block = share_steps(self.canvas, settings.steps)
        self.rule = RULES[settings.remasking or traits.default_remasking]
        self.page_size = page_size

        mask = traits.mask_token_id
        conditional = np.full(self.canvas.length, mask, dtype=np.int64)
        conditional[: len(prompt)] = prompt
        pages = np.array(page_ids, dtype=np.int64).reshape(settings.num_sequences, -1)
        canvases = [conditional, np.full_like(conditional, mask)][: settings.num_sequences]
        self.sequences = [
            Sequence(token_ids, own_pages, page_size, num_layers)
            for token_ids, own_pages in zip(canvases, pages, strict=True)
        ]
        self.masked = np.ones(self.canvas.response_length, dtype=bool)
        self.block_index = 0
        self.step = 0
        self.num_delivered = num_delivered
        self.trace: CommitTrace | None = None
        if settings.trace:
            length, with_kept = self.canvas.response_length, settings.trace > 1
            self.trace = CommitTrace(length, with_kept, num_delivered)
        self._stop_ids = {*(sampling.stop_token_ids or ()), sampling.eos_token_id} - {None}
        self._num_final = 0
        self._logprobs: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}

    @property
    def finished(self) -> bool:
        """Whether every position is committed."""
        return self.block_index >= self.canvas.num_blocks

    def next_step(self) -> NextStep:
        """Return what the request runs next."""
        block = self.canvas.block(self.block_index)
        kind = self.policy.kind(self.step, self.settings)
        queries = (
            self.policy.queries(self.canvas, block)
            if kind is StepKind.CACHED
            else (0, self.canvas.length)
        )
        candidates = self._masked_positions(block)
        if self._commits_first_position_only:
            return NextStep(kind, block, queries, candidates[:1], 1)
        count = self._scheduled_count(len(candidates))
        if count == 0:
            candidates = candidates[:0]
        return NextStep(kind, block, queries, candidates, count)

    @property
    def _commits_first_position_only(self) -> bool:
        return self.step == 0 and self.traits.shifts_logits and self.policy.first_step_commits_one

    def _masked_positions(self, block: Span) -> np.ndarray:
        first = self.canvas.prompt_length
        return np.flatnonzero(self.masked[block[0] - first : block[1] - first]) + block[0]

    def _scheduled_count(self, num_masked: int) -> int:
        """Return the commits of this step under fixed steps; elsewhere any number above 0."""
        settings = self.settings
        if settings.threshold is not None or settings.factor is not None or self.rule.independent:
            return num_masked
        start, end = self.canvas.block(self.block_index)
        return self.traits.schedule.count(
            self.step, self.steps_of_block[self.block_index], num_masked, end - start
        )

    @property
    def _ranking_of_one(self) -> UnmaskingRule:
        """What a lone candidate is ranked by: nothing is drawn, and a trace shows it."""
        parallel = self.settings.threshold is not None or self.settings.factor is not None
        return PROBABILITY_RULE if parallel or self.rule.confidence is None else self.rule

    def candidates_of(self, step: NextStep) -> Candidates:
        """Return how the candidates of a step are to be committed; there must be some."""
        settings, sampling = self.settings, self.sampling
        special = self._commits_first_position_only
        num_steps = self.steps_of_block[self.block_index]
        chance = 1.0
        if self.rule.independent and self.step < num_steps - 1:
            chance = float(commit_fractions(num_steps)[self.step])
        return Candidates(
            num=len(step.candidates),
            count=step.count,
            rule=self._ranking_of_one if special else self.rule,
            commit_probability=chance,
            threshold=None if special else settings.threshold,
            factor=None if special else settings.factor,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=max(0, sampling.top_k),
            alg_temp=0.0 if special else settings.alg_temp,
            generator=self.generator,
            num_logprobs=sampling.logprobs,
            traced=self.trace is not None,
        )

    def commit(self, positions: np.ndarray, tokens: np.ndarray, logprobs: Logprobs | None) -> None:
        """Write committed tokens and go on to the next step that does something."""
        for sequence in self.sequences:
            sequence.token_ids[positions] = tokens
        self.masked[positions - self.canvas.prompt_length] = False
        if logprobs is not None:
            for row, position in enumerate(positions.tolist()):
                self._logprobs[position] = (
                    logprobs.token_ids[row],
                    logprobs.values[row],
                    int(logprobs.ranks[row]),
                )
        self._advance()

    def _advance(self) -> None:
        block = self.canvas.block(self.block_index)
        num_masked = len(self._masked_positions(block))
        if num_masked == 0:
            self.block_index += 1
            self.step = 0
            if self.finished:
                return
            block = self.canvas.block(self.block_index)
            num_masked = block[1] - block[0]
        else:
            self.step += 1
        if self._commits_first_position_only or self._scheduled_count(num_masked) > 0:
            return
        # A step that commits nothing and fills no cache changes nothing: pass over it.
        next_commit = self.traits.schedule.next_commit(
            self.step, self.steps_of_block[self.block_index], num_masked, block[1] - block[0]
        )
        while self.step < next_commit:
            kind = self.policy.kind(self.step, self.settings)
            if kind is StepKind.REFRESH:
                return
            if kind is StepKind.CACHED:
                # There is no refresh behind a block step.
                self.step = next_commit
                return
            self.step += 1

    @property
    def continues_alone(self) -> bool:
        """Whether the next step is a block step that nobody has to decide on."""
        if self.finished or self.policy.kind(self.step, self.settings) is not StepKind.CACHED:
            return False
        first = self.canvas.prompt_length + self._num_final
        final = self.sequences[0].token_ids[first : first + self._num_newly_final()]
        return self._stop_ids.isdisjoint(final.tolist())

    def _num_newly_final(self) -> int:
        masked = self.masked[self._num_final :]
        return int(np.argmax(masked)) if masked.any() else len(masked)

    def take_final(self) -> tuple[list[int], list[tuple[np.ndarray, np.ndarray, int]]]:
        """Return the tokens that became final, with everything before them, since last time.

        Returns:
            Token ids, and their log-probabilities where the request asked for them.
        """
        num_new = self._num_newly_final()
        start = max(self._num_final, self.num_delivered)
        self._num_final += num_new
        first = self.canvas.prompt_length
        end = max(start, self._num_final)
        tokens = self.sequences[0].token_ids[first + start : first + end].tolist()
        logprobs = []
        if self._logprobs:
            for position in range(first + self._num_final - num_new, first + self._num_final):
                entry = self._logprobs.pop(position)
                if position >= first + start:
                    logprobs.append(entry)
        return tokens, logprobs
