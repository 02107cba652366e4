# SPDX-License-Identifier: Apache-2.0
"""Requests for rows of the table in docs/parameters.md; `effects` has rows honoured over HTTP."""

from __future__ import annotations

from typing import Any

from vllm.sampling_params import (
    RepetitionDetectionParams,
    RequestOutputKind,
    StructuredOutputsParams,
)

Fragment = dict[str, Any]

#: Offline: for each accepted field of `SamplingParams`, parameters with which a request must be
#: answered.
ACCEPTED_OFFLINE: dict[str, Fragment] = {
    "n": {"n": 2, "temperature": 1.0},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.9, "temperature": 1.0},
    "top_k": {"top_k": 5, "temperature": 1.0},
    "min_p": {"min_p": 0.1, "temperature": 1.0},
    "seed": {"seed": 7},
    "max_tokens": {"max_tokens": 3},
    "min_tokens": {"min_tokens": 3},
    "stop": {"stop": ["name", "x"]},
    "stop_token_ids": {"stop_token_ids": [7, 8]},
    "ignore_eos": {"ignore_eos": True},
    "bad_words": {"bad_words": ["name", "the file"]},
    "allowed_token_ids": {"allowed_token_ids": [7, 8, 9]},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": -0.5},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "flat_logprobs": {"flat_logprobs": True},
    "detokenize": {"detokenize": False},
    "skip_special_tokens": {"skip_special_tokens": False},
    "spaces_between_special_tokens": {"spaces_between_special_tokens": False},
    "include_stop_str_in_output": {"include_stop_str_in_output": True, "stop": ["name"]},
    "stream_interval": {"stream_interval": 3},
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
#: Over HTTP: for each refused field, fields added to a request, and text that the message must
#: contain.
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
    # Honoured according to the table, but not with these values and by this server.
    "echo": ({"echo": True}, "prompt_logprobs"),
    "chat_template": ({"chat_template": "{{ messages }}"}, "chat template"),
}
#: Offline: for each refused field of `SamplingParams`, a value, and a pattern of the message.
REFUSED_OFFLINE: dict[str, tuple[Any, str]] = {
    "prompt_logprobs": (1, "prompt_logprobs"),
    "prompt_logprob_token_ids": ([[7, 8]], "prompt_logprob_token_ids"),
    "prompt_logprob_start": (1, "prompt_logprob_start"),
    "logprob_token_ids": ([7], "logprob_token_ids"),
    "thinking_token_budget": (4, "thinking_token_budget"),
    "trace_decode_token_ids": ([7], "trace_decode_token_ids"),
    "watermarking": (True, "watermarking"),
    "routed_experts_prompt_start": (1, "routed_experts_prompt_start"),
}
