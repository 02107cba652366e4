# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities on their way to vLLM's front end.

vLLM carries the log-probabilities of a step in arrays, all rows of one width. A fixed token has no
alternatives, so its row is shorter: it is filled up with NaN, which no log-probability is, and the
front end cuts it there. vLLM takes every number of a row for an alternative.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable

import numpy as np
from vllm.logprobs import PromptLogprobs, SampleLogprobs
from vllm.v1.engine import logprobs as front_end
from vllm.v1.outputs import LogprobsLists

#: Token ids and log-probabilities of a token, its own first, and its rank.
Entry = tuple[np.ndarray, np.ndarray, int]


def logprobs_lists(entries: list[list[Entry]]) -> LogprobsLists:
    """Return the log-probabilities of each request's new tokens as vLLM has them, a row a token."""
    rows = [entry for own in entries for entry in own]
    width = max(len(token_ids) for token_ids, _, _ in rows)
    ids = np.zeros((len(rows), width), dtype=np.int32)
    values = np.full((len(rows), width), np.nan, dtype=np.float32)
    for row, (token_ids, logprobs, _) in enumerate(rows):
        ids[row, : len(token_ids)] = token_ids
        values[row, : len(logprobs)] = logprobs
    ranks = np.array([rank for _, _, rank in rows], dtype=np.int32)
    ends = np.cumsum([len(own) for own in entries]).tolist()
    return LogprobsLists(ids, values, ranks, [0, *ends])


def install() -> None:
    """Cut short rows in this process's front end; may be called repeatedly."""
    original = front_end.append_logprobs_for_next_position
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def append(
        request_logprobs: PromptLogprobs | SampleLogprobs,
        token_ids: list[int],
        logprobs: list[float],
        decoded_tokens: Iterable[str | None],
        rank: int,
        num_logprobs: int,
    ) -> None:
        if math.isnan(logprobs[-1]):
            num = next(index for index, value in enumerate(logprobs) if math.isnan(value))
            token_ids, logprobs = token_ids[:num], logprobs[:num]
        original(request_logprobs, token_ids, logprobs, decoded_tokens, rank, num_logprobs)

    front_end.append_logprobs_for_next_position = append
