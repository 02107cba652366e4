# SPDX-License-Identifier: Apache-2.0
"""Cache policies: which keys a step sees, which queries it runs, how many slots a request needs.

No arrays, only counts and position ranges. The scheduler asks here what a step costs and how many
pages a request needs, admission whether these fit the pool, and the runner which positions to run
and to keep.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.settings import DecodingSettings

Span = tuple[int, int]


class StepKind(Enum):
    """What a denoising step runs.

    FULL: all positions; nothing is kept. REFRESH: all positions, and the cache is filled from
    their keys and values. CACHED: some positions against the kept keys and their own. APPEND:
    a cached step that also runs the previous block once more, now without masks, and adds its
    keys to the kept ones. EVICT: a cached step on the whole cache, which is then reduced.
    """

    FULL = "full"
    REFRESH = "refresh"
    CACHED = "cached"
    APPEND = "append"
    EVICT = "evict"

    @property
    def runs_all(self) -> bool:
        """Whether all positions are run, against their own keys."""
        return self in (StepKind.FULL, StepKind.REFRESH)


@dataclass(frozen=True)
class Progress:
    """Where a request stands.

    Attributes:
        block: Block of its next step.
        step: Next step within the block.
        refreshed: Block of the last refresh, -1 before the first.
        whole: Whether the cache still holds all candidates, before a late eviction.
    """

    block: int = 0
    step: int = 0
    refreshed: int = -1
    whole: bool = False


class CachePolicy(ABC):
    """A cache policy. Stateless: the settings of a request are passed in."""

    name: ClassVar[str]
    #: Whether Dream commits only a block's first position in the block's first step.
    first_step_commits_one: ClassVar[bool] = True
    #: Whether kept entries are chosen by saliency; if not, all candidates are kept.
    selects: ClassVar[bool] = False

    def kind(self, progress: Progress, settings: DecodingSettings) -> StepKind:
        """Return what the next step runs."""
        if self.keeps_cache(progress, settings):
            return StepKind.APPEND if progress.step == 0 else StepKind.CACHED
        return self._kind(progress.step, settings)

    def keeps_cache(self, progress: Progress, settings: DecodingSettings) -> bool:
        """Return whether the block continues with the cache of an earlier block's refresh."""
        last = progress.refreshed
        return 0 <= last < progress.block < last + settings.refresh_interval

    def _kind(self, step: int, settings: DecodingSettings) -> StepKind:
        """Return what step ``step`` (0-based) of a block with a cache of its own runs."""
        return StepKind.REFRESH if step == 0 else StepKind.CACHED

    def choice(self, settings: DecodingSettings) -> StepKind:
        """Return the kind of step that decides which entries are kept."""
        return StepKind.REFRESH

    def next_change(self, progress: Progress, settings: DecodingSettings) -> int | None:
        """Return the first step, from the next one on, that changes the cache, or None."""
        steps = (0,) if self.keeps_cache(progress, settings) else self._changes(settings)
        return min((step for step in steps if step >= progress.step), default=None)

    def _changes(self, settings: DecodingSettings) -> tuple[int, ...]:
        """Return the steps that change the cache, in a block with a cache of its own."""
        return (0,)

    @abstractmethod
    def queries(self, canvas: Canvas, block: Span, settings: DecodingSettings) -> Span:
        """Return the positions that a CACHED step of the block runs."""

    @abstractmethod
    def candidates(
        self, canvas: Canvas, block: Span, settings: DecodingSettings
    ) -> tuple[Span, ...]:
        """Return the position ranges that the block's cache is filled from, in order."""

    def num_kept(self, num_candidates: int, settings: DecodingSettings, page_size: int) -> int:
        """Return the largest number of candidates that a layer keeps."""
        return num_candidates

    def num_slots(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        """Return the slots one sequence needs for its whole life.

        They hold the kept entries, the fresh keys of the largest CACHED step, and the keys that
        blocks append.
        """
        most = 0
        for index in _largest_blocks(canvas):
            block = canvas.block(index)
            start, end = self.queries(canvas, block, settings)
            candidates = sum(hi - lo for lo, hi in self.candidates(canvas, block, settings))
            kept = self.num_kept(candidates, settings, page_size)
            most = max(most, kept + end - start)
        appended = min(settings.refresh_interval, canvas.num_blocks) - 1
        # No two slots hold the same position.
        return min(most + appended * canvas.longest_block, canvas.length)

    def peak_slots(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        """Return the slots one sequence needs from a refresh until the cache is evicted."""
        return self.num_slots(canvas, settings, page_size)

    def num_pages(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        """Return the pages a request holds for its whole life, all its sequences together."""
        return _pages(self.num_slots(canvas, settings, page_size), settings, page_size)

    def peak_pages(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        """Return the pages a request holds from a refresh until the cache is evicted."""
        return _pages(self.peak_slots(canvas, settings, page_size), settings, page_size)


class NoCache(CachePolicy):
    """Vanilla: every step is a full forward; no pages are held."""

    name = "none"
    first_step_commits_one = False

    def _kind(self, step: int, settings: DecodingSettings) -> StepKind:
        return StepKind.FULL

    def _changes(self, settings: DecodingSettings) -> tuple[int, ...]:
        return ()

    def queries(self, canvas: Canvas, block: Span, settings: DecodingSettings) -> Span:
        return 0, visible_end(canvas, block, settings)

    def candidates(
        self, canvas: Canvas, block: Span, settings: DecodingSettings
    ) -> tuple[Span, ...]:
        return ()

    def num_slots(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        return 0


class PrefixCache(CachePolicy):
    """Fast-dLLM prefix cache: positions before the block are kept, the rest are run."""

    name = "prefix"

    def queries(self, canvas: Canvas, block: Span, settings: DecodingSettings) -> Span:
        return block[0], visible_end(canvas, block, settings)

    def candidates(
        self, canvas: Canvas, block: Span, settings: DecodingSettings
    ) -> tuple[Span, ...]:
        return ((0, block[0]),)


class DualCache(CachePolicy):
    """Fast-dLLM dual cache: all positions but the block's are kept, the block is run."""

    name = "dual"

    def queries(self, canvas: Canvas, block: Span, settings: DecodingSettings) -> Span:
        return block

    def candidates(
        self, canvas: Canvas, block: Span, settings: DecodingSettings
    ) -> tuple[Span, ...]:
        return (0, block[0]), (block[1], visible_end(canvas, block, settings))


class SparseCache(DualCache):
    """Sparse-dLLM: the most salient fraction of prefix and suffix is kept (section 3.2).

    With ``eviction_delay`` a refresh keeps everything, and the choice is made that many block
    steps later.
    """

    name = "sparse"
    selects = True

    def _kind(self, step: int, settings: DecodingSettings) -> StepKind:
        refresh = settings.delay_steps
        if step <= refresh:
            return StepKind.FULL if step < refresh else StepKind.REFRESH
        return StepKind.EVICT if step == refresh + settings.eviction_delay else StepKind.CACHED

    def _changes(self, settings: DecodingSettings) -> tuple[int, ...]:
        refresh = settings.delay_steps
        return refresh, refresh + settings.eviction_delay

    def choice(self, settings: DecodingSettings) -> StepKind:
        return StepKind.EVICT if settings.eviction_delay else StepKind.REFRESH

    def num_kept(self, num_candidates: int, settings: DecodingSettings, page_size: int) -> int:
        kept = num_to_keep(num_candidates, settings)
        if settings.granularity == "page":
            return min(-(-kept // page_size) * page_size, num_candidates)
        return kept

    def peak_slots(self, canvas: Canvas, settings: DecodingSettings, page_size: int) -> int:
        if not settings.eviction_delay:
            return self.num_slots(canvas, settings, page_size)
        # The last block sees the whole canvas.
        return canvas.length


POLICIES: dict[str, CachePolicy] = {
    policy.name: policy for policy in (NoCache(), PrefixCache(), DualCache(), SparseCache())
}


def num_to_keep(num_candidates: int, settings: DecodingSettings) -> int:
    """Return how many candidates ``keep_ratio`` selects, before runs are rounded up to pages."""
    return int(num_candidates * settings.keep_ratio)


def visible_end(canvas: Canvas, block: Span, settings: DecodingSettings) -> int:
    """Return the end of the positions that take part while a block is denoised."""
    if settings.suffix_window is None:
        return canvas.length
    return min(canvas.length, block[1] + settings.suffix_window)


def positions_run(canvas: Canvas, settings: DecodingSettings, progress: Progress) -> Span:
    """Return the positions that the next step runs."""
    policy = POLICIES[settings.cache_policy]
    block = canvas.block(progress.block)
    kind = policy.kind(progress, settings)
    if kind.runs_all:
        return 0, visible_end(canvas, block, settings)
    start, end = policy.queries(canvas, block, settings)
    return (canvas.block(progress.block - 1)[0] if kind is StepKind.APPEND else start), end


def step_tokens(canvas: Canvas, settings: DecodingSettings, progress: Progress) -> int:
    """Return the query tokens that the next step runs, all sequences of the request together."""
    start, end = positions_run(canvas, settings, progress)
    return settings.num_sequences * (end - start)


def slots_of_context(context: int, settings: DecodingSettings, page_size: int) -> int:
    """Return the most slots that one sequence of ``context`` positions needs."""
    policy = POLICIES[settings.cache_policy]
    # A response of one token leaves the most positions to keep; one of all tokens has the largest
    # blocks.
    prompts = (max(0, context - 1), 0)
    canvases = (Canvas(prompt, context - prompt, settings.block_length) for prompt in prompts)
    return max(policy.peak_slots(canvas, settings, page_size) for canvas in canvases)


def _pages(num_slots: int, settings: DecodingSettings, page_size: int) -> int:
    """Return the pages of a request for ``num_slots`` slots in each of its sequences."""
    return settings.num_sequences * -(-num_slots // page_size)


def _largest_blocks(canvas: Canvas) -> set[int]:
    """Return blocks among which is the one that needs the most slots: the first, the last two.

    A suffix window moves with the block, so later blocks see more; the last may be shorter.
    """
    last = canvas.num_blocks - 1
    return {0, max(0, last - 1), last}
