# SPDX-License-Identifier: Apache-2.0
"""Cache policies: what a step runs, and the slots and pages a request needs for its life."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_dllm.cache.policies import POLICIES, CachePolicy, StepKind, step_tokens
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.settings import GRANULARITIES, DecodingSettings

CACHED = [name for name in POLICIES if name != "none"]
PAGES = st.sampled_from([1, 16, 32, 64])
RATIOS = st.floats(0, 1, exclude_min=True) | st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9, 1.0])


@st.composite
def canvases(draw: st.DrawFn) -> Canvas:
    return Canvas(draw(st.integers(0, 300)), draw(st.integers(1, 200)), draw(st.integers(1, 100)))


@st.composite
def settings_of(draw: st.DrawFn, **fixed: Any) -> DecodingSettings:
    values = {
        "cache_policy": draw(st.sampled_from([*POLICIES])),
        "keep_ratio": draw(RATIOS),
        "delay_steps": draw(st.integers(0, 4)),
        "granularity": draw(st.sampled_from(GRANULARITIES)),
        "cfg_scale": draw(st.sampled_from([0.0, 1.0])),
    }
    return DecodingSettings(**{**values, **fixed})


def needed(canvas: Canvas, settings: DecodingSettings, page: int, block: int) -> int:
    """Slots that a block's cached steps use: what is kept and the queries' own keys."""
    policy = POLICIES[settings.cache_policy]
    span = canvas.block(block)
    num = sum(end - start for start, end in policy.candidates(canvas, span))
    kept = num
    if policy.selects:
        kept = int(num * settings.keep_ratio)
        if settings.granularity == "page":  # whole runs, of which one may be the short last one
            kept = min(math.ceil(kept / page) * page, num)
    start, end = policy.queries(canvas, span)
    return kept + end - start


@given(canvases(), settings_of(), PAGES)
def test_slots_are_enough_for_every_block_and_used_by_one(
    canvas: Canvas, settings: DecodingSettings, page: int
) -> None:
    slots = POLICIES[settings.cache_policy].num_slots(canvas, settings, page)
    if settings.cache_policy == "none":
        assert slots == 0
        return
    uses = [needed(canvas, settings, page, block) for block in range(canvas.num_blocks)]
    assert slots == max(uses)
    assert slots <= canvas.length


@given(canvases(), settings_of(), PAGES)
def test_pages_hold_the_slots_and_no_page_more(
    canvas: Canvas, settings: DecodingSettings, page: int
) -> None:
    policy = POLICIES[settings.cache_policy]
    slots = policy.num_slots(canvas, settings, page)
    pages = policy.num_pages(canvas, settings, page)
    own, rest = divmod(pages, settings.num_sequences)  # each sequence has whole pages
    assert rest == 0
    assert own * page >= slots > (own - 1) * page


@given(st.integers(1, 2048), st.integers(1, 256), st.integers(1, 512), RATIOS, PAGES)
def test_pages_of_sparse_are_the_formula(
    length: int, response: int, block_length: int, ratio: float, page: int
) -> None:
    response = min(response, length)
    canvas = Canvas(length - response, response, block_length)
    settings = DecodingSettings(keep_ratio=ratio)
    block = min(block_length, response)
    slots = int((length - block) * ratio) + block
    assert POLICIES["sparse"].num_slots(canvas, settings, page) == slots
    assert POLICIES["sparse"].num_pages(canvas, settings, page) == math.ceil(slots / page)


def test_pages_of_sparse_exhaustively_for_small_canvases() -> None:
    for length in range(1, 40):
        for response in range(1, length + 1):
            for block_length in (1, 3, 8, 64):
                canvas = Canvas(length - response, response, block_length)
                block = min(block_length, response)
                for ratio in (0.1, 0.3, 0.5, 0.7, 1.0):
                    settings = DecodingSettings(keep_ratio=ratio)
                    slots = int((length - block) * ratio) + block
                    assert POLICIES["sparse"].num_pages(canvas, settings, 4) == -(-slots // 4)


@given(canvases(), settings_of(), PAGES)
def test_whole_caches_need_the_whole_length(
    canvas: Canvas, settings: DecodingSettings, page: int
) -> None:
    for name in ("prefix", "dual"):
        assert POLICIES[name].num_slots(canvas, settings, page) == canvas.length
    whole = DecodingSettings(keep_ratio=1.0, granularity=settings.granularity)
    assert POLICIES["sparse"].num_slots(canvas, whole, page) == canvas.length
    assert POLICIES["none"].num_pages(canvas, settings, page) == 0


@pytest.mark.parametrize("name", CACHED)
@given(canvas=canvases())
def test_candidates_and_queries_are_every_position_once(name: str, canvas: Canvas) -> None:
    """With the whole cache kept a cached step sees the whole canvas, each position once."""
    policy = POLICIES[name]
    for index in range(canvas.num_blocks):
        block = canvas.block(index)
        start, end = policy.queries(canvas, block)
        seen = [*range(start, end)]
        for lo, hi in policy.candidates(canvas, block):
            seen += range(lo, hi)
        assert sorted(seen) == list(range(canvas.length))
        assert start <= block[0] and block[1] <= end


def test_kinds_of_steps() -> None:
    def kinds(policy: CachePolicy, delay: int) -> str:
        settings = DecodingSettings(delay_steps=delay)
        return "".join(policy.kind(step, settings).value[0] for step in range(6))

    for delay in range(4):
        assert kinds(POLICIES["none"], delay) == "ffffff"
        assert kinds(POLICIES["prefix"], delay) == kinds(POLICIES["dual"], delay) == "rccccc"
    assert [kinds(POLICIES["sparse"], d) for d in range(4)] == [
        "rccccc",
        "frcccc",  # the published programs
        "ffrccc",
        "fffrcc",
    ]


@given(canvases(), settings_of(), st.integers(0, 8))
def test_step_tokens(canvas: Canvas, settings: DecodingSettings, step: int) -> None:
    policy = POLICIES[settings.cache_policy]
    twice = 2 if settings.cfg_scale else 1
    for index in range(canvas.num_blocks):
        start, end = canvas.block(index)
        tokens = step_tokens(canvas, settings, index, step)
        if policy.kind(step, settings) is not StepKind.CACHED:
            assert tokens == twice * canvas.length
        elif settings.cache_policy == "prefix":
            assert tokens == twice * (canvas.length - start)
        else:
            assert tokens == twice * (end - start)


def test_query_tokens_of_a_response_are_those_of_the_papers() -> None:
    """B4 and B5: prefix sum(L + (S-1)(G-bB)), dual nb(L + (S-1)B), sparse nb(2L + (S-2)B)."""
    canvas, steps = Canvas(100, 128, 32), 32
    num_blocks, length = canvas.num_blocks, canvas.length

    def total(name: str) -> int:
        settings = DecodingSettings(cache_policy=name)
        return sum(
            step_tokens(canvas, settings, block, step)
            for block in range(num_blocks)
            for step in range(steps)
        )

    assert total("none") == num_blocks * steps * length
    assert total("prefix") == sum(
        length + (steps - 1) * (128 - 32 * block) for block in range(num_blocks)
    )
    assert total("dual") == num_blocks * (length + (steps - 1) * 32)
    assert total("sparse") == num_blocks * (2 * length + (steps - 2) * 32)


def test_only_none_and_dream_differ_in_the_first_step() -> None:
    assert [n for n, p in POLICIES.items() if not p.first_step_commits_one] == ["none"]
    assert [n for n, p in POLICIES.items() if p.selects] == ["sparse"]
