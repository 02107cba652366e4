# SPDX-License-Identifier: Apache-2.0
"""Benchmark the engine on one GPU, at public models' sizes, against PyTorch and the GPU's limits.

The models are LLaDA-8B and Dream-7B with random weights, which cost the same. The run ends within
``--budget`` seconds; the report names what there was no time for, and results are written after
each round. ``--merge`` joins the results of several runs. With ``--device cpu --size tiny`` the
same program runs a small model on a CPU, to show that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_cases as cases
import gpu_record
import gpu_report
import torch
from bounds import passes_of_block, roofline
from checkpoints import configuration
from gpu_cases import PAGE_SIZES, SCALES
from gpu_options import engine_options, parse_arguments
from gpu_plans import Failure, Plan, Planner, Running, Turn
from gpu_record import Record
from programs import Job, ProgramError, StartError, reasons
from session import Contender, Measurement, Options, Session

#: Guess of a run's time over its roofline, until one of as many requests has been measured.
_FIRST_GUESS = 2.0
#: Factor by which warming up lengthens the first round.
_WARM_UP = 1.3
#: Share of the time left that a run without a cache is given; if it would take longer, it does one
#: step per block only.
_PART_OF_REST = 0.25
#: Rates by which times are estimated if the machine's rates could not be measured.
_RATES: Job = {
    "cuda": {"bandwidth": 3e12, "gemm": {"1": {"rate": 5e14}}},
    "cpu": {"bandwidth": 1e10, "gemm": {"1": {"rate": 1e11}}},
}
#: Guesses of the seconds that programs take to start, until they have started once.
_STARTS = {
    "cuda": {"engine": 90.0, "baseline": 30.0, "ceilings": 10.0},
    "cpu": {"engine": 10.0, "baseline": 5.0, "ceilings": 3.0},
}


class GpuBenchmark:
    """One run of the benchmark.

    Args:
        arguments: The command line.
        deadline: Time of the monotonic clock by which the run must end.
        models: Folder for the model's configuration.
    """

    def __init__(self, arguments: argparse.Namespace, deadline: float, models: Path) -> None:
        self.arguments = arguments
        self.deadline = deadline
        self.scale = SCALES[arguments.size]
        self.record = Record()
        self.options = Options(
            dtype=arguments.dtype,
            response=self.scale.response,
            block_length=self.scale.block_length,
            keep_ratio=0.5,
            repeats=arguments.repeats,
            vanilla_steps=arguments.vanilla_steps or None,
            baseline_requests=None,
            max_num_batched_tokens=None,
            shorten_from=self.scale.shorten_from,
        )
        self.page_size = PAGE_SIZES[arguments.device]
        self.element_bytes = getattr(torch, arguments.dtype).itemsize
        self._engine_options = engine_options(arguments, self.page_size)
        self.model = configuration(
            models,
            arguments.family,
            cases.size_of(arguments.family, arguments.size),
            arguments.dtype,
            max(*(arguments.contexts or self.scale.contexts), self.scale.long)
            + self.scale.response,
        )
        self._starts = dict(_STARTS[arguments.device])
        self.planner = Planner(
            arguments, self.scale, self._session(1, 1, 0), self.page_size, self.element_bytes
        )
        #: None if they could not be measured; then nothing has a floor.
        self.ceilings: Job | None = None
        #: Time over roofline, by contender and requests at once.
        self._slowdowns: dict[tuple[str, int], float] = {}
        self._failures: dict[str, Failure] = {}
        self._measured: set[str] = set()
        #: What the running programs report about themselves.
        self._about: Job = {}

    @property
    def _run(self) -> Job:
        return self.record.runs[-1]

    @property
    def rates(self) -> Job:
        """The machine's rates, guessed if they were not measured."""
        rates: Job = self.ceilings or _RATES[self.arguments.device]
        return rates

    def run(self) -> None:
        """Measure all requested groups."""
        if self._measure_machine():
            plans = self.planner.plans(self._run["machine"]["memory"])
            for number, plan in enumerate(plans, 1):
                self._measure_groups(plan, plans[number:])

    # The machine.

    def _measure_machine(self) -> bool:
        """Measure the machine's rates; return whether the machine itself could be identified."""
        arguments = self.arguments
        machine = {"name": "unknown", "torch": torch.__version__, "memory": None}
        self.record.runs.append(
            {
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
                "family": arguments.family,
                "size": arguments.size,
                "dtype": arguments.dtype,
                "options": vars(self.options) | {"engine": self._engine_options},
                "triton": _version("triton"),
                "machine": machine | {"python": platform.python_version()},
                "ceilings": None,
                "engines": [],
            }
        )
        job = {"rows": self.planner.rows(), "budget": arguments.ceilings}
        with self._session(1, 1, 0) as session:
            try:
                session.prepare("ceilings")
            except ProgramError as error:
                self._skip(", ".join(arguments.groups), _short(error))
                return False
            self._run["machine"] = session.about()["ceilings"]
            try:
                self.ceilings = session.run("ceilings", job)
            except ProgramError as error:
                self._skip("the machine's rates, so nothing has a roofline", _short(error))
        self._run["ceilings"] = self.ceilings
        self._write()
        return True

    # Engines.

    def _session(self, max_model_len: int, max_num_seqs: int, pool_bytes: int) -> Session:
        arguments = self.arguments
        plain = ["--device", arguments.device]
        engine = ["--device-memory", "--kv-cache-bytes", str(pool_bytes)]
        engine += ["--options", json.dumps(self._engine_options)]
        return Session(
            self.model,
            self.options,
            arguments.output,
            max_model_len,
            max_num_seqs,
            {
                "engine": [*plain, *engine],
                "baseline": [*plain, "--dummy"],
                "ceilings": plain,
            },
            self.deadline,
            self._starts,
        )

    def _measure_groups(self, plan: Plan, later: Sequence[Plan] = ()) -> None:
        """Start a plan's programs and measure its turns: one round of each, then further rounds.

        Args:
            plan: What to measure.
            later: Plans whose first rounds take precedence over further rounds of this one.
        """
        if plan.most < plan.least:
            what = f"{plan.most:,.0f} pages, and the longest request needs {plan.least:,}"
            self._skip(plan.name, f"there is room for {what}")
            return
        requests = max(turn.requests for turn in plan.turns)
        length = plan.longest + self.scale.response
        with self._session(length, requests, plan.pages * self.planner.page_bytes) as session:
            turns = self._start(session, plan)
            found = [self._first_round(session, turn, plan.pages) for turn in turns]
            running = [one for one in found if one is not None]
            kept = sum(self._seconds_of(plan) for plan in later)
            for _ in range(self.options.repeats - 1):
                for one in list(running):
                    in_time = one.workload.seconds < session.left - kept
                    if in_time and not self._round(session, one):
                        running.remove(one)

    def _start(self, session: Session, plan: Plan) -> list[Turn]:
        """Start a plan's programs, the engine first; return the turns that can be measured."""
        turns = plan.turns
        for name in sorted(plan.programs, key="engine".__ne__):
            try:
                session.prepare(name)
            except ProgramError as error:
                # Without the engine, nothing is measured.
                lost = [one for one in plan.contenders if one.program == name]
                names = "" if name == "engine" else f", {', '.join(one.name for one in lost)}"
                self._skip(plan.name + names, _short(error))
                if name == "engine":
                    return []
                turns = [turn.without(lost) for turn in turns]
        self._about = session.about()
        for name, about in self._about.items():
            self._starts[name] = about["start_seconds"]
        engine = self._about["engine"]
        self._run["vllm"] = engine["vllm"]
        self._run["engines"].append({"groups": plan.groups, "about": engine})
        return turns

    # Turns.

    def _first_round(self, session: Session, turn: Turn, pages: int) -> Running | None:
        """Measure the first round of a turn, of contenders that fit into the pool and time left."""
        response = self.scale.response
        fit = cases.fitting(
            turn.contenders, turn.prompt, turn.requests, response, self.page_size, pages
        )
        for one in turn.contenders:
            if one not in fit:
                self._skip(f"{turn.what}, {one.name}", "its pages do not fit on the card")
        chosen = self._affordable(session, turn, [one for one in fit if self._works(turn, one)])
        if not chosen or (turn.sweep == "steps" and len(chosen) < len(turn.contenders)):
            return None
        prompts = session.prompts(turn.prompt, turn.requests)
        running = Running(turn, session.workload(turn.sweep, chosen, prompts), {})
        number = 1 + max((one.turn for one in self.record.measurements), default=0)
        for result in running.workload.results:
            # Each session counts its own turns.
            result.turn = number
        return running if self._round(session, running) else None

    def _round(self, session: Session, running: Running) -> bool:
        """Measure one more round of a turn and record it; return whether no contender failed."""
        turn, results = running.turn, running.workload.results
        session.round(running.workload)
        done = [one for one in results if one.seconds]
        for one in done:
            self._note(session, one)
            print(f"  {one.summary}, round {len(one.seconds)}", flush=True)
        if turn.sweep in ("steps", "memory"):
            if len(done) == len(results):
                entries = self.record.steps if turn.sweep == "steps" else self.record.memory
                if not running.entry:
                    entries.append(running.entry)
                times = turn.sweep == "steps"
                running.entry |= self._step_times(session, done) if times else _memory(*done)
        else:
            known = set(map(id, self.record.measurements))
            self.record.measurements += [one for one in done if id(one) not in known]
        for place, error in running.workload.failed.items():
            one, why = results[place], _short(error)
            if not isinstance(error, StartError):
                failure = Failure(turn.prompt, turn.requests, why)
                self._failures.setdefault(one.contender, failure)
            again = ", once more" if one.seconds else ""
            self._skip(f"{turn.what}, {one.contender}{again}", why)
        self._write()
        return not running.workload.failed

    def _works(self, turn: Turn, one: Contender) -> bool:
        """Return whether a contender should run; if not, record that it failed before.

        After a failure, a contender runs again only if it has been measured elsewhere, and with
        shorter prompts or fewer requests than where it failed.
        """
        failure = self._failures.get(one.name)
        if failure is None:
            return True
        smaller = turn.prompt < failure.prompt or turn.requests < failure.requests
        if smaller and one.name in self._measured:
            return True
        self._skip(f"{turn.what}, {one.name}", f"it failed before: {failure.why}")
        return False

    def _seconds_of(self, plan: Plan) -> float:
        """Return an estimate of the seconds for starting a plan and its first rounds."""
        start = sum(self._starts[name] for name in plan.programs)
        return start + sum(
            self._estimate(turn, one) for turn in plan.turns for one in turn.contenders
        )

    def _estimate(self, turn: Turn, one: Contender) -> float:
        """Return an estimate of the seconds for a contender's first round."""
        session = self.planner.session
        _, scale = session.job_of(one, [[]] * turn.requests, self.scale.response)
        same = [known for (_, num), known in self._slowdowns.items() if num == turn.requests]
        guess = statistics.median(same or [_FIRST_GUESS])
        slowdown = self._slowdowns.get((one.name, turn.requests), guess)
        floor = self._floor(session, one, turn.prompt, turn.requests)
        warm_up = _WARM_UP
        if self._is_few_steps(turn, one):
            # The warm-up is a step of all requests.
            warm_up = 1 + scale / self.scale.response
        return warm_up * slowdown * floor / scale

    def _is_few_steps(self, turn: Turn, one: Contender) -> bool:
        """Return whether a contender runs only a few steps of one block, without a cache."""
        if one.program != "engine" or one.policy != "none" or not self.options.vanilla_steps:
            return False
        return turn.requests >= self.scale.shorten_from

    def _affordable(
        self, session: Session, turn: Turn, contenders: list[Contender]
    ) -> list[Contender]:
        """Return the contenders whose first round is expected to end in time."""
        chosen = []
        left = self.deadline - time.monotonic()
        # Programs that an earlier failure has ended must start again.
        programs = {one.program for one in contenders}
        left -= sum(self._starts[name] for name in programs if not session.is_running(name))
        for one in contenders:
            seconds = self._estimate(turn, one)
            if seconds > _PART_OF_REST * left and self._is_few_steps(turn, one):
                self._skip(
                    f"{turn.what}, {one.name}, more than a step of its block",
                    f"would take about {seconds:,.0f} s of {max(0.0, left):,.0f} s left",
                )
                one = replace(one, one_step=True)
                seconds = self._estimate(turn, one)
            if seconds > left:
                self._skip(
                    f"{turn.what}, {one.name}",
                    f"would take about {seconds:,.0f} s of {max(0.0, left):,.0f} s left",
                )
            else:
                chosen.append(one)
                left -= seconds
        return chosen

    def _floor(self, session: Session, one: Contender, prompt: int, requests: int) -> float:
        """Return the minimum seconds of a contender's run."""
        if one.program == "baseline":
            # The baseline runs one request after the other.
            return requests * roofline(session, one.settings, prompt, 1, self.rates).response
        return roofline(session, one.settings, prompt, requests, self.rates).response

    def _note(self, session: Session, one: Measurement) -> None:
        """Add the notes that the report needs to a measurement."""
        about = self._about[one.program]
        contender = Contender(one.contender, one.program, one.settings)
        floor = self._floor(session, contender, one.prompt, one.concurrency)
        beside = about["memory"] if one.program == "engine" else {"weights": about["weights"]}
        one.notes = {"run": 0, "beside": beside, "floor": floor if self.ceilings else None}
        # Keep the latest only: launch overhead in small steps says little about large ones.
        self._slowdowns[one.contender, one.concurrency] = min(one.seconds) / floor
        self._measured.add(one.contender)
        if one.program == "engine":
            pages = cases.num_pages(one.settings, one.prompt, one.response, self.page_size)
            one.notes["pages"] = one.concurrency * pages * self.planner.page_bytes
        # Engine and baseline have different random weights.
        one.same_tokens = None

    def _step_times(self, session: Session, results: list[Measurement]) -> Job:
        """Return the times of passes, from two runs that differ only in their block steps."""
        many, few = results
        settings = session.settings("sparse")
        num_blocks = self.scale.response // self.scale.block_length
        num_full, num_steps = passes_of_block(settings)
        more = (many.settings["steps"] - few.settings["steps"]) // num_blocks
        times = [statistics.median(one.seconds) / num_blocks for one in (many, few)]
        block_step = (times[0] - times[1]) / more
        entry: Job = {
            "run": 0,
            "prompt": many.prompt,
            "requests": many.concurrency,
            "block_step": block_step,
            "full_pass": (times[0] - num_steps * block_step) / num_full,
        }
        if self.ceilings is None:
            return entry | dict.fromkeys(("weights", "block_step_floor", "full_pass_floor"))
        least = roofline(session, settings, many.prompt, many.concurrency, self.ceilings)
        weights = self.element_bytes * session.shape.weights
        return entry | {
            "weights": weights / self.ceilings["bandwidth"],
            "block_step_floor": least.block_step,
            "full_pass_floor": least.full_pass,
        }

    def fail(self, error: Exception) -> None:
        """Record an unexpected error."""
        traceback.print_exc()
        self._skip("the rest", f"{type(error).__name__}: {error}".replace("|", "/"))

    def _skip(self, what: str, why: str) -> None:
        print(f"  not measured: {what}: {why}", flush=True)
        self.record.skipped.append({"run": 0, "what": what, "why": why})
        self._write()

    def _write(self) -> None:
        gpu_report.write(self.arguments.output, self.record)


def _memory(one: Measurement) -> Job:
    """Return the peak memory of one request, and the weights and pool that it includes."""
    peak = {"run": 0, "prompt": one.prompt, "contender": one.contender, "peak": one.peak_memory}
    return peak | one.notes["beside"]


def _short(error: ProgramError) -> str:
    """Print an error; return its first line and those that give a reason, or else the last."""
    print(error, flush=True)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    chosen = [lines[0], *(reasons(str(error)) or lines[-1:])]
    return " ... ".join(dict.fromkeys(chosen)).replace("|", "/")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> int:
    start = time.monotonic()
    arguments = parse_arguments(__doc__)
    whole = True
    if arguments.merge:
        record = gpu_record.merge(arguments.merge)
    else:
        if arguments.device == "cuda":
            # Log what the engine does, in case it is new to this GPU.
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
        # The configuration goes elsewhere, so that the output folder holds nothing but results.
        with tempfile.TemporaryDirectory() as models:
            benchmark = GpuBenchmark(arguments, start + arguments.budget, Path(models))
            try:
                benchmark.run()
            except Exception as error:
                whole = False
                benchmark.fail(error)
        record = benchmark.record
    files = gpu_report.write(arguments.output, record)
    print(f"\n{files[1].read_text(encoding='utf-8')}")
    print("Written:", *[str(path) for path in files])
    return 0 if whole and (record.measurements or record.steps or record.memory) else 1


if __name__ == "__main__":
    sys.exit(main())
