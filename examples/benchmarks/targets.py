# SPDX-License-Identifier: Apache-2.0
"""Measure the targets: the figures that must hold on two CPU cores."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bounds import MANY_ROWS, block_step_cost, least_seconds, measure_rates
from breakdown import Breakdown, break_down, cache_bytes
from ceilings import best_of, floor_of
from programs import Job
from schedules import EAGER, LATE_DELAY, late
from session import Contender, Measurement, Session, Settings
from tables import Target

sys.path.append(str(Path(__file__).parents[1] / "quality"))
from tasks import END, RESPONSE, Vocabulary, held_out

#: The tasks that the embedded models do well.
KINDS = ("copy", "retrieval")
#: Steps of a block of 32, about as many as a threshold of 0.9 takes.
FEW_STEPS = 4


@dataclass(frozen=True)
class Scale:
    """Sizes of the targets' workloads; the quick mode's are too small to judge anything."""

    short: int = 512
    medium: int = 1024
    long: int = 2048
    longest: int = 4096
    several: int = 8
    requests: int = 16
    tasks: int = 100
    ceiling_seconds: float = 0.5


QUICK = Scale(
    short=48, medium=64, long=96, longest=128, several=2, requests=4, tasks=4, ceiling_seconds=0.02
)


def engine_contender(session: Session, policy: str, **changes: Any) -> Contender:
    return Contender(f"engine {policy}", "engine", session.settings(policy, **changes))


def baseline_contender(session: Session, policy: str, **changes: Any) -> Contender:
    return Contender(f"baseline {policy}", "baseline", session.settings(policy, **changes))


#: Groups of the targets, in the order in which they are measured.
GROUPS = ("baseline", "batch", "none", "at-once", "late", "threshold", "step", "cache")
#: The programs that each group needs; `threshold` runs on the embedded model.
PROGRAMS = {
    "baseline": ("engine", "baseline", "ceilings"),
    "batch": ("engine", "baseline", "ceilings"),
    "none": ("engine", "ceilings"),
    "at-once": ("engine",),
    "late": ("engine",),
    "threshold": (),
    "step": ("engine-in-process", "ceilings"),
    "cache": ("engine-in-process",),
}


def check_targets(
    session: Session,
    embedded: Session,
    scale: Scale,
    variants: dict[str, Settings],
    groups: Collection[str] = GROUPS,
) -> Iterator[Target]:
    """Measure targets.

    Args:
        session: Session on the 200M checkpoint.
        embedded: Session on the embedded model.
        scale: Sizes of the workloads.
        variants: Further settings to try for targets that leave the settings open.
        groups: The groups to measure, of `GROUPS`.
    """
    figures: dict[str, Callable[[], Iterable[Target]]] = {
        "baseline": lambda: _over_baseline(session, scale),
        "batch": lambda: _batch_over_baseline(session, scale),
        "none": lambda: _over_none(session, scale),
        "at-once": lambda: [_at_once(session, scale.medium, scale.several)],
        "late": lambda: _late_everywhere(session, scale),
        "threshold": lambda: _threshold(embedded, scale, variants),
        "step": lambda: _step(session, scale),
        "cache": lambda: [_cache_bytes(session, scale.long)],
    }
    for group in GROUPS:
        if group in groups:
            yield from figures[group]()


def _over_baseline(session: Session, scale: Scale) -> Iterator[Target]:
    sparse = engine_contender(session, "sparse")
    for length, policy, bound in ((scale.medium, "sparse", 1.5), (scale.long, "none", 20.0)):
        other, figure = baseline_contender(session, policy), f"one request, prompt {length:,}"
        budget = scale.ceiling_seconds
        yield _speed_up(session, figure, length, 1, sparse, other, bound, budget)


def _batch_over_baseline(session: Session, scale: Scale) -> Iterator[Target]:
    yield _speed_up(
        session,
        f"{scale.requests} requests, prompt {scale.short:,}, total throughput",
        scale.short,
        scale.requests,
        engine_contender(session, "sparse"),
        baseline_contender(session, "sparse"),
        3.5,
        scale.ceiling_seconds,
    )


def _over_none(session: Session, scale: Scale) -> Iterator[Target]:
    sparse, none = engine_contender(session, "sparse"), engine_contender(session, "none")
    figure = f"one request, prompt {scale.longest:,}"
    budget = scale.ceiling_seconds
    yield _speed_up(session, figure, scale.longest, 1, sparse, none, 15.0, budget)


def _late_everywhere(session: Session, scale: Scale) -> Iterator[Target]:
    for length in (scale.short, scale.medium, scale.long, scale.longest):
        yield from _late(session, length)
        yield _late_in_few_steps(session, length)


def _rates(one: Measurement, other: Measurement) -> str:
    """Return both rates and the spread of the times behind them."""
    return (
        f"{one.rate:.2f} and {other.rate:.2f} tokens/s (spread {one.spread:.0%} and "
        f"{other.spread:.0%})"
    )


def _speed_up(
    session: Session,
    figure: str,
    length: int,
    num: int,
    one: Contender,
    other: Contender,
    bound: float,
    ceiling_seconds: float,
) -> Target:
    """Measure the speed-up of one contender over another, and the most that the machine allows.

    Args:
        session: The session to measure in.
        figure: Description of the figure.
        length: Tokens of the prompts.
        num: Requests at once.
        one: The contender whose speed-up is measured.
        other: The contender that it is compared with.
        bound: Lower bound of the speed-up.
        ceiling_seconds: Seconds for each measurement of the machine's ceilings.
    """
    mine, theirs = session.measure("targets", [one, other], session.prompts(length, num))
    note = _rates(mine, theirs)
    if theirs.scale > 1:
        note += f"; the latter scaled up by {theirs.scale:g} from fewer steps"
    if theirs.num_requests < num:
        note += f"; the latter's rate over {theirs.num_requests} requests"
    note += "; " + _machine_allows(session, mine, theirs, ceiling_seconds)
    return Target(
        f"{figure}: {one.name} over {other.name}", bound, mine.speed_up(theirs), note=note
    )


def _machine_allows(
    session: Session, mine: Measurement, theirs: Measurement, ceiling_seconds: float
) -> str:
    """Return the highest possible speed-up, and the times that it follows from.

    If ``theirs`` is the same engine without a cache, full passes count as measured there, since
    both gain from faster ones; otherwise they count at their floor.
    """
    length, num, settings = mine.prompt, mine.num_requests, mine.settings
    rates = measure_rates(session, settings, num, ceiling_seconds)
    given = None
    if theirs.program == "engine" and theirs.settings["cache_policy"] == "none":
        given = num / theirs.rate
    full, step, least = least_seconds(session, settings, length, num, rates, given)
    most = num * mine.response / least / theirs.rate
    return (
        f"at most {most:.1f} × with full passes of {full:,.3f} s "
        f"({'as measured' if given else 'their floor'}) and block steps of {step:.4f} s (their "
        f"floor; products at {rates['gemm'][str(MANY_ROWS)]['rate'] / 1e9:,.0f} GFLOP/s in full "
        f"passes, weights at {rates['bandwidth'] / 1e9:.0f} GB/s)"
    )


def _at_once(session: Session, length: int, num: int) -> Target:
    """Return the throughput of several requests at once over that of one."""
    settings = session.settings("sparse")
    contenders = [
        Contender(f"engine sparse, {count} at once", "engine", settings, count)
        for count in (num, 1)
    ]
    several, one = session.measure("targets", contenders, session.prompts(length, num))
    return Target(
        f"{num} requests at once over one, prompt {length:,}, sparse: total throughput",
        1.8,
        several.speed_up(one),
        note=_rates(several, one),
    )


def _late(session: Session, length: int) -> Iterator[Target]:
    """Yield the speed-ups of late eviction over the published schedule and over ``dual``."""
    name = f"late {LATE_DELAY}"
    contenders = [
        Contender(f"engine {name}", "engine", session.settings("sparse", **late(), keep_ratio=0.5)),
        engine_contender(session, "sparse", keep_ratio=0.5),
        engine_contender(session, "dual"),
    ]
    mine, *others = session.measure("targets", contenders, session.prompts(length, 1))
    for other, bound in zip(others, (1.25, 1.0), strict=True):
        yield Target(
            f"one request, prompt {length:,}, keep 0.5: late eviction over {other.contender}",
            bound,
            mine.speed_up(other),
            note=f"{_rates(mine, other)}; late: delay_steps 0, eviction_delay {LATE_DELAY}",
        )


def _late_in_few_steps(session: Session, length: int) -> Target:
    """Return the speed-up of late eviction over the published schedule with few steps per block.

    The number of steps is fixed at about what a threshold takes: with random weights, no token
    reaches a threshold.
    """
    num_blocks = -(-session.options.response // session.options.block_length)
    few = {"keep_ratio": 0.5, "steps": num_blocks * FEW_STEPS}
    contenders = [
        Contender("engine late 1", "engine", session.settings("sparse", **late(1), **few)),
        engine_contender(session, "sparse", **few),
    ]
    mine, other = session.measure("targets", contenders, session.prompts(length, 1))
    return Target(
        f"one request, prompt {length:,}, keep 0.5, {FEW_STEPS} steps a block: late eviction over "
        "sparse",
        1.6,
        mine.speed_up(other),
        note=f"{_rates(mine, other)}; late: delay_steps 0, eviction_delay 1",
    )


def threshold_contenders(
    session: Session,
    thresholds: list[float],
    keep_ratios: list[float],
    variants: dict[str, Settings],
) -> list[Contender]:
    """Return ``none`` with fixed steps first, then parallel decoding with each policy."""
    contenders = [engine_contender(session, "none")]
    for threshold in thresholds:
        settings = [(f"none t={threshold:g}", session.settings("none", threshold=threshold))]
        settings.append((f"dual t={threshold:g}", session.settings("dual", threshold=threshold)))
        settings += [
            (
                f"sparse {ratio:g} t={threshold:g}",
                session.settings("sparse", threshold=threshold, keep_ratio=ratio),
            )
            for ratio in keep_ratios
        ]
        settings += [
            (f"{name} t={threshold:g}", session.settings("sparse") | own | {"threshold": threshold})
            for name, own in variants.items()
        ]
        contenders += [Contender(f"engine {name}", "engine", own) for name, own in settings]
    return contenders


def beyond_contenders(
    session: Session, tried: dict[str, Settings], **changes: Any
) -> list[Contender]:
    """Return a contender for each of ``tried``: ``sparse`` with these settings on top."""
    return [
        Contender(f"engine {name}", "engine", session.settings("sparse", **changes) | own)
        for name, own in tried.items()
    ]


def measure_tasks(
    session: Session, sweep: str, kind: str, num: int, length: int, contenders: list[Contender]
) -> list[Measurement]:
    """Run contenders on the same tasks and count right answers."""
    vocabulary = Vocabulary(session.model)
    items = held_out(kind, length, num)
    prompts = [vocabulary.encode(item.prompt) for item in items]
    answers = [vocabulary.encode((*item.answer, END)) for item in items]
    results = session.measure(f"{sweep}: {kind}", contenders, prompts, RESPONSE)
    for result in results:
        pairs = zip(result.tokens, answers, strict=True)
        result.accuracy = sum(tokens[: len(answer)] == answer for tokens, answer in pairs) / num
    return results


def _threshold(session: Session, scale: Scale, variants: dict[str, Settings]) -> Iterator[Target]:
    """Yield, for each kind of task, figures on ``sparse`` with a threshold.

    These are the best speed-up over ``none``, by any schedule and keep ratio, that costs at most
    one percentage point of right answers; and the gain of late eviction at the same keep ratio.
    """
    keep_ratios = [0.5, 0.7, 0.9, 1.0]
    # With one block per response, as elsewhere, there is no second block for a refresh to serve.
    halves = {"block_length": RESPONSE // 2}
    schedules = {
        "eager": EAGER,
        f"late {LATE_DELAY}": late(),
        f"late {LATE_DELAY}, interval 2, block {RESPONSE // 2}": late(refresh_interval=2) | halves,
    }
    tried = {
        f"{name} {ratio:g}": settings | {"keep_ratio": ratio}
        for name, settings in schedules.items()
        for ratio in keep_ratios
    }
    contenders = threshold_contenders(session, [0.9], keep_ratios, tried | variants)
    for kind in KINDS:
        none, *others = measure_tasks(
            session, "targets", kind, scale.tasks, scale.short, contenders
        )
        sparse = [m for m in others if m.settings["cache_policy"] == "sparse"]
        assert none.accuracy is not None
        fit = [m for m in sparse if (m.accuracy or 0.0) >= none.accuracy - 0.01 - 1e-9]
        best = max(fit, key=lambda m: m.rate, default=None)
        figure = (
            f"embedded model, {kind}, prompt {scale.short:,}: sparse with threshold 0.9 over none"
        )
        # List the other policies too: they show how much of the speed-up is due to the threshold.
        note = f"none is right in {none.accuracy:.0%}; " + "; ".join(
            f"{m.contender.removeprefix('engine ')}: {m.speed_up(none):.1f} × (spread "
            f"{m.spread:.0%}), {m.accuracy:.0%}"
            for m in others
        )
        if best is not None:
            note = f"best: {best.contender.removeprefix('engine ')}; {note}"
        yield Target(figure, 20.0, best.speed_up(none) if best else None, note=note)
        by_name = {m.contender: m for m in sparse}
        mine = by_name[f"engine late {LATE_DELAY} 0.5 t=0.9"]
        other = by_name["engine sparse 0.5 t=0.9"]
        yield Target(
            f"embedded model, {kind}, prompt {scale.short:,}, threshold 0.9, keep 0.5: "
            "late eviction over sparse",
            1.6,
            mine.speed_up(other),
            note=f"{_rates(mine, other)}; right in {mine.accuracy:.0%} and {other.accuracy:.0%}",
        )


def measure_breakdown(
    session: Session, policy: str, prompt: int, requests: int
) -> tuple[dict[str, Breakdown], Job]:
    """Run requests in one process, without and with details; return breakdown and record."""
    settings = session.settings(policy)
    job = {
        "prompts": session.prompts(prompt, requests),
        "response": session.options.response,
        "settings": settings,
    }
    num_blocks = -(-session.options.response // settings["block_length"])
    if policy == "none" and session.options.vanilla_steps:
        job["settings"] = settings | {"steps": num_blocks * 2}
    job["record"] = True
    short = job | {"response": session.options.block_length}
    session.run("engine-in-process", short)
    record = session.run("engine-in-process", job)["record"]
    detailed = session.run("engine-in-process", short | {"detailed": True})
    return break_down(record, detailed["record"]), record


def measure_transport(session: Session, policy: str, prompt: int, requests: int) -> Job:
    """Run the same requests in one process and, as users do, with the engine core in another.

    The difference is the cost of transport: serialising, sockets, wake-ups, and the front end's
    work as far as it does not overlap with the core's.
    """
    settings = session.settings(policy)
    job = {
        "prompts": session.prompts(prompt, requests),
        "response": session.options.block_length,
        "settings": settings | {"steps": session.options.block_length},
    }
    record = session.run("engine-in-process", job | {"record": True})["record"]
    seconds: dict[str, list[float]] = {"engine-in-process": [], "engine": []}
    session.run("engine", job)
    for _ in range(session.options.repeats):
        for program, times in seconds.items():
            times.append(session.run(program, job)["seconds"])
    one, two = (statistics.median(times) for times in seconds.values())
    num_steps = len(record["steps"])
    return {"one_process": one, "two_processes": two, "num_steps": num_steps}


def _step(session: Session, scale: Scale) -> Iterator[Target]:
    requests, block = scale.requests, session.options.block_length
    job = {"rows": [requests * block], "budget": scale.ceiling_seconds}
    # Measure the ceilings before and after the step: a floor measured while something else disturbs
    # the machine would flatter the step.
    before = session.run("ceilings", job)
    kinds, record = measure_breakdown(session, "sparse", scale.short, requests)
    ceilings = best_of(before, session.run("ceilings", job))
    step = kinds.get("block")
    missing = f"; not found: {', '.join(record['missing'])}" if record["missing"] else ""
    value = share = None
    note = share_note = "no block step"
    if step is not None:
        settings = session.settings("sparse")
        cost = block_step_cost(session, settings, scale.short, step.num_requests)
        floor = floor_of(cost, step.num_requests * block, ceilings)
        walk = min(ceilings["gemm"][str(requests * block)]["walk"].values())
        value = step.seconds / floor.seconds
        note = (
            f"{step.num_requests} requests: step {step.seconds * 1e3:.1f} ms (the model "
            f"{step.forward * 1e3:.1f}), floor {floor.seconds * 1e3:.1f} ms: weights "
            f"{floor.memory * 1e3:.1f} ms, products {floor.linear * 1e3:.1f} and attention "
            f"{floor.attention * 1e3:.1f} ms; without attention's part "
            f"{step.seconds / floor.seconds_without_attention:.2f} ×; all rows through all "
            f"products, as measured: {walk * 1e3:.1f} ms{missing}"
        )
        share = step.share_outside_forward
        largest = sorted(step.parts.items(), key=lambda part: -part[1])
        share_note = ", ".join(f"{name} {time * 1e3:.2f} ms" for name, time in largest) + missing
    figure = f"block step of {requests} requests, prompt {scale.short:,}, over its floor"
    # A step below its floor means that the measurement was disturbed.
    judged = value is None or value >= 1
    yield Target(figure, 1.5, value, at_least=False, note=note, judged=judged)
    figure = f"part of a block step of {requests} requests that is not the model"
    yield Target(figure, 0.10, share, at_least=False, note=share_note)


def measure_cache_bytes(session: Session, policy: str, prompt: int, **changes: Any) -> int:
    """Return the maximum bytes of pages that one request holds."""
    settings = session.settings(policy, **changes)
    num_blocks = -(-session.options.response // settings["block_length"])
    job = {
        "prompts": session.prompts(prompt, 1),
        "response": session.options.response,
        "settings": settings | {"steps": num_blocks * 3},
        "record": True,
    }
    return cache_bytes(session.run("engine-in-process", job)["record"])


def _cache_bytes(session: Session, prompt: int) -> Target:
    sparse = measure_cache_bytes(session, "sparse", prompt, keep_ratio=0.5)
    dual = measure_cache_bytes(session, "dual", prompt)
    figure = f"KV bytes of a request, prompt {prompt:,}: sparse 0.5 over dual"
    note = f"{sparse / 2**20:.1f} and {dual / 2**20:.1f} MiB"
    return Target(figure, 0.55, sparse / dual, at_least=False, note=note)
