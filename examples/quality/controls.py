# SPDX-License-Identifier: Apache-2.0
"""Controls for saliencies: ways to choose keys that no server could use, since they know the item.

A saliency that does no better than `Random` and `Framed` has selected nothing useful; one that
equals `Oracle` has found all there is to find. Like saliencies, controls choose separately in each
layer; draws depend on the prompt, not on the requests that it is batched with.
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
    """Always keeps certain positions of the items it knows, and of the rest those `rest` chooses.

    Meant for ``kernel_size`` 1: a wider pool would also keep the neighbours of those positions.

    Args:
        seed: Seed of the draws.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._certain: dict[bytes, np.ndarray] = {}

    def certain(self, item: Item) -> Sequence[int]:
        """Return the prompt positions that are kept before all others."""
        raise NotImplementedError

    def expect(self, items: Sequence[Item], vocabulary: Vocabulary) -> None:
        """Replace the known items by these; their requests follow."""
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
        """Score the positions to keep beyond the certain ones, by default at random.

        Args:
            inputs: The inputs of `score`.
            positions: ``[n]``, the candidates' positions.
            prompt: A hash of the prompt.

        Returns:
            ``[n]`` float32 scores in [0, 1).
        """
        canvas = inputs.canvas
        rng = np.random.default_rng([self.seed, prompt, inputs.layer, canvas.block[0]])
        return rng.random(len(canvas.token_ids), dtype=np.float32)[positions]


class Random(Control):
    """Keeps the question, and random positions of the rest."""

    name = "random"

    def certain(self, item: Item) -> Sequence[int]:
        return item.question


class Framed(Control):
    """Keeps the question and the chat template around it, and random positions of the rest."""

    name = "framed"

    def certain(self, item: Item) -> Sequence[int]:
        return item.question + item.template


class Oracle(Control):
    """Keeps what `Framed` keeps and what the question asks about, then what `Window` chooses.

    So it knows where the answer is, and lets the model choose what else to keep.
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
    """Register the controls as saliencies for engines in this process."""
    controls = {control.name: control(seed) for control in CONTROLS}
    for control in controls.values():
        register_saliency(control)
    try:
        yield controls
    finally:
        for name in controls:
            unregister_saliency(name)
