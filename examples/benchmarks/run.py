# SPDX-License-Identifier: Apache-2.0
"""Compare the engine with plain PyTorch and with the machine's limits.

Contenders run alternately in one session; results are medians and ratios. Without options: a random
LLaDA of 200 million parameters in bfloat16, all sweeps, which takes hours on two cores.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from pathlib import Path

import report
import schedules
from baseline_network import POLICIES as BASELINE_POLICIES
from bounds import block_step_cost, full_pass_cost
from breakdown import as_json
from ceilings import floor_of
from checkpoints import FAMILIES, SIZES, checkpoint
from devices import processor
from options import list_of, names_of, ratio, whole_number, whole_numbers
from programs import Job, num_cores
from session import Contender, Options, Session, Settings
from tables import Target
from targets import (
    GROUPS,
    KINDS,
    PROGRAMS,
    QUICK,
    RESPONSE,
    Scale,
    baseline_contender,
    beyond_contenders,
    check_targets,
    engine_contender,
    measure_breakdown,
    measure_cache_bytes,
    measure_tasks,
    measure_transport,
    threshold_contenders,
)

from vllm_sparse_dllm.settings import CACHE_POLICIES, FIELDS

ROOT = Path(__file__).parents[2]
SWEEPS = (
    "context",
    "concurrency",
    "keep",
    "block",
    "threshold",
    "beyond",
    "breakdown",
    "memory",
    "ceilings",
)
#: Sweeps that run the embedded model.
EMBEDDED_SWEEPS = ("threshold", "beyond")
#: The option with each sweep's prompt lengths: several lengths with one request, one length with
#: several requests, or one length with one request under several settings. `threshold` has tasks.
PROMPTS = {
    "context": "prompts",
    "concurrency": "batch_prompt",
    "keep": "sweep_prompt",
    "block": "sweep_prompt",
    "beyond": "prompts",
    "breakdown": "batch_prompt",
    "memory": "prompts",
}


class Benchmark:
    """One run of the benchmark: its sessions and their results."""

    def __init__(self, arguments: argparse.Namespace, session: Session, embedded: Session) -> None:
        self.arguments = arguments
        self.session = session
        self.embedded = embedded
        self.targets: list[Target] = []
        self.breakdowns: list[Job] = []
        self.cache: list[Job] = []
        self.floors: list[Job] = []
        self.ceilings: Job | None = None

    def run(self) -> None:
        """Measure the targets or the sweeps that the command line asks for."""
        if self.arguments.targets:
            scale = QUICK if self.arguments.quick else Scale()
            variants = self.arguments.variants
            groups = self.arguments.only
            for target in check_targets(self.session, self.embedded, scale, variants, groups):
                self.targets.append(target)
                print(f"  {target.figure}: {target.value} ({target.target})", flush=True)
            return
        self.session.prepare(*self._programs())
        for sweep in self.arguments.sweeps:
            print(f"{sweep} ...", flush=True)
            getattr(self, f"sweep_{sweep}")()

    def _programs(self) -> list[str]:
        """Return the programs to load up front, so that none loads while another is measured."""
        sweeps = set(self.arguments.sweeps)
        wanted = {
            "engine": {"context", "concurrency", "keep", "block", "beyond", "breakdown"},
            "baseline": {"context", "concurrency", "keep", "block"},
            "engine-in-process": {"breakdown", "memory"},
            "ceilings": {"ceilings"},
        }
        skipped = set() if self.has_baseline else {"baseline"}
        return [name for name, by in wanted.items() if by & sweeps and name not in skipped]

    @property
    def has_baseline(self) -> bool:
        return not self.arguments.no_baseline

    def contenders(self, policies: list[str], **changes: object) -> list[Contender]:
        """Return contenders: the engine's policies and variants, and the baseline's policies."""
        session = self.session
        found = [engine_contender(session, policy, **changes) for policy in policies]
        found += [
            Contender(f"engine {name}", "engine", session.settings("sparse") | own | changes)
            for name, own in self.arguments.variants.items()
        ]
        if self.has_baseline:
            found += [
                baseline_contender(session, policy, **changes)
                for policy in policies
                if policy in BASELINE_POLICIES
            ]
        return found

    def sweep_context(self) -> None:
        """Throughput of one request against the length of its prompt."""
        for length in self.arguments.prompts:
            contenders = self.contenders(self.arguments.policies)
            self.session.measure("context", contenders, self.session.prompts(length, 1))

    def sweep_concurrency(self) -> None:
        """Throughput against the number of requests at once."""
        for num in self.arguments.concurrency:
            contenders = self.contenders(self.arguments.policies)
            prompts = self.session.prompts(self.arguments.batch_prompt, num)
            self.session.measure("concurrency", contenders, prompts)

    def sweep_keep(self) -> None:
        """Throughput against the part of the keys that is kept."""
        contenders: list[Contender] = []
        for keep_ratio in self.arguments.keep_ratios:
            contenders += self.contenders(["sparse"], keep_ratio=keep_ratio)
        prompts = self.session.prompts(self.arguments.sweep_prompt, 1)
        self.session.measure("keep ratio", contenders, prompts)

    def sweep_block(self) -> None:
        """Throughput against the length of a block."""
        contenders: list[Contender] = []
        policies = [policy for policy in self.arguments.policies if policy != "none"]
        for length in self.arguments.block_lengths:
            contenders += self.contenders(policies, block_length=length)
        prompts = self.session.prompts(self.arguments.sweep_prompt, 1)
        self.session.measure("block length", contenders, prompts)

    def sweep_threshold(self) -> None:
        """Throughput and right answers of the embedded model with parallel decoding."""
        arguments = self.arguments
        contenders = threshold_contenders(
            self.embedded, arguments.thresholds, arguments.keep_ratios, arguments.variants
        )
        for kind in KINDS:
            measure_tasks(
                self.embedded,
                "threshold",
                kind,
                arguments.tasks,
                arguments.task_prompt,
                contenders,
            )

    def sweep_beyond(self) -> None:
        """Speed and right answers of schedules and suffix windows beyond the published ones."""
        arguments, session = self.arguments, self.session
        # A window that reaches the end of the response from its first block leaves nothing out.
        behind = arguments.response - arguments.block_length
        windows = schedules.windows([size for size in arguments.windows if size < behind])
        tried = schedules.within_block() | schedules.intervals() | windows | arguments.variants
        for length in arguments.prompts:
            contenders = [engine_contender(session, policy) for policy in ("sparse", "dual")]
            contenders += beyond_contenders(session, tried)
            session.measure("beyond", contenders, session.prompts(length, 1))
        # Responses of one block, which nothing follows, and of four blocks.
        whole, quarter = RESPONSE, RESPONSE // 4
        for kind in KINDS:
            for block_length, tried in (
                (whole, schedules.within_block() | arguments.variants),
                (quarter, schedules.intervals() | schedules.windows([quarter])),
            ):
                for threshold, label in ((None, "one a step"), (0.9, "threshold 0.9")):
                    changes = {"block_length": block_length, "threshold": threshold}
                    contenders = [
                        engine_contender(self.embedded, policy, **changes)
                        for policy in ("none", "sparse", "dual")
                    ]
                    contenders += beyond_contenders(self.embedded, tried, **changes)
                    measure_tasks(
                        self.embedded,
                        f"beyond, blocks of {block_length}, {label}",
                        kind,
                        arguments.tasks,
                        arguments.task_prompt,
                        contenders,
                    )

    def sweep_breakdown(self) -> None:
        """Time that the engine's steps spend on each part."""
        for num in self.arguments.breakdown_requests:
            for policy in self.arguments.policies:
                prompt = self.arguments.batch_prompt
                kinds, record = measure_breakdown(self.session, policy, prompt, num)
                one: Job = {"policy": policy, "prompt": prompt, "requests": num}
                one["transport"] = measure_transport(self.session, policy, prompt, num)
                one |= {"kinds": as_json(kinds), "missing": record["missing"]}
                self.breakdowns.append(one)

    def sweep_memory(self) -> None:
        """Bytes of pages that one request holds."""
        for length in self.arguments.prompts:
            for policy in self.arguments.policies:
                held = measure_cache_bytes(self.session, policy, length)
                self.cache.append({"prompt": length, "policy": policy, "bytes": held})

    def sweep_ceilings(self) -> None:
        """The machine's limits, and the floors of the engine's steps that follow from them."""
        arguments, session = self.arguments, self.session
        options = session.options
        longest = [length + options.response for length in arguments.prompts]
        blocks = [num * options.block_length for num in arguments.concurrency]
        rows = sorted({*blocks, *longest})
        self.ceilings = session.run(
            "ceilings", {"rows": rows, "budget": 0.02 if arguments.quick else 0.5}
        )
        settings = session.settings("sparse")
        for num in arguments.concurrency:
            cost = block_step_cost(session, settings, arguments.batch_prompt, num)
            floor = floor_of(cost, num * options.block_length, self.ceilings)
            self._add_floor("sparse block step", arguments.batch_prompt, num, vars(floor))
        for prompt, length in zip(arguments.prompts, longest, strict=True):
            floor = floor_of(full_pass_cost(session, settings, prompt, 1), length, self.ceilings)
            self._add_floor("full pass", prompt, 1, vars(floor))

    def _add_floor(self, step: str, prompt: int, requests: int, floor: Job) -> None:
        seconds = max(floor["memory"], floor["linear"] + floor["attention"])
        self.floors.append(
            {"step": step, "prompt": prompt, "requests": requests, "floor": seconds} | floor
        )

    def write(self) -> list[Path]:
        """Write the report."""
        arguments = self.arguments
        options = self.session.options
        result = {
            "about": {
                "model": self.session.model.name,
                "dtype": options.dtype,
                "cores": num_cores(),
                "processor": processor(),
                "response": options.response,
                "repeats": options.repeats,
                "quick": arguments.quick,
                "options": vars(options),
                "programs": self.session.about(),
            },
            "breakdowns": self.breakdowns,
            "cache": self.cache,
            "ceilings": self.ceilings,
            "floors": self.floors,
        }
        measurements = self.session.measurements + self.embedded.measurements
        return report.write(arguments.output, result, measurements, self.targets)


def _variant(text: str) -> tuple[str, Settings]:
    name, _, content = text.partition("=")
    try:
        settings = dict(json.loads(content))
        for setting, value in settings.items():
            if setting not in FIELDS or FIELDS[setting].scope == "engine":
                raise ValueError(f"a request has no setting {setting}")
            FIELDS[setting].parse(setting, value)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"needs NAME=JSON, got {text}: {error}") from None
    return name, settings


def _checkpoint(text: str) -> Path:
    path = Path(text)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"needs the folder of a checkpoint, got {text}")
    return path


def _longest_prompt(arguments: argparse.Namespace) -> int:
    """Return the longest prompt of the chosen sweeps."""
    prompts = {name for sweep, name in PROMPTS.items() if sweep in arguments.sweeps}
    given = (getattr(arguments, name) for name in prompts)
    return max((max(one) if isinstance(one, list) else one for one in given), default=1)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--targets", action="store_true", help="measure only the figures that must hold")
    add("--only", help=f"of those figures, some groups, of {','.join(GROUPS)} (default: all)")
    add(
        "--sweeps",
        help=f"of {','.join(SWEEPS)} (default: all; quick: those without the embedded model)",
    )
    add("--quick", action="store_true", help="a tiny model and short runs: does it work?")
    add("--model", type=_checkpoint, help="a checkpoint; default: a random one")
    add("--family", choices=FAMILIES, default="llada", help="of the random one")
    add("--size", choices=sorted(SIZES), help="of the random one (default: 200m)")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16, quick: float32")
    add("--policies", type=names_of(CACHE_POLICIES), default=list(CACHE_POLICIES))
    add("--variant", type=_variant, action="append", default=[], metavar="NAME=JSON")
    add("--no-baseline", action="store_true", help="the engine alone")
    add("--prompts", type=whole_numbers(1), help="sweep context (default: 128,512,1024,2048,4096)")
    add("--concurrency", type=whole_numbers(1), help="sweep concurrency (default: 1,4,8,16)")
    add("--batch-prompt", type=whole_number(1), help="prompt of several requests (default: 512)")
    add("--breakdown-requests", type=whole_numbers(1), help="default: 1 and the most at once")
    add("--sweep-prompt", type=whole_number(1), help="sweeps keep and block (default: 1024)")
    add(
        "--keep-ratios", type=list_of(ratio), help="sweeps keep and threshold (0.1,0.3,0.5,0.7,1.0)"
    )
    add("--block-lengths", type=whole_numbers(1), help="sweep block (default: 8,16,32,64)")
    add("--windows", type=whole_numbers(0), help="suffix windows of sweep beyond (default: 64,256)")
    add("--thresholds", type=list_of(ratio), default=[0.5, 0.7, 0.9])
    add("--tasks", type=whole_number(1), help="tasks of a kind (default: 100)")
    add("--task-prompt", type=whole_number(1), default=512)
    add("--response", type=whole_number(1), help="positions of a response (default: 128)")
    add("--block-length", type=whole_number(1), help="default: 32")
    add("--keep-ratio", type=ratio, default=0.5)
    add("--repeats", type=whole_number(1), help="runs of each contender (default: 3)")
    add("--vanilla-steps", type=whole_number(0), default=16, help="of runs without cache; 0: all")
    add("--baseline-requests", type=whole_number(0), default=2, help="of several at once; 0: all")
    add("--max-num-batched-tokens", type=whole_number(1), help="the engine's (default: its own)")
    add("--checkpoints", type=Path, default=ROOT / "build" / "checkpoints")
    add("--output", type=Path, default=ROOT / "build" / "benchmark")
    arguments = parser.parse_args(argv)

    quick = arguments.quick
    for name, small, usual in (
        ("size", "tiny", "200m"),
        ("dtype", "float32", "bfloat16"),
        ("prompts", [48, 96], [128, 512, 1024, 2048, 4096]),
        ("concurrency", [1, 4], [1, 4, 8, 16]),
        ("batch_prompt", 48, 512),
        ("sweep_prompt", 64, 1024),
        ("block_lengths", [8], [8, 16, 32, 64]),
        ("keep_ratios", [0.5], [0.1, 0.3, 0.5, 0.7, 1.0]),
        ("windows", [4], [64, 256]),
        ("tasks", 4, 100),
        ("response", 32, 128),
        ("block_length", 16, 32),
        ("repeats", 2, 3),
    ):
        if getattr(arguments, name) is None:
            setattr(arguments, name, small if quick else usual)
    if arguments.breakdown_requests is None:
        arguments.breakdown_requests = sorted({1, max(arguments.concurrency)})
    arguments.variants = dict(arguments.variant)
    if arguments.only and not arguments.targets:
        parser.error("--only chooses of the figures of --targets, which is not given")
    arguments.only = arguments.only.split(",") if arguments.only else list(GROUPS)
    for name in arguments.only:
        if name not in GROUPS:
            parser.error(f"--only must be of {', '.join(GROUPS)}, got {name}")
    default_sweeps = [name for name in SWEEPS if not (quick and name in EMBEDDED_SWEEPS)]
    arguments.sweeps = arguments.sweeps.split(",") if arguments.sweeps else default_sweeps
    for name in arguments.sweeps:
        if name not in SWEEPS:
            parser.error(f"--sweeps must be of {', '.join(SWEEPS)}, got {name}")
    swept = arguments.block_lengths if "block" in arguments.sweeps else []
    for length in {arguments.block_length, *swept}:
        if arguments.response % length:
            parser.error(f"--response must be a multiple of the block length {length}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    scale = QUICK if arguments.quick else Scale()
    longest = _longest_prompt(arguments)
    most = max([*arguments.concurrency, *arguments.breakdown_requests])
    if arguments.targets:
        longest, most = scale.longest, scale.requests
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = arguments.model or checkpoint(
        arguments.checkpoints, arguments.family, arguments.size, arguments.dtype
    )
    options = Options(
        dtype=arguments.dtype,
        response=arguments.response,
        block_length=arguments.block_length,
        keep_ratio=arguments.keep_ratio,
        repeats=arguments.repeats,
        vanilla_steps=arguments.vanilla_steps or None,
        baseline_requests=arguments.baseline_requests or None,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
    )
    from vllm_sparse_dllm.assets import embedded_model

    task_options = Options(**vars(options) | {"block_length": RESPONSE, "vanilla_steps": None})
    with ExitStack() as stack:
        session = stack.enter_context(
            Session(model, options, arguments.output, longest + options.response, most)
        )
        task_prompt = scale.short if arguments.targets else arguments.task_prompt
        embedded = stack.enter_context(
            Session(
                Path(embedded_model()),
                task_options,
                arguments.output,
                # With some room to spare: prompts include the chat template's tokens.
                task_prompt + RESPONSE + 32,
                most,
            )
        )
        if arguments.targets:
            needed = {name for group in arguments.only for name in PROGRAMS[group]}
            session.prepare(*sorted(needed))
            if "threshold" in arguments.only:
                embedded.prepare("engine")
        elif set(EMBEDDED_SWEEPS) & set(arguments.sweeps):
            embedded.prepare("engine")
        benchmark = Benchmark(arguments, session, embedded)
        try:
            benchmark.run()
        finally:
            # Keep what was measured before a failure or an interrupt.
            files = benchmark.write()
    text, *others = files
    print(f"\n{text.read_text(encoding='utf-8')}")
    print("Written:", *[str(path) for path in (text, *others)])


if __name__ == "__main__":
    main()
