# SPDX-License-Identifier: Apache-2.0
"""Markdown tables, and targets: figures that must stay within a bound."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from programs import Job


@dataclass(frozen=True)
class Target:
    """A figure that must stay within a bound.

    Attributes:
        figure: Description of the figure.
        bound: The bound.
        value: The measured value; None if it was not measured.
        at_least: Whether the bound is a lower bound.
        note: How the value came about.
        judged: Whether it was measured under conditions for which the bound must hold.
    """

    figure: str
    bound: float
    value: float | None
    at_least: bool = True
    note: str = ""
    judged: bool = True

    @property
    def holds(self) -> bool | None:
        if self.value is None or not self.judged:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def target(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.bound:g}"

    def as_json(self) -> Job:
        return vars(self) | {"holds": self.holds}


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def targets_table(targets: list[Target]) -> str:
    """Return the table of targets."""
    rows = [
        [
            one.figure,
            one.target,
            "" if one.value is None else f"{one.value:.3g}",
            _verdict(one),
            one.note,
        ]
        for one in targets
    ]
    return table(["figure", "target", "measured", "holds", "how"], rows)


def _verdict(one: Target) -> str:
    if one.holds is None:
        return "not measured" if one.value is None else "not judged"
    return "yes" if one.holds else "**no**"
