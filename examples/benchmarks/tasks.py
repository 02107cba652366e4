# SPDX-License-Identifier: Apache-2.0
"""Questions with one right answer for the embedded model, drawn at random from a seed.

*Retrieval*: a long list of words, each with a number; which numbers have these? *Copying*: a
long text with a bracketed list in it; what is in the brackets? It was trained on both.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Words that are one token each for the embedded model.
WORDS = Path(__file__).parents[1].joinpath("words.txt").read_text(encoding="utf-8").split()
#: Positions of a response that the model was trained for.
RESPONSE = 32
KINDS = ("copying", "retrieval")


@dataclass(frozen=True)
class Task:
    """A prompt's token ids and its only right answer."""

    prompt: list[int]
    answer: str


class Tasks:
    """Makes tasks and counts right answers, with a checkpoint's tokenizer."""

    def __init__(self, model: Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self.tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(model))

    def make(self, kind: str, num: int, length: int, seed: int) -> list[Task]:
        """Return tasks whose prompts have about ``length`` tokens."""
        rng = random.Random(f"{kind} {length} {seed}")
        make_one = {"copying": _copying, "retrieval": _retrieval}[kind]
        return [self._task(*make_one(rng, length)) for _ in range(num)]

    def _task(self, text: str, answer: str) -> Task:
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        return Task(list(ids), answer)

    def num_right(self, tasks: list[Task], responses: list[list[int]]) -> int:
        texts = (
            self.tokenizer.decode(response, skip_special_tokens=True).strip()
            for response in responses
        )
        return sum(t == task.answer for t, task in zip(texts, tasks, strict=True))


def _retrieval(rng: random.Random, length: int) -> tuple[str, str]:
    num_asked = rng.randint(1, 3)
    num_pairs = min((length - num_asked - 5) // 2, len(WORDS) - 1)
    pairs = [f"{word}{rng.randrange(100):02d}" for word in rng.sample(WORDS, num_pairs)]
    asked = rng.sample(pairs, num_asked)
    return " " + " ".join([*pairs, "get", *(pair[:-2] for pair in asked)]), " ".join(asked)


def _copying(rng: random.Random, length: int) -> tuple[str, str]:
    words = rng.sample(WORDS, len(WORDS))
    num_listed = rng.randint(4, 8)
    listed, others = words[:num_listed], words[num_listed:]
    text = rng.choices(others, k=length - num_listed - 7)
    place = rng.randint(0, len(text))
    prompt = [*text[:place], "[", *listed, "]", *text[place:], "copy"]
    return " " + " ".join(prompt), " ".join(listed)
