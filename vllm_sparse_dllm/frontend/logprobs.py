# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of tokens that have no alternatives, because the request fixed them.

vLLM takes every number of a row for an alternative. The engine pads such rows with NaN
(`engine/logprobs.py`), and here they end there.
"""

from __future__ import annotations

import math
from typing import Any

from vllm.v1.engine import logprobs as vllm_logprobs

from vllm_sparse_dllm.frontend.wrapping import wrap


def install() -> None:
    """Cut padded rows in this process's front end; may be called repeatedly."""
    leading = ("request_logprobs", "token_ids", "logprobs")

    @wrap(vllm_logprobs, "append_logprobs_for_next_position", *leading)
    def append_unpadded(
        original: Any,
        request_logprobs: Any,
        token_ids: list[int],
        logprobs: list[float],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if math.isnan(logprobs[-1]):
            num = next(index for index, value in enumerate(logprobs) if math.isnan(value))
            token_ids, logprobs = token_ids[:num], logprobs[:num]
        original(request_logprobs, token_ids, logprobs, *args, **kwargs)
