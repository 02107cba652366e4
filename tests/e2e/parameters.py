# SPDX-License-Identifier: Apache-2.0
"""Every row of the table in docs/parameters.md as requests: what is sent, what comes back."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    StructuredOutputsParams,
)

Fragment = dict[str, Any]

#: Over HTTP. Field: what a request gets added, that must be answered.
ACCEPTED: dict[str, Fragment] = {
    "n": {"n": 2, "temperature": 1.0},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.9, "temperature": 1.0},
    "top_k": {"top_k": 5, "temperature": 1.0},
    "min_p": {"min_p": 0.1, "temperature": 1.0},
    "seed": {"seed": 7},
    "max_tokens": {"max_tokens": 3},
    "max_completion_tokens": {"max_completion_tokens": 3},
    "min_tokens": {"min_tokens": 3},
    "stop": {"stop": ["name", "x"]},
    "stop_token_ids": {"stop_token_ids": [7, 8]},
    "ignore_eos": {"ignore_eos": True},
    "logit_bias": {"logit_bias": {"7": 1.5, "8": -200}},
    "bad_words": {"bad_words": ["name", "the file"]},
    "allowed_token_ids": {"allowed_token_ids": [7, 8, 9]},
    "structured_outputs": {"structured_outputs": {"choice": ["a"]}},
    "response_format": {"response_format": {"type": "json_object"}},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": -0.5},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "flat_logprobs": {"flat_logprobs": True},
    "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True},
    "return_token_ids": {"return_token_ids": True},
    "return_prompt_text": {"return_prompt_text": True},
    "detokenize": {"detokenize": False},
    "skip_special_tokens": {"skip_special_tokens": False},
    "spaces_between_special_tokens": {"spaces_between_special_tokens": False},
    "include_stop_str_in_output": {"include_stop_str_in_output": True, "stop": ["name"]},
    "stream": {"stream": False},
    "stream_interval": {"stream_interval": 3},
    "repetition_detection": {
        "repetition_detection": {"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 2}
    },
    "vllm_xargs": {"vllm_xargs": {"diffusion_steps": 2}},
    "model": {"model": "tiny"},
    "prompt": {"prompt": [[7, 8], [9]]},
    "messages": {"messages": [{"role": "user", "content": "a"}]},
    "add_special_tokens": {"add_special_tokens": False},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 2},
    "truncation_side": {"truncation_side": "left", "truncate_prompt_tokens": 2},
    "add_generation_prompt": {"add_generation_prompt": True},
    "continue_final_message": {"continue_final_message": True, "add_generation_prompt": False},
    "chat_template_kwargs": {"chat_template_kwargs": {"x": 1}},
    "documents": {"documents": [{"title": "a", "text": "b"}]},
    "tools": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "none",
    },
    "tool_choice": {"tool_choice": "none"},
    "parallel_tool_calls": {"parallel_tool_calls": False},
    "reasoning_effort": {"reasoning_effort": "low"},
    "include_reasoning": {"include_reasoning": False},
    "priority": {"priority": 3},
    "request_id": {"request_id": "mine"},
    "session_id": {"session_id": "mine"},
    "user": {"user": "me"},
    "cache_salt": {"cache_salt": "salt"},
    "length_penalty": {"length_penalty": 1.5},
    "media_io_kwargs": {"media_io_kwargs": {}},
    "mm_processor_kwargs": {"mm_processor_kwargs": {}},
    "mm_payload": {"mm_payload": "none"},
    "return_mm_kwargs": {"return_mm_kwargs": True},
    "return_token_offsets": {"return_token_offsets": True},
}
#: As `ACCEPTED`, where the two endpoints differ.
ACCEPTED_COMPLETION: dict[str, Fragment] = {
    "logprobs": {"logprobs": 2},
    "echo": {"echo": True},
    "stream_options": {},
}
ACCEPTED_CHAT: dict[str, Fragment] = {
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "stream_options": {},
}
#: Field: what a request gets added, and what the message of the refusal names.
REFUSED: dict[str, tuple[Fragment, str]] = {
    "prompt_logprobs": ({"prompt_logprobs": 0}, "prompt_logprobs"),
    "thinking_token_budget": ({"thinking_token_budget": 4}, "thinking_token_budget"),
    "watermarking": ({"watermarking": True}, "watermarking"),
    "routed_experts_prompt_start": (
        {"routed_experts_prompt_start": 1},
        "routed_experts_prompt_start",
    ),
    "use_beam_search": ({"use_beam_search": True}, "beam"),
    "kv_transfer_params": ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    "ec_transfer_params": ({"ec_transfer_params": {"a": 1}}, "ec_transfer_params"),
}
REFUSED_COMPLETION: dict[str, tuple[Fragment, str]] = {
    "logprob_token_ids": ({"logprob_token_ids": [7], "logprobs": 1}, "logprob_token_ids"),
    "suffix": ({"suffix": "end"}, "suffix"),
    "prompt_embeds": ({"prompt_embeds": "AAAA"}, "prompt"),
}
REFUSED_CHAT: dict[str, tuple[Fragment, str]] = {
    "logprob_token_ids": (
        {"logprob_token_ids": [7], "logprobs": True, "top_logprobs": 1},
        "logprob_token_ids",
    ),
    # Honoured in the table, but not by this server and not with these values.
    "echo": ({"echo": True}, "prompt_logprobs"),
    "chat_template": ({"chat_template": "{{ messages }}"}, "chat template"),
}
#: Offline: fields of `SamplingParams` that HTTP has not, or has in another form.
ACCEPTED_OFFLINE: dict[str, Fragment] = {
    "logprobs": {"logprobs": 2},
    "logit_bias": {"logit_bias": {7: 1.5, 8: -200.0}},
    "repetition_detection": {
        "repetition_detection": RepetitionDetectionParams(
            max_pattern_size=1, min_pattern_size=1, min_count=2
        )
    },
    "output_kind": {"output_kind": RequestOutputKind.FINAL_ONLY},
    "extra_args": {"extra_args": {"diffusion_steps": 2}},
    "structured_outputs": {"structured_outputs": StructuredOutputsParams(choice=["a"])},
    "skip_reading_prefix_cache": {"skip_reading_prefix_cache": True},
    "skip_clone": {"skip_clone": True},
    "output_text_buffer_length": {"output_text_buffer_length": 3},
}
#: Offline: fields of `SamplingParams` with a value that is refused.
REFUSED_OFFLINE: dict[str, tuple[Any, str]] = {
    "prompt_logprobs": (1, "prompt_logprobs"),
    "prompt_logprob_token_ids": ([[7]], "prompt_logprob_token_ids"),
    "prompt_logprob_start": (1, "prompt_logprob_start"),
    "logprob_token_ids": ([7], "logprob_token_ids"),
    "thinking_token_budget": (4, "thinking_token_budget"),
    "trace_decode_token_ids": ([7], "trace_decode_token_ids"),
    "watermarking": (True, "watermarking"),
    "routed_experts_prompt_start": (1, "routed_experts_prompt_start"),
}
