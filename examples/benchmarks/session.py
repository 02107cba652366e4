# SPDX-License-Identifier: Apache-2.0
"""Runs contenders on the same requests, in turn: A B C, C B A, A B C, ..."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ceilings import ModelShape
from checkpoints import special_ids
from programs import Job, Program, ProgramError

Settings = dict[str, Any]
#: What the baseline knows of the engine's settings.
BASELINE_SETTINGS = ("cache_policy", "block_length", "steps", "keep_ratio", "threshold")


@dataclass(frozen=True)
class Contender:
    """A program and the settings of its requests, under a name.

    Attributes:
        name: In the report.
        program: ``engine`` or ``baseline``.
        settings: Of its requests.
        num_requests: Prompts that it takes, the first ones; None for all.
    """

    name: str
    program: str
    settings: Settings
    num_requests: int | None = None

    @property
    def policy(self) -> str:
        return self.settings["cache_policy"]


@dataclass(frozen=True)
class Options:
    """How everything is measured.

    Attributes:
        dtype: Of the models.
        response: Positions of a response.
        block_length: Positions of a block.
        keep_ratio: Part of the keys that ``sparse`` keeps.
        repeats: Times that each contender runs.
        vanilla_steps: Steps that a run without a cache does at most; all its steps cost the
            same, so its time is scaled up. None for all steps.
        baseline_requests: Requests that the baseline does at most of those that are asked
            for; it does one after the other, so its rate is that of all. None for all.
        max_num_batched_tokens: The engine's, None for its default.
    """

    dtype: str
    response: int
    block_length: int
    keep_ratio: float
    repeats: int
    vanilla_steps: int | None
    baseline_requests: int | None
    max_num_batched_tokens: int | None


@dataclass
class Measurement:
    """A contender's runs of one workload.

    Attributes:
        sweep: What it was run for.
        turn: Those of one sweep and one turn ran in turn on the same requests.
        contender: Its name.
        program: ``engine`` or ``baseline``.
        settings: Of its requests.
        prompt: Tokens of the longest prompt.
        response: Positions of a response.
        concurrency: Requests submitted at once.
        seconds: Of each run of `num_requests`, scaled.
        num_requests: Requests that were run.
        scale: What times were multiplied by: steps of a whole response over steps run.
        peak_memory: Most bytes over the runs: resident, of the program's processes; on a GPU of
            tensors on it.
        cache_bytes: Most bytes of one request's cache, where the program says so.
        tokens: The responses of the last run.
        accuracy: Part of the right answers, for tasks.
        same_tokens: Whether the tokens are those of the baseline with the same settings;
            None in bfloat16, where another order of sums gives others.
        notes: What else a program of its own wants to know of it later.
    """

    sweep: str
    turn: int
    contender: str
    program: str
    settings: Settings
    prompt: int
    response: int
    concurrency: int
    num_requests: int
    scale: float
    seconds: list[float] = field(default_factory=list)
    peak_memory: int = 0
    cache_bytes: int | None = None
    tokens: list[list[int]] = field(default_factory=list)
    accuracy: float | None = None
    same_tokens: bool | None = None
    notes: Job = field(default_factory=dict)

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each run."""
        return [self.num_requests * self.response / seconds for seconds in self.seconds]

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Range of the times over their median."""
        return (max(self.seconds) - min(self.seconds)) / statistics.median(self.seconds)

    def speed_up(self, other: Measurement) -> float:
        """Return how many times as fast as another this is: the ratio of the medians."""
        return self.rate / other.rate

    def as_json(self) -> Job:
        names = (
            "sweep turn contender program settings prompt response concurrency num_requests scale "
            "seconds peak_memory cache_bytes accuracy same_tokens notes"
        )
        return {name: getattr(self, name) for name in names.split()} | {
            "tokens_per_second": self.rate
        }

    @classmethod
    def from_json(cls, content: Job) -> Measurement:
        """Return what `as_json` wrote down, without the tokens."""
        names = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})


class Session:
    """The programs of a run of the benchmark on one checkpoint.

    Args:
        model: Its directory.
        options: How everything is measured.
        logs: Folder for the programs' output.
        max_model_len: The engine's.
        max_num_seqs: The engine's.
        arguments: More of each program's command line.
        deadline: Of the monotonic clock: no contender is run once more when that would end later.
    """

    def __init__(
        self,
        model: Path,
        options: Options,
        logs: Path,
        max_model_len: int,
        max_num_seqs: int,
        arguments: Mapping[str, Sequence[str]] | None = None,
        deadline: float = math.inf,
    ) -> None:
        self.model = model
        self.options = options
        self.shape = ModelShape.of(model)
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.measurements: list[Measurement] = []
        self.deadline = deadline
        self._arguments = arguments or {}
        self._logs = logs
        self._turns = 0
        self._programs: dict[str, Program] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        for program in self._programs.values():
            program.stop()

    def prepare(self, *names: str) -> None:
        """Start programs, and wait until all are loaded and idle."""
        for name in names:
            if name not in self._programs:
                self._programs[name] = self._start(name)
        for program in self._programs.values():
            program.wait_until_ready()

    def _start(self, name: str) -> Program:
        arguments = [str(self.model), "--dtype", self.options.dtype]
        script = f"{name}.py"
        if name in ("engine", "engine-in-process"):
            script = "engine.py"
            arguments += ["--max-model-len", str(self.max_model_len)]
            arguments += ["--max-num-seqs", str(self.max_num_seqs)]
            if self.options.max_num_batched_tokens:
                budget = str(self.options.max_num_batched_tokens)
                arguments += ["--max-num-batched-tokens", budget]
            if name == "engine-in-process":
                arguments.append("--in-process")
        arguments += self._arguments.get(name, ())
        return Program(script, arguments, self._logs / f"{self.model.name}-{name}.log")

    def about(self) -> Job:
        """Return what the programs say of themselves."""
        return {name: program.wait_until_ready() for name, program in self._programs.items()}

    def run(self, program: str, job: Job) -> Job:
        """Have one program do one job, while the others wait.

        Raises:
            ProgramError: If it ended; started anew, it may do other jobs.
        """
        self.prepare(program)
        try:
            return self._programs[program].run(job)
        except ProgramError:
            self.stop(program)
            raise

    def stop(self, name: str) -> None:
        """End a program and free what it holds."""
        self._programs.pop(name).stop()

    def settings(self, policy: str, **changes: Any) -> Settings:
        """Return a policy's settings under this session's options."""
        base: Settings = {"cache_policy": policy, "block_length": self.options.block_length}
        if policy == "sparse":
            base["keep_ratio"] = self.options.keep_ratio
        return base | changes

    def prompts(self, length: int, num: int, seed: int = 0) -> list[list[int]]:
        """Return prompts of random ordinary tokens."""
        rng = random.Random(f"{length} {seed}")
        vocab = self.shape.vocab
        # The public models have their special tokens at the very end.
        highest = min(*special_ids(vocab).values(), vocab - vocab // 64)
        return [[rng.randrange(8, highest) for _ in range(length)] for _ in range(num)]

    def measure(
        self,
        sweep: str,
        contenders: list[Contender],
        prompts: list[list[int]],
        response: int | None = None,
    ) -> list[Measurement]:
        """Run contenders on prompts that are submitted at once.

        After the first round a contender has another only if there is time for one.
        """
        response = response or self.options.response
        self.prepare(*(contender.program for contender in contenders))
        jobs = [self.job_of(contender, prompts, response) for contender in contenders]
        self._turns += 1
        results = [
            Measurement(
                sweep,
                self._turns,
                contender.name,
                contender.program,
                contender.settings,
                max(map(len, prompts)),
                response,
                contender.num_requests or len(prompts),
                len(job["prompts"]),
                scale,
            )
            for contender, (job, scale) in zip(contenders, jobs, strict=True)
        ]
        for contender, (job, _) in zip(contenders, jobs, strict=True):
            self.run(contender.program, _warm_up(job))
        order = list(range(len(contenders)))
        for _ in range(self.options.repeats):
            start = time.monotonic()
            for number in order:
                result, (job, scale) = results[number], jobs[number]
                reply = self.run(result.program, job)
                result.seconds.append(reply["seconds"] * scale)
                result.peak_memory = max(result.peak_memory, reply["peak_memory"])
                result.cache_bytes = reply.get("cache_bytes")
                result.tokens = reply["tokens"]
            order.reverse()
            if 2 * time.monotonic() - start > self.deadline:
                break
        if self.options.dtype == "float32":
            _compare_tokens(results)
        self.measurements += results
        for result in results:
            print(
                f"  {sweep}: prompt {result.prompt}, {result.concurrency} at once, "
                f"{result.contender}: {result.rate:.2f} tokens/s",
                flush=True,
            )
        return results

    def job_of(
        self, contender: Contender, prompts: list[list[int]], response: int
    ) -> tuple[Job, float]:
        """Return what a contender does for prompts, and what its time is multiplied by."""
        options = self.options
        settings = dict(contender.settings)
        prompts = prompts[: contender.num_requests]
        scale = 1.0
        if options.vanilla_steps and contender.policy == "none" and not settings.get("threshold"):
            num_blocks = -(-response // settings["block_length"])
            steps = settings.get("steps") or response
            fewer = max(num_blocks, options.vanilla_steps // num_blocks * num_blocks)
            if fewer < steps:
                settings["steps"] = fewer
                scale = steps / fewer
        if contender.program == "baseline":
            settings = {k: v for k, v in settings.items() if k in BASELINE_SETTINGS}
            prompts = prompts[: options.baseline_requests]
        return {"prompts": prompts, "response": response, "settings": settings}, scale


def _warm_up(job: Job) -> Job:
    """Return a short job with steps of the same shapes, a late eviction among them."""
    block_length = min(job["settings"]["block_length"], job["response"])
    steps = min(4 + job["settings"].get("eviction_delay", 0), block_length)
    settings = job["settings"] | {"steps": steps, "block_length": block_length}
    return job | {"response": block_length, "settings": settings}


def _compare_tokens(results: list[Measurement]) -> None:
    """Note whether the engine gave the baseline's tokens where both did the same."""
    for result in results:
        for other in results:
            if result.program == "engine" and other.program == "baseline":
                same = all(
                    result.settings.get(name) == other.settings.get(name)
                    for name in BASELINE_SETTINGS
                )
                if same and set(result.settings) <= set(BASELINE_SETTINGS):
                    result.same_tokens = result.tokens[: other.num_requests] == other.tokens
