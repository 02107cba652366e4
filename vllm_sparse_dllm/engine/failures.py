# SPDX-License-Identifier: Apache-2.0
"""Requests that end without an answer by their own fault are told so: HTTP 400 in the server.

vLLM answers 500 to whatever ends with an error. Where the scheduler sends a reason with the end
(as ``stop_reason``, which offline users see on the output), the request itself left nothing to
write: its client gets a refusal with that reason, as at admission.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState


def install() -> None:
    """Put this into the front end of this process; may be repeated."""
    if getattr(RequestState, "tells_diffusion_failures", False):
        return
    RequestState.tells_diffusion_failures = True  # type: ignore[attr-defined]
    # Late: an engine core has no use for it.
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
        # A reason begins with what is wrong: the length, or what a grammar allows.
        parameter = "max_tokens" if stop_reason.startswith("max_tokens") else "structured_outputs"
        refusal = VLLMValidationError(stop_reason, parameter=parameter)
        # Of the errors that reach a client as they are, the one that also ends the request's
        # other samples.
        self.queue.put(InputStreamError(refusal))
        return None

    RequestState.make_request_output = make_request_output  # type: ignore[method-assign]
