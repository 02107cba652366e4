# SPDX-License-Identifier: Apache-2.0
"""What a request forbids or favours: edits of its logits, and commits that exclude each other.

Edits act on the float32 logits of the request's candidates before anything is computed from
them, so that tokens are drawn from, and positions ranked by, the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

#: Stands for a masked position among token ids.
MASKED = -1


class LogitsEdit(Protocol):
    """A change of one request's logits in one step."""

    def apply(self, logits: torch.Tensor, first: int) -> None:
        """Change logits in place.

        Args:
            logits: ``[n, vocab]`` float32 of the request's candidates first, first + 1, ...
            first: Number of the first of these candidates; above 0 where the request's logits are
                computed in parts.
        """


#: Decides which commits of one step stand. Takes ``[k]`` candidate rows, surest first, and their
#: ``[k]`` tokens; returns ``[k]`` booleans, False for a row that stays masked.
CommitCheck = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Allow:
    """Allows only the given tokens.

    Attributes:
        token_ids: ``[k]`` distinct ids.
    """

    token_ids: torch.Tensor

    def apply(self, logits: torch.Tensor, first: int) -> None:
        kept = logits.index_select(-1, self.token_ids)
        logits.fill_(-torch.inf)
        logits.index_copy_(-1, self.token_ids, kept)


@dataclass(frozen=True)
class AllowMask:
    """Allows only the tokens of a bit mask, as grammars produce it.

    Attributes:
        bits: Host array of int32; token i is bit i % 32 of word i // 32.
    """

    bits: np.ndarray

    def apply(self, logits: torch.Tensor, first: int) -> None:
        allowed = np.unpackbits(
            self.bits.view(np.uint8), count=logits.shape[-1], bitorder="little"
        ).astype(bool)
        logits.masked_fill_(torch.from_numpy(~allowed).to(logits.device), -torch.inf)


@dataclass(frozen=True)
class Forbid:
    """Forbids some tokens at some candidates.

    Attributes:
        rows: ``[k]`` host array of candidates.
        token_ids: ``[k]`` host array, the token that each must not take.
    """

    rows: np.ndarray
    token_ids: np.ndarray

    def apply(self, logits: torch.Tensor, first: int) -> None:
        own = (self.rows >= first) & (self.rows < first + logits.shape[0])
        index = np.stack([self.rows[own] - first, self.token_ids[own]])
        rows, token_ids = torch.from_numpy(index).to(logits.device)
        logits[rows, token_ids] = -torch.inf


@dataclass(frozen=True)
class ForbidFirst:
    """Some tokens not at the first candidates.

    Attributes:
        num: How many candidates.
        token_ids: ``[k]`` host array.
    """

    num: int
    token_ids: np.ndarray

    def apply(self, logits: torch.Tensor, first: int) -> None:
        # A tokenizer's end of text may have an id that the model has not.
        own = torch.from_numpy(self.token_ids[self.token_ids < logits.shape[1]])
        rows = logits[: max(0, self.num - first)]
        rows.index_fill_(1, own.to(logits.device), -torch.inf)


@dataclass(frozen=True)
class Add:
    """Adds a value per token, the same at every candidate.

    Attributes:
        token_ids: ``[k]`` distinct ids.
        values: ``[k]`` float32.
    """

    token_ids: torch.Tensor
    values: torch.Tensor

    def apply(self, logits: torch.Tensor, first: int) -> None:
        logits.index_add_(-1, self.token_ids, self.values.expand(logits.shape[0], -1))


@dataclass(frozen=True)
class Repetition:
    """Penalises tokens that are already present: divides logits above 0, multiplies others.

    Attributes:
        token_ids: ``[k]`` distinct ids.
        penalty: Above 0.
    """

    token_ids: torch.Tensor
    penalty: float

    def apply(self, logits: torch.Tensor, first: int) -> None:
        own = logits.index_select(-1, self.token_ids)
        own = torch.where(own > 0, own / self.penalty, own * self.penalty)
        logits.index_copy_(-1, self.token_ids, own)


class BadWords:
    """Sequences of tokens that the response must not contain.

    Positions are committed in any order, so the last missing token of a word is forbidden,
    wherever in the word it is missing.

    Args:
        words: Token ids of each word, none empty.
    """

    def __init__(self, words: Iterable[tuple[int, ...]]) -> None:
        distinct = sorted(set(words), key=lambda word: (len(word), word))
        self._by_length = {
            length: np.array([word for word in distinct if len(word) == length])
            for length in sorted({len(word) for word in distinct})
        }

    @property
    def longest(self) -> int:
        """Tokens of the longest word."""
        return max(self._by_length)

    def forbidden(self, response: np.ndarray, candidates: np.ndarray) -> Forbid:
        """Return the edit that forbids tokens that would complete a word with committed ones.

        Args:
            response: ``[G]`` ids, `MASKED` where nothing is committed.
            candidates: ``[n]`` masked positions of the response, ascending, at least one.
        """
        rows, token_ids = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        row_of = np.full(len(response), -1)
        row_of[candidates] = np.arange(len(candidates))
        for length, words in self._by_length.items():
            start = max(0, int(candidates[0]) - length + 1)
            part = response[start : int(candidates[-1]) + length]
            if len(part) < length:
                continue
            windows = sliding_window_view(part, length)
            differs = windows[:, None, :] != words
            window, word = np.nonzero(differs.sum(axis=-1) == 1)
            missing = differs[window, word].argmax(axis=-1)
            # Ignore positions that are no candidates, and ones that hold another token.
            row = row_of[start + window + missing]
            own = (row >= 0) & (windows[window, missing] == MASKED)
            rows.append(row[own])
            token_ids.append(words[word, missing][own])
        return Forbid(np.concatenate(rows), np.concatenate(token_ids))

    def compatible(
        self, response: np.ndarray, positions: np.ndarray, tokens: np.ndarray
    ) -> np.ndarray:
        """Return which commits of one step can stand: one that completes a word cannot.

        Args:
            response: ``[G]`` ids, `MASKED` where nothing is committed before the step.
            positions: ``[k]`` positions to commit, surest first: each is checked together with
                the accepted ones before it.
            tokens: ``[k]`` their tokens.
        """
        response = response.copy()
        accepted = np.ones(len(positions), dtype=bool)
        for index, (position, token) in enumerate(zip(positions, tokens, strict=True)):
            response[position] = token
            if self._completes(response, int(position)):
                response[position] = MASKED
                accepted[index] = False
        return accepted

    def _completes(self, response: np.ndarray, position: int) -> bool:
        for length, words in self._by_length.items():
            part = response[max(0, position - length + 1) : position + length]
            if len(part) < length:
                continue
            windows = sliding_window_view(part, length)
            if (windows[:, None, :] == words).all(axis=-1).any():
                return True
        return False


@dataclass(frozen=True)
class ForbidWords:
    """Tokens that would complete a bad word; found for a part of the candidates at a time.

    Attributes:
        words: The bad words.
        response: ``[G]`` ids, `MASKED` where nothing is committed.
        candidates: ``[n]`` masked positions of it, ascending.
    """

    words: BadWords
    response: np.ndarray
    candidates: np.ndarray

    def apply(self, logits: torch.Tensor, first: int) -> None:
        own = self.candidates[first : first + logits.shape[0]]
        self.words.forbidden(self.response, own).apply(logits, 0)
