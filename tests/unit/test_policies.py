# SPDX-License-Identifier: Apache-2.0
"""Cache policies: what a step runs, and how many slots and pages a request needs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sparse_dllm.cache.policies import (
    POLICIES,
    Progress,
    StepKind,
    positions_run,
    step_tokens,
    visible_end,
)
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
        "suffix_window": draw(st.none() | st.integers(0, 120)),
        "refresh_interval": draw(st.sampled_from([1, 1, 2, 3, 1000])),
        "eviction_delay": draw(st.sampled_from([0, 0, 1, 5])),
    }
    return DecodingSettings(**{**values, **fixed})


#: The values of these settings in the papers.
PUBLISHED = {"suffix_window": None, "refresh_interval": 1, "eviction_delay": 0}


def needed(canvas: Canvas, settings: DecodingSettings, page: int, block: int) -> int:
    """Return the slots that a block's cached steps use: kept entries and the queries' own keys."""
    policy = POLICIES[settings.cache_policy]
    span = canvas.block(block)
    num = sum(end - start for start, end in policy.candidates(canvas, span, settings))
    kept = num
    if policy.selects:
        kept = int(num * settings.keep_ratio)
        if settings.granularity == "page":  # whole runs, the last of which may be short
            kept = min(math.ceil(kept / page) * page, num)
    start, end = policy.queries(canvas, span, settings)
    return kept + end - start


@given(canvases(), settings_of(refresh_interval=1), PAGES)
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
    for slots, pages in (
        (policy.num_slots, policy.num_pages),
        (policy.peak_slots, policy.peak_pages),
    ):
        num = slots(canvas, settings, page)
        own, rest = divmod(pages(canvas, settings, page), settings.num_sequences)
        assert rest == 0  # each sequence has whole pages
        assert own * page >= num > (own - 1) * page


@given(canvases(), settings_of(), PAGES)
def test_only_late_eviction_has_a_peak(
    canvas: Canvas, settings: DecodingSettings, page: int
) -> None:
    policy = POLICIES[settings.cache_policy]
    slots = policy.num_slots(canvas, settings, page)
    peak = policy.peak_slots(canvas, settings, page)
    late = settings.cache_policy == "sparse" and settings.eviction_delay > 0
    assert peak == (canvas.length if late else slots)
    assert slots <= peak


@given(canvases(), settings_of(), PAGES)
def test_slots_are_enough_for_what_blocks_append(
    canvas: Canvas, settings: DecodingSettings, page: int
) -> None:
    """A block that continues with a cache holds the kept entries and every block appended since."""
    policy = POLICIES[settings.cache_policy]
    slots = policy.num_slots(canvas, settings, page)
    for block in range(canvas.num_blocks if settings.cache_policy != "none" else 0):
        used = needed(canvas, settings, page, block)
        assert used <= slots
        last = min(block + settings.refresh_interval, canvas.num_blocks) - 1
        appended = canvas.block(last)[0] - canvas.block(block)[0]
        assert min(used + appended, canvas.length) <= slots
    assert slots <= canvas.length


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


@given(canvases(), settings_of(**PUBLISHED), PAGES)
def test_whole_caches_need_the_whole_length(
    canvas: Canvas, settings: DecodingSettings, page: int
) -> None:
    for name in ("prefix", "dual"):
        assert POLICIES[name].num_slots(canvas, settings, page) == canvas.length
    whole = DecodingSettings(keep_ratio=1.0, granularity=settings.granularity)
    assert POLICIES["sparse"].num_slots(canvas, whole, page) == canvas.length
    assert POLICIES["none"].num_pages(canvas, settings, page) == 0


@pytest.mark.parametrize("name", CACHED)
@given(canvas=canvases(), window=st.none() | st.integers(0, 250))
def test_candidates_and_queries_are_every_position_once(
    name: str, canvas: Canvas, window: int | None
) -> None:
    """If all candidates are kept, a cached step sees every visible position, each once."""
    settings = DecodingSettings(suffix_window=window)
    policy = POLICIES[name]
    for index in range(canvas.num_blocks):
        block = canvas.block(index)
        start, end = policy.queries(canvas, block, settings)
        seen = [*range(start, end)]
        for lo, hi in policy.candidates(canvas, block, settings):
            seen += range(lo, hi)
        visible = canvas.length if window is None else min(canvas.length, block[1] + window)
        assert sorted(seen) == list(range(visible))
        assert visible_end(canvas, block, settings) == visible
        assert start <= block[0] and block[1] <= end


def kinds(policy: str, block: int = 0, refreshed: int = -1, **settings: Any) -> str:
    """Return the first letters of the kinds of a block's first eight steps."""
    decoding = DecodingSettings(cache_policy=policy, **settings)
    steps = [Progress(block, step, refreshed) for step in range(8)]
    return "".join(POLICIES[policy].kind(progress, decoding).value[0] for progress in steps)


def test_kinds_of_steps() -> None:
    for delay in range(4):
        assert kinds("none", delay_steps=delay) == "ffffffff"
        for policy in ("prefix", "dual"):
            assert kinds(policy, delay_steps=delay, eviction_delay=2) == "rccccccc"
    assert [kinds("sparse", delay_steps=d) for d in range(4)] == [
        "rccccccc",
        "frcccccc",  # the published programs
        "ffrccccc",
        "fffrcccc",
    ]
    assert kinds("sparse", delay_steps=0, eviction_delay=1) == "recccccc"
    assert kinds("sparse", delay_steps=2, eviction_delay=3) == "ffrccecc"
    assert kinds("sparse", eviction_delay=100) == "frcccccc"


def test_kinds_of_steps_between_refreshes() -> None:
    """With a refresh interval of k, only blocks r < b < r + k continue with block r's cache."""
    for policy in CACHED:
        own = kinds(policy, eviction_delay=2)
        for refreshed, block, goes_on in (
            (-1, 0, False),
            (0, 0, False),
            (0, 1, True),
            (0, 2, True),
            (0, 3, False),
            (-1, 1, False),  # the previous block ended before its refresh
            (4, 6, True),
        ):
            options = {"refresh_interval": 3, "eviction_delay": 2}
            expected = "accccccc" if goes_on else own
            assert kinds(policy, block, refreshed, **options) == expected
        assert kinds(policy, 1, 0, refresh_interval=1, eviction_delay=2) == own
    assert kinds("none", 1, -1, refresh_interval=3) == "ffffffff"


@given(canvases(), settings_of(), st.integers(0, 12), st.integers(-1, 3))
def test_next_change(canvas: Canvas, settings: DecodingSettings, step: int, refreshed: int) -> None:
    """It is the first step, from ``step`` on, that changes the cache; `none` has no such step."""
    policy = POLICIES[settings.cache_policy]
    if settings.cache_policy == "none":
        refreshed = -1
    for block in (0, 2, 4):
        progress = Progress(block, step, min(refreshed, block))
        changes = [
            later
            for later in range(step, 20)
            if policy.kind(Progress(block, later, progress.refreshed), settings)
            in (StepKind.REFRESH, StepKind.APPEND, StepKind.EVICT)
        ]
        assert policy.next_change(progress, settings) == next(iter(changes), None)


@given(canvases(), settings_of(), st.integers(0, 8), st.integers(-1, 4))
def test_step_tokens(canvas: Canvas, settings: DecodingSettings, step: int, refreshed: int) -> None:
    policy = POLICIES[settings.cache_policy]
    if settings.cache_policy == "none":
        refreshed = -1
    twice = 2 if settings.cfg_scale else 1
    for index in range(canvas.num_blocks):
        progress = Progress(index, step, min(refreshed, index))
        start, end = canvas.block(index)
        visible = visible_end(canvas, (start, end), settings)
        kind = policy.kind(progress, settings)
        if kind.runs_all:
            expected = 0, visible
        else:
            first = canvas.block(index - 1)[0] if kind is StepKind.APPEND else start
            expected = first, visible if settings.cache_policy == "prefix" else end
        assert positions_run(canvas, settings, progress) == expected
        tokens = step_tokens(canvas, settings, progress)
        assert tokens == twice * (expected[1] - expected[0]) <= twice * canvas.length


def test_query_tokens_of_a_response_are_those_of_the_papers() -> None:
    """B4 and B5: prefix sum(L + (S-1)(G-bB)), dual nb(L + (S-1)B), sparse nb(2L + (S-2)B)."""
    canvas, steps = Canvas(100, 128, 32), 32
    num_blocks, length = canvas.num_blocks, canvas.length

    def total(name: str) -> int:
        settings = DecodingSettings(cache_policy=name)
        return sum(
            step_tokens(canvas, settings, Progress(block, step))
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
