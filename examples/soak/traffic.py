# SPDX-License-Identifier: Apache-2.0
"""Random requests over the whole API surface, each derived from the seed and its number alone."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "quality"))
from tasks import Vocabulary, make_item

Body = dict[str, Any]

CONTEXT = 2048
#: Ordinary tokens of the embedded model.
TOKENS = range(6, 1376)
MASK = 5
WORDS = "file name list object time default used method class given copy the get".split()
#: Two tokens, the bytes of "é", so a stop string made of it often spans two commits.
E_ACUTE = "é"
SPECIAL = ("<|mask|>", "<|endoftext|>", "<|eot_id|>", "<|startoftext|>", "<|user|>")
#: How a client behaves: ``vanish`` disconnects midway, ``slow`` reads slowly.
MANNERS = ("read", "vanish", "slow")


@dataclass(frozen=True)
class Plan:
    """One request, and what its answer must be.

    Attributes:
        number: The request's number, from which it was made.
        path: ``completions`` or ``chat/completions``.
        body: The request's body, ``stream`` included.
        manner: One of `MANNERS`.
        status: The expected HTTP status: 200, or a 4xx for bad input.
        named: Text that the error message of a refused request must contain.
        kind: Category in the report's counts.
    """

    number: int
    path: str
    body: Body
    manner: str = "read"
    status: int = 200
    named: str = ""
    kind: str = "good"


def make(number: int, seed: int) -> Plan:
    """Return request ``number`` of a run."""
    rng = random.Random(f"{seed}-{number}")
    if rng.random() < 0.12:
        return _bad(number, rng)
    path = rng.choice(("completions", "completions", "chat/completions"))
    body: Body = {"return_token_ids": True, "max_tokens": rng.choice((1, 2, 7, 16, 24, 33, 48))}
    body |= _prompt(rng, path, body)
    xargs = _decoding(rng)
    _sampling(rng, body)
    _constrain(rng, path, body, xargs)
    _presentation(rng, path, body, xargs)
    if path == "completions" and len(body["prompt"]) > CONTEXT // 2:
        # For long prompts, vLLM may cut max_tokens below the canvas's length or min_tokens, and the
        # second sequence of classifier-free guidance would exceed the token budget.
        for name in ("diffusion_canvas", "diffusion_cfg_scale"):
            xargs.pop(name, None)
        body.pop("min_tokens", None)
    if _draws(body, xargs):
        body["seed"] = rng.randrange(2**31)
        if rng.random() < 0.2 and body.get("temperature"):
            body["n"] = rng.choice((2, 3))
    if xargs:
        body["vllm_xargs"] = xargs
    manner = rng.choices(MANNERS, (85, 10, 5))[0]
    body["stream"] = manner == "slow" or rng.random() < 0.5
    if manner == "vanish":
        body["max_tokens"] = max(body["max_tokens"], 24)
    return Plan(number, path, body, manner, kind="good" if manner == "read" else manner)


@cache
def _vocabulary() -> Vocabulary:
    return Vocabulary(Path(__file__).parents[2] / "vllm_sparse_dllm" / "assets" / "tiny-llada")


def _text(rng: random.Random, words: int) -> str:
    parts = [
        rng.choice(WORDS) if rng.random() < 0.9 else str(rng.randrange(100)) for _ in range(words)
    ]
    if rng.random() < 0.15:
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(SPECIAL))
    if rng.random() < 0.15:
        parts.insert(rng.randrange(len(parts) + 1), rng.choice(("naïve", "日本", "🙂", "\0", "—")))
    return " ".join(parts)


def _prompt(rng: random.Random, path: str, body: Body) -> Body:
    if path == "chat/completions":
        messages = [{"role": "user", "content": _text(rng, rng.choice((1, 6, 20)))}]
        if rng.random() < 0.2:
            messages.insert(0, {"role": "system", "content": rng.choice(("", _text(rng, 4)))})
        return {"messages": messages}
    chance = rng.random()
    if chance < 0.02:
        # Fills the context to its last token.
        length = CONTEXT - body["max_tokens"]
        return {"prompt": [rng.choice(TOKENS) for _ in range(length)]}
    if chance < 0.03:
        # vLLM cuts max_tokens to what the context has left.
        return {"prompt": [rng.choice(TOKENS) for _ in range(CONTEXT - 1)]}
    if chance < 0.4:
        return {"prompt": _text(rng, rng.choice((1, 8, 30)))}
    if chance < 0.45:
        return {"prompt": [[rng.choice(TOKENS) for _ in range(rng.randint(1, 30))] for _ in "ab"]}
    if chance < 0.75:
        # Prompts that the embedded model can answer, each with a different answer.
        item = make_item(rng, rng.choice(("copy", "retrieval")), rng.choice((40, 90, 250)))
        return {"prompt": _vocabulary().encode(item.prompt)}
    return {"prompt": [rng.choice(TOKENS) for _ in range(rng.choice((1, 5, 40, 90, 250)))]}


def _decoding(rng: random.Random) -> Body:
    """Return the plugin's parameters."""
    own: Body = {}
    if rng.random() < 0.8:
        own["cache_policy"] = rng.choice(("none", "prefix", "dual", "sparse", "sparse"))
    if rng.random() < 0.7:
        own["block_length"] = rng.choice((1, 5, 8, 16, 32))
    count = rng.choice(("none", "none", "steps", "threshold", "factor"))
    if count == "steps":
        own["steps"] = rng.choice((1, 3, 8, 60))
    elif count == "threshold":
        own["threshold"] = rng.choice((0.2, 0.5, 0.9))
    elif count == "factor":
        own["factor"] = rng.choice((0.5, 1.0, 2.0))
    if rng.random() < 0.4:
        own["remasking"] = rng.choice(
            ("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "origin", "none")
        )
    choices: dict[str, tuple[Any, ...]] = {
        "keep_ratio": (0.1, 0.5, 0.7, 1.0),
        "kernel_size": (1, 3, 5),
        "delay_steps": (0, 1, 3),
        "granularity": ("token", "page"),
        "saliency": ("paper", "attention", "window"),
        "eviction_delay": (0, 1, 4),
        "refresh_interval": (1, 2, 3),
        "suffix_window": (0, 7, 64, "none"),
        "cfg_scale": (0, 0.5),
    }
    for name, values in choices.items():
        if (rng.random() < 0.25 and name != "cfg_scale") or rng.random() < 0.08:
            own[name] = rng.choice(values)
    if count in ("none", "steps") and own.get("remasking") != "origin" and rng.random() < 0.1:
        own["alg_temp"] = 0.4
    return {f"diffusion_{name}": value for name, value in own.items()}


def _sampling(rng: random.Random, body: Body) -> None:
    if rng.random() < 0.4:
        body["temperature"] = rng.choice((0.5, 1.0, 2.0))
        own: Body = {"top_p": 0.9, "top_k": 20, "min_p": 0.05}
        body |= {name: value for name, value in own.items() if rng.random() < 0.25}
    elif rng.random() < 0.5:
        body["temperature"] = 0
    if rng.random() < 0.6:
        body["ignore_eos"] = True


def _draws(body: Body, xargs: Body) -> bool:
    return bool(
        body.get("temperature")
        or xargs.get("diffusion_alg_temp")
        or xargs.get("diffusion_remasking") in ("random", "origin")
    )


#: Structured outputs, in every form in which a request can ask for them.
GRAMMARS: tuple[Body, ...] = (
    {"structured_outputs": {"choice": ["yes", "no", "naïve"]}},
    {"structured_outputs": {"regex": r"[a-z]{3}-\d{2}"}},
    {"structured_outputs": {"grammar": 'root ::= "<" [a-c]+ ">"'}},
    {"structured_outputs": {"json": {"type": "array", "items": {"const": 7}, "maxItems": 2}}},
    {"response_format": {"type": "json_object"}},
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "flag", "schema": {"type": "boolean"}},
        }
    },
)


PENALTIES: tuple[Body, ...] = (
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.4},
)


def _bias(rng: random.Random) -> dict[str, int]:
    return {str(rng.choice(TOKENS)): rng.choice((-100, 6)) for _ in range(5)}


def _constrain(rng: random.Random, path: str, body: Body, xargs: Body) -> None:
    """Add a grammar, or else a canvas or min_tokens, constraints and penalties."""
    if rng.random() < 0.12:
        body |= rng.choice(GRAMMARS)
        body.pop("ignore_eos", None)
        for name in ("steps", "remasking", "threshold", "factor", "alg_temp"):
            xargs.pop(f"diffusion_{name}", None)
        # Options that never rule out all tokens that the grammar allows.
        for option in (*PENALTIES, {"logit_bias": _bias(rng)}, {"bad_words": ["q", "the file"]}):
            if rng.random() < 0.25:
                body |= option
        return
    if rng.random() < 0.12:
        length = rng.randint(1, body["max_tokens"])
        xargs["diffusion_canvas"] = [
            MASK if rng.random() < 0.6 else rng.choice(TOKENS) for _ in range(length)
        ]
    elif rng.random() < 0.1:
        body["min_tokens"] = rng.randint(1, body["max_tokens"])
    options: tuple[Body, ...] = (
        *PENALTIES,
        {"logit_bias": _bias(rng)},
        {"bad_words": rng.sample(WORDS, 3) + ["the file"]},
        {"allowed_token_ids": rng.sample(TOKENS, 40)},
        {"repetition_detection": {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 4}},
    )
    for option in options:
        if rng.random() < 0.07:
            body |= option


def _presentation(rng: random.Random, path: str, body: Body, xargs: Body) -> None:
    """Add options that change when an answer ends or how it is presented."""
    chance = rng.random()
    if chance < 0.1:
        body["stop"] = rng.choice((["e"], [" name", "zz"], " ", ["naïve", "le", "\n"]))
    elif chance < 0.15:
        body["stop_token_ids"] = rng.sample(TOKENS, 200)
    elif chance < 0.2 and not body.keys() & {"structured_outputs", "response_format"}:
        body |= {"stop": [E_ACUTE * rng.randint(1, 2)], "temperature": 2.0, "top_k": 0}
        body["allowed_token_ids"] = E_ACUTE_TOKENS
        body.pop("bad_words", None)
        body.pop("logit_bias", None)
    if rng.random() < 0.1:
        body["include_stop_str_in_output"] = True
    if rng.random() < 0.1:
        body["skip_special_tokens"] = False
    if rng.random() < 0.15:
        xargs["diffusion_trace"] = rng.choice((1, 2))
    if rng.random() < 0.15:
        if path == "completions":
            body["logprobs"] = rng.choice((0, 2))
        else:
            body |= {"logprobs": True, "top_logprobs": rng.choice((0, 2))}
    elif path == "completions" and isinstance(body["prompt"], str) and rng.random() < 0.1:
        body["echo"] = True
        # With token ids in the response, vLLM would leave out the echoed prompt's text.
        del body["return_token_ids"]


#: Set by `learn`.
E_ACUTE_TOKENS: list[int] = []


def learn(tokens: list[int]) -> None:
    """Store the token ids of `E_ACUTE`, which depend on the tokenizer."""
    E_ACUTE_TOKENS[:] = sorted(set(tokens))


def _bad(number: int, rng: random.Random) -> Plan:
    path = rng.choice(("completions", "chat/completions"))
    question: Body = {"prompt": [77, 311, 316]}
    if path == "chat/completions":
        question = {"messages": [{"role": "user", "content": _text(rng, 4)}]}
    options = BAD + (BAD_COMPLETIONS if path == "completions" else BAD_CHATS)
    status, named, wrong = rng.choice(options)
    body = {**question, "max_tokens": 8, "stream": rng.random() < 0.3, **wrong}
    return Plan(number, path, body, status=status, named=named, kind="bad")


def _setting(name: str, value: Any) -> tuple[int, str, Body]:
    return 400, f"diffusion_{name}", {"vllm_xargs": {f"diffusion_{name}": value}}


#: Status, text in the error message, and fields added to a good request.
BAD: tuple[tuple[int, str, Body], ...] = (
    _setting("cache_policy", "lru"),
    _setting("keep_ratio", 0),
    _setting("kernel_size", 2),
    _setting("delay_steps", -1),
    _setting("saliency", "mine"),
    _setting("granularity", "line"),
    _setting("eviction_delay", 0.5),
    _setting("refresh_interval", 0),
    _setting("suffix_window", -1),
    _setting("block_length", "32"),
    _setting("steps", 0),
    _setting("remasking", "best"),
    _setting("threshold", 1.5),
    _setting("factor", -1),
    _setting("alg_temp", "hot"),
    _setting("cfg_scale", -1),
    _setting("canvas", []),
    _setting("canvas", [MASK] * 9),
    _setting("canvas", [100_000]),
    _setting("trace", 3),
    _setting("unheard_of", 1),
    (400, "diffusion_steps", {"diffusion_steps": 4}),
    (400, "guided_regex", {"guided_regex": "a"}),
    (400, "best_of", {"best_of": 3}),
    (400, "presence_penalty", {"presence_penalty": 2.5}),
    (400, "repetition_penalty", {"repetition_penalty": 0}),
    (400, "min_p", {"min_p": 1.5, "temperature": 1.0}),
    (400, "min_tokens", {"min_tokens": 9}),
    (400, "logit_bias", {"logit_bias": {"100000": 1}}),
    (400, "bad_words", {"bad_words": [""]}),
    (400, "allowed_token_ids", {"allowed_token_ids": []}),
    (400, "thinking_token_budget", {"thinking_token_budget": 4}),
    (400, "prompt_logprobs", {"prompt_logprobs": 1}),
    (400, "unclosed group", {"structured_outputs": {"regex": "("}}),
    (400, "ignore_eos", {"structured_outputs": {"regex": "a"}, "ignore_eos": True}),
    (400, "ends the text", {"structured_outputs": {"regex": "a"}, "allowed_token_ids": [7]}),
    # Detected only while the request runs.
    (
        400,
        "none at position 0",
        {"structured_outputs": {"regex": "a"}, "allowed_token_ids": [7, 1]},
    ),
    (400, "no token at position 0", {"structured_outputs": {"choice": ["<|mask|>"]}}),
    (400, "temperature", {"temperature": -1}),
    (400, "top_p", {"top_p": 0}),
    (400, "top_k", {"top_k": -3}),
    (400, "n must", {"n": 0}),
    (400, "n must", {"n": 10**9, "temperature": 1.0}),
    (400, "seed", {"seed": "x"}),
    (400, "max_tokens", {"max_tokens": 0}),
    (400, "max_tokens", {"max_tokens": CONTEXT + 1}),
    (400, "max_num_batched_tokens", {"max_tokens": 1200, "vllm_xargs": {"diffusion_cfg_scale": 1}}),
    (400, "kv_transfer_params", {"kv_transfer_params": {"a": 1}}),
    (400, "beam", {"use_beam_search": True, "n": 2}),
    (404, "absent", {"model": "absent"}),
)
BAD_COMPLETIONS: tuple[tuple[int, str, Body], ...] = (
    (400, "logprobs", {"logprobs": 1000}),
    (400, "prompt", {"prompt": ""}),
    (400, "prompt", {"prompt": []}),
    (400, "input tokens", {"prompt": [7] * (CONTEXT + 1)}),
    (400, "input tokens", {"prompt": "name " * 3 * CONTEXT}),
    (400, "vocabulary", {"prompt": [100_000]}),
    (400, "suffix", {"suffix": "end"}),
    (400, "prompt_logprobs", {"echo": True, "logprobs": 1}),
)
BAD_CHATS: tuple[tuple[int, str, Body], ...] = (
    (400, "logprobs", {"logprobs": True, "top_logprobs": 1000}),
    (400, "conversation", {"messages": []}),
    (400, "input tokens", {"messages": [{"role": "user", "content": "name " * 6000}]}),
    (400, "role", {"messages": [{"content": "a"}]}),
)
