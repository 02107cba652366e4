# SPDX-License-Identifier: Apache-2.0
"""Requests that the engine and the slow reference are compared on."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm import LLM, SamplingParams

from tests.engines import sampling, scheduler_of
from tests.reference import Model, generate
from vllm_sparse_dllm.settings import SALIENCIES

POLICIES = ("none", "prefix", "dual", "sparse")
GREEDY_RULES = ("low_confidence", "maskgit_plus", "topk_margin", "entropy")
COUNTS = ("one_a_step", "fewer_steps", "more_steps", "threshold", "factor")
#: vLLM's own parameters, which get no prefix ``diffusion_``. The reference takes all options
#: without it.
VLLM_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "min_tokens", "ignore_eos", "logit_bias"),
    *("allowed_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty"),
)


@dataclass(frozen=True)
class Case:
    """One request: prompt, response length and settings."""

    prompt: list[int]
    max_tokens: int
    options: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None

    def __str__(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in self.options.items())
        return f"P{len(self.prompt)}-G{self.max_tokens}-{options}"

    def sampling(self) -> SamplingParams:
        given = dict(self.options)
        bad_words, stop_ids = given.pop("bad_words", None), given.pop("stop_ids", None)
        options = {
            (name if name in VLLM_NAMES else f"diffusion_{name}"): value
            for name, value in given.items()
        }
        params = sampling(self.max_tokens, seed=self.seed, stop_token_ids=stop_ids, **options)
        # vLLM stores the ids of `bad_words` here; these checkpoints have no tokenizer to make them.
        params._bad_words_token_ids = bad_words
        return params

    def expected(self, model: Model, page: int = 32, **more: Any) -> list[int]:
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        options = {**self.options, **more}
        return generate(
            model, self.prompt, self.max_tokens, page=page, generator=generator, **options
        )

    def closest_call(self, model: Model) -> float:
        """Return the smallest relative gap between the last confidence chosen and the next one."""
        leads: list[float] = []
        self.expected(model, leads=leads)
        return min(leads, default=math.inf)


def run_staggered(
    llm: LLM, cases: list[Case], rng: random.Random, preempt: bool = False
) -> list[list[int]]:
    """Add requests while others run, a random number of steps apart.

    Args:
        llm: An engine in this process.
        cases: What to run.
        rng: Decides the order and times.
        preempt: Preempt all running requests now and then.

    Returns:
        Response ids of each case.
    """
    engine, scheduler = llm.llm_engine, scheduler_of(llm)
    waiting = list(enumerate(cases))
    rng.shuffle(waiting)
    results: dict[str, list[int]] = {}
    while waiting or engine.has_unfinished_requests():
        for _ in range(rng.randint(0, 2)):
            if waiting:
                number, case = waiting.pop()
                engine.add_request(str(number), {"prompt_token_ids": case.prompt}, case.sampling())
        for _ in range(rng.randint(1, 4)):
            for output in engine.step():
                if output.finished:
                    results[output.request_id] = list(output.outputs[0].token_ids)
        if preempt and rng.random() < 0.1:
            scheduler.reset_prefix_cache(reset_running_requests=True)
    return [results[str(number)] for number in range(len(cases))]


def random_prompt(rng: random.Random, length: int, vocab: int) -> list[int]:
    """Return ordinary token ids."""
    return [rng.randrange(vocab - 8) for _ in range(length)]


def _count_options(rng: random.Random, count: str, max_tokens: int) -> dict[str, Any]:
    return {
        "one_a_step": {},
        "fewer_steps": {"steps": max(1, max_tokens // rng.choice((2, 3, 5)))},
        "more_steps": {"steps": max_tokens + rng.randint(1, max_tokens)},
        "threshold": {"threshold": rng.choice((0.2, 0.5, 0.9))},
        "factor": {"factor": rng.choice((0.5, 1.0, 2.0))},
    }[count]


def _sparse_options(rng: random.Random) -> dict[str, Any]:
    return {
        "keep_ratio": rng.choice((0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)),
        "kernel_size": rng.choice((1, 3, 5, 9)),
        "delay_steps": rng.choice((0, 1, 1, 2, 3, 40)),
        "granularity": rng.choice(("token", "token", "page")),
    }


def greedy_cases(seed: int, vocab: int) -> list[Case]:
    """Return a case for each policy, each non-random rule and each way to count commits."""
    rng = random.Random(seed)
    cases = []
    for policy, rule, count in itertools.product(POLICIES, GREEDY_RULES, COUNTS):
        max_tokens = rng.choice((1, 7, 16, 24, 40, 64))
        options: dict[str, Any] = {
            "cache_policy": policy,
            "remasking": rule,
            "block_length": rng.choice((1, 4, 8, 16, 32, 64)),
            **_count_options(rng, count, max_tokens),
        }
        if policy == "sparse":
            options |= _sparse_options(rng)
        prompt = random_prompt(rng, rng.choice((1, 5, 31, 64, 130, 250)), vocab)
        cases.append(Case(prompt, max_tokens, options))
    return cases


def plain_cases(block_length: int) -> list[Case]:
    """Return greedy cases of all policies; their steps need one copy each way at most."""
    options: list[dict[str, Any]] = [
        {"cache_policy": "none", "steps": 8},
        {"cache_policy": "prefix", "threshold": 0.3},
        {"cache_policy": "dual", "factor": 1.0},
        {"keep_ratio": 0.5},
        {"keep_ratio": 0.3, "delay_steps": 0, "eviction_delay": 2, "remasking": "entropy"},
        {"saliency": "window", "remasking": "topk_margin"},
        {"saliency": "attention", "keep_ratio": 0.4},
    ]
    return [
        Case([7 + i] * 60, 24, {"block_length": block_length, **own})
        for i, own in enumerate(options)
    ]


def drawn_cases(seed: int, vocab: int, guided: bool) -> list[Case]:
    """Return cases with random draws or guidance."""
    rng = random.Random(seed)
    variants: list[dict[str, Any]] = [
        {"remasking": "random"},
        {"remasking": "origin"},
        {"remasking": "origin", "steps": 8},
        {"temperature": 0.7},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 0.9, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.5, "top_k": 3, "threshold": 0.4},
        {"temperature": 0.5, "factor": 1.0},
        {"temperature": 0.8, "remasking": "entropy"},
        {"temperature": 0.8, "remasking": "topk_margin", "steps": 9},
        {"alg_temp": 0.4},
        {"alg_temp": 2.0, "temperature": 0.6, "remasking": "topk_margin"},
    ]
    if guided:
        variants += [
            {"cfg_scale": 0.5},
            {"cfg_scale": 1.5, "threshold": 0.6},
            {"cfg_scale": 1.0, "temperature": 0.7},
        ]
    cases = []
    for policy, variant in itertools.product(POLICIES, variants):
        max_tokens = rng.choice((8, 24, 33))
        options = {"cache_policy": policy, "block_length": rng.choice((8, 16, 32)), **variant}
        if policy == "sparse":
            options |= _sparse_options(rng)
        prompt = random_prompt(rng, rng.choice((3, 40, 90)), vocab)
        cases.append(Case(prompt, max_tokens, options, seed=rng.randrange(2**31)))
    return cases


def _bad_words(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Return options that allow few tokens, and forbid some of their pairs and triples."""
    few = rng.sample(range(vocab - 8), 6)
    pairs = [[a, b] for a in few[:5] for b in few[:5] if rng.random() < 0.4]
    triples = [[rng.choice(few[:5]) for _ in range(3)] for _ in range(6)]
    return {"allowed_token_ids": few, "bad_words": [*pairs, *triples, [few[0]], [vocab - 9]]}


def _canvas(rng: random.Random, vocab: int, mask: int, max_tokens: int) -> dict[str, Any]:
    """Return a canvas with scattered fixed tokens, and a run of them that can fill a block."""
    length = rng.choice((max_tokens, rng.randint(1, max_tokens)))
    share = rng.choice((0.1, 0.5, 0.9))
    canvas = [rng.randrange(vocab - 8) if rng.random() < share else mask for _ in range(length)]
    start = rng.randrange(length)
    canvas[start : start + 8] = [rng.randrange(vocab - 8) for _ in canvas[start : start + 8]]
    return {"canvas": canvas}


def constrained_cases(seed: int, vocab: int, mask: int, guided: bool) -> list[Case]:
    """Return cases of every policy with every constraint, alone and combined, and infilling."""
    rng = random.Random(seed)
    few_steps = {"steps": 6}
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
    cases = []
    for policy, number in itertools.product(POLICIES, range(16)):
        max_tokens = rng.choice((8, 17, 32, 40))
        bias = {rng.randrange(vocab - 8): rng.choice((-100.0, 2.5, 6.0)) for _ in range(20)}
        words = _bad_words(rng, vocab)
        canvas = _canvas(rng, vocab, mask, max_tokens)
        stops = {
            "stop_ids": rng.sample(range(vocab - 8), 60),
            "min_tokens": rng.randint(1, max_tokens),
            "ignore_eos": False,
        }
        everything = {**words, "logit_bias": bias, **penalties, "min_tokens": max_tokens // 2}
        own: dict[str, Any] = [
            {"temperature": 1.0, "min_p": 0.1},
            {"temperature": 1.0, "min_p": 0.02, "top_p": 0.9, "top_k": 4, **few_steps},
            stops,
            {**stops, "threshold": 0.1},
            {"logit_bias": bias},
            {**words, **few_steps},
            {**words, "threshold": 0.05},
            {"allowed_token_ids": words["allowed_token_ids"], "factor": 1.0},
            {"presence_penalty": 1.5, "frequency_penalty": -0.5},
            {"repetition_penalty": 1.5, **few_steps},
            {**everything, **few_steps, "temperature": 0.8},
            {**everything, "remasking": "origin", "steps": 3},
            canvas,
            {**canvas, **few_steps, "cfg_scale": 0.7 if guided else 0.0},
            {**canvas, **everything, "threshold": 0.1},
            {**canvas, **penalties, "temperature": 0.9, "remasking": "random"},
        ][number]
        options = {
            "cache_policy": policy,
            "remasking": rng.choice(GREEDY_RULES),
            "block_length": rng.choice((4, 8, 16, 32)),
            **own,
        }
        if "min_tokens" in own and "canvas" in own:
            options["min_tokens"] = 0
        if policy == "sparse":
            options |= _sparse_options(rng)
        prompt = random_prompt(rng, rng.choice((3, 40, 90)), vocab)
        cases.append(Case(prompt, max_tokens, options, seed=rng.randrange(2**31)))
    return cases


def saliency_cases(seed: int, vocab: int, guided: bool) -> list[Case]:
    """Return cases of every saliency but the published one, applied at a refresh or later."""
    rng = random.Random(seed)
    variants: list[dict[str, Any]] = [
        {},
        {"granularity": "page"},
        {"eviction_delay": 2},
        {"eviction_delay": 1, "refresh_interval": 2},
        {"refresh_interval": 3, "suffix_window": 4},
        {"cfg_scale": 1.0} if guided else {"suffix_window": 0},
    ]
    cases = []
    for saliency, variant in itertools.product(SALIENCIES[1:], variants):
        max_tokens = rng.choice((17, 24, 40))
        options = {
            "block_length": rng.choice((7, 8, 12)),
            "remasking": rng.choice(GREEDY_RULES),
            **_count_options(rng, rng.choice(COUNTS), max_tokens),
            **_sparse_options(rng),
            "delay_steps": rng.choice((0, 1)),
            **variant,
            "saliency": saliency,
        }
        # Some prompts are shorter than the end that `window` keeps, and some keep ratios too small
        # to keep all of that end.
        prompt = random_prompt(rng, rng.choice((1, 9, 40, 130)), vocab)
        cases.append(Case(prompt, max_tokens, options))
    return cases


def beyond_cases(seed: int, vocab: int, guided: bool, mask: int | None = None) -> list[Case]:
    """Return cases of late eviction, refresh intervals and suffix windows, mostly together.

    Blocks are many and short, so that each case has several refreshes or blocks without one; the
    last block is often shorter. Some blocks end before their refresh or their eviction. With
    ``mask``, every response is an infilling, in which some blocks may have nothing to write.
    """
    rng = random.Random(seed)
    variants = [
        {"suffix_window": 0},
        {"suffix_window": 5},
        {"suffix_window": 10_000},
        {"refresh_interval": 2},
        {"refresh_interval": 3},
        {"refresh_interval": 99},
        {"refresh_interval": 2, "suffix_window": 0},
        {"refresh_interval": 2, "suffix_window": 3},
        {"refresh_interval": 3, "suffix_window": 12},
        {"refresh_interval": 99, "suffix_window": 20},
    ]
    late = [
        {"eviction_delay": delay, **more}
        for delay in (1, 2, 5, 50)
        for more in ({}, *variants[3:10:3], variants[1], variants[8])
    ]
    cases = []
    for policy in POLICIES:
        for variant in variants + (late if policy == "sparse" else []):
            max_tokens = rng.choice((17, 24, 40, 50))
            options: dict[str, Any] = {
                "cache_policy": policy,
                "block_length": rng.choice((3, 7, 8, 12)),
                "remasking": rng.choice(GREEDY_RULES),
                **_count_options(rng, rng.choice(COUNTS), max_tokens),
                **variant,
            }
            if policy == "sparse":
                options |= _sparse_options(rng)
                options["delay_steps"] = rng.choice((0, 0, 1, 1, 2, 3, 5))
            if guided and rng.random() < 0.2:
                options["cfg_scale"] = 1.5
            if mask is not None:
                options |= _canvas(rng, vocab, mask, max_tokens)
            prompt = random_prompt(rng, rng.choice((1, 20, 64, 130)), vocab)
            drawn = rng.random() < 0.2
            if drawn:
                options |= {"temperature": 0.8}
            cases.append(
                Case(prompt, max_tokens, options, seed=rng.randrange(2**31) if drawn else None)
            )
    return cases
