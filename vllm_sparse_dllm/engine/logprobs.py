# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities on their way to vLLM's front end.

vLLM carries the log-probabilities of a step in arrays, all rows of one width. A fixed token has no
alternatives, so its row is shorter: it is padded with NaN, which no log-probability is, and the
front end (`frontend/logprobs.py`) cuts it there.
"""

from __future__ import annotations

import numpy as np
from vllm.v1.outputs import LogprobsLists

#: Token ids and log-probabilities of a token, its own first, and its rank.
Entry = tuple[np.ndarray, np.ndarray, int]


def logprobs_lists(entries: list[list[Entry]]) -> LogprobsLists:
    """Return the log-probabilities of each request's new tokens in vLLM's form, a row per token."""
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
