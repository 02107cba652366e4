# SPDX-License-Identifier: Apache-2.0
"""Runs contenders on the same requests, in turn: A B C, C B A, A B C, ..."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ceilings import ModelShape
from checkpoints import mask_token_id, special_ids
from jobs import Settings, blocks_that_tell, canvas_of, check_canvas, warm_up
from programs import Job, Program, ProgramError, StartError

#: Times that a program may fail to start.
_MOST_FAILED_STARTS = 2
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
        one_step: Whether without a cache one step of a block is all that there is time for.
    """

    name: str
    program: str
    settings: Settings
    num_requests: int | None = None
    one_step: bool = False

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
        shorten_from: Requests at once from which on the engine does only as many blocks of each
            response as tell what all take; times are scaled up. None for never.
    """

    dtype: str
    response: int
    block_length: int
    keep_ratio: float
    repeats: int
    vanilla_steps: int | None
    baseline_requests: int | None
    max_num_batched_tokens: int | None
    shorten_from: int | None = None


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
    def summary(self) -> str:
        return (
            f"{self.sweep}: prompt {self.prompt}, {self.concurrency} at once, {self.contender}: "
            f"{self.rate:.2f} tokens/s"
        )

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


@dataclass
class Workload:
    """Contenders on the same requests.

    Attributes:
        results: What each of them did, one after the other.
        jobs: What each of them does in a round.
        num_rounds: Rounds that are done.
        seconds: What the last of them took, without warming up.
        failed: What ended contenders, by their places; they do not run again.
        warm: Which start of its program each place is warm in.
    """

    results: list[Measurement]
    jobs: list[Job]
    num_rounds: int = 0
    seconds: float = 0.0
    failed: dict[int, ProgramError] = field(default_factory=dict)
    warm: dict[int, int] = field(default_factory=dict)


class Session:
    """The programs of a run of the benchmark on one checkpoint.

    Args:
        model: Its directory.
        options: How everything is measured.
        logs: Folder for the programs' output.
        max_model_len: The engine's.
        max_num_seqs: The engine's.
        arguments: More of each program's command line.
        deadline: Of the monotonic clock: programs that have not answered by then are ended.
        starts: Seconds that programs take to start, by name: none is started that would be ready
            after the deadline.
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
        starts: Mapping[str, float] | None = None,
    ) -> None:
        self.model = model
        self.options = options
        self.shape = ModelShape.of(model)
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.measurements: list[Measurement] = []
        self.deadline = deadline
        self._starts = starts or {}
        self._arguments = arguments or {}
        self._logs = logs
        self._turns = 0
        self._programs: dict[str, Program] = {}
        self._num_starts: Counter[str] = Counter()
        self._failed_starts: Counter[str] = Counter()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        for program in self._programs.values():
            program.stop()

    def prepare(self, *names: str) -> None:
        """Start programs that do not run, and wait until all are loaded and idle.

        Raises:
            StartError: If one failed, now or too often, or there is no time left to start one.
        """
        missing = [name for name in dict.fromkeys(names) if name not in self._programs]
        for name in missing:
            if self._failed_starts[name] == _MOST_FAILED_STARTS:
                raise StartError(f"{name} is not started again: it failed to start before")
        start = max((self._starts.get(name, 0.0) for name in missing), default=0.0)
        if start > self.left:
            raise StartError(
                f"to start takes about {start:,.0f} s of {max(0.0, self.left):,.0f} s left"
            )
        for name in missing:
            self._programs[name] = self._start(name)
        failed = []
        for name in missing:
            try:
                about = self._programs[name].wait_until_ready(self.left)
            except ProgramError as error:
                self.stop(name)
                self._failed_starts[name] += 1
                failed.append(error)
            else:
                print(f"  {name} started in {about['start_seconds']:.0f} s", flush=True)
        if failed:
            raise StartError(str(failed[0]))

    def is_running(self, name: str) -> bool:
        """Return whether a program is started and has not failed."""
        return name in self._programs

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

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
        self._num_starts[name] += 1
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
            return self._programs[program].run(job, self.left)
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
        """Run contenders on prompts that are submitted at once."""
        self.prepare(*(contender.program for contender in contenders))
        workload = self.workload(sweep, contenders, prompts, response)
        for _ in range(self.options.repeats):
            self.round(workload)
            for error in workload.failed.values():
                raise error
        results = workload.results
        if self.options.dtype == "float32":
            _compare_tokens(results)
        self.measurements += results
        for result in results:
            print(f"  {result.summary}", flush=True)
        return results

    def workload(
        self,
        sweep: str,
        contenders: list[Contender],
        prompts: list[list[int]],
        response: int | None = None,
    ) -> Workload:
        """Return what contenders are to do on prompts that are submitted at once."""
        response = response or self.options.response
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
        return Workload(results, [job for job, _ in jobs])

    def round(self, workload: Workload) -> None:
        """Run each contender once more, before the first time warm; every other round backwards.

        One that fails is noted in the workload, and the others go on.
        """
        places = range(len(workload.results))
        for place in places:
            self._attempt(workload, place, self._warm)
        start = time.monotonic()
        for place in places[:: -1 if workload.num_rounds % 2 else 1]:
            self._attempt(workload, place, self._once)
        workload.num_rounds += 1
        workload.seconds = time.monotonic() - start

    def _attempt(self, workload: Workload, place: int, do: Callable[[Workload, int], None]) -> None:
        if place not in workload.failed:
            try:
                do(workload, place)
            except ProgramError as error:
                workload.failed[place] = error

    def _warm(self, workload: Workload, place: int) -> None:
        """Warm a contender up where its program has not done so since it started."""
        program = workload.results[place].program
        self.prepare(program)
        if workload.warm.get(place) != self._num_starts[program]:
            self.run(program, warm_up(workload.jobs[place]))
            workload.warm[place] = self._num_starts[program]

    def _once(self, workload: Workload, place: int) -> None:
        """Run a contender once and note what it took."""
        result, job = workload.results[place], workload.jobs[place]
        # Another contender may have ended the program.
        self._warm(workload, place)
        reply = self.run(result.program, job)
        if "canvas" in job["settings"]:
            check_canvas(job, reply, mask_token_id(self.model))
        result.seconds.append(reply["seconds"] * result.scale)
        result.peak_memory = max(result.peak_memory, reply["peak_memory"])
        result.cache_bytes = reply.get("cache_bytes")
        result.tokens = reply["tokens"]

    def job_of(
        self, contender: Contender, prompts: list[list[int]], response: int
    ) -> tuple[Job, float]:
        """Return what a contender does for prompts, and what its time is multiplied by."""
        options = self.options
        settings, block_length = dict(contender.settings), contender.settings["block_length"]
        prompts = prompts[: contender.num_requests]
        num_blocks = -(-response // block_length)
        blocks: Sequence[int] = range(num_blocks)
        all_steps = settings.get("steps") or response
        few = options.shorten_from is not None and len(prompts) >= options.shorten_from
        few = few and contender.program == "engine"
        if few:
            blocks = blocks_that_tell(settings, num_blocks)
            canvas = canvas_of(blocks, num_blocks, block_length, mask_token_id(self.model))
            settings["canvas"] = canvas[:response]
        steps = all_steps * len(blocks) // num_blocks
        if options.vanilla_steps and contender.policy == "none" and not settings.get("threshold"):
            most = 1 if contender.one_step else max(1, options.vanilla_steps // num_blocks)
            steps = min(steps, most * len(blocks))
        if settings.get("steps") or steps < all_steps * len(blocks) // num_blocks:
            settings["steps"] = steps
        if contender.program == "baseline":
            settings = {k: v for k, v in settings.items() if k in BASELINE_SETTINGS}
            prompts = prompts[: options.baseline_requests]
        job = {"prompts": prompts, "response": response, "settings": settings}
        return job, all_steps / steps


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
