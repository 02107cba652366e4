# SPDX-License-Identifier: Apache-2.0
"""Refuses running requests that cannot be answered: HTTP 400 in the server, with the reason.

vLLM answers HTTP 500 to every request that ends with an error. If the scheduler ends one with a
reason (as ``stop_reason``, which offline users see on the output), the request is itself the cause,
and its client gets a refusal with that reason, as at admission.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState


def install() -> None:
    """Wrap the output of this process's front end; may be called repeatedly."""
    if getattr(RequestState, "tells_diffusion_failures", False):
        return
    RequestState.tells_diffusion_failures = True  # type: ignore[attr-defined]
    # Imported late: an engine core does not need it.
    from vllm.v1.engine.async_llm import InputStreamError

    original = RequestState.make_request_output

    @functools.wraps(original)
    def make_request_output(
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
        told = finish_reason == FinishReason.ERROR and isinstance(stop_reason, str)
        if not told or self.queue is None:
            return output
        assert isinstance(stop_reason, str)
        # Reasons begin with the field at fault.
        field = re.match(r"\w*", stop_reason)
        refusal = VLLMValidationError(stop_reason, parameter=field[0] if field else None)
        # vLLM passes the wrapped refusal to the client unchanged, and also aborts the request's
        # other samples.
        self.queue.put(InputStreamError(refusal))
        return None

    RequestState.make_request_output = make_request_output  # type: ignore[method-assign]
