# SPDX-License-Identifier: Apache-2.0
"""Training data: a batch depends on (seed, number, process) alone, so any run can resume."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))
from tasks import END, RESPONSE, Vocabulary, make_item

#: Share of each task in the training items, by default.
MIX = {"retrieval": 0.45, "copy": 0.3, "reverse": 0.15, "addition": 0.1}
#: Weight in the loss of the padding after an answer, which is soon learnt.
PADDING_WEIGHT = 0.1
#: Share of sequences that show a part of the answer and the end of the padding, as decoding does
#: half-way; in all others each position is masked independently.
HALF_WAY = 0.4
#: Maximum number of padding positions after the answer that are then still masked.
LATE_PADDING = 8


@dataclass(frozen=True)
class Stage:
    """A stage of training, whose steps draw from the same distribution.

    Attributes:
        steps: Number of steps.
        lengths: Weights of the sequence lengths in tokens.
        mix: Weights of the tasks.
        in_order: Share of half-way responses that show the start of the answer; the others show
            random words of it.
        unbegun: Share of half-way responses that always show nothing of the answer, only the end
            of the padding.
    """

    steps: int
    lengths: Mapping[int, float]
    mix: Mapping[str, float] = field(default_factory=lambda: MIX)
    in_order: float = 0.4
    unbegun: float = 0.0


@dataclass(frozen=True)
class Batch:
    """One process's part of a step.

    Attributes:
        ids: The network's input, ``[B, T]``.
        targets: The tokens of the last `RESPONSE` positions, ``[B, RESPONSE]``.
        weights: Weights of the loss at these positions, 0 where nothing is masked.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor


class Batches(Dataset[Batch]):
    """All batches of a run, by number."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        stages: tuple[Stage, ...],
        tokens: int,
        seed: int,
        process: int = 0,
        num_processes: int = 1,
    ) -> None:
        """``tokens`` is about the number of tokens per step, over all processes."""
        self.vocabulary, self.stages, self.tokens, self.seed = vocabulary, stages, tokens, seed
        self.process, self.num_processes = process, num_processes
        self._ends = list(accumulate(stage.steps for stage in stages))

    def __len__(self) -> int:
        return self._ends[-1]

    def length_of(self, number: int) -> int:
        """Return the sequence length of a batch, which is the same in all processes."""
        lengths = self._stage_of(number).lengths
        rng = random.Random(f"length {self.seed} {number}")
        return rng.choices(list(lengths), list(lengths.values()))[0]

    def _stage_of(self, number: int) -> Stage:
        return next(s for s, end in zip(self.stages, self._ends, strict=True) if number < end)

    def __getitem__(self, number: int) -> Batch:
        if not 0 <= number < len(self):
            raise IndexError(number)
        length, stage = self.length_of(number), self._stage_of(number)
        rows = max(1, self.tokens // length // self.num_processes)
        rng = random.Random(f"batch {self.seed} {number} {self.process}")
        draws = np.random.default_rng([self.seed, number, self.process])
        ids = np.full((rows, length), self.vocabulary["<|endoftext|>"], dtype=np.int64)
        weights = np.zeros((rows, RESPONSE), dtype=np.float32)
        # Stratified, so that every batch has responses from nearly empty to nearly full.
        times = (draws.permutation(rows) + draws.random(rows)) / rows
        for row in range(rows):
            start, end = self._write(rng, ids[row], stage.mix)
            masked = draws.random(length) < 1.0 - 0.95 * times[row] ** 2
            masked[:start] = False
            if rng.random() < HALF_WAY:
                masked[:] = False
                first = rng.randrange(start, end)
                if stage.unbegun and rng.random() < stage.unbegun:
                    first = start
                masked[first : end + rng.randint(0, LATE_PADDING)] = True
                if rng.random() >= stage.in_order:
                    masked[start:end] = False
                    masked[rng.sample(range(start, end), end - first)] = True
            weights[row] = masked[-RESPONSE:]
            weights[row, end - length :] *= PADDING_WEIGHT
            ids[row, masked] *= -1
        targets = np.abs(ids)
        seen = np.where(ids < 0, self.vocabulary["<|mask|>"], ids)
        return Batch(
            torch.from_numpy(seen),
            torch.from_numpy(targets[:, -RESPONSE:]),
            torch.from_numpy(weights),
        )

    def _write(
        self, rng: random.Random, ids: np.ndarray, mix: Mapping[str, float]
    ) -> tuple[int, int]:
        """Fill a row with an item; return where its answer and the padding after it start."""
        # Most responses have the usual length; a few are shorter.
        response = RESPONSE if rng.random() < 0.85 else rng.randint(20, RESPONSE)
        start = len(ids) - response
        item = make_item(rng, rng.choices(list(mix), list(mix.values()))[0], start)
        ids[:start] = self.vocabulary.encode(item.prompt)
        answer = self.vocabulary.encode((*item.answer, END))
        ids[start : start + len(answer)] = answer
        return start, start + len(answer)
