# SPDX-License-Identifier: Apache-2.0
"""What programs are told to do: parts of responses, short jobs that warm up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from programs import Job, ProgramError

Settings = dict[str, Any]
#: An ordinary token, where a response is not to be written.
_FIXED = 8


def blocks_that_tell(settings: Settings, num_blocks: int) -> Sequence[int]:
    """Return blocks of a response that take on average as long as all do.

    All, where they share refreshes. Under ``prefix`` a step of the first block runs all positions
    of the response and one of the last those of a block; else they are alike.
    """
    if settings.get("refresh_interval", 1) > 1:
        return range(num_blocks)
    return sorted({0, num_blocks - 1}) if settings["cache_policy"] == "prefix" else [0]


def canvas_of(blocks: Sequence[int], num_blocks: int, block_length: int, mask: int) -> list[int]:
    """Return a canvas of whole blocks of which only these are to be written.

    Args:
        blocks: Their indices.
        num_blocks: Of the response.
        block_length: Positions of a block.
        mask: The mask's id.
    """
    fixed = [[_FIXED] * block_length, [mask] * block_length]
    return [token for index in range(num_blocks) for token in fixed[index in blocks]]


def check_canvas(job: Job, reply: Job, mask: int) -> None:
    """Check that what was to be written of a canvas was.

    Args:
        job: What a program was told.
        reply: What it gave.
        mask: The mask's id.

    Raises:
        ProgramError: If it was not, or if there was nothing to write.
    """
    canvas = job["settings"].get("canvas")
    if canvas is None:
        return
    if mask not in canvas:
        raise ProgramError(f"no position of the canvas was to be written: it has no mask, {mask}")
    if any(mask in tokens for tokens in reply["tokens"]):
        raise ProgramError(f"the canvas was not written: its mask, {mask}, is among the tokens")


def warm_up(job: Job) -> Job:
    """Return a short job with steps of the same shapes, a late eviction among them."""
    block_length = min(job["settings"]["block_length"], job["response"])
    # Without a cache all steps are alike.
    whole = job["settings"]["cache_policy"] == "none"
    steps = min((1 if whole else 4) + job["settings"].get("eviction_delay", 0), block_length)
    settings = job["settings"] | {"steps": steps, "block_length": block_length}
    # Its response is a block, all to be written. Of many requests a part fills the same steps,
    # but where the few steps that are measured run all of them.
    if settings.pop("canvas", None) is not None and not whole:
        job = job | {"prompts": job["prompts"][: -(-len(job["prompts"]) // 4)]}
    return job | {"response": block_length, "settings": settings}
