# SPDX-License-Identifier: Apache-2.0
"""Where a request starts or restarts, and the steps that are left to it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.helpers import traits_of
from vllm_sparse_dllm.cache.policies import Progress
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.engine.course import Course
from vllm_sparse_dllm.settings import DecodingSettings

MASK = 3
PROMPT = 5


def course(
    family: str = "llada",
    response: int = 24,
    delivered: list[int] | None = None,
    left_to_right: bool = False,
    **settings: Any,
) -> Course:
    decoding = DecodingSettings(**{"block_length": 8, **settings})
    canvas = Canvas(PROMPT, response, decoding.block_length)
    return Course(canvas, decoding, traits_of(family, MASK), left_to_right, delivered or [])


@pytest.mark.parametrize(
    ("family", "settings", "start"),
    [
        ("llada", {"cache_policy": "none"}, Progress(0, 0)),
        # The first step of Dream's timetable would commit 8 * 0.1249 positions.
        ("dream", {"cache_policy": "none"}, Progress(0, 1)),
        ("dream", {"cache_policy": "none", "steps": 3}, Progress(0, 0)),
        ("dream", {"cache_policy": "none", "threshold": 0.9}, Progress(0, 0)),
        ("dream", {"cache_policy": "none", "remasking": "origin"}, Progress(0, 0)),
        # With a cache it commits the block's first position, unless that is fixed.
        ("dream", {"cache_policy": "dual"}, Progress(0, 0)),
        ("dream", {"cache_policy": "dual", "canvas": (9,)}, Progress(0, 0)),
        ("dream", {"cache_policy": "sparse", "canvas": (9,)}, Progress(0, 1)),
        ("dream", {"cache_policy": "sparse", "canvas": (9,), "delay_steps": 0}, Progress(0, 0)),
        ("dream", {"cache_policy": "sparse", "canvas": (9,) * 8}, Progress(1, 0)),
        ("dream", {"cache_policy": "sparse", "canvas": (9,) * 9}, Progress(1, 1)),
        ("llada", {"canvas": (9,) * 24}, Progress(3, 0)),
    ],
)
def test_the_first_step_does_something(
    family: str, settings: dict[str, Any], start: Progress
) -> None:
    assert course(family, **settings).start == start


@pytest.mark.parametrize(
    ("num_delivered", "settings", "left", "steps", "block"),
    [
        (0, {}, [8, 8, 8], (8, 8, 8), 0),
        (8, {}, [0, 8, 8], (0, 8, 8), 1),
        (11, {}, [0, 5, 8], (0, 5, 8), 1),
        # A block's steps are 4: for 5 of its 8 positions 2.5, so 3.
        (11, {"steps": 12}, [0, 5, 8], (0, 3, 4), 1),
        (11, {"steps": 48}, [0, 5, 8], (0, 10, 16), 1),
        (15, {"steps": 3}, [0, 1, 8], (0, 1, 1), 1),
        # Of the four masks of the second block two are left.
        (10, {"canvas": (9,) * 8 + (MASK,) * 4 + (9,) * 4}, [0, 2, 8], (0, 2, 8), 1),
        (20, {"left_to_right": True}, [0, 0, 8], (0, 0, 8), 2),
    ],
)
def test_what_was_delivered_is_given(
    num_delivered: int,
    settings: dict[str, Any],
    left: list[int],
    steps: tuple[int, ...],
    block: int,
) -> None:
    own = course(delivered=[9] * num_delivered, **settings)
    assert own.masked_of_block == left
    assert own.steps_of_block == steps
    assert own.start == Progress(block, 0)
    assert own.starts_whole_block is (num_delivered in (0, 8, 20))
    given = own.response != MASK
    assert given.sum() == 24 - sum(left)
