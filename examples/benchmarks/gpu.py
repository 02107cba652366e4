# SPDX-License-Identifier: Apache-2.0
"""The engine on one GPU, at the sizes of LLaDA-8B and Dream-7B, against plain PyTorch and the card.

Weights are random: they cost the same. Everything ends within ``--budget`` seconds, what there
was no time for is named, and results are written after each measurement. ``--merge`` joins what
several runs wrote. With ``--device cpu --size tiny`` the same program runs a small model on a CPU,
to show that it works.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_cases as cases
import gpu_record
import torch
from bounds import MANY_ROWS, passes_of_block, roofline
from checkpoints import FAMILIES, configuration
from gpu_cases import CONTENDERS, PAGE_SIZES, SCALES
from gpu_record import GIB, Record
from programs import Job, ProgramError
from session import Contender, Measurement, Options, Session

ROOT = Path(__file__).parents[2]
#: In the order in which they are measured.
GROUPS = ("contexts", "steps", "long", "batches", "baseline", "memory")
#: A run's time over its roofline, before any was measured.
_FIRST_GUESS = 2.0
#: What a warm-up adds to the first round.
_WARM_UP = 1.3
#: Memory of the card that each program has for what is neither weights nor pages.
_RESERVE = 8 * GIB

#: What is measured in turn: sweep, tokens of each prompt, requests at once, contenders.
Turn = tuple[str, int, int, list[Contender]]


@dataclass(frozen=True)
class Plan:
    """Groups that are measured on the same programs.

    Attributes:
        groups: Their names.
        turns: In order.
        needed: Pages that all turns' requests find room in.
        most: Pages that there is room for beside the programs' weights.
    """

    groups: list[str]
    turns: list[Turn]
    needed: int
    most: float

    @property
    def fits(self) -> bool:
        return self.needed <= self.most

    @property
    def programs(self) -> list[str]:
        return sorted({one.program for turn in self.turns for one in turn[3]})

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(prompt for _, prompt, _, _ in self.turns)


class GpuBenchmark:
    """One run."""

    def __init__(self, arguments: argparse.Namespace, deadline: float) -> None:
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
        )
        self.page_size = PAGE_SIZES[arguments.device]
        self.element_bytes = getattr(torch, arguments.dtype).itemsize
        self.model = configuration(
            arguments.output / "models",
            arguments.family,
            cases.size_of(arguments.family, arguments.size),
            arguments.dtype,
            max(*self.contexts, self.scale.long) + self.scale.response,
        )
        self._slowdowns: dict[str, float] = {}
        self._turns = 0

    @property
    def contexts(self) -> Sequence[int]:
        return self.arguments.contexts or self.scale.contexts

    @property
    def batches(self) -> Sequence[int]:
        return self.arguments.batches or self.scale.batches

    def run(self) -> None:
        """Measure all groups that were asked for."""
        self._measure_machine()
        chosen = self.arguments.groups
        # An engine takes a while to start: all groups that fit beside each other share one.
        together = [group for group in chosen if group != "memory"]
        plans = [together]
        if together and not self._plan(together).fits:
            plans = [[group for group in together if group != "baseline"], ["baseline"]]
        for groups in (*plans, ["memory"]):
            groups = [group for group in groups if group in chosen]
            if groups:
                self._measure_groups(self._plan(groups))

    # The machine.

    def _measure_machine(self) -> None:
        arguments, scale = self.arguments, self.scale
        run: Job = {
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "started": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "family": arguments.family,
            "size": arguments.size,
            "dtype": arguments.dtype,
            "options": vars(self.options) | {"engine": self._engine_options()},
            "triton": _version("triton"),
        }
        blocks = {scale.block_length * requests for requests in self.batches}
        rows = sorted({*blocks, MANY_ROWS, max(self.contexts) + scale.response})
        with self._session(1, 1, 0) as session:
            self.ceilings = session.run("ceilings", {"rows": rows, "budget": arguments.ceilings})
            run["machine"] = session.about()["ceilings"]
        self.record.runs.append(run | {"ceilings": self.ceilings})
        self._write()

    # Engines.

    def _engine_options(self) -> Job:
        arguments = self.arguments
        options: Job = {
            "load_format": "dummy",
            "block_size": self.page_size,
            # The pool's size is given; the share of the memory is only checked.
            "gpu_memory_utilization": 0.3,
        }
        if arguments.native_ops:
            options["compilation_config"] = {"custom_ops": ["none"]}
        if arguments.attention_backend:
            options["additional_config"] = {
                "sparse_dllm": {"attention_backend": arguments.attention_backend}
            }
        return options | arguments.options

    def _session(self, max_model_len: int, max_num_seqs: int, pages: int) -> Session:
        arguments = self.arguments
        pool = pages * self._page_bytes(self.model)
        plain = ["--device", arguments.device]
        return Session(
            self.model,
            self.options,
            arguments.output,
            max_model_len,
            max_num_seqs,
            {
                "engine": [
                    "--device-memory",
                    "--kv-cache-bytes",
                    str(pool),
                    "--options",
                    json.dumps(self._engine_options()),
                ],
                "baseline": [*plain, "--dummy"],
                "ceilings": plain,
            },
            self.deadline,
        )

    def _page_bytes(self, model: Path) -> int:
        shape = cases.ModelShape.of(model)
        return cases.page_bytes(shape, self.page_size, self.element_bytes)

    def _most_pages(self, baseline_rows: int) -> float:
        """Return the pages that there is room for on the card.

        Args:
            baseline_rows: Positions of the baseline's longest canvas, 0 if it does not run.
        """
        total = self.record.runs[-1]["machine"]["memory"]
        if self.arguments.kv_cache_gib is not None:
            room = self.arguments.kv_cache_gib * GIB
        elif total is None:
            return math.inf
        else:
            shape = cases.ModelShape.of(self.model)
            program = (shape.weights + shape.width * shape.vocab) * self.element_bytes + _RESERVE
            # The baseline's dual cache takes the softmax of all rows' logits in float64.
            logits = 3 * 8 * shape.vocab * baseline_rows
            room = total - program * (2 if baseline_rows else 1) - logits
        return max(0, room // self._page_bytes(self.model))

    # Turns.

    def _plan(self, groups: list[str]) -> Plan:
        """Return what some groups measure, and the pages that they need."""
        with self._session(1, 1, 0) as planned:
            turns = [turn for group in groups for turn in getattr(self, f"_{group}")(planned)]
        longest = max(prompt for _, prompt, _, _ in turns) + self.scale.response
        needed = cases.pool_pages(
            [
                (one.settings, prompt, requests)
                for _, prompt, requests, contenders in turns
                for one in contenders
                if one.program == "engine"
            ],
            self.scale.response,
            longest,
            self.page_size,
        )
        rows = max((prompt for sweep, prompt, _, _ in turns if sweep == "baseline"), default=0)
        return Plan(groups, turns, needed, self._most_pages(rows and rows + self.scale.response))

    def _measure_groups(self, plan: Plan) -> None:
        """Start the programs of a plan and measure its turns."""
        pages = int(min(plan.needed, plan.most))
        requests = max(requests for _, _, requests, _ in plan.turns)
        with self._session(plan.longest + self.scale.response, requests, pages) as session:
            try:
                session.prepare(*plan.programs)
            except ProgramError as error:
                self._skip(", ".join(plan.groups), _short(error))
                return
            self.record.runs[-1]["vllm"] = session.about()["engine"]["vllm"]
            for turn in plan.turns:
                self._measure(session, *turn, pages)

    def _contexts(self, session: Session) -> list[Turn]:
        return [("contexts", context, 1, self._contenders(session)) for context in self.contexts]

    def _batches(self, session: Session) -> list[Turn]:
        return [
            (f"{requests} at once", context, requests, self._contenders(session))
            for requests in self.batches
            if requests > 1
            for context in self.contexts
        ]

    def _long(self, session: Session) -> list[Turn]:
        return [("long", self.scale.long, 1, [cases.engine(session, "sparse")])]

    def _steps(self, session: Session) -> list[Turn]:
        scale = self.scale
        return [
            ("steps", context, requests, cases.steps_contenders(session))
            for context, requests in ((scale.short, 1), (scale.large, 1), (scale.short, scale.many))
        ]

    def _baseline(self, session: Session) -> list[Turn]:
        contenders = [cases.engine(session, "sparse")]
        contenders += [cases.baseline(session, name) for name in cases.BASELINES]
        return [("baseline", context, 1, contenders) for context in self.contexts]

    def _memory(self, session: Session) -> list[Turn]:
        return [("memory", self.scale.large, 1, [cases.engine(session, "sparse")])]

    def _contenders(self, session: Session) -> list[Contender]:
        return [cases.engine(session, name) for name in self.arguments.contenders]

    def _measure(
        self,
        session: Session,
        sweep: str,
        prompt: int,
        requests: int,
        contenders: list[Contender],
        pages: int,
    ) -> None:
        """Measure those contenders of a turn that fit into the pool and into the time left."""
        what = f"{sweep}: context {prompt:,}, {requests} at once"
        response = self.scale.response
        fit = cases.fitting(contenders, prompt, requests, response, self.page_size, pages)
        for one in contenders:
            if one not in fit:
                self._skip(f"{what}, {one.name}", "its pages do not fit on the card")
        chosen = self._affordable(session, fit, prompt, requests, what)
        if not chosen or (sweep == "steps" and len(chosen) < len(contenders)):
            return
        try:
            results = session.measure(sweep, chosen, session.prompts(prompt, requests))
        except ProgramError as error:
            self._skip(what, _short(error))
            return
        about = session.about()
        # Sessions each count their own.
        self._turns += 1
        for one in results:
            one.turn = self._turns
            self._note(session, one, about[one.program])
        if sweep == "steps":
            self.record.steps.append(self._step_times(session, results))
        elif sweep == "memory":
            self.record.memory += [
                {"run": 0, "prompt": prompt, "contender": one.contender, "peak": one.peak_memory}
                | one.notes["beside"]
                for one in results
            ]
        else:
            self.record.measurements += results
        self._write()

    def _affordable(
        self, session: Session, contenders: list[Contender], prompt: int, requests: int, what: str
    ) -> list[Contender]:
        """Return the contenders whose first round should end in time."""
        chosen = []
        left = self.deadline - time.monotonic()
        for one in contenders:
            _, scale = session.job_of(one, [[]], self.scale.response)
            guess = max(self._slowdowns.values(), default=_FIRST_GUESS)
            seconds = self._floor(session, one, prompt, requests) / scale
            seconds *= _WARM_UP * self._slowdowns.get(one.name, guess)
            if seconds > left:
                self._skip(
                    f"{what}, {one.name}",
                    f"would take about {seconds:,.0f} s of {max(0.0, left):,.0f} s left",
                )
            else:
                chosen.append(one)
                left -= seconds
        return chosen

    def _floor(self, session: Session, one: Contender, prompt: int, requests: int) -> float:
        """Return the least seconds of a contender's run, a token a step."""
        if one.program == "baseline":
            # One request after the other.
            return requests * roofline(session, one.settings, prompt, 1, self.ceilings).response
        return roofline(session, one.settings, prompt, requests, self.ceilings).response

    def _note(self, session: Session, one: Measurement, about: Job) -> None:
        """Add what the report says of a measurement."""
        contender = Contender(one.contender, one.program, one.settings)
        floor = self._floor(session, contender, one.prompt, one.concurrency)
        beside = about["memory"] if one.program == "engine" else {"weights": about["weights"]}
        one.notes = {"run": 0, "beside": beside}
        if one.settings.get("steps") is None:
            one.notes["floor"] = floor
            slowdown = min(one.seconds) / floor
            self._slowdowns[one.contender] = max(slowdown, self._slowdowns.get(one.contender, 0.0))
        if one.program == "engine":
            pages = cases.num_pages(one.settings, one.prompt, one.response, self.page_size)
            one.notes["pages"] = one.concurrency * pages * self._page_bytes(session.model)
        # Engine and baseline have random weights of their own.
        one.same_tokens = None

    def _step_times(self, session: Session, results: list[Measurement]) -> Job:
        """Return the times of passes, from runs that differ in their block steps alone."""
        many, few = results
        settings = session.settings("sparse")
        num_blocks = self.scale.response // self.scale.block_length
        num_full, num_steps = passes_of_block(settings)
        more = (many.settings["steps"] - few.settings["steps"]) // num_blocks
        times = [statistics.median(one.seconds) / num_blocks for one in (many, few)]
        block_step = (times[0] - times[1]) / more
        least = roofline(session, settings, many.prompt, many.concurrency, self.ceilings)
        weights = self.element_bytes * session.shape.weights
        return {
            "run": 0,
            "prompt": many.prompt,
            "requests": many.concurrency,
            "block_step": block_step,
            "full_pass": (times[0] - num_steps * block_step) / num_full,
            "weights": weights / self.ceilings["bandwidth"],
            "block_step_floor": least.block_step,
            "full_pass_floor": least.full_pass,
        }

    def _skip(self, what: str, why: str) -> None:
        print(f"  not measured: {what}: {why}", flush=True)
        self.record.skipped.append({"run": 0, "what": what, "why": why})
        self._write()

    def _write(self) -> None:
        gpu_record.write(self.arguments.output, self.record)


def _short(error: ProgramError) -> str:
    """Return the first line of an error and the last of what a program printed."""
    print(error, flush=True)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(dict.fromkeys([lines[0], lines[-1]])).replace("|", "/")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--groups", default=",".join(GROUPS), help=f"of {', '.join(GROUPS)} (default: all)")
    add("--family", choices=FAMILIES, default="llada")
    add("--size", choices=sorted(SCALES), default="public", help="tiny: does it work?")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16; on a CPU float32")
    add("--contexts", type=_numbers, help="default: 1024,2048,4096,8192")
    add("--batches", type=_numbers, help="requests at once (default: 1,8,32,128)")
    add("--contenders", default=",".join(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    add("--repeats", type=int, default=3, help="runs of each, if there is time")
    add("--vanilla-steps", type=int, default=16, help="runs without cache do so many; 0: all")
    add("--budget", type=float, default=420.0, metavar="SECONDS", help="for everything (420)")
    add("--ceilings", type=float, default=0.2, metavar="SECONDS", help="for each rate (0.2)")
    add("--kv-cache-gib", type=float, help="most memory for pages (default: what is free)")
    add("--attention-backend", help="the engine's (default: its own choice)")
    add("--native-ops", action="store_true", help="none of vLLM's compiled operators")
    add("--options", type=json.loads, default={}, metavar="JSON", help="more of vLLM's options")
    add("--output", type=Path, default=ROOT / "build" / "gpu")
    add("--merge", type=Path, nargs="+", metavar="FILE", help="join gpu.json files, run nothing")
    arguments = parser.parse_args(argv)
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    for name, allowed in (("groups", GROUPS), ("contenders", CONTENDERS)):
        chosen = getattr(arguments, name).split(",")
        for one in chosen:
            if one not in allowed:
                parser.error(f"--{name} must be of {', '.join(allowed)}, got {one}")
        setattr(arguments, name, [one for one in allowed if one in chosen])
    return arguments


def main() -> int:
    start = time.monotonic()
    arguments = parse_arguments()
    if arguments.merge:
        record = gpu_record.merge(arguments.merge)
    else:
        arguments.output.mkdir(parents=True, exist_ok=True)
        benchmark = GpuBenchmark(arguments, start + arguments.budget)
        benchmark.run()
        record = benchmark.record
    files = gpu_record.write(arguments.output, record)
    print(f"\n{files[1].read_text(encoding='utf-8')}")
    print("Written:", *[str(path) for path in files])
    return 0 if record.measurements or record.steps or record.memory else 1


if __name__ == "__main__":
    sys.exit(main())
