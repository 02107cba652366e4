# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark measures: sizes, contenders, and the pages that they hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ceilings import ModelShape
from checkpoints import PUBLIC_SIZES, SIZES, Size
from schedules import LATE_DELAY, late
from session import Contender, Session, Settings

from vllm_sparse_dllm.cache.policies import POLICIES
from vllm_sparse_dllm.denoise.timetable import Canvas
from vllm_sparse_dllm.settings import DecodingSettings

GIB = 2**30
#: Of vLLM's pages on a CPU, where they are 32 slots, and on a GPU.
PAGE_SIZES = {"cpu": 32, "cuda": 16}
LATE = f"late {LATE_DELAY}"
#: One refresh for all blocks of the response.
INTERVAL = f"{LATE} interval 4"
#: `sparse` with settings beyond the published ones.
SCHEDULES: dict[str, Settings] = {LATE: late(), INTERVAL: late(refresh_interval=4)}
#: The fastest of them with fewer steps than tokens.
FEWER_STEPS = f"{INTERVAL} steps 8"
STEPS_OF_BLOCK = 8
#: The engine's contenders: the policies, and schedules of `sparse`.
CONTENDERS = ("sparse", *SCHEDULES, FEWER_STEPS, "dual", "prefix", "none")
BASELINES = ("sparse", "dual", "none")
#: Pages on top of what is needed: vLLM keeps one back.
_SPARE_PAGES = 2


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        contexts: Tokens of the prompts.
        long: Of the longest, for ``sparse`` alone.
        batches: Requests at once, the first of them 1.
        response: Positions of a response.
        block_length: Positions of a block.
        short: Context of the figures on one request and on `many`.
        medium: Context of the first figure over ``none``.
        large: Context of the second one, and of the figure on memory.
        many: Requests at once of the figure on throughput.
        shorten_from: Requests at once from which on responses are not run whole.
    """

    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192)
    long: int = 32768
    batches: tuple[int, ...] = (1, 8, 32, 128)
    response: int = 128
    block_length: int = 32
    short: int = 1024
    medium: int = 4096
    large: int = 8192
    many: int = 32
    shorten_from: int = 8


#: ``tiny`` shows that the benchmark works, nothing else.
SCALES = {
    "public": Scale(),
    "tiny": Scale(
        contexts=(32, 48),
        long=96,
        batches=(1, 3),
        response=16,
        block_length=8,
        short=32,
        medium=32,
        large=48,
        many=3,
        shorten_from=3,
    ),
}


def size_of(family: str, size: str) -> Size:
    """Return the widths of a model."""
    return PUBLIC_SIZES[family] if size == "public" else SIZES[size]


def settings_of(session: Session, name: str) -> Settings:
    """Return the settings of one of `CONTENDERS`."""
    if name == FEWER_STEPS:
        num_blocks = session.options.response // session.options.block_length
        return settings_of(session, INTERVAL) | {"steps": STEPS_OF_BLOCK * num_blocks}
    if name in SCHEDULES:
        return session.settings("sparse") | SCHEDULES[name]
    return session.settings(name)


def engine(session: Session, name: str) -> Contender:
    return Contender(f"engine {name}", "engine", settings_of(session, name))


def baseline(session: Session, name: str) -> Contender:
    return Contender(f"baseline {name}", "baseline", settings_of(session, name))


def steps_contenders(session: Session) -> list[Contender]:
    """Return ``sparse`` with a token a step and with fewer steps in a block, refreshes the same."""
    options, settings = session.options, session.settings("sparse")
    num_blocks = options.response // options.block_length
    return [
        Contender(
            f"engine sparse, {steps} steps a block",
            "engine",
            settings | {"steps": steps * num_blocks},
        )
        for steps in (options.block_length, max(3, options.block_length // 4))
    ]


def num_pages(settings: Settings, prompt: int, response: int, page_size: int) -> int:
    """Return the most pages that a request holds at a time."""
    canvas = Canvas(prompt, response, settings["block_length"])
    policy = POLICIES[settings["cache_policy"]]
    return policy.peak_pages(canvas, DecodingSettings(**settings), page_size)


def page_bytes(shape: ModelShape, page_size: int, element_bytes: int) -> int:
    """Return the bytes of a page in all layers."""
    return 2 * shape.layers * shape.kv_width * element_bytes * page_size


def pool_pages(
    cases: Iterable[tuple[Settings, int, int]],
    response: int,
    longest: int,
    page_size: int,
) -> int:
    """Return the pages of a pool that all cases fit into.

    Args:
        cases: Settings, prompt and requests at once of each.
        response: Positions of a response.
        longest: The engine's ``max_model_len``: vLLM asks for room for one such request.
        page_size: Slots of a page.
    """
    needed = [
        requests * num_pages(settings, prompt, response, page_size)
        for settings, prompt, requests in cases
    ]
    # The engine's own settings are the defaults; what is longest depends on the rounding.
    default = {"cache_policy": "sparse", "block_length": 32}
    needed += [
        num_pages(default, prompt, longest - prompt, page_size) for prompt in (0, longest - 1)
    ]
    return max(needed) + _SPARE_PAGES


def fitting(
    contenders: Collection[Contender],
    prompt: int,
    requests: int,
    response: int,
    page_size: int,
    pages: int,
) -> list[Contender]:
    """Return the contenders whose requests all run at once in a pool of so many pages."""
    room = pages - _SPARE_PAGES
    return [
        one
        for one in contenders
        if one.program != "engine"
        or requests * num_pages(one.settings, prompt, response, page_size) <= room
    ]
