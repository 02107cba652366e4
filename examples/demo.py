# SPDX-License-Identifier: Apache-2.0
"""Answer a batch of prompts with a diffusion model in vLLM, without and with a sparse cache.

The embedded models (3 million parameters) were trained on synthetic tasks. They do well on two of
them: *retrieval* (a long list of words, each with a number; which numbers do these words have?) and
*copy* (a long text that contains a bracketed list; what is in the brackets?). The prompts are drawn
at random from a seed, so the right answers are known and can be counted.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Log only errors by default. Must be set before vLLM and PyTorch are imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from tqdm import tqdm

from vllm_sparse_dllm.assets import embedded_model, embedded_models

sys.path.append(str(Path(__file__).parent / "quality"))
from tasks import Item, make_item

if TYPE_CHECKING:
    from vllm import LLM

POLICIES = ("none", "sparse")
#: The tasks that the embedded models do well.
KINDS = ("retrieval", "copy")


def make_items(num: int, seed: int) -> list[Item]:
    """Return items of alternating kinds, with prompts of 256 to 512 tokens."""
    rng = random.Random(seed)
    return [make_item(rng, KINDS[i % 2], rng.randint(256, 512)) for i in range(num)]


@dataclass(frozen=True)
class Run:
    """Results of one policy: an answer for each item, and the time taken."""

    policy: str
    answers: list[str]
    num_tokens: int
    seconds: float

    @property
    def speed(self) -> float:
        return self.num_tokens / self.seconds

    def num_right(self, items: list[Item], kind: str) -> tuple[int, int]:
        """Return how many items of a kind were answered right, and how many there are."""
        pairs = zip(items, self.answers, strict=True)
        right = [a == item.answer_text.strip() for item, a in pairs if item.task == kind]
        return sum(right), len(right)


def run(llm: LLM, prompts: list[list[int]], policy: str, keep_ratio: float, max_tokens: int) -> Run:
    """Generate all responses under one cache policy."""
    from vllm import SamplingParams

    extra_args: dict[str, Any] = {"diffusion_cache_policy": policy}
    if policy == "sparse":
        extra_args["diffusion_keep_ratio"] = keep_ratio
    # With `ignore_eos` both policies fill every position of every response: the same work.
    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args
    )
    start = time.perf_counter()
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        params,
        use_tqdm=partial(_progress_bar, policy),
    )
    seconds = time.perf_counter() - start
    completions = [output.outputs[0] for output in outputs]
    answers = [completion.text.strip() for completion in completions]
    return Run(policy, answers, sum(len(c.token_ids) for c in completions), seconds)


def _progress_bar(policy: str, *prompts: Any, **options: Any) -> tqdm:
    """Make a progress bar for vLLM: hide the one that iterates over prompts, show the counter."""
    options |= {"desc": f"cache policy {policy:<6}", "unit": "prompt", "disable": bool(prompts)}
    return tqdm(*prompts, **options)


def shorten(text: str, width: int) -> str:
    """Return a text shortened to ``width``: its start and its end."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    head = width // 3
    return f"{text[:head]} ... {text[head + 5 - width :]}"


def report(items: list[Item], lengths: list[int], runs: list[Run], keep_ratio: float) -> None:
    """Print prompts, answers and the comparison."""
    for number, (item, length) in enumerate(zip(items, lengths, strict=True)):
        right = item.answer_text.strip()
        print(f"\n[{number + 1}] {item.task}, {length} tokens: {shorten(item.content, 72)}")
        for one in runs:
            answer = one.answers[number]
            verdict = "right" if answer == right else f"wrong, it is: {right}"
            print(f"    {one.policy:<6} -> {shorten(answer, 64)}  ({verdict})")

    kinds = [kind for kind in KINDS if any(item.task == kind for item in items)]
    print(f"\n{'cache policy':<24}{'tokens/s':>10}" + "".join(f"{kind:>14}" for kind in kinds))
    for one in runs:
        name = one.policy if one.policy != "sparse" else f"sparse (keeps {keep_ratio:g})"
        cells = [" of ".join(map(str, one.num_right(items, kind))) for kind in kinds]
        print(f"{name:<24}{one.speed:>10.1f}" + "".join(f"{cell:>14}" for cell in cells))
    base, *others = runs
    for one in others:
        print(f"\n{one.policy} is {one.speed / base.speed:.1f} times as fast as {base.policy}.")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model",
        default="tiny-llada",
        help=f"{' or '.join(embedded_models())}, which are embedded, or a checkpoint of their "
        "tokenizer; default: %(default)s",
    )
    parser.add_argument("--num-prompts", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--keep-ratio", type=float, default=0.5, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.num_prompts < 1:
        parser.error(f"--num-prompts must be at least 1, got {arguments.num_prompts}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    items = make_items(arguments.num_prompts, arguments.seed)

    print(f"Loading {arguments.model} (about half a minute) ...", flush=True)
    from vllm import LLM, SamplingParams

    embedded = arguments.model in embedded_models()
    llm = LLM(
        embedded_model(arguments.model) if embedded else arguments.model,
        max_model_len=1024 + arguments.max_tokens,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
        seed=arguments.seed,
        use_tqdm_on_load=False,
    )
    tokenizer = llm.get_tokenizer()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.content}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for item in items
    ]
    print("Warming up ...", flush=True)
    llm.generate([{"prompt_token_ids": prompts[0]}], SamplingParams(max_tokens=8), use_tqdm=False)
    runs = [
        run(llm, prompts, policy, arguments.keep_ratio, arguments.max_tokens) for policy in POLICIES
    ]
    report(items, [len(prompt) for prompt in prompts], runs, arguments.keep_ratio)
    if embedded:
        print("So few prompts tell little of what eviction costs: docs/quality.md has many.")


if __name__ == "__main__":
    main()
