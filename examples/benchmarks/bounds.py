# SPDX-License-Identifier: Apache-2.0
"""What steps and responses must take on this machine, by the costs and rates of `ceilings`."""

from __future__ import annotations

from typing import Any

from ceilings import StepCost, floor_of, step_cost
from programs import Job
from session import Session, Settings

#: More rows than these multiply no faster.
MANY_ROWS = 2048


def block_step_cost(session: Session, settings: Settings, prompt: int, requests: int) -> StepCost:
    """Return what a block step must cost; of a block half the positions are masks on average."""
    block = settings["block_length"]
    others = prompt + session.options.response - block
    if settings["cache_policy"] == "sparse":
        others = int(others * settings["keep_ratio"])
    rows = requests * block
    return _cost(session, rows, rows / 2, others + block, others, requests)


def full_pass_cost(session: Session, settings: Settings, prompt: int, requests: int) -> StepCost:
    """Return what a full pass must cost at the start of a block, which is all masks then."""
    length = prompt + session.options.response
    candidates = requests * settings["block_length"]
    return _cost(session, requests * length, candidates, length, 0, requests)


def _cost(session: Session, *sizes: Any) -> StepCost:
    return step_cost(session.shape, *sizes, {"bfloat16": 2, "float32": 4}[session.options.dtype])


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
    refreshes = settings.get("delay_steps", 1) + 1 if settings["cache_policy"] == "sparse" else 1
    if full_pass is None:
        cost = full_pass_cost(session, settings, prompt, requests)
        rows = requests * (prompt + session.options.response)
        full_pass = floor_of(cost, rows, rates).seconds
    cost = block_step_cost(session, settings, prompt, requests)
    step = floor_of(cost, requests * block_length, rates).seconds
    block = refreshes * full_pass + (block_length - refreshes) * step
    return full_pass, step, session.options.response // block_length * block
