# SPDX-License-Identifier: Apache-2.0
"""What steps and responses must take on this machine, by the costs and rates of `ceilings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ceilings import StepCost, floor_of, step_cost
from programs import Job
from session import Session, Settings

#: More rows than these multiply no faster.
MANY_ROWS = 2048


def block_step_rows(session: Session, settings: Settings, index: int = 0) -> int:
    """Return the positions of a request that a block step runs in block ``index``."""
    if settings["cache_policy"] == "prefix":
        return session.options.response - index * settings["block_length"]
    return settings["block_length"]


def block_step_cost(
    session: Session,
    settings: Settings,
    prompt: int,
    requests: int,
    index: int = 0,
    whole: bool = False,
) -> StepCost:
    """Return what a block step must cost; of a block half the positions are masks on average.

    Args:
        session: Has the model and the length of responses.
        settings: Of the requests; any policy with a cache.
        prompt: Tokens of each prompt.
        requests: In the step.
        index: Which block.
        whole: Under ``sparse``, before the cache is evicted.
    """
    rows = block_step_rows(session, settings, index)
    cached = prompt + session.options.response - rows
    if settings["cache_policy"] == "sparse" and not whole:
        cached = int(cached * settings["keep_ratio"])
    masks = requests * settings["block_length"] / 2
    return _cost(session, requests * rows, masks, cached + rows, cached, requests)


def full_pass_cost(session: Session, settings: Settings, prompt: int, requests: int) -> StepCost:
    """Return what a full pass must cost at the start of a block, which is all masks then."""
    length = prompt + session.options.response
    candidates = requests * settings["block_length"]
    return _cost(session, requests * length, candidates, length, 0, requests)


def _cost(session: Session, *sizes: Any) -> StepCost:
    return step_cost(session.shape, *sizes, {"bfloat16": 2, "float32": 4}[session.options.dtype])


def passes_of_block(settings: Settings) -> tuple[int, int]:
    """Return how many full passes and block steps a block has, a token a step."""
    block_length, policy = settings["block_length"], settings["cache_policy"]
    full = {"none": block_length, "sparse": settings.get("delay_steps", 1) + 1}.get(policy, 1)
    full = min(full, block_length)
    return full, block_length - full


@dataclass(frozen=True)
class Roofline:
    """The least time on this machine, in seconds.

    Attributes:
        full_pass: All positions of all requests.
        block_step: The mean over the response's; 0 where there are none.
        response: The whole.
    """

    full_pass: float
    block_step: float
    response: float


def roofline(
    session: Session, settings: Settings, prompt: int, requests: int, rates: Job
) -> Roofline:
    """Return the roofline of responses, a token a step, under any policy.

    A pass takes max(bytes of weights and cached keys and values / bandwidth, operations / rate of
    matrix products).

    Args:
        session: Has the model and the length of responses, whole blocks.
        settings: Of the requests.
        prompt: Tokens of each prompt.
        requests: That run together.
        rates: What `ceilings` measured.
    """

    def seconds(cost: StepCost, rows: int) -> float:
        floor = floor_of(cost, rows, rates)
        memory = floor.memory + cost.cache_bytes / rates["bandwidth"]
        return max(memory, floor.linear + floor.attention)

    length = prompt + session.options.response
    full = seconds(full_pass_cost(session, settings, prompt, requests), requests * length)
    num_full, num_steps = passes_of_block(settings)
    num_blocks = session.options.response // settings["block_length"]
    num_whole = min(settings.get("eviction_delay", 0), num_steps)
    in_steps = 0.0
    for index in range(num_blocks if num_steps else 0):
        rows = requests * block_step_rows(session, settings, index)
        for whole, count in ((True, num_whole), (False, num_steps - num_whole)):
            cost = block_step_cost(session, settings, prompt, requests, index, whole)
            in_steps += count * seconds(cost, rows)
    mean = in_steps / (num_blocks * num_steps) if num_steps else 0.0
    return Roofline(full, mean, num_blocks * num_full * full + in_steps)


def measure_rates(session: Session, settings: Settings, requests: int, seconds: float) -> Job:
    """Measure the ceilings at the rows of block steps and of full passes.

    Args:
        session: Has the model.
        settings: Of the requests.
        requests: In a step.
        seconds: For one measurement.
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
    """Return the least seconds of full pass, block step and responses under `sparse` or `dual`.

    The schedule's passes are counted, a token a step, at their floors: max(weights / bandwidth,
    operations / rate of matrix products).

    Args:
        session: Has the model and the length of responses, whole blocks.
        settings: Of the requests.
        prompt: Tokens of each prompt.
        requests: That run together.
        rates: From `measure_rates`.
        full_pass: Seconds of a full pass, if they are to be taken as given.
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
