# SPDX-License-Identifier: Apache-2.0
"""Train a tiny LLaDA or Dream from scratch and write it as a checkpoint in the public layout.

The objective is masked diffusion's: part of a response is masked, and the network predicts it. By
default two processes of one thread each share a batch. Interrupted runs continue with ``--resume``
and give the same result as uninterrupted ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread per process: for matrices so small, faster than one process with several threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from batches import Batch, Batches, Stage
from layouts import write_checkpoint
from network import FAMILIES, Network, Shape
from tasks import Vocabulary
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from wiring import wire

TOKENIZER = Path(__file__).parents[2] / "vllm_sparse_dllm" / "assets" / "tiny-llada"
STARTS = ("wired", "random")


@dataclass(frozen=True)
class Cycle:
    """A sequence of stages over which the learning rates rise, stay constant and fall to 0."""

    stages: tuple[Stage, ...]
    #: Factor of the learning rates at their highest.
    peak: float = 1.0
    #: Weight decay of the hidden matrices. It removes components of queries and keys that nothing
    #: needs; otherwise their raw products, by which caches choose, are large even where attention
    #: makes no use of them.
    weight_decay: float = 0.0
    #: Share of the steps, at the end, over which the rates fall to 0.
    cooldown: float = 0.4

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


@dataclass(frozen=True)
class Plan:
    """The network that a run trains, its schedule and its data."""

    width: int
    mlp: int
    layers: int
    cycles: tuple[Cycle, ...]
    #: Tokens per step, over all processes.
    tokens: int
    #: Learning rates: Muon's for the hidden matrices, Adam's for all other parameters.
    hidden_rate: float = 0.01
    other_rate: float = 1.5e-3
    warm_up: int = 40

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for cycle in self.cycles for stage in cycle.stages)

    @property
    def steps(self) -> int:
        return sum(cycle.steps for cycle in self.cycles)

    def schedule(self, step: int) -> tuple[float, float]:
        """Return the factor of the learning rates at a step, and the weight decay."""
        for cycle in self.cycles:
            if step < cycle.steps:
                left = (cycle.steps - step) / (cycle.cooldown * cycle.steps)
                factor = cycle.peak * min(1.0, (step + 1) / self.warm_up, left)
                return factor, cycle.weight_decay
            step -= cycle.steps
        return 0.0, 0.0


#: Weights of the sequence lengths, for each stage of the first cycle and for later cycles.
_GROWING = (
    {64: 0.5, 160: 0.5},
    {64: 0.2, 160: 0.6, 288: 0.2},
    {64: 0.15, 160: 0.3, 288: 0.4, 544: 0.15},
    {64: 0.1, 160: 0.2, 288: 0.25, 544: 0.35, 1056: 0.1},
)
_LATE = {64: 0.1, 160: 0.25, 288: 0.25, 544: 0.3, 1056: 0.1}
_LONG = {160: 0.15, 288: 0.25, 544: 0.5, 1056: 0.1}
#: Dream's mixes: first more copying, to teach it where a list ends before copying has begun, ...
_COUNTING = {"retrieval": 0.45, "copy": 0.38, "reverse": 0.12, "addition": 0.05}
#: ... and at last more retrieval, to find what a question asks for in long prompts.
_ASKING = {"retrieval": 0.55, "copy": 0.33, "reverse": 0.09, "addition": 0.03}


def _growing(*steps: int, **others: Any) -> tuple[Stage, ...]:
    pairs = zip(steps, _GROWING, strict=True)
    return tuple(Stage(num, lengths, **others) for num, lengths in pairs)


def _full(*cycles: Cycle) -> Plan:
    return Plan(width=256, mlp=512, layers=4, cycles=cycles, tokens=8448)


PLANS = {
    "llada": _full(
        Cycle(_growing(300, 700, 800, 900)),
        Cycle((Stage(1000, _LATE),), peak=0.7),
    ),
    "dream": _full(
        Cycle(_growing(300, 600, 700, 700, mix=_COUNTING, in_order=0.7, unbegun=0.25)),
        Cycle((Stage(1300, _LATE, _COUNTING, unbegun=0.3),), peak=0.7, weight_decay=0.25),
        Cycle(
            (Stage(1000, _LONG, _ASKING, unbegun=0.3),), peak=0.35, weight_decay=0.2, cooldown=0.9
        ),
    ),
    # For tests: takes seconds.
    "toy": Plan(
        width=128,
        mlp=64,
        layers=3,
        cycles=(
            Cycle((Stage(4, {64: 1.0}),)),
            Cycle((Stage(4, {64: 0.5, 96: 0.5}),), peak=0.5, weight_decay=0.1, cooldown=1.0),
        ),
        tokens=768,
        warm_up=2,
    ),
}


def shape_of(plan: Plan, family: str, vocab: int) -> Shape:
    heads = 4
    kv_heads = heads if family == "llada" else heads // 2
    return Shape(family, vocab, plan.width, plan.layers, heads, kv_heads, plan.mlp)


class Training:
    """A network, its optimisers and its progress; each process has an identical copy."""

    def __init__(self, plan: Plan, family: str, start: str, vocabulary: Vocabulary, seed: int):
        self.plan = plan
        # Embedding tables are padded to a multiple of 64 rows.
        vocab = -(-vocabulary.size // 64) * 64
        self.network = Network(shape_of(plan, family, vocab), seed)
        if start == "wired":
            wire(self.network, vocabulary["<|mask|>"])
        self.optimisers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(self.network.hidden_matrices(), lr=plan.hidden_rate, weight_decay=0.0),
            torch.optim.Adam(
                self.network.other_parameters(), lr=plan.other_rate, betas=(0.9, 0.98)
            ),
        ]
        self.step = 0
        self.cpu_seconds = 0.0

    def update(self, forward: nn.Module | Any, batch: Batch) -> tuple[float, float]:
        """Take one step; return this process's loss and share of correct answer tokens."""
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(batch.ids, batch.targets.shape[1])
        masked = batch.weights > 0
        weights, targets = batch.weights[masked], batch.targets[masked]
        chosen = logits[masked].float()
        losses = F.cross_entropy(chosen, targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum().clamp(min=1.0)
        loss.backward()
        self._share_gradients()
        factor, weight_decay = self.plan.schedule(self.step)
        rates = ((self.plan.hidden_rate, weight_decay), (self.plan.other_rate, 0.0))
        for optimiser, (rate, decay) in zip(self.optimisers, rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"], group["weight_decay"] = rate * factor, decay
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        right = (chosen.argmax(-1) == targets)[weights == 1.0].float()
        return loss.item(), right.mean().item() if len(right) else 1.0

    def _share_gradients(self) -> None:
        if not dist.is_initialized():
            return
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def save(self, path: Path, run: dict[str, Any]) -> None:
        """Write, atomically, everything that is needed to resume the run."""
        state = {
            "run": run,
            "step": self.step,
            "cpu_seconds": self.cpu_seconds,
            "network": self.network.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Resume from a file of `save`, which `read_state` has checked to belong to this run."""
        state = torch.load(path, weights_only=True)
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]
        self.network.load_state_dict(state["network"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def plan_of(arguments: argparse.Namespace) -> Plan:
    return PLANS[arguments.plan or arguments.model]


def run_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that must be the same when a run is resumed."""
    names = ("model", "start", "seed", "processes", "compile")
    run = {name: getattr(arguments, name) for name in names}
    return run | {"plan": repr(plan_of(arguments))}


def read_state(path: Path, run: dict[str, Any]) -> dict[str, Any]:
    """Read a file written by `Training.save`.

    Raises:
        ValueError: If it is no such file, or of a run with other settings.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        settings = state["run"]
    except Exception as error:  # unpickling a broken file can raise anything
        raise ValueError(f"{path} is no state of a run: {error!r}") from error
    for name, value in run.items():
        # States from older versions lack settings that were added since.
        saved = settings.get(name, value)
        if saved != value:
            raise ValueError(f"{path} is of a run with {name}={saved!r}, not {value!r}")
    return state


def work(process: int, arguments: argparse.Namespace, port: int) -> None:
    """Train in one of the processes; the first one logs and saves."""
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    if arguments.processes > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=process,
            world_size=arguments.processes,
        )
    plan = plan_of(arguments)
    vocabulary = Vocabulary(TOKENIZER)
    training = Training(plan, arguments.model, arguments.start, vocabulary, arguments.seed)
    state = arguments.output / "state.pt"
    run = run_of(arguments)
    if arguments.resume:
        training.load(state)
    data = Batches(
        vocabulary,
        plan.stages,
        plan.tokens,
        arguments.seed,
        process,
        arguments.processes,
    )
    end = min(plan.steps, arguments.stop_after or plan.steps)
    loader = DataLoader(data, batch_size=None, sampler=range(training.step, end))
    network = training.network
    forward = torch.compile(network, dynamic=False) if arguments.compile else network
    bar = tqdm(
        loader,
        desc=arguments.model,
        unit="step",
        initial=training.step,
        total=plan.steps,
        disable=process > 0,
        mininterval=arguments.report_every,
    )
    log = _Log(arguments.output / "log.jsonl") if process == 0 else None
    before = training.cpu_seconds
    for batch in bar:
        loss, right = training.update(forward, batch)
        training.cpu_seconds = before + _cpu_seconds() * arguments.processes
        if log is None:
            continue
        log.add(training, batch.ids.shape[1], loss, right)
        bar.set_postfix_str(log.line, refresh=False)
        if training.step % arguments.save_every == 0:
            training.save(state, run)
    if process == 0:
        training.save(state, run)
        ids = {"bos": "<|startoftext|>", "eos": "<|endoftext|>", "mask": "<|mask|>"}
        write_checkpoint(
            arguments.output,
            training.network,
            TOKENIZER,
            {name: vocabulary[token] for name, token in ids.items()},
            getattr(torch, arguments.dtype),
        )
        size = sum(parameter.numel() for parameter in network.parameters())
        print(
            f"{arguments.output}: {size / 1e6:.2f} million parameters after {training.step} steps, "
            f"{training.cpu_seconds / 60:.1f} CPU minutes"
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class _Log:
    """Running means of loss and accuracy, written to a file every 25 steps."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.means: dict[str, float] = {}
        self.line = ""

    def add(self, training: Training, length: int, loss: float, right: float) -> None:
        for name, value in (("loss", loss), ("right", right), (f"right {length}", right)):
            self.means[name] = 0.95 * self.means.get(name, value) + 0.05 * value
        self.line = ", ".join(f"{name} {value:.3f}" for name, value in self.means.items())
        if training.step % 25 == 0:
            rounded = {name: round(value, 4) for name, value in self.means.items()}
            entry = {"step": training.step, "cpu_seconds": round(training.cpu_seconds)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry | rounded) + "\n")


def parse_arguments(command: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, help="directory of checkpoint, state and log")
    parser.add_argument("--model", choices=FAMILIES, default="llada", help="default: %(default)s")
    parser.add_argument(
        "--plan", choices=sorted(PLANS), help="default: the model's; toy: for tests"
    )
    parser.add_argument("--start", choices=STARTS, default="wired", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the directory's state")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="stop early, to resume")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    parser.add_argument("--report-every", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="without torch.compile"
    )
    arguments = parser.parse_args(command)
    for option in ("processes", "stop_after", "save_every"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= arguments.seed < 2**63:
        parser.error(f"--seed must be from 0 to 2**63 - 1, got {arguments.seed}")
    if not 0 < arguments.report_every < math.inf:
        parser.error(f"--report-every must be above 0, got {arguments.report_every}")
    for path in (arguments.output, *arguments.output.parents):
        if path.exists() and not path.is_dir():
            parser.error(f"output must be a directory, {path} is none")
    state = arguments.output / "state.pt"
    if arguments.resume:
        if not state.exists():
            parser.error(f"--resume: there is no {state}")
        try:
            step = read_state(state, run_of(arguments))["step"]
        except ValueError as error:
            parser.error(f"--resume: {error}")
        if arguments.stop_after is not None and arguments.stop_after <= step:
            parser.error(
                f"--stop-after must be above the state's {step}, {arguments.stop_after} is not"
            )
    elif state.exists():
        parser.error(f"{arguments.output} has a run: go on with it by --resume, or remove it")
    return arguments


def main(command: list[str] | None = None) -> None:
    arguments = parse_arguments(command)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if arguments.processes == 1:
        work(0, arguments, port)
    else:
        mp.spawn(work, (arguments, port), arguments.processes)


if __name__ == "__main__":
    main()
