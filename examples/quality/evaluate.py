# SPDX-License-Identifier: Apache-2.0
"""Count right answers of a checkpoint, through the engine, per task and length of prompt.

Items are held out: drawn from generators that training does not use. Decoding is greedy, one token
a step, in one block and without a cache, unless ``--settings`` says otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Log only errors by default. Must be set before vLLM is imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from tasks import END, MIN_LENGTH, PADDING, RESPONSE, TASKS, Item, Vocabulary, held_out

from vllm_sparse_dllm.assets import embedded_model, embedded_models

if TYPE_CHECKING:
    from vllm import LLM, CompletionOutput

#: Requests that the engine runs at once.
BATCH = 16
LENGTHS = (64, 128, 256, 512, 1024)
#: The values that a model argument accepts, for messages.
MODELS = f"one of {', '.join(embedded_models())}, or a checkpoint's directory"


@dataclass(frozen=True)
class Score:
    """Results of a cell: items of one task and length, submitted together.

    Attributes:
        right: For each item, whether its answer was right.
        passes: For each item, the number of forward passes that filled the response.
        seconds: Time for all items.
    """

    task: str
    length: int
    right: tuple[bool, ...]
    passes: tuple[int, ...]
    seconds: float

    @property
    def num_items(self) -> int:
        return len(self.right)

    @property
    def exact_match(self) -> float:
        return sum(self.right) / self.num_items

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.exact_match * (1 - self.exact_match) / self.num_items)

    @property
    def num_tokens(self) -> int:
        """Tokens of all responses; most of them are padding after the answer."""
        return RESPONSE * self.num_items

    def as_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "length": self.length,
            "num_items": self.num_items,
            "num_right": sum(self.right),
            "exact_match": self.exact_match,
            "standard_error": self.standard_error,
            "tokens_per_second": self.num_tokens / self.seconds,
            "tokens_per_step": self.num_tokens / sum(self.passes),
            "num_steps": sum(self.passes),
            "seconds": self.seconds,
            "right": "".join("01"[one] for one in self.right),
        }

    def __str__(self) -> str:
        return f"{self.exact_match:.3f} ± {self.standard_error:.3f}"


def is_right(item: Item, response: Sequence[int], vocabulary: Vocabulary) -> bool:
    """Return whether a response, up to its first end or padding token, is the answer."""
    ends = {vocabulary[END], vocabulary[PADDING]}
    answer = itertools.takewhile(lambda token: token not in ends, response)
    return list(answer) == vocabulary.encode(item.answer)


class Evaluator:
    """Submits items to an engine and counts right answers; one engine serves many settings."""

    def __init__(self, llm: LLM, model: Path) -> None:
        self.llm = llm
        self.vocabulary = Vocabulary(model)

    def ask(self, items: Sequence[Item], **settings: Any) -> list[CompletionOutput]:
        """Return the responses; ``settings`` are request parameters without ``diffusion_``.

        Every response is filled to its last position, so that all of them take the same work.
        """
        from vllm import SamplingParams

        extra = {f"diffusion_{name}": value for name, value in settings.items()}
        params = SamplingParams(
            temperature=0,
            max_tokens=RESPONSE,
            ignore_eos=True,
            detokenize=False,
            extra_args={**extra, "diffusion_trace": 1},
        )
        prompts = [{"prompt_token_ids": self.vocabulary.encode(item.prompt)} for item in items]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def score(self, task: str, length: int, num: int, seed: int, **settings: Any) -> Score:
        items = held_out(task, length, num, seed)
        start = time.perf_counter()
        responses = self.ask(items, **settings)
        seconds = time.perf_counter() - start
        pairs = zip(items, responses, strict=True)
        right = tuple(
            is_right(item, response.token_ids, self.vocabulary) for item, response in pairs
        )
        passes = tuple(response.diffusion_trace["nfe"] for response in responses)
        return Score(task, length, right, passes, seconds)


def start_engine(model: str, dtype: str, longest: int = max(LENGTHS)) -> LLM:
    """Start an engine for prompts of at most ``longest`` tokens."""
    from vllm import LLM

    return LLM(
        model,
        dtype=dtype,
        max_model_len=longest + RESPONSE,
        max_num_seqs=BATCH,
        kv_cache_memory_bytes=256 << 20,
        use_tqdm_on_load=False,
    )


def model_path(name: str) -> str:
    """Return a model's path; embedded models are given by name, all others by path."""
    return embedded_model(name) if name in embedded_models() else name


def is_model(name: str) -> bool:
    """Return whether a name is an embedded model's or the path of a checkpoint."""
    return name in embedded_models() or Path(name, "config.json").is_file()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help=MODELS)
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
    arguments = parser.parse_args(argv)
    if not is_model(arguments.model):
        parser.error(f"model must be {MODELS}, got {arguments.model!r}")
    if arguments.items < 1:
        parser.error(f"--items must be at least 1, got {arguments.items}")
    lengths = list(arguments.lengths)
    if not all(MIN_LENGTH <= length <= max(LENGTHS) for length in lengths):
        parser.error(f"--lengths must be from {MIN_LENGTH} to {max(LENGTHS)}, got {lengths}")
    if not isinstance(arguments.settings, dict):
        parser.error(f"--settings must be a JSON object, got {arguments.settings}")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"--json: there is no directory {arguments.json.parent}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    model = model_path(arguments.model)
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
            "scores": [score.as_json() for score in scores],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
