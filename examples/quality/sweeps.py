# SPDX-License-Identifier: Apache-2.0
"""What is measured: rows of settings, and how many items each answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tasks import RESPONSE

Settings = dict[str, Any]

#: The late eviction that is tried with everything.
LATE = (4,)
#: The control that is measured at every ratio of the published choice.
RANDOM = "random"
#: Schedules of the cache that do not evict.
WHOLE = ("none", "prefix", "dual")


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes:
        tasks: Kinds of items.
        lengths: Of the prompts in the main table; side sweeps take the first.
        side_tasks: Those of the side sweeps.
        num_items: Of a cell of the main table that the claims are made of: policies that evict
            nothing, and the published choice at `claimed_keep_ratios`. Numbers of items are
            multiples of the requests at once, so that all cells fill the same batches.
        num_side_items: Of a cell of its other rows, and of side sweeps.
        keep_ratios: Of the main table's published choice, and of the random one.
        claimed_keep_ratios: Those of them that claims are made of.
        side_keep_ratios: Of the side sweeps; those of one ratio take the first.
        other_keep_ratios: Of the main table's other saliencies and controls.
        small_blocks: Length of blocks where a response has several.
    """

    tasks: tuple[str, ...] = ("retrieval", "copy")
    side_tasks: tuple[str, ...] = ("retrieval", "copy")
    lengths: tuple[int, ...] = (256, 512)
    num_items: int = 112
    num_side_items: int = 32
    keep_ratios: tuple[float, ...] = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1)
    claimed_keep_ratios: tuple[float, ...] = (0.5, 0.3)
    side_keep_ratios: tuple[float, ...] = (0.5, 0.3)
    other_keep_ratios: tuple[float, ...] = (0.5, 0.3, 0.1)
    delays: tuple[int, ...] = (0, 1, 2, 3)
    kernel_sizes: tuple[int, ...] = (1, 3, 5, 7, 9)
    eviction_delays: tuple[int, ...] = (1, 4, 8, 16, 24)
    refresh_intervals: tuple[int, ...] = (1, 2, 4)
    suffix_windows: tuple[int, ...] = (16, 8, 0)
    small_blocks: int = RESPONSE // 4
    thresholds: tuple[float, ...] = (0.5, 0.7, 0.9, 0.99)
    factors: tuple[float, ...] = (0.25, 0.5, 1.0)


#: Shows that all works; its figures mean little.
QUICK = Scale(
    side_tasks=("copy",),
    lengths=(96,),
    num_items=16,
    num_side_items=8,
    keep_ratios=(1.0, 0.5, 0.3),
    side_keep_ratios=(0.5,),
    other_keep_ratios=(1.0, 0.5),
    delays=(0, 1),
    kernel_sizes=(1, 3),
    eviction_delays=(4,),
    refresh_intervals=(1, 2),
    suffix_windows=(0,),
    small_blocks=RESPONSE // 2,
    thresholds=(0.9,),
    factors=(1.0,),
)


@dataclass(frozen=True)
class Row:
    """Settings that are measured.

    Attributes:
        series: What the row is one of, for plots.
        label: What tells it from others of the series.
        settings: Request parameters without ``diffusion_``.
        num_items: Of each cell.
    """

    series: str
    label: str
    settings: Settings
    num_items: int

    @property
    def name(self) -> str:
        return f"{self.series} {self.label}".strip()


@dataclass(frozen=True)
class Sweep:
    """A table: rows, and the cells of each.

    Attributes:
        name: As on the command line.
        title: In words.
        tasks: Kinds of items.
        lengths: Of the prompts.
        rows: In order. All are compared with `none`, the sweep's own or that of `keep`.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    rows: list[Row] = field(default_factory=list)

    def add(self, series: str, label: str, num_items: int, **settings: Any) -> None:
        settings = {"block_length": RESPONSE, **settings}
        self.rows.append(Row(series, label, settings, num_items))


def _side(scale: Scale) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return scale.side_tasks, scale.lengths[:1]


def _kept(ratio: float) -> str:
    return f"keep {ratio:g}"


def _series(saliency: str) -> str:
    return "sparse" if saliency == "paper" else f"sparse {saliency}"


def _keep(scale: Scale, saliencies: Iterable[str], controls: Iterable[str]) -> Sweep:
    sweep = Sweep("keep", "Policies and keep ratios", scale.tasks, scale.lengths)
    for policy in WHOLE:
        sweep.add(policy, "", scale.num_items, cache_policy=policy)
    for saliency in saliencies:
        published = saliency == "paper"
        for ratio in scale.keep_ratios if published else scale.other_keep_ratios:
            claimed = published and ratio in scale.claimed_keep_ratios
            num_items = scale.num_items if claimed else scale.num_side_items
            sweep.add(
                _series(saliency),
                _kept(ratio),
                num_items,
                cache_policy="sparse",
                keep_ratio=ratio,
                saliency=saliency,
            )
    for control in controls:
        for ratio in scale.keep_ratios if control == RANDOM else scale.other_keep_ratios:
            sweep.add(
                control,
                _kept(ratio),
                scale.num_side_items,
                cache_policy="sparse",
                keep_ratio=ratio,
                saliency=control,
                kernel_size=1,
            )
    return sweep


def _delay(scale: Scale) -> Sweep:
    """Ratio 1 tells what waiting does when nothing is evicted; with delay 0 it is ``dual``."""
    sweep = Sweep("delay", "Full passes before the choice", *_side(scale))
    num_items = scale.num_side_items
    sweep.add("dual", "", num_items, cache_policy="dual")
    for ratio in (1.0, scale.side_keep_ratios[0]):
        for delay in scale.delays:
            settings = {"cache_policy": "sparse", "keep_ratio": ratio, "delay_steps": delay}
            sweep.add(f"sparse {_kept(ratio)}", f"delay {delay}", num_items, **settings)
    return sweep


def _kernel(scale: Scale) -> Sweep:
    sweep = Sweep("kernel", "Width of the max-pool", *_side(scale))
    num_items = scale.num_side_items
    ratio = scale.side_keep_ratios[0]
    for size in scale.kernel_sizes:
        settings = {"cache_policy": "sparse", "keep_ratio": ratio, "kernel_size": size}
        sweep.add(f"sparse {_kept(ratio)}", f"kernel {size}", num_items, **settings)
    return sweep


def _granularity(scale: Scale) -> Sweep:
    sweep = Sweep("granularity", "Single positions or runs of a page", *_side(scale))
    num_items = scale.num_side_items
    for granularity in ("token", "page"):
        for ratio in dict.fromkeys((0.7, *scale.side_keep_ratios)):
            settings = {"cache_policy": "sparse", "keep_ratio": ratio, "granularity": granularity}
            sweep.add(granularity, _kept(ratio), num_items, **settings)
    return sweep


def _late(scale: Scale, saliencies: Iterable[str]) -> Sweep:
    """Late eviction has one full pass; the first rows have it too, or are as published."""
    sweep = Sweep("late", "Late eviction (one full pass)", *_side(scale))
    num_items = scale.num_side_items
    sweep.add("dual", "", num_items, cache_policy="dual")
    for saliency in saliencies:
        for ratio in scale.side_keep_ratios:
            series = f"{_series(saliency)} {_kept(ratio)}"
            settings = {"cache_policy": "sparse", "keep_ratio": ratio, "saliency": saliency}
            sweep.add(series, "as published", num_items, **settings)
            settings["delay_steps"] = 0
            delays = scale.eviction_delays if saliency == "paper" else LATE
            for delay in delays:
                sweep.add(series, f"late {delay}", num_items, **settings, eviction_delay=delay)
    return sweep


def _interval(scale: Scale) -> Sweep:
    """Blocks shorter than the response: the others have one, which no refresh can share."""
    blocks = {"block_length": scale.small_blocks}
    title = f"Blocks of {scale.small_blocks} that share a refresh"
    sweep = Sweep("interval", title, *_side(scale))
    num_items = scale.num_side_items
    sweep.add("none", "", num_items, cache_policy="none", **blocks)
    for policy in WHOLE[1:]:
        for interval in scale.refresh_intervals:
            settings = {"cache_policy": policy, "refresh_interval": interval, **blocks}
            sweep.add(policy, f"interval {interval}", num_items, **settings)
    for ratio in scale.side_keep_ratios:
        for interval in scale.refresh_intervals:
            settings = {"cache_policy": "sparse", "keep_ratio": ratio, **blocks}
            settings["refresh_interval"] = interval
            sweep.add(f"sparse {_kept(ratio)}", f"interval {interval}", num_items, **settings)
    return sweep


def _suffix(scale: Scale) -> Sweep:
    """Blocks shorter than the response, of which the last sees all and the others a part."""
    title = f"Blocks of {scale.small_blocks} that see a part of what follows"
    sweep = Sweep("suffix", title, *_side(scale))
    num_items, blocks = scale.num_side_items, {"block_length": scale.small_blocks}
    sweep.add("none", "", num_items, cache_policy="none", **blocks)
    methods: dict[str, Settings] = {name: {"cache_policy": name} for name in WHOLE[1:]}
    ratio = scale.side_keep_ratios[0]
    methods[f"sparse {_kept(ratio)}"] = {"cache_policy": "sparse", "keep_ratio": ratio}
    for method, settings in methods.items():
        for window in (None, *scale.suffix_windows):
            label = "all" if window is None else f"window {window}"
            sweep.add(method, label, num_items, **settings, suffix_window=window, **blocks)
    return sweep


def _parallel(scale: Scale) -> Sweep:
    """Several tokens a step."""
    sweep = Sweep("parallel", "Several tokens a step", *_side(scale))
    num_items = scale.num_side_items
    rules: dict[str, Settings] = {"one a step": {}}
    rules |= {f"threshold {value:g}": {"threshold": value} for value in scale.thresholds}
    rules |= {f"factor {value:g}": {"factor": value} for value in scale.factors}
    ratio = scale.side_keep_ratios[0]
    kept = {"cache_policy": "sparse", "keep_ratio": ratio}
    methods: dict[str, Settings] = {name: {"cache_policy": name} for name in ("none", "dual")}
    methods[f"sparse {_kept(ratio)}"] = kept
    methods[f"sparse {_kept(ratio)} late 4"] = kept | {"delay_steps": 0, "eviction_delay": 4}
    for method, settings in methods.items():
        for label, rule in rules.items():
            sweep.add(method, label, num_items, **settings, **rule)
    return sweep


SWEEPS = ("keep", "delay", "kernel", "granularity", "late", "interval", "suffix", "parallel")


def make_sweeps(
    scale: Scale, saliencies: Iterable[str], controls: Iterable[str]
) -> dict[str, Sweep]:
    """Return all sweeps by name.

    Args:
        scale: How much is measured.
        saliencies: What ``sparse`` can rank keys by, the paper's among it.
        controls: Those that know the item.
    """
    saliencies = list(saliencies)
    made = [
        _keep(scale, saliencies, controls),
        _delay(scale),
        _kernel(scale),
        _granularity(scale),
        _late(scale, saliencies),
        _interval(scale),
        _suffix(scale),
        _parallel(scale),
    ]
    return {sweep.name: sweep for sweep in made}
