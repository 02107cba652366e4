# SPDX-License-Identifier: Apache-2.0
"""Types of option values for argparse, whose errors say which values are allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def whole_number(least: int) -> Callable[[str], int]:
    """Return a type for whole numbers from ``least`` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return number

    return parse


def list_of(one: Callable[[str], Value]) -> Callable[[str], list[Value]]:
    """Return a type for lists of values separated by commas."""
    return lambda text: [one(part) for part in text.split(",")]


def whole_numbers(least: int) -> Callable[[str], list[int]]:
    """Return a type for lists of whole numbers from ``least`` on, separated by commas."""
    return list_of(whole_number(least))


def _number(text: str) -> float:
    """Parse a number; anything else becomes NaN, with which every comparison fails."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def ratio(text: str) -> float:
    """Parse a keep ratio or a threshold: above 0 and at most 1."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return number


def above_0(text: str) -> float:
    """Parse a finite number above 0."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def names_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a type for lists of names out of ``allowed``, separated by commas."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, got {text}")
        return text

    return list_of(parse)
