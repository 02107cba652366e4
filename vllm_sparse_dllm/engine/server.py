# SPDX-License-Identifier: Apache-2.0
"""vLLM's HTTP server of a diffusion model: how it ends, and one field of the wrong type.

vLLM ends a server whose engine has died with status 0, as if it had been asked to; a service
manager then leaves it down. One of several API servers does not notice that an engine was killed:
the process above it does, and ends it, while its requests wait for ever. And vLLM's own check of
``structured_outputs`` takes for granted that the field is an object, and fails with 500 where it
is not. None has a hook, so `install` wraps `serve_http`, the call that a server spends its life
in.
"""

from __future__ import annotations

import asyncio
import functools
import reprlib
import sys
from collections.abc import Awaitable
from typing import Any

from vllm.exceptions import VLLMError, VLLMValidationError
from vllm.logger import init_logger
from vllm.v1.engine.exceptions import EngineDeadError

logger = init_logger("vllm." + __name__)

_ENTRY = "vllm.entrypoints.launchers.api_server.entry"
_FIELD = "structured_outputs"


def install() -> None:
    """Put all of it into this process's server, if it is one; may be repeated."""
    # Not imported: a process without it, with an `LLM` say, is no server.
    entry: Any = sys.modules.get(_ENTRY)
    if entry is None or hasattr(entry.serve_http, "__wrapped__"):
        return
    original = entry.serve_http

    @functools.wraps(original)
    async def serve_http(app: Any, *args: Any, **kwargs: Any) -> Awaitable[None]:
        app.add_exception_handler(AttributeError, _answer_wrong_type)
        # Built when vLLM made the application, before it had this handler; built anew, of all
        # that was added, by the first request.
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
                # No answer can come any more for those that still wait.
                fail = engine.output_processor.propagate_error
                loop.call_soon_threadsafe(fail, EngineDeadError())

        engine.shutdown = shutdown
        ending: Awaitable[None] = await original(app, *args, **kwargs)
        if engine.errored and not stopped:
            await ending
            logger.error("The engine has died, so the server ends, with an error status.")
            raise EngineDeadError()
        return ending

    entry.serve_http = serve_http


async def _answer_wrong_type(request: Any, error: Exception) -> Any:
    """Answer 400 where a field's type is what vLLM's validators stumbled over.

    Raises:
        Exception: The error, if it has another reason; vLLM answers 500.
    """
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
