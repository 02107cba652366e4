# SPDX-License-Identifier: Apache-2.0
"""When `sparse` refreshes and evicts, and what takes part: settings beyond the published ones.

The published schedule has two full passes a block: a plain one, and one that fills the cache and
evicts. *Eager*: the first pass does both. *Late*: the first pass fills the cache, and eviction
follows some block steps later. *Interval*: one refresh serves several blocks. *Window*: of the
positions behind the block only so many take part.
"""

from __future__ import annotations

from session import Settings

EAGER: Settings = {"delay_steps": 0}
#: Late eviction as the targets have it.
LATE_DELAY = 4


def late(delay: int = LATE_DELAY, **changes: int) -> Settings:
    """Return late eviction after so many block steps, with more settings on top."""
    return EAGER | {"eviction_delay": delay} | changes


def intervals() -> dict[str, Settings]:
    """Return one refresh for several blocks, and the same with late eviction."""
    found: dict[str, Settings] = {f"interval {n}": {"refresh_interval": n} for n in (2, 4)}
    return found | {f"late {LATE_DELAY}, interval 2": late(refresh_interval=2)}


def windows(sizes: list[int]) -> dict[str, Settings]:
    """Return windows, and the largest of them with late eviction."""
    found: dict[str, Settings] = {f"window {size}": {"suffix_window": size} for size in sizes}
    if sizes:
        most = max(sizes)
        found[f"late {LATE_DELAY}, window {most}"] = late(suffix_window=most)
    return found


def within_block() -> dict[str, Settings]:
    """Return what differs from the published schedule inside a block."""
    return {"eager": EAGER} | {f"late {delay}": late(delay) for delay in (2, LATE_DELAY, 8)}
