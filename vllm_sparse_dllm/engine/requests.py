# SPDX-License-Identifier: Apache-2.0
"""The runner's state of a request: canvas, step counters, pages and next step."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from vllm.sampling_params import SamplingParams

from vllm_sparse_dllm.cache.policies import (
    Progress,
    Span,
    StepKind,
    positions_run,
)
from vllm_sparse_dllm.denoise.constraints import MASKED, AllowMask, LogitsEdit
from vllm_sparse_dllm.denoise.plan import Candidates
from vllm_sparse_dllm.denoise.rules import PROBABILITY_RULE, UnmaskingRule
from vllm_sparse_dllm.denoise.step import Logprobs
from vllm_sparse_dllm.denoise.timetable import Canvas, commit_fractions
from vllm_sparse_dllm.denoise.traits import ModelTraits
from vllm_sparse_dllm.engine.constraints import RequestConstraints
from vllm_sparse_dllm.engine.course import Course
from vllm_sparse_dllm.engine.logprobs import Entry
from vllm_sparse_dllm.engine.output import Failure
from vllm_sparse_dllm.engine.structured_output import has_grammar
from vllm_sparse_dllm.engine.trace import CommitTrace
from vllm_sparse_dllm.settings import DecodingSettings


class Sequence:
    """One canvas and its pages. A request has one, under guidance two.

    The fresh keys of the positions that are run take the first slots, the kept entries those
    after them, without a gap.

    Args:
        token_ids: ``[L]`` ids; the response starts as mask ids, except for fixed positions.
        page_ids: ``[pages]`` page ids in the pool.
        page_size: Slots of a page.
        num_layers: Decoder layers.
        tracks_positions: Whether to record which position each slot holds.

    Attributes:
        slots: ``[pages * page_size]`` slots of the pages, in order.
        num_fresh: Slots of fresh keys.
        num_kept: ``[layers]`` numbers of kept entries.
        positions: ``[layers, L]`` position that each slot keeps, -1 for none; None if they are
            not recorded.
    """

    def __init__(
        self,
        token_ids: np.ndarray,
        page_ids: np.ndarray,
        page_size: int,
        num_layers: int,
        tracks_positions: bool = False,
    ) -> None:
        self.token_ids = token_ids
        self.page_size = page_size
        self.num_fresh = 0
        self.num_kept = np.zeros(num_layers, dtype=np.int64)
        self.positions: np.ndarray | None = None
        if tracks_positions:
            self.positions = np.full((num_layers, len(token_ids)), -1, dtype=np.int64)
        self.set_pages(page_ids)

    def set_pages(self, page_ids: np.ndarray) -> None:
        """Hold these pages: those held before and further ones, or the first of them."""
        self.page_ids = page_ids
        self.slots = (page_ids[:, None] * self.page_size + np.arange(self.page_size)).reshape(-1)

    @property
    def kept_positions(self) -> list[np.ndarray]:
        """Positions of the kept entries of each layer, in order; needs `positions`."""
        assert self.positions is not None
        return [np.sort(own[own >= 0]) for own in self.positions]

    def make_room(self, finished: Span, queries: Span) -> np.ndarray:
        """Add a finished block's keys to the kept entries, and drop the entries of the queries.

        The finished block takes the slots that become free, then those after the last entry. No
        gap remains: the dropped entries and the slots that the fresh keys no longer need are
        never more than the finished block's keys.

        Args:
            finished: Positions of the finished block.
            queries: Positions of the coming steps; their kept entries are stale.

        Returns:
            ``[layers, block]`` indices into `slots` for the finished block's keys.
        """
        assert self.positions is not None
        self.num_fresh = num_fresh = queries[1] - queries[0]
        positions = self.positions
        positions[:, :num_fresh] = -1
        positions[(positions >= queries[0]) & (positions < queries[1])] = -1
        free = positions[:, num_fresh:] < 0
        block = np.arange(*finished)
        # Free slots in order: gaps between the entries first, then those after the last one.
        targets = np.argsort(~free, axis=1, kind="stable")[:, : len(block)] + num_fresh
        np.put_along_axis(positions, targets, block[None], axis=1)
        self.num_kept = (positions >= 0).sum(axis=1)
        return targets


@dataclass(frozen=True)
class NextStep:
    """What a request runs in its next step.

    Attributes:
        kind: What it does with the cache.
        block: Positions [start, end) of the current block.
        queries: Positions [start, end) that are run.
        candidates: ``[n]`` masked positions that can be committed, ascending; may be empty.
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
        traits: The model's traits.
        page_ids: Pages of all sequences of the request, those it always holds first.
        page_size: Slots of a page.
        num_layers: Decoder layers.
        generator: Source of the request's own noise.
        delivered: Tokens of the response that were delivered before a preemption. They are given
            now, and not delivered twice.
        request_id: vLLM's id of the request.

    Attributes:
        allowed_tokens: Bit mask of the next token, as in `AllowedTokens`, if a grammar constrains
            the request; the runner sets it before each step.
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
        delivered: SequenceOf[int] = (),
        request_id: str = "",
    ) -> None:
        assert sampling.max_tokens is not None
        self.request_id = request_id
        self.settings = settings
        self.sampling = sampling
        self.traits = traits
        self.generator = generator
        self.canvas = Canvas(len(prompt), sampling.max_tokens, settings.block_length)
        self.left_to_right = has_grammar(sampling)
        self.course = Course(self.canvas, settings, traits, self.left_to_right, delivered)
        self.policy, self.rule = self.course.policy, self.course.rule
        self.page_size = page_size

        mask = traits.mask_token_id
        conditional = np.concatenate([np.array(prompt, dtype=np.int64), self.course.response])
        unconditional = conditional.copy()
        unconditional[: len(prompt)] = mask
        self.num_pages = self.policy.num_pages(self.canvas, settings, page_size)
        pages = np.array(page_ids[: self.num_pages], dtype=np.int64)
        pages = pages.reshape(settings.num_sequences, -1)
        canvases = [conditional, unconditional][: settings.num_sequences]
        tracks_positions = self.num_pages > 0 and (
            settings.refresh_interval > 1 or settings.trace > 1
        )
        self.sequences = [
            Sequence(token_ids, own_pages, page_size, num_layers, tracks_positions)
            for token_ids, own_pages in zip(canvases, pages, strict=True)
        ]
        self.add_pages(page_ids[self.num_pages :])
        # Only in the response: a mask id in the prompt is text.
        self.masked = self.course.response == mask
        self.constraints = RequestConstraints.of(
            sampling, conditional[: len(prompt)], generator.device
        )
        self.allowed_tokens: np.ndarray | None = None
        start = self.course.start
        self.block_index = start.block
        self.step = start.step
        self.refreshed = -1
        self.cache_is_whole = False
        self.num_delivered = len(delivered)
        self._noise_of_block = generator.get_state()
        self.trace: CommitTrace | None = None
        if settings.trace:
            length, with_kept = self.canvas.response_length, settings.trace > 1
            self.trace = CommitTrace(length, with_kept)
        self._stop_ids = {*(sampling.stop_token_ids or ()), sampling.eos_token_id} - {None}
        self._num_final = 0
        self._logprobs: dict[int, Entry] = {}
        if sampling.logprobs is not None:
            # Given tokens have probability 1.
            for position in np.flatnonzero(~self.masked) + len(prompt):
                given = conditional[position : position + 1].copy()
                self._logprobs[int(position)] = (given, np.zeros(1, np.float32), 1)

    def follow(self, before: RequestState) -> None:
        """Go on with the noise and the trace of the request as it was before a preemption.

        Noise that decided what was delivered must not decide the rest too. A block of which the
        model has delivered nothing draws what it drew before.
        """
        self.generator = before.generator
        if before.block_index == self.block_index and self.course.starts_whole_block:
            self.generator.set_state(before._noise_of_block)
        self._noise_of_block = self.generator.get_state()
        self.trace = before.trace

    @property
    def finished(self) -> bool:
        """Whether every position is committed."""
        return self.block_index >= self.canvas.num_blocks

    @property
    def progress(self) -> Progress:
        """The request's progress."""
        return Progress(self.block_index, self.step, self.refreshed, self.cache_is_whole)

    def add_pages(self, page_ids: list[int]) -> None:
        """Hold further pages until the cache is evicted."""
        if not page_ids:
            return
        pages = np.array(page_ids, dtype=np.int64).reshape(len(self.sequences), -1)
        for sequence, own in zip(self.sequences, pages, strict=True):
            sequence.set_pages(np.concatenate([sequence.page_ids, own]))

    def _give_pages_back(self) -> None:
        self.cache_is_whole = False
        for sequence in self.sequences:
            sequence.set_pages(sequence.page_ids[: self.num_pages // len(self.sequences)])

    def next_step(self) -> NextStep:
        """Return what the request runs next."""
        progress = self.progress
        block = self.canvas.block(self.block_index)
        kind = self.policy.kind(progress, self.settings)
        queries = positions_run(self.canvas, self.settings, progress)
        candidates = self._masked_positions(block)
        if self._commits_first_position_only:
            return NextStep(kind, block, queries, candidates[:1], 1)
        count = self.course.count(self.block_index, self.step, len(candidates))
        if count == 0:
            candidates = candidates[:0]
        return NextStep(kind, block, queries, candidates, count)

    @property
    def _commits_first_position_only(self) -> bool:
        return self.course.commits_first_only(self.block_index, self.step)

    def _masked_positions(self, block: Span) -> np.ndarray:
        first = self.canvas.prompt_length
        return np.flatnonzero(self.masked[block[0] - first : block[1] - first]) + block[0]

    @property
    def _ranking_of_one(self) -> UnmaskingRule:
        """The rule that ranks a lone candidate: never by a draw, so that a trace can show it."""
        parallel = self.settings.threshold is not None or self.settings.factor is not None
        return PROBABILITY_RULE if parallel or self.rule.confidence is None else self.rule

    def candidates_of(self, step: NextStep) -> Candidates:
        """Return how to commit the candidates of a step, of which there must be at least one."""
        settings, sampling = self.settings, self.sampling
        special = self._commits_first_position_only
        num_steps = self.course.steps_of_block[self.block_index]
        edits: tuple[LogitsEdit, ...] = ()
        check = None
        if self.constraints is not None:
            first = self.canvas.prompt_length
            response = np.where(self.masked, MASKED, self.sequences[0].token_ids[first:])
            edits = self.constraints.edits(response, step.candidates - first)
            check = self.constraints.check(response, step.candidates - first)
        if self.allowed_tokens is not None:
            edits = (AllowMask(self.allowed_tokens), *edits)
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
            min_p=sampling.min_p,
            edits=edits,
            check=check,
            traced=self.trace is not None,
        )

    def failure(self, vocab_size: int) -> Failure:
        """Return why no token could be chosen in the step that was run and not committed."""
        if self.allowed_tokens is None:
            return Failure("logits", "the model's logits are not finite")
        step = self.next_step()
        # Only the edits matter here, not the model.
        logits = torch.zeros(1, vocab_size, device=self.generator.device)
        for edit in self.candidates_of(step).edits:
            edit.apply(logits, 0)
        if logits.isfinite().any():
            return Failure("logits", "the model's logits are not finite")
        where = f"position {step.candidates[0] - self.canvas.prompt_length} of the response"
        given = [
            name for name in ("allowed_token_ids", "bad_words") if getattr(self.sampling, name)
        ]
        if self.allowed_tokens.any() and given:
            return Failure(
                "grammar",
                f"{' and '.join(given)} must leave one of the tokens that structured_outputs "
                f"allows, but leaves none at {where}",
            )
        names = "; names of special tokens are no text" if self.sampling.skip_special_tokens else ""
        return Failure("grammar", f"structured_outputs allows no token at {where}{names}")

    def commit(self, positions: np.ndarray, tokens: np.ndarray, logprobs: Logprobs | None) -> None:
        """Write committed tokens and advance to the next step that has an effect."""
        kind = self.policy.kind(self.progress, self.settings)
        if kind is StepKind.REFRESH:
            self.refreshed = self.block_index
            self.cache_is_whole = self.policy.choice(self.settings) is StepKind.EVICT
        elif kind is StepKind.EVICT:
            self._give_pages_back()
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

    def _skip_blocks_without_masks(self) -> None:
        block = self.course.first_with_masks(self.block_index)
        if block > self.block_index:
            self.block_index = block
            # Only the block directly after a denoised one can go on with its cache.
            self.refreshed = -1

    def _advance(self) -> None:
        num_masked = len(self._masked_positions(self.canvas.block(self.block_index)))
        if num_masked == 0:
            self.block_index += 1
            self._skip_blocks_without_masks()
            self.step = 0
            self._noise_of_block = self.generator.get_state()
            if self.cache_is_whole and not self.policy.keeps_cache(self.progress, self.settings):
                self._give_pages_back()
            if self.finished:
                return
            num_masked = self.course.masked_of_block[self.block_index]
        else:
            self.step += 1
        self.step = self.course.next_step(self.progress, num_masked)

    @property
    def continues_alone(self) -> bool:
        """Whether the next step is a block step that the scheduler need not decide on."""
        if self.finished:
            return False
        if self.policy.kind(self.progress, self.settings) is not StepKind.CACHED:
            return False
        first = self.canvas.prompt_length + self._num_final
        final = self.sequences[0].token_ids[first : first + self._num_newly_final()]
        return self._stop_ids.isdisjoint(final.tolist())

    def _num_newly_final(self) -> int:
        masked = self.masked[self._num_final :]
        return int(np.argmax(masked)) if masked.any() else len(masked)

    def take_final(self) -> tuple[list[int], list[Entry]]:
        """Return the tokens that became final (as has all before them) since the last call.

        Returns:
            Token ids, and their log-probabilities if the request asked for them.
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
