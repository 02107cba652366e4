# SPDX-License-Identifier: Apache-2.0
"""The targets on one H100 with LLaDA-8B."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gpu_cases import FEWER_STEPS, GIB, SCALES, SCHEDULES, Scale
from gpu_record import Record, find
from programs import Job
from session import Measurement
from tables import Target

#: Names of the GPUs on which rates are judged: the targets' H100, not its PCIe and NVL variants.
_CARD = re.compile(r"\bH100\b(?!.*(PCIe|NVL))")
#: Compute capability on which all other figures are judged, as they depend little, if at all, on
#: bandwidth and clock.
_HOPPER = [9, 0]
#: Bytes a second according to the data sheets; the first name that matches counts.
_NOMINAL = {
    r"\bH100 PCIe": 2.04e12,
    r"\bH100 NVL": 3.94e12,
    r"\bH100\b": 3.35e12,
    r"\bH200\b": 4.8e12,
}


def most_rate(one: Measurement) -> float | None:
    """Return the tokens a second that the roofline allows; None if no roofline was measured."""
    floor = one.notes["floor"]
    return None if floor is None else one.num_requests * one.response / floor


def is_possible(one: Measurement) -> bool:
    """Return whether no run was faster than its floor; if one was, it did not do its work."""
    floor = one.notes["floor"]
    return floor is None or min(one.seconds) >= floor


def roofline_note(*ones: Measurement) -> str:
    """Return the reason why rates cannot be judged, "" if there is none."""
    if not all(map(is_possible, ones)):
        return "faster than the roofline, so not what it was to be"
    return "" if all(map(most_rate, ones)) else "no roofline was measured"


def check_targets(record: Record) -> list[Target]:
    """Return the targets.

    Of several measurements of a rate, the target's own sweep, more rounds and later runs take
    precedence, in this order. If only the small model ran, its figures are shown and not judged.
    """
    sizes = {run["size"] for run in record.runs if run["family"] == "llada"}
    size = "public" if "public" in sizes or not sizes else min(sizes)
    return list(_Targets(record, size, SCALES[size]))


@dataclass
class _Targets:
    record: Record
    size: str
    scale: Scale

    def __iter__(self) -> Iterator[Target]:
        scale, name = self.scale, "LLaDA-8B" if self.size == "public" else f"LLaDA {self.size}"
        for schedule in ("sparse", *SCHEDULES):
            yield self._rate(f"{name}, one request, context {scale.short:,}", schedule, 1, 120.0)
        for context, bound in ((scale.medium, 15.0), (scale.large, 25.0)):
            for schedule in ("sparse", *SCHEDULES):
                yield self._over_none(name, schedule, context, bound)
        for schedule in ("sparse", *SCHEDULES):
            figure = f"{name}, {scale.many} requests, context {scale.short:,}"
            yield self._rate(figure, schedule, scale.many, 2000.0)
        figure = f"(for comparison, not asked for) {figure}"
        yield self._rate(figure, FEWER_STEPS, scale.many, 2000.0, asked=False)
        yield self._step(name)
        yield self._memory(name)

    def _counts(self, run: int) -> bool:
        """Return whether a run was with the judged model and size."""
        about = self.record.runs[run]
        return (about["family"], about["size"]) == ("llada", self.size)

    def _latest(self, entries: list[Job], **wanted: Any) -> Job | None:
        """Return the latest entry of the judged model with the ``wanted`` values, if any."""
        found = [
            one for one in entries if self._counts(one["run"]) and wanted.items() <= one.items()
        ]
        return max(reversed(found), key=lambda one: self._started(one["run"]), default=None)

    def _started(self, run: int) -> str:
        started: str = self.record.runs[run]["started"]
        return started

    def _target(
        self,
        figure: str,
        bound: float,
        run: int | None = None,
        value: float | None = None,
        note: str = "",
        at_least: bool = True,
        judged: bool = True,
    ) -> Target:
        if run is None:
            return Target(figure, bound, None, at_least)
        name = self.record.runs[run]["machine"]["name"]
        judged = judged and self.size == "public"
        note = "; ".join(filter(None, (f"run {run + 1}, {name}", note)))
        return Target(figure, bound, value, at_least, note, judged)

    def _is_hopper(self, run: int) -> bool:
        return self.record.runs[run]["machine"].get("capability") == _HOPPER

    def _is_the_card(self, run: int) -> bool:
        return _CARD.search(self.record.runs[run]["machine"]["name"]) is not None

    def _measurements(self, contender: str, prompt: int, requests: int) -> list[Measurement]:
        """Return a contender's measurements, those of the sweep that measures its rate first.

        Then by more rounds, then by later runs, since merged files come in no particular order.
        """
        wanted = (f"engine {contender}", prompt, requests)
        sweep = "contexts" if requests == 1 else f"{requests} at once"
        found = [
            one
            for one in reversed(self.record.measurements)
            if self._counts(one.notes["run"])
            and (one.contender, one.prompt, one.concurrency) == wanted
        ]

        def rank(one: Measurement) -> tuple[bool, int, str]:
            return one.sweep == sweep, len(one.seconds), self._started(one.notes["run"])

        return sorted(found, key=rank, reverse=True)

    def _rate(
        self, figure: str, schedule: str, requests: int, bound: float, asked: bool = True
    ) -> Target:
        one = next(iter(self._measurements(schedule, self.scale.short, requests)), None)
        figure = f"{figure}, {schedule}: tokens/s"
        if one is None:
            return self._target(figure, bound)
        most, why_not = most_rate(one), roofline_note(one)
        note = "" if most is None else f"the roofline allows {most:,.0f}"
        if most is not None and most < bound:
            note += ", so nothing can reach it here"
        note = "; ".join(filter(None, (note, why_not)))
        run = one.notes["run"]
        judged = asked and self._is_the_card(run) and not why_not
        return self._target(figure, bound, run, one.rate, note, judged=judged)

    def _over_none(self, name: str, schedule: str, context: int, bound: float) -> Target:
        figure = f"{name}, one request, context {context:,}: {schedule} over none"
        one = none = None
        for none in self._measurements("none", context, 1):
            one = find(self.record.measurements, none, f"engine {schedule}")
            if one is not None:
                break
        if one is None or none is None:
            return self._target(figure, bound)
        mosts, run = (most_rate(one), most_rate(none)), one.notes["run"]
        note = f"{one.rate:.2f} and {none.rate:.2f} tokens/s"
        if mosts[0] and mosts[1]:
            note += f"; rooflines {mosts[0]:.2f} and {mosts[1]:.2f}: {mosts[0] / mosts[1]:.1f} ×"
        why_not = roofline_note(one, none)
        note = "; ".join(filter(None, (note, why_not)))
        judged = self._is_hopper(run) and not why_not
        return self._target(figure, bound, run, one.speed_up(none), note, judged=judged)

    def _step(self, name: str) -> Target:
        scale = self.scale
        one = self._latest(self.record.steps, prompt=scale.short, requests=1)
        figure = (
            f"{name}, block step of one request, context {scale.short:,}, over weights / "
            "measured bandwidth"
        )
        if one is None or one["weights"] is None:
            return self._target(figure, 1.3, at_least=False)
        run, ratio = one["run"], one["block_step"] / one["weights"]
        note = f"{1e3 * one['block_step']:.2f} and {1e3 * one['weights']:.2f} ms"
        measured = (self.record.runs[run]["ceilings"] or {}).get("bandwidth")
        name = self.record.runs[run]["machine"]["name"]
        nominal = next((rate for kind, rate in _NOMINAL.items() if re.search(kind, name)), None)
        if measured and nominal:
            note += f"; {ratio * nominal / measured:.2f} by the nominal bandwidth, "
            note += f"{nominal / 1e9:,.0f} GB/s, not the measured {measured / 1e9:,.0f}"
        # A step below its floor is the difference of two runs that were disturbed.
        possible = one["block_step"] >= one.get("block_step_floor", 0)
        note += "" if possible else "; faster than the roofline, so not what it was to be"
        judged = self._is_hopper(run) and possible
        return self._target(figure, 1.3, run, ratio, note, at_least=False, judged=judged)

    def _memory(self, name: str) -> Target:
        context = self.scale.large
        figure = f"{name}, one request, context {context:,}, sparse: peak memory over weights, GiB"
        one = self._latest(self.record.memory, prompt=context, contender="engine sparse")
        if one is None:
            return self._target(figure, 7.0, at_least=False)
        run, value = one["run"], (one["peak"] - one["weights"]) / GIB
        note = "of PyTorch's tensors, without the CUDA context and what graphs take of the driver"
        judged = self._is_hopper(run)
        return self._target(figure, 7.0, run, value, note, at_least=False, judged=judged)
