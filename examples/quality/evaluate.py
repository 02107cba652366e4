# SPDX-License-Identifier: Apache-2.0
"""Count right answers of a checkpoint, through the engine, per task and length of prompt.

Items are held out: drawn with a seed of their own. Decoding is greedy, a token a step, in one
block, without a cache unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Only errors, unless asked for more. Must be set before vLLM is imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from tasks import RESPONSE, TASKS, Item, Vocabulary, held_out

from vllm_sparse_dllm.assets import embedded_model, embedded_models

if TYPE_CHECKING:
    from vllm import LLM

LENGTHS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Score:
    """How many of a cell's items were answered right."""

    task: str
    length: int
    num_right: int
    num_items: int

    @property
    def exact_match(self) -> float:
        return self.num_right / self.num_items

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.exact_match * (1 - self.exact_match) / self.num_items)

    def __str__(self) -> str:
        return f"{self.exact_match:.3f} ± {self.standard_error:.3f}"


class Evaluator:
    """Asks an engine and counts right answers; one engine serves many settings."""

    def __init__(self, llm: LLM, model: Path) -> None:
        self.llm = llm
        self.vocabulary = Vocabulary(model)

    def answers(self, items: Sequence[Item], **settings: Any) -> list[str]:
        """Return the text of each answer; ``settings`` are parameters without ``diffusion_``."""
        from vllm import SamplingParams

        extra = {f"diffusion_{name}": value for name, value in settings.items()}
        params = SamplingParams(temperature=0, max_tokens=RESPONSE, extra_args=extra)
        prompts = [{"prompt_token_ids": self.vocabulary.encode(item.prompt)} for item in items]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    def score(self, task: str, length: int, num: int, seed: int, **settings: Any) -> Score:
        items = held_out(task, length, num, seed)
        answers = self.answers(items, **settings)
        right = sum(a == item.answer_text for a, item in zip(answers, items, strict=True))
        return Score(task, length, right, num)


def start_engine(model: str, dtype: str) -> LLM:
    """Start an engine for the longest prompts of `LENGTHS`."""
    from vllm import LLM

    return LLM(
        model,
        dtype=dtype,
        max_model_len=max(LENGTHS) + RESPONSE,
        max_num_seqs=16,
        kv_cache_memory_bytes=256 << 20,
        use_tqdm_on_load=False,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "model", help=f"one of {', '.join(embedded_models())}, or a checkpoint's directory"
    )
    parser.add_argument("--items", type=int, default=100, help="of a cell; default: %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--seed", type=int, default=1, help="of the items; default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--settings",
        type=json.loads,
        default={"cache_policy": "none", "block_length": RESPONSE},
        help="request parameters as JSON, without the prefix diffusion_; default: %(default)s",
    )
    parser.add_argument("--json", type=Path, help="also write the scores to this file")
    arguments = parser.parse_args()
    if arguments.items < 1:
        parser.error(f"--items must be at least 1, got {arguments.items}")
    if not set(arguments.lengths) <= set(range(1, max(LENGTHS) + 1)):
        parser.error(f"--lengths must be at most {max(LENGTHS)}, got {arguments.lengths}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    named = arguments.model in embedded_models()
    model = embedded_model(arguments.model) if named else arguments.model
    evaluator = Evaluator(start_engine(model, arguments.dtype), Path(model))
    print(f"{arguments.model}: exact match ± standard error, {arguments.items} items a cell")
    print(f"| prompt | {' | '.join(arguments.tasks)} | seconds |")
    print("|---" * (len(arguments.tasks) + 2) + "|")
    scores = []
    for length in arguments.lengths:
        start = time.perf_counter()
        row = [
            evaluator.score(task, length, arguments.items, arguments.seed, **arguments.settings)
            for task in arguments.tasks
        ]
        scores += row
        seconds = time.perf_counter() - start
        print(f"| {length} | {' | '.join(map(str, row))} | {seconds:.0f} |", flush=True)
    if arguments.json:
        report = {
            "model": arguments.model,
            "settings": arguments.settings,
            "dtype": arguments.dtype,
            "seed": arguments.seed,
            "scores": [asdict(s) | {"standard_error": s.standard_error} for s in scores],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
