# SPDX-License-Identifier: Apache-2.0
"""Traces in vLLM's answers: offline and over HTTP, for the requests that ask for one.

The parts of a trace come with the engine's outputs in ``kv_transfer_params``, which vLLM passes
from scheduler to front end unread. There they are taken out, so that nothing else sees them, and
merged into the attribute ``diffusion_trace`` of the `CompletionOutput`. vLLM's OpenAI answers have
``kv_transfer_params`` once for all choices, and not at all when streamed; so the four methods that
build answers from outputs are wrapped and add ``diffusion_trace`` to each choice, in a stream to
the chunk that ends it. Other OpenAI and Anthropic endpoints refuse to trace. A request without
``diffusion_trace`` passes through untouched.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.output_processor import RequestState

from vllm_sparse_dllm.engine.trace import TRACE, finish, merge
from vllm_sparse_dllm.frontend.wrapping import wrap

_EVENT = "data: "


def install() -> None:
    """Add traces to the answers of this process's front end; may be called repeatedly."""
    # Imported late: an engine core does not need the server's modules.
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    _wrap_request_output()
    _wrap_stream(OpenAIServingChat, "chat_completion_stream_generator")
    _wrap_stream(OpenAIServingCompletion, "completion_stream_generator")
    _wrap_chat(OpenAIServingChat)
    _wrap_completion(OpenAIServingCompletion)
    # Their answers have no place for a trace.
    _refuse(OpenAIServingChatBatch, "create_batch_chat_completion")
    _refuse(OpenAIServingResponses, "create_responses")
    _refuse(AnthropicServingMessages, "create_messages")


def _wrap_request_output() -> None:
    parameters = ("new_token_ids", "pooling_output", "finish_reason", "stop_reason")

    @wrap(RequestState, "make_request_output", *parameters, "kv_transfer_params")
    def attach_trace(
        original: Any,
        self: RequestState,
        new_token_ids: list[int],
        pooling_output: Any,
        finish_reason: Any,
        stop_reason: int | str | None,
        kv_transfer_params: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        part = kv_transfer_params.get(TRACE) if kv_transfer_params else None
        if part is not None:
            kv_transfer_params = None
            if not hasattr(self, TRACE):
                setattr(self, TRACE, {})
            merge(getattr(self, TRACE), part)
        output = original(
            self,
            new_token_ids,
            pooling_output,
            finish_reason,
            stop_reason,
            kv_transfer_params,
            *args,
            **kwargs,
        )
        trace = getattr(self, TRACE, None)
        if trace:
            if finish_reason is not None and self.detokenizer is not None:
                # A stop string may end inside a part.
                finish(trace, self.detokenizer.num_output_tokens())
            _attach(self, output, trace)
        return output


def _attach(state: RequestState, output: Any, trace: dict[str, Any]) -> None:
    """Attach a request's trace to its completion, which may still wait for other samples."""
    if isinstance(output, RequestOutput):
        completions = output.outputs
    else:
        completions = state.parent_req.output_aggregator if state.parent_req is not None else []
    for completion in completions:
        if completion is not None and completion.index == state.request_index:
            # All outputs of a request share one trace: vLLM merges them for a slow reader.
            setattr(completion, TRACE, trace)


def _asks(request: Any) -> bool:
    """Return whether an HTTP request asks for a trace; its value was checked at admission."""
    given = getattr(request, "vllm_xargs", None)
    # Some endpoints do not check its type before admission does.
    return isinstance(given, dict) and bool(given.get(TRACE))


async def _watched(
    results: AsyncGenerator[Any, None], num_choices: int, traces: dict[int, Any]
) -> AsyncGenerator[Any, None]:
    """Pass outputs on and record their traces by the index of the choice."""
    async with aclosing(results):  # a client that leaves aborts its request at once
        async for result in results:
            number, output = result if isinstance(result, tuple) else (0, result)
            for completion in output.outputs:
                traces[completion.index + number * num_choices] = getattr(completion, TRACE, None)
            yield result


def _watch(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[inspect.BoundArguments, dict[int, Any]]:
    """Return a method's arguments with its outputs watched, and the dict that traces go to."""
    given = signature.bind(*args, **kwargs)
    traces: dict[int, Any] = {}
    given.arguments["result_generator"] = _watched(
        given.arguments["result_generator"], given.arguments["request"].n or 1, traces
    )
    return given, traces


def _wrap_stream(serving: type, name: str) -> None:
    signature = inspect.signature(getattr(serving, name))

    @wrap(serving, name, "request", named=("result_generator",))
    def stream_with_traces(
        original: Any, self: Any, request: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        if not _asks(request):
            events: AsyncGenerator[str, None] = original(self, request, *args, **kwargs)
            return events
        given, traces = _watch(signature, (self, request, *args), kwargs)
        return _with_traces(original(*given.args, **given.kwargs), traces)


async def _with_traces(
    events: AsyncGenerator[str, None], traces: dict[int, Any]
) -> AsyncGenerator[str, None]:
    """Add the trace of each choice to the event that ends it."""
    async with aclosing(events):
        async for event in events:
            text = event.removeprefix(_EVENT).strip()
            chunk = json.loads(text) if text.startswith("{") else {}
            last = [c for c in chunk.get("choices", ()) if c.get("finish_reason") is not None]
            for choice in last:
                choice[TRACE] = traces.get(choice["index"])
            yield f"{_EVENT}{json.dumps(chunk, ensure_ascii=False)}\n\n" if last else event


def _wrap_chat(serving: Any) -> None:
    name = "chat_completion_full_generator"
    signature = inspect.signature(getattr(serving, name))

    @wrap(serving, name, "request", named=("result_generator",))
    async def chat_with_traces(
        original: Any, self: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if not _asks(request):
            return await original(self, request, *args, **kwargs)
        given, traces = _watch(signature, (self, request, *args), kwargs)
        response = await original(*given.args, **given.kwargs)
        for choice in getattr(response, "choices", ()):
            setattr(choice, TRACE, traces.get(choice.index))
        return response


def _wrap_completion(serving: Any) -> None:
    name = "request_output_to_completion_response"

    @wrap(serving, name, "final_res_batch", "request")
    def completion_with_traces(
        original: Any,
        self: Any,
        final_res_batch: list[RequestOutput],
        request: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        response = original(self, final_res_batch, request, *args, **kwargs)
        if _asks(request):
            completions = [own for result in final_res_batch for own in result.outputs]
            for choice, completion in zip(response.choices, completions, strict=True):
                setattr(choice, TRACE, getattr(completion, TRACE, None))
        return response


def _refuse(serving: type, name: str) -> None:
    @wrap(serving, name, "request")
    async def refuse_to_trace(
        original: Any, self: Any, request: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if _asks(request):
            raise VLLMValidationError(
                f"{TRACE} must be 0 here, got {request.vllm_xargs[TRACE]!r}; /v1/completions and "
                "/v1/chat/completions return traces",
                parameter=TRACE,
                value=request.vllm_xargs[TRACE],
            )
        return await original(self, request, *args, **kwargs)
