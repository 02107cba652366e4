# SPDX-License-Identifier: Apache-2.0
"""Run contenders alternately on the same requests: A B C, C B A, A B C, ..."""

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

#: Failed starts after which a program is not started again.
_MOST_FAILED_STARTS = 2
#: The engine's settings that the baseline supports.
BASELINE_SETTINGS = ("cache_policy", "block_length", "steps", "keep_ratio", "threshold")


@dataclass(frozen=True)
class Contender:
    """A program and the settings of its requests, under a name.

    Attributes:
        name: Name in the report.
        program: ``engine`` or ``baseline``.
        settings: Settings of its requests.
        num_requests: Number of prompts that it takes, from the first on; None for all.
        one_step: Whether there is time for only one step per block, without a cache.
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
        dtype: Dtype of the models.
        response: Positions of a response.
        block_length: Positions of a block.
        keep_ratio: Keep ratio of ``sparse``.
        repeats: Number of runs of each contender.
        vanilla_steps: Maximum steps of a run without a cache; all its steps cost the same, so its
            time is scaled up. None for all steps.
        baseline_requests: Maximum requests that the baseline runs; it runs them one after another,
            so its rate does not depend on their number. None for all.
        max_num_batched_tokens: The engine's option; None for its default.
        shorten_from: Requests at once from which on the engine runs only some blocks of each
            response, representative of all; times are scaled up. None for never.
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
        sweep: Name of the sweep that it was run for.
        turn: Number shared by the contenders that ran alternately on the same requests.
        contender: Name of the contender.
        program: ``engine`` or ``baseline``.
        settings: Settings of its requests.
        prompt: Tokens of the longest prompt.
        response: Positions of a response.
        concurrency: Requests submitted at once.
        num_requests: Requests that were run.
        scale: Factor on the times: steps of a whole response over steps run.
        seconds: Scaled time of each run of `num_requests`.
        peak_memory: Peak bytes over the runs: resident memory of the program's processes, or the
            tensors on a GPU.
        cache_bytes: Maximum bytes of one request's cache, if the program reports them.
        tokens: The responses of the last run.
        accuracy: Share of right answers, for tasks.
        same_tokens: Whether the tokens are those of the baseline with the same settings; None if
            not compared, as in bfloat16, where a different order of sums changes tokens.
        notes: Further data that the GPU benchmark attaches to a measurement.
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
        """Range of the times, relative to their median."""
        return (max(self.seconds) - min(self.seconds)) / statistics.median(self.seconds)

    def speed_up(self, other: Measurement) -> float:
        """Return the ratio of the median rates, of this measurement over another."""
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
        """Return the measurement that `as_json` returned as ``content``, without its tokens."""
        names = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})


@dataclass
class Workload:
    """Contenders on the same requests. Their indices in `results` and `jobs` are their places.

    Attributes:
        results: Measurements of each contender.
        jobs: The job of each contender in a round.
        num_rounds: Number of finished rounds.
        seconds: Seconds of the last round, without warming up.
        failed: Errors of contenders that failed, by place; they do not run again.
        warm: By place, the number of the program's start in which the contender was warmed up.
    """

    results: list[Measurement]
    jobs: list[Job]
    num_rounds: int = 0
    seconds: float = 0.0
    failed: dict[int, ProgramError] = field(default_factory=dict)
    warm: dict[int, int] = field(default_factory=dict)


class Session:
    """The programs of a benchmark run on one checkpoint.

    Args:
        model: Directory of the checkpoint.
        options: How everything is measured.
        logs: Folder for the programs' output.
        max_model_len: The engine's option.
        max_num_seqs: The engine's option.
        arguments: Further command-line arguments of each program.
        deadline: Time of the monotonic clock at which programs that have not answered are killed.
        starts: Seconds that programs take to start, by name; a program is not started if it would
            be ready only after the deadline.
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
        """Start those programs that are not running, and wait until all are loaded and idle.

        Raises:
            StartError: If a program fails to start, has failed too often, or there is no time left.
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
        """Return what the running programs report about themselves."""
        return {name: program.wait_until_ready() for name, program in self._programs.items()}

    def run(self, program: str, job: Job) -> Job:
        """Run a job on one program while the others wait.

        Raises:
            ProgramError: If the job failed. The program is stopped, and started again for its next
                job.
        """
        self.prepare(program)
        try:
            return self._programs[program].run(job, self.left)
        except ProgramError:
            self.stop(program)
            raise

    def stop(self, name: str) -> None:
        """Stop a program, which frees its memory."""
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
        """Measure contenders on prompts that are submitted at once."""
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
        """Return the workload of contenders on prompts that are submitted at once."""
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
        """Run each contender once more, in reverse order in every other round.

        Contenders are warmed up first if they are not yet. A failure is recorded in the workload,
        and the other contenders go on.
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
        """Warm up a contender, unless done since its program started."""
        program = workload.results[place].program
        self.prepare(program)
        if workload.warm.get(place) != self._num_starts[program]:
            self.run(program, warm_up(workload.jobs[place]))
            workload.warm[place] = self._num_starts[program]

    def _once(self, workload: Workload, place: int) -> None:
        """Run a contender once and record its results."""
        result, job = workload.results[place], workload.jobs[place]
        # A failure of another contender may have stopped the program.
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
        """Return a contender's job for prompts, and the factor by which its time is multiplied."""
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
    """Record whether engine and baseline gave the same tokens where their settings are the same."""
    for result in results:
        for other in results:
            if result.program == "engine" and other.program == "baseline":
                same = all(
                    result.settings.get(name) == other.settings.get(name)
                    for name in BASELINE_SETTINGS
                )
                if same and set(result.settings) <= set(BASELINE_SETTINGS):
                    result.same_tokens = result.tokens[: other.num_requests] == other.tokens
