# SPDX-License-Identifier: Apache-2.0
"""Jobs for programs: responses of which only some blocks are written, and warm-up jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from programs import Job, ProgramError

Settings = dict[str, Any]
#: An ordinary token that fills the blocks of a canvas that are not to be written.
_FIXED = 8


def blocks_that_tell(settings: Settings, num_blocks: int) -> Sequence[int]:
    """Return the indices of blocks that on average take as long as all blocks of a response.

    These are all blocks if they share refreshes. Under ``prefix``, a step of the first block runs
    all positions of the response and a step of the last one only its block, so they are these two.
    Otherwise all blocks are alike, and one is enough.
    """
    if settings.get("refresh_interval", 1) > 1:
        return range(num_blocks)
    return sorted({0, num_blocks - 1}) if settings["cache_policy"] == "prefix" else [0]


def canvas_of(blocks: Sequence[int], num_blocks: int, block_length: int, mask: int) -> list[int]:
    """Return a canvas of whole blocks in which only ``blocks`` are to be written.

    Args:
        blocks: Indices of the blocks to write.
        num_blocks: Blocks of the response.
        block_length: Positions of a block.
        mask: The mask's token id.
    """
    fixed = [[_FIXED] * block_length, [mask] * block_length]
    return [token for index in range(num_blocks) for token in fixed[index in blocks]]


def check_canvas(job: Job, reply: Job, mask: int) -> None:
    """Check that all masks of a job's canvas, if it has one, were written.

    Args:
        job: The job of a program.
        reply: The program's reply.
        mask: The mask's token id.

    Raises:
        ProgramError: If some were not, or if there was nothing to write.
    """
    canvas = job["settings"].get("canvas")
    if canvas is None:
        return
    if mask not in canvas:
        raise ProgramError(f"no position of the canvas was to be written: it has no mask, {mask}")
    if any(mask in tokens for tokens in reply["tokens"]):
        raise ProgramError(f"the canvas was not written: its mask, {mask}, is among the tokens")


def warm_up(job: Job) -> Job:
    """Return a short job with steps of the same shapes, late eviction included."""
    block_length = min(job["settings"]["block_length"], job["response"])
    # Without a cache, all steps are alike.
    whole = job["settings"]["cache_policy"] == "none"
    steps = min((1 if whole else 4) + job["settings"].get("eviction_delay", 0), block_length)
    settings = job["settings"] | {"steps": steps, "block_length": block_length}
    # The warm-up's response is one block, written as a whole. Of many requests, a quarter fills
    # steps of the same shapes, except without a cache, where each measured step runs all requests.
    if settings.pop("canvas", None) is not None and not whole:
        job = job | {"prompts": job["prompts"][: -(-len(job["prompts"]) // 4)]}
    return job | {"response": block_length, "settings": settings}
