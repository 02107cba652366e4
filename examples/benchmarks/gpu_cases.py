# SPDX-License-Identifier: Apache-2.0
"""Cases of the GPU benchmark: sizes, contenders, and the pages that they hold."""

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
#: Slots of a page on a CPU and on a GPU.
PAGE_SIZES = {"cpu": 32, "cuda": 16}
LATE = f"late {LATE_DELAY}"
#: One refresh for all blocks of the response.
INTERVAL = f"{LATE} interval 4"
#: `sparse` with settings beyond the published ones.
SCHEDULES: dict[str, Settings] = {LATE: late(), INTERVAL: late(refresh_interval=4)}
#: The fastest of these schedules, with fewer steps than tokens.
FEWER_STEPS = f"{INTERVAL} steps 8"
STEPS_OF_BLOCK = 8
#: The engine's contenders: the policies, and schedules of `sparse`.
CONTENDERS = ("sparse", *SCHEDULES, FEWER_STEPS, "dual", "prefix", "none")
BASELINES = ("sparse", "dual", "none")
#: Pages on top of those needed, since vLLM reserves one.
_SPARE_PAGES = 2


@dataclass(frozen=True)
class Scale:
    """Sizes of the workloads.

    Attributes:
        contexts: Tokens of the prompts.
        long: Tokens of the longest prompt, which only ``sparse`` runs.
        batches: Requests at once, the first of them 1.
        response: Positions of a response.
        block_length: Positions of a block.
        short: Context of the targets on the rates of one request and of `many`.
        medium: Context of the first target on the speed-up over ``none``.
        large: Context of the second one, and of the target on memory.
        many: Requests at once in the target on throughput.
        shorten_from: Requests at once from which on only some blocks of each response are run.
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


#: ``tiny`` only shows that the benchmark works.
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
    """Return the sizes of a model."""
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
    """Return ``sparse`` with one token a step, and with fewer steps but as many refreshes."""
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
    """Return the maximum number of pages that a request holds at a time."""
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
    """Return the number of pages of a pool that each of the cases fits into.

    Args:
        cases: Settings, prompt length and requests at once of each case.
        response: Positions of a response.
        longest: The engine's ``max_model_len``; vLLM requires room for one such request.
        page_size: Slots of a page.
    """
    needed = [
        requests * num_pages(settings, prompt, response, page_size)
        for settings, prompt, requests in cases
    ]
    # That request has the engine's own settings, which are the defaults. Depending on rounding,
    # either a short or a long prompt needs more pages.
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
    """Return the contenders whose requests can all run at once in a pool of ``pages`` pages."""
    room = pages - _SPARE_PAGES
    return [
        one
        for one in contenders
        if one.program != "engine"
        or requests * num_pages(one.settings, prompt, response, page_size) <= room
    ]
