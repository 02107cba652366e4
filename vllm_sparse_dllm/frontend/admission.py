# SPDX-License-Identifier: Apache-2.0
"""Admission: every request is checked in the front end, before it reaches the engine.

A `RequestError` is a ``ValueError`` offline and HTTP 400 in the server. vLLM has a hook that
sees a request's parameters (`LogitsProcessor.validate_params`) but none that sees them together
with the prompt and the engine's configuration, and both decide whether a request can ever run;
so `install` wraps `InputProcessor.process_inputs` (and a method that beam search calls first), for
diffusion models only. In a server, fields of a request that vLLM does not know are checked too.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor

from vllm_sparse_dllm.cache.policies import POLICIES
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.config import DiffusionModelConfig, pages_of_an_engine, token_budget
from vllm_sparse_dllm.engine.constraints import check_constraints
from vllm_sparse_dllm.engine.structured_output import check_structured_output
from vllm_sparse_dllm.frontend import (
    failures,
    logprobs,
    metrics,
    server,
    structural_tag,
    traces,
)
from vllm_sparse_dllm.frontend.wrapping import wrap
from vllm_sparse_dllm.models.configs import model_traits
from vllm_sparse_dllm.settings import REQUEST_PREFIX, EngineSettings, request_settings

#: vLLM's parameters that are not supported, each with the values that request nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (None,),
    "prompt_logprob_token_ids": (None,),
    "prompt_logprob_start": (None,),
    "logprob_token_ids": (None,),
    "thinking_token_budget": (None,),
    "trace_decode_token_ids": (None,),
    "watermarking": (None, False),
    "routed_experts_prompt_start": (0,),
}


#: Attribute of `SamplingParams` from HTTP with the fields that vLLM's front end does not know.
_UNKNOWN_FIELDS = "unknown_fields"
_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)


class RequestError(VLLMValidationError, ValueError):
    """A request that cannot be served: `ValueError` offline, HTTP 400 in the server."""


def check_sampling(sampling: SamplingParams) -> None:
    """Refuse vLLM's parameters that diffusion models do not support.

    Raises:
        RequestError: Naming the parameter, its value and the value that is allowed.
    """
    for name, neutral in _NEUTRAL.items():
        value = getattr(sampling, name)
        # vLLM turns some lists into arrays, for which `in` is ambiguous.
        if not isinstance(value, int | None) or value not in neutral:
            # vLLM's front end turns this field of a server's request into `prompt_logprobs`.
            echo = " (echo with logprobs asks for it)" if name == "prompt_logprobs" else ""
            raise RequestError(
                f"{name} is not supported by diffusion models; it must be {neutral[0]!r}, "
                f"got {value!r}{echo}",
                parameter=name,
                value=value,
            )


def _check_transport(given: msgspec.Struct) -> None:
    """Refuse values that the messages between vLLM's processes cannot hold.

    vLLM would fail only when it sends the request to the engine: the client gets HTTP 500, and
    the front end keeps the request forever.

    Args:
        given: The request, or its parameters before vLLM passes their texts to the tokenizer,
            which must not receive invalid Unicode.

    Raises:
        RequestError: Naming the field, its value and what is allowed.
    """
    if _fits_message(given):
        return
    for name in given.__struct_fields__:
        value = getattr(given, name)
        if not _fits_message(value):
            raise RequestError(
                f"{name} must hold integers from -2**63 to 2**64 - 1 and valid Unicode only, "
                f"got {reprlib.repr(value)}",
                parameter=name,
                value=reprlib.repr(value),
            )


def _check_seeds(sampling: SamplingParams) -> None:
    """Refuse a seed from which the last of ``n`` samples would get one beyond 64 bits.

    Raises:
        RequestError: Naming the seed, its value and what is allowed.
    """
    largest = 2**64 - sampling.n
    if sampling.seed is not None and sampling.seed > largest:
        raise RequestError(
            f"seed must be at most 2**64 - n = {largest} with n={sampling.n}, whose samples have "
            f"the seeds seed, seed + 1, ..., got {sampling.seed}",
            parameter="seed",
            value=sampling.seed,
        )


def _fits_message(value: Any) -> bool:
    try:
        # vLLM checks the types; an object of an unknown type becomes null here.
        msgspec.msgpack.encode(value, enc_hook=lambda _: None)
    except (OverflowError, UnicodeEncodeError):
        return False
    return True


def check_request(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Refuse a request that cannot run.

    Raises:
        ValueError: Naming the field, its value and what is allowed.
    """
    sampling = request.sampling_params
    if sampling is None:
        raise RequestError("a diffusion model only generates text; pooling is not supported")
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        raise RequestError("prompt_embeds is not supported by diffusion models")
    if request.resumable:
        raise RequestError("streaming input is not supported by diffusion models")
    _check_transport(request)
    vocab_size = vllm_config.model_config.get_vocab_size()
    for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"prompt_token_ids must be from 0 to {vocab_size - 1}, got {token_id}",
                parameter="prompt_token_ids",
                value=token_id,
            )
    traits = model_traits(vllm_config.model_config.hf_config)
    engine = EngineSettings.from_additional_config(vllm_config.additional_config)
    settings = request_settings(engine, traits, sampling.extra_args)
    check_constraints(sampling, traits.mask_token_id, vocab_size)
    check_structured_output(sampling)

    assert sampling.max_tokens is not None
    if settings.canvas is not None:
        _check_canvas(settings.canvas, sampling, vocab_size)

    canvas = Canvas(len(request.prompt_token_ids), sampling.max_tokens, settings.block_length)
    lengths = (
        f"the prompt has {canvas.prompt_length} tokens and max_tokens is {sampling.max_tokens}"
    )
    context = vllm_config.model_config.max_model_len
    if canvas.length > context:
        raise RequestError(
            f"prompt and response must fit the context of {context} tokens, but {lengths}; "
            "lower max_tokens or raise max_model_len",
            parameter="max_tokens",
            value=sampling.max_tokens,
        )
    tokens = canvas.length * settings.num_sequences
    option, budget = token_budget(vllm_config.scheduler_config)
    if tokens > budget:
        guided = " and cfg_scale runs them twice" if settings.num_sequences > 1 else ""
        raise RequestError(
            f"a step of this request takes {tokens} tokens ({lengths}{guided}), more than "
            f"{option}={budget}; lower max_tokens or raise {option}",
            parameter="max_tokens",
            value=sampling.max_tokens,
        )
    cache = vllm_config.cache_config
    available = pages_of_an_engine(vllm_config)
    if available is not None:
        pages = POLICIES[settings.cache_policy].peak_pages(canvas, settings, cache.block_size)
        if pages > available:
            raise RequestError(
                f"this request needs {pages} cache pages of {cache.block_size} slots ({lengths}, "
                f"cache policy {settings.cache_policy}), but the pool has {available}; lower "
                "max_tokens or keep_ratio, or raise kv_cache_memory_bytes or "
                "gpu_memory_utilization",
                parameter="max_tokens",
                value=sampling.max_tokens,
            )


def _check_canvas(given: tuple[int, ...], sampling: SamplingParams, vocab_size: int) -> None:
    """Refuse a canvas that the response cannot have.

    Raises:
        RequestError: Naming the field, its value and what is allowed.
    """
    name = REQUEST_PREFIX + "canvas"
    stops = {sampling.eos_token_id, *(sampling.stop_token_ids or ())}
    assert sampling.max_tokens is not None
    if len(given) > sampling.max_tokens:
        raise RequestError(
            f"{name} must have at most max_tokens={sampling.max_tokens} ids, got {len(given)}",
            parameter=name,
            value=len(given),
        )
    for index, token_id in enumerate(given):
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"{name} must hold ids from 0 to {vocab_size - 1}, got {token_id} at {index}",
                parameter=name,
                value=token_id,
            )
        if index < sampling.min_tokens and token_id in stops:
            raise RequestError(
                f"{name} must hold no stop token before min_tokens={sampling.min_tokens}, "
                f"got {token_id} at {index}",
                parameter=name,
                value=token_id,
            )


def _check_unknown_fields(fields: Mapping[str, Any]) -> None:
    """Refuse unknown fields of an HTTP request that were meant to change its answer.

    The OpenAI API allows any field, and vLLM's front end drops those it does not know.

    Raises:
        RequestError: Naming the field, its value and what is allowed.
    """
    for name, value in fields.items():
        if value is None or (name == "best_of" and value == 1):
            continue
        if name.startswith(REQUEST_PREFIX):
            problem = "must be in vllm_xargs, not a field of the request"
        elif name == "best_of" or name.startswith("guided_") or name in _SAMPLING_FIELDS:
            problem = "is not a field of this server's requests; it must be absent"
        else:
            continue
        raise RequestError(
            f"{name} {problem}, got {reprlib.repr(value)}", parameter=name, value=value
        )


def install() -> None:
    """Add admission to vLLM's front end; may be called repeatedly."""
    _wrap_init()
    _wrap_process_inputs()
    _wrap_beam_search()


def _wrap_init() -> None:
    # Only front ends construct an `InputProcessor`, before anything else: the place to install
    # what only the front end of a diffusion model needs.
    @wrap(InputProcessor, "__init__")
    def install_the_rest(original: Any, self: InputProcessor, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if isinstance(self.model_config, DiffusionModelConfig):
            metrics.install()
            # Both wrap the same function: the trace is taken out before a failure is refused.
            traces.install()
            logprobs.install()
            failures.install()
            server.install()
            _keep_unknown_fields()


@contextmanager
def _refusals(vllm_config: VllmConfig) -> Iterator[None]:
    """Count a `ValueError` raised inside as a refusal, and raise it as a `RequestError`."""
    try:
        yield
    except ValueError as error:
        metrics.record_refusal(vllm_config)
        if isinstance(error, RequestError):
            raise
        raise RequestError(str(error)) from error


def _wrap_process_inputs() -> None:
    @wrap(InputProcessor, "process_inputs", "request_id", "prompt", "params")
    def check_inputs(
        original: Callable[..., EngineCoreRequest],
        self: InputProcessor,
        request_id: str,
        prompt: Any,
        params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> EngineCoreRequest:
        model_config = self.model_config
        if not isinstance(model_config, DiffusionModelConfig):
            return original(self, request_id, prompt, params, *args, **kwargs)
        given = params
        if isinstance(params, SamplingParams):
            with _refusals(self.vllm_config):
                _check_transport(params)
                _check_seeds(params)
                given = structural_tag.write_out(
                    params, self.structured_outputs_config, self.tokenizer
                )
        request = original(self, request_id, prompt, given, *args, **kwargs)
        sampling = request.sampling_params
        if sampling is not None and params.max_tokens is None:
            # Without `max_tokens`, vLLM fills up the context.
            assert sampling.max_tokens is not None
            sampling.max_tokens = min(sampling.max_tokens, model_config.default_response_length)
        with _refusals(self.vllm_config):
            if isinstance(params, SamplingParams):
                # The parameters as given: vLLM sets `watermarking` to False in its own copy.
                check_sampling(params)
                _check_unknown_fields(getattr(params, _UNKNOWN_FIELDS, {}))
            check_request(request, self.vllm_config)
        return request


def _wrap_beam_search() -> None:
    # Beam search reaches `process_inputs` only as requests of one token; both of its front ends
    # call this method first.
    @wrap(InputProcessor, "resolve_watermarking", "params")
    def refuse_beam_search(
        original: Callable[..., bool],
        self: InputProcessor,
        params: SamplingParams | BeamSearchParams,
    ) -> bool:
        if isinstance(params, BeamSearchParams) and isinstance(
            self.model_config, DiffusionModelConfig
        ):
            raise RequestError(
                "use_beam_search is not supported by diffusion models; it must be False, got True",
                parameter="use_beam_search",
                value=True,
            )
        return original(self, params)


def _keep_unknown_fields() -> None:
    """Attach the fields of HTTP requests that vLLM does not know to their `SamplingParams`."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    for request_type in (ChatCompletionRequest, CompletionRequest, ResponsesRequest):

        @wrap(request_type, "to_sampling_params")
        def keep_unknown_fields(
            original: Callable[..., SamplingParams], self: Any, *args: Any, **kwargs: Any
        ) -> SamplingParams:
            params = original(self, *args, **kwargs)
            setattr(params, _UNKNOWN_FIELDS, dict(self.model_extra or {}))
            return params
