# SPDX-License-Identifier: Apache-2.0
"""The offline side of the comparison, as a program: ``python offline.py IN OUT``.

IN is a JSON list of ``{"body"}``, the requests' bodies as sent to the server; for each, OUT has the
choices that `LLM` gives. All run in one batch, in an engine whose limits differ from the server's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from traffic import CONTEXT
from vllm import LLM, SamplingParams
from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

from vllm_sparse_dllm.assets import embedded_model

#: Fields of a body that `SamplingParams` does not have, or has in another form.
_OTHERS = (
    *("prompt", "messages", "stream", "echo", "return_token_ids", "vllm_xargs", "logprobs"),
    *("top_logprobs", "logit_bias", "response_format", "structured_outputs"),
    "repetition_detection",
)


def parameters(body: dict[str, Any], prompt_length: int) -> SamplingParams:
    """Return the sampling parameters that a body asks for.

    Args:
        body: The body of a good request.
        prompt_length: Tokens of its prompt; as in the server, ``max_tokens`` is cut to what the
            context has left.
    """
    given = {name: value for name, value in body.items() if name not in _OTHERS}
    given["max_tokens"] = min(given["max_tokens"], CONTEXT - prompt_length)
    scores = body.get("logprobs")
    given["logprobs"] = body.get("top_logprobs") if scores is True else scores
    if "logit_bias" in body:
        given["logit_bias"] = {int(token): value for token, value in body["logit_bias"].items()}
    if "repetition_detection" in body:
        given["repetition_detection"] = RepetitionDetectionParams(**body["repetition_detection"])
    wanted = body.get("structured_outputs")
    if form := body.get("response_format"):
        schema = form["type"] == "json_schema"
        wanted = {"json": form["json_schema"]["schema"]} if schema else {"json_object": True}
    if wanted:
        given["structured_outputs"] = StructuredOutputsParams(**wanted)
    return SamplingParams(
        **{"temperature": 0.0, **given}, extra_args=body.get("vllm_xargs") or None
    )


def main(given: Path, found: Path) -> None:
    """Answer the requests in one file and write the answers to another."""
    requests = json.loads(given.read_text(encoding="utf-8"))
    llm = LLM(embedded_model(), dtype="float32", kv_cache_memory_bytes=256 << 20)
    tokenizer = llm.get_tokenizer()
    prompts: list[list[int]] = []
    wanted: list[SamplingParams] = []
    owners: list[int] = []
    for number, request in enumerate(requests):
        body = request["body"]
        if "messages" in body:
            text = tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, tokenize=False
            )
            own = [tokenizer.encode(text, add_special_tokens=False)]
        elif isinstance(body["prompt"], str):
            own = [tokenizer.encode(body["prompt"])]
        else:
            own = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        for prompt in own:
            prompts.append(prompt)
            wanted.append(parameters(body, len(prompt)))
            owners.append(number)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    answers: list[list[dict[str, Any]]] = [[] for _ in requests]
    for owner, output in zip(owners, outputs, strict=True):
        for choice in output.outputs:
            tokens = list(choice.token_ids)
            scores = choice.logprobs
            answers[owner].append(
                {
                    "tokens": tokens,
                    "text": choice.text,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                    "logprobs": None
                    if scores is None
                    else [at[t].logprob for t, at in zip(tokens, scores, strict=True)],
                }
            )
    found.write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
