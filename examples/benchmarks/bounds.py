# SPDX-License-Identifier: Apache-2.0
"""Minimum times of steps and responses on this machine, from the costs and rates of `ceilings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ceilings import StepCost, floor_of, step_cost
from programs import Job
from session import Session, Settings

#: Number of rows from which on matrix products are no longer faster per row.
MANY_ROWS = 2048


def block_step_cost(session: Session, settings: Settings, prompt: int, requests: int) -> StepCost:
    """Return the minimum cost of a block step of `sparse` or `dual`."""
    block_length = settings["block_length"]
    cached = kept_keys(settings, prompt + session.options.response - block_length)
    return cached_step_cost(session, settings, requests, block_length, cached)


def kept_keys(settings: Settings, others: int) -> int:
    """Return how many of the keys outside the block a policy keeps."""
    if settings["cache_policy"] == "sparse":
        return int(others * settings["keep_ratio"])
    return others


def cached_step_cost(
    session: Session, settings: Settings, requests: int, rows: int, cached: int
) -> StepCost:
    """Return the minimum cost of a step on a cache, when half of each block is masks.

    Args:
        session: The session, for its model.
        settings: Settings of the requests.
        requests: Requests in the step.
        rows: Positions that each request runs.
        cached: Keys that each request reads from its cache.
    """
    masks = requests * settings["block_length"] / 2
    return _cost(session, requests * rows, masks, cached + rows, cached, requests)


def full_pass_cost(session: Session, settings: Settings, prompt: int, requests: int) -> StepCost:
    """Return the minimum cost of a full pass at the start of a block, when all of it is masks."""
    length = prompt + session.options.response
    candidates = requests * settings["block_length"]
    return _cost(session, requests * length, candidates, length, 0, requests)


def _cost(session: Session, *sizes: Any) -> StepCost:
    return step_cost(session.shape, *sizes, {"bfloat16": 2, "float32": 4}[session.options.dtype])


def passes_of_block(settings: Settings) -> tuple[int, int]:
    """Return how many full passes and block steps a block has with one token a step."""
    return _passes(settings, settings["block_length"])


def _passes(settings: Settings, steps: int) -> tuple[int, int]:
    """Return how many full passes and block steps a block of ``steps`` steps has."""
    policy = settings["cache_policy"]
    full = {"none": steps, "sparse": settings.get("delay_steps", 1) + 1}.get(policy, 1)
    full = min(full, steps)
    return full, steps - full


def _fills_late(settings: Settings) -> bool:
    """Return whether a later step of a block than its first fills the cache."""
    return settings["cache_policy"] == "sparse" and settings.get("delay_steps", 1) > 0


@dataclass(frozen=True)
class Passes:
    """Passes of one kind in a response.

    Attributes:
        rows: Positions that each request runs.
        cached: Keys that each request reads from its cache; None for a full pass.
        count: Number of such passes.
    """

    rows: int
    cached: int | None
    count: int


def passes_of_response(
    settings: Settings, prompt: int, response: int, family: str = "llada"
) -> list[Passes]:
    """Return the passes of a response under any policy and schedule: a lower bound of the work.

    Args:
        settings: Settings of the request; ``steps``, if given, are equally many for each block.
        prompt: Tokens of the prompt.
        response: Positions of the response, whole blocks.
        family: Family of the model.
    """
    block_length, length = settings["block_length"], prompt + response
    num_blocks = response // block_length
    steps = (settings.get("steps") or response) // num_blocks
    if family == "dream" and steps == block_length and not _fills_late(settings):
        # Dream's shares are rounded down, so an early step of a block commits nothing. The engine
        # skips a step that neither commits anything nor changes the cache.
        steps = max(1, steps - 1)
    num_full, num_steps = _passes(settings, steps)
    interval = settings.get("refresh_interval", 1) if num_steps else 1
    num_whole = min(settings.get("eviction_delay", 0), num_steps)
    found = []
    for index in range(num_blocks):
        rows = block_length
        if settings["cache_policy"] == "prefix":
            rows = response - index * block_length
        # The blocks finished since the refresh add their keys to those that it kept. Of the kept
        # keys, at most as many are no longer read: those in the blocks after the refresh's own, up
        # to this one. So the keys read are at least those kept, and at least the added ones.
        cached = max(kept_keys(settings, length - rows), index % interval * block_length)
        cached = min(cached, length - rows)
        if index % interval:
            found.append(Passes(rows + block_length, cached - block_length, 1))
            found.append(Passes(rows, cached, steps - 1))
        else:
            found.append(Passes(length, None, num_full))
            found.append(Passes(rows, length - rows, num_whole))
            found.append(Passes(rows, cached, num_steps - num_whole))
    return [one for one in found if one.count]


@dataclass(frozen=True)
class Roofline:
    """Minimum times on this machine, in seconds.

    Attributes:
        full_pass: Time of a full pass over all requests.
        block_step: Time of the shortest step on a cache; 0 if there is none.
        response: Time of the complete responses.
    """

    full_pass: float
    block_step: float
    response: float


def roofline(
    session: Session, settings: Settings, prompt: int, requests: int, rates: Job
) -> Roofline:
    """Return the roofline of responses under any policy and schedule.

    A pass takes max(bytes of weights and cached keys and values / bandwidth, operations / rate of
    matrix products).

    Args:
        session: The session, for its model and the length of responses, whole blocks.
        settings: Settings of the requests.
        prompt: Tokens of each prompt.
        requests: Number of requests that run together.
        rates: The result of `ceilings`.
    """

    def seconds(rows: int, cached: int | None) -> float:
        if cached is None:
            cost = full_pass_cost(session, settings, prompt, requests)
        else:
            cost = cached_step_cost(session, settings, requests, rows, cached)
        floor = floor_of(cost, requests * rows, rates)
        memory = floor.memory + cost.cache_bytes / rates["bandwidth"]
        return max(memory, floor.linear + floor.attention)

    response = session.options.response
    passes = passes_of_response(settings, prompt, response, session.shape.family)
    times = [seconds(one.rows, one.cached) for one in passes]
    return Roofline(
        seconds(prompt + response, None),
        min((t for t, one in zip(times, passes, strict=True) if one.cached is not None), default=0),
        sum(t * one.count for t, one in zip(times, passes, strict=True)),
    )


def measure_rates(session: Session, settings: Settings, requests: int, seconds: float) -> Job:
    """Measure the ceilings at the rows of block steps and of full passes.

    Args:
        session: The session, for its model.
        settings: Settings of the requests.
        requests: Requests in a step.
        seconds: Seconds for one measurement.
    """
    rows = [requests * settings["block_length"], MANY_ROWS]
    return session.run("ceilings", {"rows": rows, "budget": seconds})


def least_seconds(
    session: Session,
    settings: Settings,
    prompt: int,
    requests: int,
    rates: Job,
    full_pass: float | None = None,
) -> tuple[float, float, float]:
    """Return the minimum seconds of full pass, block step and responses, for `sparse` or `dual`.

    The schedule's passes, with one token a step, are counted at their floors: max(weights /
    bandwidth, operations / rate of matrix products).

    Args:
        session: The session, for its model and the length of responses, whole blocks.
        settings: Settings of the requests.
        prompt: Tokens of each prompt.
        requests: Number of requests that run together.
        rates: The result of `measure_rates`.
        full_pass: Seconds of a full pass to use instead of its floor.
    """
    block_length = settings["block_length"]
    refreshes, steps = passes_of_block(settings)
    if full_pass is None:
        cost = full_pass_cost(session, settings, prompt, requests)
        rows = requests * (prompt + session.options.response)
        full_pass = floor_of(cost, rows, rates).seconds
    cost = block_step_cost(session, settings, prompt, requests)
    step = floor_of(cost, requests * block_length, rates).seconds
    block = refreshes * full_pass + steps * step
    return full_pass, step, session.options.response // block_length * block
