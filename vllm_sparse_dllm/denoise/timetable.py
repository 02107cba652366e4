# SPDX-License-Identifier: Apache-2.0
"""Blocks of a response, denoising steps per block, and how many tokens a step commits.

The scheduler needs only the blocks (`Canvas`); the runner also follows the steps and commits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

#: Lower end of Dream's time axis (Dream, `generation_utils`).
_DREAM_EPS = 1e-3


@dataclass(frozen=True)
class Canvas:
    """The layout of a request's prompt and blocks.

    Attributes:
        prompt_length: P, positions of the prompt.
        response_length: G, positions of the response.
        block_length: B, positions of a block; the last one takes the remainder.
    """

    prompt_length: int
    response_length: int
    block_length: int

    @property
    def length(self) -> int:
        """L = P + G."""
        return self.prompt_length + self.response_length

    @property
    def num_blocks(self) -> int:
        return -(-self.response_length // self.block_length)

    @property
    def longest_block(self) -> int:
        return min(self.block_length, self.response_length)

    def block(self, index: int) -> tuple[int, int]:
        """Return the positions [start, end) of a block."""
        start = self.prompt_length + index * self.block_length
        return start, min(start + self.block_length, self.length)


def share_steps(
    canvas: Canvas, steps: int | None, masked_of_block: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Distribute denoising steps among the blocks, in proportion to their masked positions.

    Args:
        canvas: The blocks.
        steps: T, for the whole response; None means one per masked position.
        masked_of_block: Masked positions of each block at the start; None for all.

    Returns:
        Steps of each block, at least 1 where something is masked, else 0; the remainder of the
        division goes to the first blocks with masked positions.
    """
    masked = masked_of_block
    if masked is None:
        masked = [end - start for start, end in map(canvas.block, range(canvas.num_blocks))]
    num_masked = max(1, sum(masked))
    total = num_masked if steps is None else steps
    shares = [max(1, total * size // num_masked) if size else 0 for size in masked]
    open_blocks = [index for index, size in enumerate(masked) if size]
    for index in open_blocks[: max(0, total - sum(shares))]:
        shares[index] += 1
    return tuple(shares)


class CommitSchedule(ABC):
    """How many masked positions step ``i`` of a block commits under fixed steps."""

    @abstractmethod
    def count(self, step: int, num_steps: int, num_masked: int, num_at_start: int) -> int:
        """Return the number of commits of ``step``.

        Args:
            step: 0-based index within the block.
            num_steps: S, the block's share of steps. At ``step >= num_steps`` each step commits
                one position, so that every block ends.
            num_masked: Positions of the block that are masked now.
            num_at_start: Masked positions of the block before its first step: its size less the
                fixed positions.
        """

    def next_commit(self, step: int, num_steps: int, num_masked: int, num_at_start: int) -> int:
        """Return the first step from ``step`` on that commits something.

        Args:
            step: First step to consider.
            num_steps: S, the block's share of steps.
            num_masked: Positions of the block that are masked until that step; above 0.
            num_at_start: Masked positions of the block before its first step: its size less the
                fixed positions.
        """
        while self.count(step, num_steps, num_masked, num_at_start) == 0:
            step += 1
        return step


class EvenSchedule(CommitSchedule):
    """LLaDA: the block's masks divided evenly, the remainder to the first steps."""

    def count(self, step: int, num_steps: int, num_masked: int, num_at_start: int) -> int:
        if step >= num_steps:
            return min(1, num_masked)
        quota = num_at_start // num_steps + (step < num_at_start % num_steps)
        return min(quota, num_masked)


class LinearTimeSchedule(CommitSchedule):
    """Dream: a share ``1 - t[i+1] / t[i]`` of the remaining masks, all of them at the last step."""

    def count(self, step: int, num_steps: int, num_masked: int, num_at_start: int) -> int:
        if step >= num_steps:
            return min(1, num_masked)
        if step == num_steps - 1:
            return num_masked
        return int(np.float32(num_masked) * commit_fractions(num_steps)[step])

    def next_commit(self, step: int, num_steps: int, num_masked: int, num_at_start: int) -> int:
        if step >= num_steps - 1:
            return step
        counts = np.float32(num_masked) * commit_fractions(num_steps)[step : num_steps - 1]
        commits = np.flatnonzero(counts >= 1)
        return step + int(commits[0]) if len(commits) else num_steps - 1


@lru_cache(maxsize=64)
def commit_fractions(num_steps: int) -> np.ndarray:
    """Return ``[num_steps]`` float32 ``1 - t[i+1] / t[i]``, in float32 arithmetic."""
    # torch's linspace, not numpy's: they differ in the last bit, and the bit decides counts.
    import torch

    times = torch.linspace(1, _DREAM_EPS, num_steps + 1, dtype=torch.float32).numpy()
    return np.float32(1) - times[1:] / times[:-1]
