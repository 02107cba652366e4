# SPDX-License-Identifier: Apache-2.0
"""Sweeps to measure: rows of settings, and the number of items each of them answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tasks import RESPONSE

Settings = dict[str, Any]

#: Delays of late eviction tried with every saliency but the published one.
LATE = (4,)
#: The control that is measured at the same keep ratios as the published choice.
RANDOM = "random"
#: Cache policies that do not evict.
WHOLE = ("none", "prefix", "dual")


@dataclass(frozen=True)
class Scale:
    """How much is measured. The main table is the sweep `keep`; all others are side sweeps.

    Attributes:
        tasks: Tasks of the main table.
        side_tasks: Tasks of the side sweeps.
        lengths: Prompt lengths of the main table; side sweeps use the first.
        num_items: Items per cell in those rows of the main table that claims are based on: policies
            that do not evict, and the published choice at `claimed_keep_ratios`. Numbers of items
            are multiples of the number of requests at once, so that all batches are full.
        num_side_items: Items per cell in the main table's other rows and in side sweeps.
        keep_ratios: Keep ratios of the published choice and of the random one in the main table.
        claimed_keep_ratios: Those of `keep_ratios` that claims are made about.
        side_keep_ratios: Keep ratios of the side sweeps; sweeps with a single one use the first.
        other_keep_ratios: Keep ratios of the main table's other saliencies and controls.
        small_blocks: Block length in the sweeps whose responses have several blocks.
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


#: A quick check that everything works; its figures mean little.
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
    """One combination of settings to measure.

    Attributes:
        series: The series that the row belongs to in plots.
        label: What distinguishes the row from others of its series.
        settings: Request parameters without ``diffusion_``.
        num_items: Items per cell.
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
    """A table of rows; each row has a cell for every task and length.

    Attributes:
        name: Name on the command line.
        title: Title in the report.
        tasks: Tasks of the items.
        lengths: Prompt lengths.
        rows: Rows in order. All are compared with the row `none` of this sweep or else of `keep`.
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
    """Ratio 1 shows the delay's effect when nothing is evicted; with delay 0 it is ``dual``."""
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
    """Compare late eviction, which has one full pass, with ``dual`` and the published schedule."""
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
    """Uses blocks shorter than the response: with one block, there is no refresh to share."""
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
    """Uses blocks shorter than the response: a single block has nothing after it to leave out."""
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
        saliencies: Names of the saliencies that ``sparse`` can use, ``paper`` among them.
        controls: Names of the controls.
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
