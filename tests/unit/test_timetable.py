# SPDX-License-Identifier: Apache-2.0
"""Blocks, their steps, and commits per step, against the reference and B6's tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reference.decode import blocks, dream_count, llada_quota, origin_probability
from vllm_sparse_dllm.denoise.timetable import (
    Canvas,
    CommitSchedule,
    EvenSchedule,
    LinearTimeSchedule,
    commit_fractions,
    share_steps,
)

LENGTHS = st.integers(1, 300)


@given(st.integers(0, 400), LENGTHS, st.integers(1, 320), st.none() | st.integers(1, 500))
def test_blocks_and_their_steps_are_the_references(
    prompt: int, response: int, length: int, steps: int | None
) -> None:
    canvas = Canvas(prompt, response, length)
    expected = list(blocks(response, length, steps or response))
    spans = [canvas.block(index) for index in range(canvas.num_blocks)]
    assert [end - start for start, end in spans] == [size for size, _ in expected]
    assert share_steps(canvas, steps) == tuple(share for _, share in expected)
    # Gapless from the prompt's end to the canvas' end.
    assert spans[0][0] == prompt
    assert spans[-1][1] == canvas.length == prompt + response
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert canvas.longest_block == max(end - start for start, end in spans)


@given(st.integers(1, 20), st.integers(1, 64), st.integers(1, 64))
def test_what_divides_is_divided_evenly(num_blocks: int, length: int, steps: int) -> None:
    canvas = Canvas(5, num_blocks * length, length)
    assert share_steps(canvas, steps * num_blocks) == (steps,) * num_blocks
    assert share_steps(canvas, None) == (length,) * num_blocks


def test_what_division_leaves_goes_to_the_first_blocks() -> None:
    assert share_steps(Canvas(0, 10, 4), 7) == (3, 3, 1)
    assert share_steps(Canvas(0, 70, 32), 35) == (16, 16, 3)
    assert share_steps(Canvas(0, 8, 2), 2) == (1, 1, 1, 1)
    assert share_steps(Canvas(0, 5, 32), 5) == (5,)


def spent(schedule: CommitSchedule, num_steps: int, size: int, first_one: bool) -> list[int]:
    """Return the commits of each step of a block until it is full."""
    left, counts = size, []
    while left:
        step = len(counts)
        special = first_one and step == 0  # Dream's first step of a block
        count = 1 if special else schedule.count(step, num_steps, left, size)
        assert 0 <= count <= left
        counts.append(count)
        left -= count
    return counts


@given(st.integers(1, 300), st.integers(1, 400))
def test_even_schedule_is_llada_quota(size: int, num_steps: int) -> None:
    counts = spent(EvenSchedule(), num_steps, size, False)
    assert counts == [llada_quota(i, num_steps, size) for i in range(len(counts))]
    assert len(counts) == min(size, num_steps)


@given(st.integers(1, 300), st.integers(1, 400), st.booleans())
def test_linear_time_schedule_is_dream_count(size: int, num_steps: int, first_one: bool) -> None:
    left = size
    for step, count in enumerate(spent(LinearTimeSchedule(), num_steps, size, first_one)):
        if step or not first_one:
            assert count == dream_count(step, num_steps, left)
        left -= count


@given(st.integers(1, 300), st.integers(0, 500), st.integers(0, 300))
def test_counts_of_any_state(num_steps: int, step: int, num_masked: int) -> None:
    """They agree with the reference, also in states that fixed steps never reach."""
    got = LinearTimeSchedule().count(step, num_steps, num_masked, max(num_masked, 1))
    assert got == min(dream_count(step, num_steps, num_masked), num_masked)
    if step >= num_steps:
        assert EvenSchedule().count(step, num_steps, num_masked, 300) == min(1, num_masked)


@pytest.mark.parametrize(
    ("size", "num_steps", "counts"),
    [
        (32, 32, [1, 0] + [1] * 29 + [2]),
        (32, 16, [1] + [2] * 14 + [3]),
        (32, 8, [1, 4, 4, 4, 4, 4, 5, 6]),
        (32, 4, [1, 10, 10, 11]),
        (32, 2, [1, 31]),
        (32, 1, [1] * 32),  # B6 leaves masks here; A2 goes on, one at a time
        (16, 16, [1, 0] + [1] * 13 + [2]),
    ],
)
def test_dreams_blocks(size: int, num_steps: int, counts: list[int]) -> None:
    assert spent(LinearTimeSchedule(), num_steps, size, True) == counts


def test_vanilla_dream() -> None:
    assert spent(LinearTimeSchedule(), 64, 64, False) == [0] + [1] * 62 + [2]


@given(st.integers(1, 400))
def test_commit_fractions_are_origins_chances(num_steps: int) -> None:
    fractions = commit_fractions(num_steps)
    assert len(fractions) == num_steps
    assert all(isinstance(fraction, np.float32) for fraction in fractions)
    for step in range(num_steps - 1):  # at the last step all are committed
        assert float(fractions[step]) == float(origin_probability(step, num_steps))
