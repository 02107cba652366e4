# SPDX-License-Identifier: Apache-2.0
"""How a request goes through its blocks: where it starts, and which of its steps are run.

The scheduler and the runner build a `Course` from the same request, so they agree on its first
step before it is run, also when the request restarts after a preemption.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vllm_sparse_dllm.cache.policies import POLICIES, Progress
from vllm_sparse_dllm.denoise.rules import RULES
from vllm_sparse_dllm.denoise.timetable import Canvas, share_steps
from vllm_sparse_dllm.denoise.traits import ModelTraits
from vllm_sparse_dllm.settings import DecodingSettings


class Course:
    """The blocks of a request and their steps.

    Args:
        canvas: Where the blocks lie.
        settings: The request's settings.
        traits: The model.
        left_to_right: Whether each step commits the first masked position only, for a grammar.
        delivered: Tokens of the response that were delivered before a preemption. The client has
            them, so they are given to the restarted request, and the model writes what follows.

    Attributes:
        response: ``[G]`` ids before the first step, the mask id where the model is to write.
        masked_of_block: Masked positions of each block before its first step.
        steps_of_block: Denoising steps of each block; of a block that was delivered in part, the
            same share of its steps as of its masked positions, rounded up.
    """

    def __init__(
        self,
        canvas: Canvas,
        settings: DecodingSettings,
        traits: ModelTraits,
        left_to_right: bool,
        delivered: Sequence[int] = (),
    ) -> None:
        self.canvas = canvas
        self.settings = settings
        self.traits = traits
        self.left_to_right = left_to_right
        self.policy = POLICIES[settings.cache_policy]
        self.rule = RULES[settings.remasking or traits.default_remasking]
        self.response = np.full(canvas.response_length, traits.mask_token_id, dtype=np.int64)
        if settings.canvas is not None:
            self.response[: len(settings.canvas)] = settings.canvas
        self._planned = self._count_masked()
        num_given = len(delivered)
        if left_to_right:
            # A grammar forces what was delivered anyway; so its block runs as it did before.
            num_given -= num_given % canvas.block_length
        self.response[:num_given] = delivered[:num_given]
        self.masked_of_block = self._count_masked()
        shares = share_steps(canvas, settings.steps, self._planned)
        self.steps_of_block = tuple(
            -(-steps * left // max(1, planned))
            for steps, left, planned in zip(
                shares, self.masked_of_block, self._planned, strict=True
            )
        )

    def _count_masked(self) -> list[int]:
        starts = np.arange(0, self.canvas.response_length, self.canvas.block_length)
        masked = self.response == self.traits.mask_token_id
        return np.add.reduceat(masked.astype(np.int64), starts).tolist()

    @property
    def start(self) -> Progress:
        """Where the request starts; after the last block if no block has masks."""
        block = self.first_with_masks(0)
        if block == self.canvas.num_blocks:
            return Progress(block)
        return Progress(block, self.next_step(Progress(block), self.masked_of_block[block]))

    @property
    def starts_whole_block(self) -> bool:
        """Whether nothing that the model has to write in the first block to run is given."""
        block = self.start.block
        return self.masked_of_block[block] == self._planned[block]

    def first_with_masks(self, block: int) -> int:
        """Return the first block from ``block`` on that has masks, `num_blocks` if none has."""
        while block < self.canvas.num_blocks and not self.masked_of_block[block]:
            block += 1
        return block

    def commits_first_only(self, block: int, step: int) -> bool:
        """Return whether a step commits the first masked position and no other."""
        if self.left_to_right:
            return True
        if step or not self.traits.shifts_logits or not self.policy.first_step_commits_one:
            return False
        # Only this step has the row that predicts it; a fixed one needs none.
        first = self.response[block * self.canvas.block_length]
        return bool(first == self.traits.mask_token_id)

    def count(self, block: int, step: int, num_masked: int) -> int:
        """Return the commits of a step under fixed steps; elsewhere any number above 0."""
        settings = self.settings
        if settings.threshold is not None or settings.factor is not None or self.rule.independent:
            return num_masked
        return self.traits.schedule.count(
            step, self.steps_of_block[block], num_masked, self.masked_of_block[block]
        )

    def next_step(self, progress: Progress, num_masked: int) -> int:
        """Return the step to run next: the others commit nothing and leave the cache unchanged.

        Args:
            progress: The block, and the first step to consider.
            num_masked: Masked positions of the block now, above 0.
        """
        block, step = progress.block, progress.step
        if self.commits_first_only(block, step) or self.count(block, step, num_masked) > 0:
            return step
        next_commit = self.traits.schedule.next_commit(
            step, self.steps_of_block[block], num_masked, self.masked_of_block[block]
        )
        next_change = self.policy.next_change(progress, self.settings)
        return next_commit if next_change is None else min(next_commit, next_change)
