# SPDX-License-Identifier: Apache-2.0
"""Ways to choose what a cache keeps that no server could use: they know the item.

A method that does no better than `Random` and `Framed` has chosen nothing; one that equals
`Oracle` has found where the answer stands. A model may look elsewhere too, so a method can do
better still. All draw at random, in each layer anew, as the methods
choose in each layer anew; the draw is the same for the same prompt, whatever it is batched with.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tasks import Item, Vocabulary

from vllm_sparse_dllm.cache.saliency import (
    Saliency,
    SaliencyInputs,
    register_saliency,
    unregister_saliency,
)


class Control(Saliency):
    """Keeps some positions of the items it knows for certain, and of the rest any.

    Meant for ``kernel_size`` 1: a wider pool would keep the neighbours of what is certain too.

    Args:
        seed: Of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._certain: dict[bytes, np.ndarray] = {}

    def certain(self, item: Item) -> Sequence[int]:
        """Return the positions of the prompt that are kept before all others."""
        raise NotImplementedError

    def expect(self, items: Sequence[Item], vocabulary: Vocabulary) -> None:
        """Know these items, and no others, from now on."""
        self._certain = {
            np.array(vocabulary.encode(item.prompt), dtype=np.int64).tobytes(): np.array(
                self.certain(item), dtype=np.int64
            )
            for item in items
        }

    def score(self, inputs: SaliencyInputs) -> torch.Tensor:
        canvas = inputs.canvas
        prompt = canvas.token_ids[: canvas.prompt_length].astype(np.int64).tobytes()
        rng = np.random.default_rng([self.seed, zlib.crc32(prompt), inputs.layer, canvas.block[0]])
        scores = rng.random(len(canvas.token_ids), dtype=np.float32)
        scores[self._certain[prompt]] += 1.0
        chosen = np.concatenate([scores[start:end] for start, end in inputs.candidates])
        return torch.from_numpy(chosen).to(inputs.keys.device)


class Random(Control):
    """Keeps the question, and of the rest any."""

    name = "random"

    def certain(self, item: Item) -> Sequence[int]:
        return item.question


class Framed(Control):
    """Keeps the question and the chat template around the prompt, and of the rest any."""

    name = "framed"

    def certain(self, item: Item) -> Sequence[int]:
        return item.question + item.template


class Oracle(Control):
    """Keeps what `Framed` does and what the question asks about, and of the rest any."""

    name = "oracle"

    def certain(self, item: Item) -> Sequence[int]:
        return item.question + item.template + item.pivots


CONTROLS: tuple[type[Control], ...] = (Random, Framed, Oracle)


@contextmanager
def registered(seed: int) -> Iterator[dict[str, Control]]:
    """Let settings name the controls as saliencies, in engines of this process."""
    controls = {control.name: control(seed) for control in CONTROLS}
    for control in controls.values():
        register_saliency(control)
    try:
        yield controls
    finally:
        for name in controls:
            unregister_saliency(name)
