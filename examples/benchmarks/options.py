# SPDX-License-Identifier: Apache-2.0
"""What values of options may be: types for argparse, which say what is allowed."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Value = TypeVar("Value")


def whole_number(least: int) -> Callable[[str], int]:
    """Return the type of whole numbers from ``least`` on."""

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
    """Return the type of values separated by commas."""
    return lambda text: [one(part) for part in text.split(",")]


def whole_numbers(least: int) -> Callable[[str], list[int]]:
    """Return the type of whole numbers from ``least`` on, separated by commas."""
    return list_of(whole_number(least))


def _number(text: str) -> float:
    """Return a number, NaN for what is none: every comparison with it fails."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def ratio(text: str) -> float:
    """Return a part of the keys, or a threshold."""
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return number


def above_0(text: str) -> float:
    """Return a number of seconds, or of bytes."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return number


def names_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Return the type of some of these names, separated by commas."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(allowed)}, got {text}")
        return text

    return list_of(parse)
