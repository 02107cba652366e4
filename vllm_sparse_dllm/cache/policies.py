# SPDX-License-Identifier: Apache-2.0
"""Cache policies: which keys a step sees, which queries it runs, how many slots it holds.

Pure Python. The scheduler asks what a step costs, the block manager how many slots a request
needs, the runner which positions to run and to keep: all three ask here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from typing import ClassVar

from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.settings import DecodingSettings

Span = tuple[int, int]


class StepKind(Enum):
    """What a denoising step runs.

    FULL: all positions, nothing kept. REFRESH: all positions, and the cache is filled from
    their keys and values. CACHED: some positions against the kept keys and their own.
    """

    FULL = "full"
    REFRESH = "refresh"
    CACHED = "cached"


class CachePolicy(ABC):
    """One policy; stateless, the settings of a request are passed in."""

    name: ClassVar[str]
    #: Dream writes only the block's first position in the first step of a block.
    first_step_commits_one: ClassVar[bool] = True
    #: Kept entries are chosen by saliency (else all candidates are kept).
    selects: ClassVar[bool] = False

    @abstractmethod
    def kind(self, step: int, settings: DecodingSettings) -> StepKind:
        """Return what step ``step`` (0-based) of a block runs."""

    @abstractmethod
    def queries(self, canvas: Canvas, block: Span) -> Span:
        """Return the positions that a CACHED step of the block runs."""

    @abstractmethod
    def candidates(self, canvas: Canvas, block: Span) -> tuple[Span, ...]:
        """Return the position ranges that the block's cache is filled from, in order."""

    def num_kept(self, num_candidates: int, settings: DecodingSettings, page_size: int) -> int:
        """Return how many of the candidates are kept, at most."""
        return num_candidates

    def num_slots(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        """Return the slots one sequence needs for its whole life.

        Kept entries and the own fresh keys of the largest CACHED step. The block that needs
        most is a longest one or the last (shorter) one.
        """
        most = 0
        for index in {0, canvas.num_blocks - 1}:
            block = canvas.block(index)
            start, end = self.queries(canvas, block)
            candidates = sum(hi - lo for lo, hi in self.candidates(canvas, block))
            kept = self.num_kept(candidates, settings, page_size)
            most = max(most, kept + end - start)
        return most

    def num_pages(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        """Return the pages a request holds for its whole life, all its sequences together."""
        slots = self.num_slots(canvas, settings, page_size)
        return settings.num_sequences * -(-slots // page_size)


class NoCache(CachePolicy):
    """Vanilla: every step is a full forward; no page is held."""

    name = "none"
    first_step_commits_one = False

    def kind(self, step: int, settings: DecodingSettings) -> StepKind:
        return StepKind.FULL

    def queries(self, canvas: Canvas, block: Span) -> Span:
        return 0, canvas.length

    def candidates(self, canvas: Canvas, block: Span) -> tuple[Span, ...]:
        return ()

    def num_slots(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        return 0


class PrefixCache(CachePolicy):
    """Fast-dLLM prefix cache: what lies before the block is kept, the rest is run."""

    name = "prefix"

    def kind(self, step: int, settings: DecodingSettings) -> StepKind:
        return StepKind.REFRESH if step == 0 else StepKind.CACHED

    def queries(self, canvas: Canvas, block: Span) -> Span:
        return block[0], canvas.length

    def candidates(self, canvas: Canvas, block: Span) -> tuple[Span, ...]:
        return ((0, block[0]),)


class DualCache(CachePolicy):
    """Fast-dLLM dual cache: everything but the block is kept, the block is run."""

    name = "dual"

    def kind(self, step: int, settings: DecodingSettings) -> StepKind:
        return StepKind.REFRESH if step == 0 else StepKind.CACHED

    def queries(self, canvas: Canvas, block: Span) -> Span:
        return block

    def candidates(self, canvas: Canvas, block: Span) -> tuple[Span, ...]:
        return (0, block[0]), (block[1], canvas.length)


class SparseCache(DualCache):
    """Sparse-dLLM: the most salient fraction of prefix and suffix is kept (section 3.2)."""

    name = "sparse"
    selects = True

    def kind(self, step: int, settings: DecodingSettings) -> StepKind:
        if step < settings.delay_steps:
            return StepKind.FULL
        return StepKind.REFRESH if step == settings.delay_steps else StepKind.CACHED

    def num_kept(self, num_candidates: int, settings: DecodingSettings, page_size: int) -> int:
        kept = int(num_candidates * settings.keep_ratio)
        if settings.granularity == "page":
            return min(-(-kept // page_size) * page_size, num_candidates)
        return kept


POLICIES: dict[str, CachePolicy] = {
    policy.name: policy for policy in (NoCache(), PrefixCache(), DualCache(), SparseCache())
}


def step_tokens(canvas: Canvas, settings: DecodingSettings, block: int, step: int) -> int:
    """Return the query tokens that a step runs, all sequences of the request together."""
    policy = POLICIES[settings.cache_policy]
    if policy.kind(step, settings) is StepKind.CACHED:
        start, end = policy.queries(canvas, canvas.block(block))
        return settings.num_sequences * (end - start)
    return settings.num_sequences * canvas.length
