# SPDX-License-Identifier: Apache-2.0
"""Corrects vLLM's HTTP server of a diffusion model: how it ends, and a field of the wrong type.

When its engine has died, vLLM's server exits with status 0, as if it had been asked to, and a
service manager does not restart it. One of several API servers does not notice that an engine was
killed; its parent process does and ends it, while its requests wait forever. And vLLM's own check
of ``structured_outputs`` assumes that the field is an object, and otherwise answers HTTP 500. None
of these has a hook, so `install` wraps `serve_http`, the call in which a server spends its life.
"""

from __future__ import annotations

import asyncio
import reprlib
import sys
from collections.abc import Awaitable
from typing import Any

from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

from vllm_sparse_dllm.frontend.wrapping import wrap

logger = init_logger("vllm." + __name__)

_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_FIELD = "structured_outputs"


def install() -> None:
    """Install the corrections in this process if it is a server; may be called repeatedly."""
    # Not imported here: a process that has not imported it, as with an `LLM`, is no server.
    entry: Any = sys.modules.get(_ENTRY)
    if entry is None:
        return

    @wrap(entry, "serve_http", "app")
    async def serve_corrected(
        original: Any, app: Any, *args: Any, **kwargs: Any
    ) -> Awaitable[None]:
        app.add_exception_handler(AttributeError, _answer_wrong_type)
        # Built before the handler was added; the first request builds it again, with everything
        # that was added.
        app.middleware_stack = None
        engine = app.state.engine_client
        loop = asyncio.get_running_loop()
        stop = engine.shutdown
        stopped = False

        def shutdown(*args: Any, **kwargs: Any) -> None:
            nonlocal stopped
            first, stopped = not stopped, True
            stop(*args, **kwargs)
            if first:
                # Requests that still wait can get no answer any more.
                fail = engine.output_processor.propagate_error
                loop.call_soon_threadsafe(fail, EngineDeadError())

        engine.shutdown = shutdown
        ending: Awaitable[None] = await original(app, *args, **kwargs)
        if engine.errored and not stopped:
            await ending
            logger.error("The engine has died, so the server ends, with an error status.")
            raise EngineDeadError()
        return ending


async def _answer_wrong_type(request: Any, error: Exception) -> Any:
    """Answer HTTP 400 if the type of ``structured_outputs`` made vLLM's validators fail.

    Raises:
        Exception: The error, if it has another cause; vLLM then answers 500.
    """
    if not hasattr(request, "_body"):
        # Not read yet, or read by an inner handler that raised the error again: there may be
        # nothing left to receive, and reading would wait for ever.
        raise error
    try:
        value = (await request.json())[_FIELD]
    except (ValueError, TypeError, KeyError):
        raise error from None
    if value is None or isinstance(value, dict):
        raise error
    shown = reprlib.repr(value)
    refusal = VLLMValidationError(
        f"{_FIELD} must be an object, got {shown}", parameter=_FIELD, value=shown
    )
    return await request.app.exception_handlers[VLLMError](request, refusal)
