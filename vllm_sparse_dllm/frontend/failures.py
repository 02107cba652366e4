# SPDX-License-Identifier: Apache-2.0
"""Refuses running requests that cannot be answered: HTTP 400 in the server, with the reason.

vLLM answers HTTP 500 to every request that ends with an error. If the scheduler ends one with a
reason (as ``stop_reason``, which offline users see on the output), the request is itself the cause,
and its client gets a refusal with that reason, as at admission.
"""

from __future__ import annotations

import re
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState

from vllm_sparse_dllm.frontend.wrapping import wrap


def install() -> None:
    """Wrap the output of this process's front end; may be called repeatedly."""
    # Imported late: an engine core does not need it.
    from vllm.v1.engine.async_llm import InputStreamError

    parameters = ("new_token_ids", "pooling_output", "finish_reason", "stop_reason")

    @wrap(RequestState, "make_request_output", *parameters)
    def refuse_failed_request(
        original: Any,
        self: RequestState,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        output = original(
            self, new_token_ids, pooling_output, finish_reason, stop_reason, *args, **kwargs
        )
        if finish_reason != FinishReason.ERROR or not isinstance(stop_reason, str):
            return output
        if self.queue is None:
            return output
        # Reasons begin with the field at fault.
        field = re.match(r"\w*", stop_reason)
        refusal = VLLMValidationError(stop_reason, parameter=field[0] if field else None)
        # vLLM passes the wrapped refusal to the client unchanged, and also aborts the request's
        # other samples.
        self.queue.put(InputStreamError(refusal))
        return None
