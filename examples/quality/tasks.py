# SPDX-License-Identifier: Apache-2.0
"""Questions with one right answer that depends on a few tokens of a long prompt.

Shared by training, evaluation and other examples. A prompt has an exact number of tokens of the
embedded models' tokenizer; every *piece* of it is one token.

    task        in the prompt, somewhere in filler        the answer
    retrieval   " file18 the42 name49 ... get name file"  " name49 file18"
    copy        "... [ file the name ] ... copy"          " file the name"
    reverse     "... [ file the name ] ... reverse"       " name the file"
    addition    "... 4 7+ 3 8 ... add"                    " 8 5"
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

#: Words that are one token each, with the space before them.
WORDS = [
    f" {word}"
    for word in Path(__file__).parents[1].joinpath("words.txt").read_text(encoding="utf-8").split()
]
VALUES = [f"{number:02d}" for number in range(100)]
OPEN, CLOSE, SPACE, PLUS = " [", " ]", " ", "+"
#: What the chat template puts around a prompt.
HEAD, TAIL = ("<|startoftext|>", "<|user|>"), ("<|eot_id|>", "<|assistant|>")
#: What follows an answer, and what fills the rest of a response.
END, PADDING = "<|eot_id|>", "<|endoftext|>"
#: Positions of a response, as in most of the models' training.
RESPONSE = 32
#: Length of the shortest prompt that every task fits into.
MIN_LENGTH = 32
#: Minimum and maximum: words of a list, digits of a number, keys that are asked for.
LISTED, DIGITS, ASKED = (4, 8), (2, 3), (1, 4)
#: Words that are not used as keys, so that there is filler.
NUM_FILLER = 20


@dataclass(frozen=True)
class Item:
    """A question and its answer, in pieces of one token each."""

    task: str
    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    #: Prompt positions that the answer depends on: what is asked about, and the question itself.
    pivots: tuple[int, ...]
    question: tuple[int, ...]

    @property
    def content(self) -> str:
        """The user's message; the chat template adds the rest."""
        return "".join(self.prompt[len(HEAD) : -len(TAIL)])

    @property
    def template(self) -> tuple[int, ...]:
        """Positions of what the chat template adds."""
        length = len(self.prompt)
        return (*range(len(HEAD)), *range(length - len(TAIL), length))

    @cached_property
    def answer_text(self) -> str:
        return "".join(self.answer)


@dataclass
class _Draft:
    """What a task puts into a prompt; `make_item` mixes it with filler."""

    #: Runs of pieces that stay together; their order is shuffled. The question asks about the
    #: first `num_asked`.
    segments: list[list[str]]
    num_asked: int
    question: list[str]
    answer: list[str]
    #: Words for filler: neither keys nor in a list.
    others: list[str]


def _pairs(rng: random.Random, words: list[str], num: int) -> list[list[str]]:
    """Take ``num`` keys off the end of ``words`` and give each a value."""
    return [[words.pop(), rng.choice(VALUES)] for _ in range(num)]


def _list(rng: random.Random, words: list[str], room: int) -> list[str]:
    most = min(LISTED[1], max(2, (room - 2) // 2))
    return [words.pop() for _ in range(rng.randint(min(LISTED[0], most), most))]


def _distractors(rng: random.Random, words: list[str], room: int) -> list[list[str]]:
    """Return pairs that the question does not ask about, for half of the prompts."""
    most = min(room // 2, len(words) - NUM_FILLER)
    return _pairs(rng, words, rng.randint(0, most) if most > 0 and rng.random() < 0.5 else 0)


def _retrieval(rng: random.Random, words: list[str], room: int) -> _Draft:
    """Draw as many pairs as fit in half of the prompts, and fewer, among filler, in the others."""
    num_asked = min(rng.randint(*ASKED), (room - 1) // 4)
    room -= 1 + num_asked
    most = min(room // 2, len(words) - NUM_FILLER)
    num = most if rng.random() < 0.5 else rng.randint(min(most, max(num_asked, most // 4)), most)
    pairs = _pairs(rng, words, num)
    asked = pairs[:num_asked]
    segments = list(pairs)
    if rng.random() < 0.25 and room - 2 * num >= 12:
        segments.append([OPEN, *_list(rng, words, 12), CLOSE])
    question = [" get", *(key for key, _ in asked)]
    return _Draft(segments, num_asked, question, [p for pair in asked for p in pair], words)


def _copy(rng: random.Random, words: list[str], room: int) -> _Draft:
    listed = _list(rng, words, room - 1)
    segments = [[OPEN, *listed, CLOSE]]
    segments += _distractors(rng, words, room - len(listed) - 3)
    return _Draft(segments, 1, [" copy"], listed, words)


def _reverse(rng: random.Random, words: list[str], room: int) -> _Draft:
    draft = _copy(rng, words, room)
    draft.question, draft.answer = [" reverse"], draft.answer[::-1]
    return draft


def _addition(rng: random.Random, words: list[str], room: int) -> _Draft:
    num_digits = rng.randint(*DIGITS)
    terms = [rng.randrange(10 ** (num_digits - 1), 10**num_digits) for _ in range(2)]
    first, second, total = ([p for d in str(n) for p in (SPACE, d)] for n in (*terms, sum(terms)))
    segments = [[*first, PLUS, *second]]
    segments += _distractors(rng, words, room - len(segments[0]) - 1)
    return _Draft(segments, 1, [" add"], total, words)


TASKS: dict[str, Callable[[random.Random, list[str], int], _Draft]] = {
    "retrieval": _retrieval,
    "copy": _copy,
    "reverse": _reverse,
    "addition": _addition,
}


def make_item(rng: random.Random, task: str, length: int) -> Item:
    """Return an item whose prompt has exactly ``length`` tokens, the chat template's included.

    Raises:
        ValueError: If there is no such task, or ``length`` is below `MIN_LENGTH`.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    if length < MIN_LENGTH:
        raise ValueError(f"length must be at least {MIN_LENGTH} tokens, got {length}")
    room = length - len(HEAD) - len(TAIL)
    draft = TASKS[task](rng, rng.sample(WORDS, len(WORDS)), room)
    num_filler = room - len(draft.question) - sum(map(len, draft.segments))
    segments = draft.segments + [[word] for word in rng.choices(draft.others, k=num_filler)]
    order = list(range(len(segments)))
    rng.shuffle(order)
    prompt, pivots = list(HEAD), []
    for number in order:
        if number < draft.num_asked:
            pivots += range(len(prompt), len(prompt) + len(segments[number]))
        prompt += segments[number]
    question = range(len(prompt), len(prompt) + len(draft.question))
    prompt += [*draft.question, *TAIL]
    assert len(prompt) == length
    return Item(task, tuple(prompt), tuple(draft.answer), tuple(pivots), tuple(question))


def held_out(task: str, length: int, num: int, seed: int = 1) -> list[Item]:
    """Return items for evaluation; training seeds its generators with other strings."""
    rng = random.Random(f"held out {task} {length} {seed}")
    return [make_item(rng, task, length) for _ in range(num)]


class Vocabulary:
    """Token ids of pieces, from a checkpoint's ``tokenizer.json``."""

    def __init__(self, checkpoint: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        digits = [str(digit) for digit in range(10)]
        words = [*WORDS, *VALUES, *digits, OPEN, CLOSE, SPACE, PLUS, " get", " copy", " reverse"]
        self._ids = {piece: self._only_id(tokenizer, piece) for piece in [*words, " add"]}
        for name in {*HEAD, *TAIL, END, PADDING, "<|mask|>"}:
            self._ids[name] = tokenizer.token_to_id(name)
        self.size = tokenizer.get_vocab_size()

    @staticmethod
    def _only_id(tokenizer: object, piece: str) -> int:
        ids = tokenizer.encode(piece, add_special_tokens=False).ids  # type: ignore[attr-defined]
        if len(ids) != 1:
            raise ValueError(f"the tokenizer must make one token of {piece!r}, it makes {len(ids)}")
        return ids[0]

    def __getitem__(self, piece: str) -> int:
        return self._ids[piece]

    def encode(self, pieces: tuple[str, ...]) -> list[int]:
        return [self._ids[piece] for piece in pieces]
