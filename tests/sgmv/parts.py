"""A process that runs parts of the proof by their names."""

from __future__ import annotations

import sys
from collections.abc import Callable

PARTS: dict[str, Callable[[], int]] = {}


def part(function: Callable[[], int]) -> Callable[[], int]:
    """It returns how many things it tried, and raises AssertionError for what is wrong."""
    PARTS[function.__name__] = function
    return function


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def run_parts() -> None:
    """Those named on the command line."""
    for name in sys.argv[1:]:
        say(f"{name}: {PARTS[name]()} tried")
