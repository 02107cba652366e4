# SPDX-License-Identifier: Apache-2.0
"""Ways to choose what a cache keeps that no server could use: they know the item.

A method that does no better than `Random` and `Framed` has chosen nothing; one that equals
`Oracle` has found all there is to find. All choose in each layer anew, as the methods do; a draw
is the same for the same prompt, whatever it is batched with.
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
    Window,
    register_saliency,
    unregister_saliency,
)


class Control(Saliency):
    """Keeps some positions of the items it knows for certain, and of the rest any or its choice.

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
        positions = np.concatenate([np.arange(start, end) for start, end in inputs.candidates])
        scores = self.rest(inputs, positions, zlib.crc32(prompt))
        scores[np.isin(positions, self._certain[prompt])] += 1.0
        return torch.from_numpy(scores).to(inputs.keys.device)

    def rest(self, inputs: SaliencyInputs, positions: np.ndarray, prompt: int) -> np.ndarray:
        """Score what is kept after what is certain: here, at random.

        Args:
            inputs: Of `score`.
            positions: ``[n]`` of the candidates.
            prompt: A number that stands for the prompt.

        Returns:
            ``[n]`` float32 numbers from 0 to below 1.
        """
        canvas = inputs.canvas
        rng = np.random.default_rng([self.seed, prompt, inputs.layer, canvas.block[0]])
        return rng.random(len(canvas.token_ids), dtype=np.float32)[positions]


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
    """Keeps what `Framed` does and what the question asks about, then what `Window` chooses.

    So it knows where the answer is, and asks the model for what else it looks at.
    """

    name = "oracle"

    def certain(self, item: Item) -> Sequence[int]:
        return item.question + item.template + item.pivots

    def rest(self, inputs: SaliencyInputs, positions: np.ndarray, prompt: int) -> np.ndarray:
        scores = Window().score(inputs)
        return (scores.argsort(stable=True).argsort() / len(scores)).float().cpu().numpy()


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
