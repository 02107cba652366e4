# SPDX-License-Identifier: Apache-2.0
"""Schedules of `sparse` beyond the published one, and suffix windows.

The published schedule has two full passes per block: a plain one, and one that fills the cache and
evicts. *Eager*: the first pass does both. *Late*: the first pass fills the cache, and eviction
follows some block steps later. *Interval*: one refresh serves several blocks. *Window*: only a
limited number of the positions after the block takes part.
"""

from __future__ import annotations

from session import Settings

EAGER: Settings = {"delay_steps": 0}
#: Eviction delay of the targets.
LATE_DELAY = 4


def late(delay: int = LATE_DELAY, **changes: int) -> Settings:
    """Return the settings of late eviction after ``delay`` block steps, with ``changes`` on top."""
    return EAGER | {"eviction_delay": delay} | changes


def intervals() -> dict[str, Settings]:
    """Return schedules with one refresh for several blocks, one of them with late eviction."""
    found: dict[str, Settings] = {f"interval {n}": {"refresh_interval": n} for n in (2, 4)}
    return found | {f"late {LATE_DELAY}, interval 2": late(refresh_interval=2)}


def windows(sizes: list[int]) -> dict[str, Settings]:
    """Return suffix windows, and the largest of them with late eviction."""
    found: dict[str, Settings] = {f"window {size}": {"suffix_window": size} for size in sizes}
    if sizes:
        most = max(sizes)
        found[f"late {LATE_DELAY}, window {most}"] = late(suffix_window=most)
    return found


def within_block() -> dict[str, Settings]:
    """Return the schedules that differ from the published one within a block."""
    return {"eager": EAGER} | {f"late {delay}": late(delay) for delay in (2, LATE_DELAY, 8)}
