# SPDX-License-Identifier: Apache-2.0
"""vLLM's sampling parameters that edit logits, defined for commits in any order.

Penalties count, and bad words match, all tokens committed in the response, in whatever order and
whether the model chose them or the request's canvas fixed them. No state is kept between steps:
everything follows from the canvas, so neither a burst nor a preemption can make a count wrong.
"""

from __future__ import annotations

import reprlib

import numpy as np
import torch
from vllm.sampling_params import SamplingParams

from vllm_sparse_dllm.denoise.constraints import (
    Add,
    Allow,
    BadWords,
    CommitCheck,
    ForbidFirst,
    ForbidWords,
    LogitsEdit,
    Repetition,
)

#: Wider than any practical use, narrow enough that float32 logits stay finite.
_REPETITION_RANGE = (0.01, 100.0)
_BIAS_LIMIT = 1e9
#: Most tokens in all bad words of a request: every commit is compared with each of them.
_MOST_BAD_TOKENS = 4096


def _is_constrained(sampling: SamplingParams) -> bool:
    return bool(
        sampling.allowed_token_ids is not None
        or sampling.bad_words_token_ids
        or sampling.min_tokens
        or sampling.logit_bias
        or sampling.presence_penalty
        or sampling.frequency_penalty
        or sampling.repetition_penalty != 1
    )


def check_constraints(sampling: SamplingParams, mask_token_id: int, vocab_size: int) -> None:
    """Refuse constraints that the engine cannot enforce or that may leave no token to commit.

    Raises:
        ValueError: Naming the parameter, its value and what is allowed.
    """
    low, high = _REPETITION_RANGE
    if not low <= sampling.repetition_penalty <= high:
        raise ValueError(
            f"repetition_penalty must be from {low} to {high}, got {sampling.repetition_penalty}"
        )
    for token_id, bias in (sampling.logit_bias or {}).items():
        number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not number or not abs(bias) <= _BIAS_LIMIT:
            raise ValueError(
                f"logit_bias must be numbers from -{_BIAS_LIMIT:g} to {_BIAS_LIMIT:g}, "
                f"got {bias!r} for token {token_id}"
            )
    allowed = sampling.allowed_token_ids
    if allowed is not None and not all(isinstance(token_id, int) for token_id in allowed):
        raise ValueError(f"allowed_token_ids must be integers, got {allowed!r}")
    if sampling.bad_words and sampling.bad_words_token_ids is None:
        raise ValueError(
            f"bad_words needs a tokenizer; it must be empty with skip_tokenizer_init, "
            f"got {sampling.bad_words!r}"
        )
    assert sampling.max_tokens is not None
    if sampling.min_tokens > sampling.max_tokens:
        raise ValueError(
            f"min_tokens must be at most max_tokens={sampling.max_tokens}, "
            f"got {sampling.min_tokens}"
        )
    num_bad = sum(map(len, sampling.bad_words_token_ids or ()))
    if num_bad > _MOST_BAD_TOKENS:
        raise ValueError(
            f"bad_words must have at most {_MOST_BAD_TOKENS} tokens, each written with and without "
            f"a space before it, got {num_bad}: {reprlib.repr(sampling.bad_words)}"
        )
    bad = {token_id for word in sampling.bad_words_token_ids or () for token_id in word}
    outside = [token_id for token_id in bad if not 0 <= token_id < vocab_size]
    if outside:
        raise ValueError(
            f"bad_words must be of tokens from 0 to {vocab_size - 1}, got {sampling.bad_words!r} "
            f"with tokens {sorted(outside)}"
        )
    # Commits come in any order, so any token of a bad word may be the last one missing.
    forbidden = bad | {mask_token_id}
    if sampling.min_tokens:
        forbidden |= sampling.all_stop_token_ids
    possible = vocab_size - len(forbidden) if allowed is None else len(set(allowed) - forbidden)
    if possible < 1:
        raise ValueError(
            "allowed_token_ids must hold a token that is not the mask id "
            f"({mask_token_id}), is in no bad word and, with min_tokens, is no stop token, "
            f"got {'all tokens' if allowed is None else reprlib.repr(allowed)}"
        )


class RequestConstraints:
    """A request's constraints.

    Args:
        sampling: vLLM's parameters of the request, checked at admission.
        prompt: ``[P]`` token ids.
        device: Device of the logits.
    """

    def __init__(self, sampling: SamplingParams, prompt: np.ndarray, device: torch.device) -> None:
        self._sampling = sampling
        self._device = device
        words = sampling.bad_words_token_ids or []
        self._bad_words = BadWords(tuple(word) for word in words) if words else None
        self._has_long_words = any(len(word) > 1 for word in words)
        self._stop_ids = np.array(sorted(sampling.all_stop_token_ids), dtype=np.int64)
        self._prompt_ids = np.unique(prompt)
        self._repetition: list[LogitsEdit] = []
        if sampling.repetition_penalty != 1:
            # The prompt can be long, so its ids are sent to the device only once.
            there = self._tensor(self._prompt_ids)
            self._repetition.append(Repetition(there, sampling.repetition_penalty))
        self._allow: list[LogitsEdit] = []
        if sampling.allowed_token_ids is not None:
            self._allow.append(Allow(self._tensor(np.unique(sampling.allowed_token_ids))))
        self._bias: list[LogitsEdit] = []
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias.items(), strict=True)
            self._bias.append(
                Add(self._tensor(np.array(ids)), self._tensor(np.array(values, np.float32)))
            )

    @classmethod
    def of(
        cls, sampling: SamplingParams, prompt: np.ndarray, device: torch.device
    ) -> RequestConstraints | None:
        """Return the request's constraints, None if it has none."""
        return cls(sampling, prompt, device) if _is_constrained(sampling) else None

    def edits(self, response: np.ndarray, candidates: np.ndarray) -> tuple[LogitsEdit, ...]:
        """Return the edits of a step, in the order in which vLLM applies its own.

        Args:
            response: ``[G]`` ids, `MASKED` where nothing is committed.
            candidates: ``[n]`` masked positions of it, ascending, at least one.
        """
        edits = list(self._allow)
        if self._bad_words is not None:
            edits.append(ForbidWords(self._bad_words, response, candidates))
        num_early = int(np.searchsorted(candidates, self._sampling.min_tokens))
        if num_early and len(self._stop_ids):
            edits.append(ForbidFirst(num_early, self._stop_ids))
        return (*edits, *self._bias, *self._penalties(response))

    def _penalties(self, response: np.ndarray) -> list[LogitsEdit]:
        sampling, penalties = self._sampling, list(self._repetition)
        by_count = sampling.frequency_penalty or sampling.presence_penalty
        if not penalties and not by_count:
            return penalties
        committed, counts = np.unique(response[response >= 0], return_counts=True)
        if penalties:
            last = len(self._prompt_ids) - 1
            places = np.searchsorted(self._prompt_ids, committed).clip(max=last)
            new = committed[self._prompt_ids[places] != committed]
            if len(new):
                penalties.append(Repetition(self._tensor(new), sampling.repetition_penalty))
        if by_count and len(committed):
            weights = sampling.frequency_penalty * counts + sampling.presence_penalty
            penalties.append(
                Add(self._tensor(committed), self._tensor(-weights.astype(np.float32)))
            )
        return penalties

    def check(self, response: np.ndarray, candidates: np.ndarray) -> CommitCheck | None:
        """Return the check of a step's commits, None if none is needed; arguments as in `edits`."""
        words = self._bad_words
        if words is None or not self._has_long_words or len(candidates) < 2:
            return None
        return lambda rows, tokens: words.compatible(response, candidates[rows], tokens)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
