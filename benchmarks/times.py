"""Times of contenders in interleaved rounds, and the lines that tell of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from harness import print_table

Line = dict[str, object]


@dataclass(slots=True)
class Times:
    """Of each contender, in ms."""

    of: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.of.setdefault(name, []).append(seconds * 1e3)

    def median(self, name: str) -> float:
        return statistics.median(self.of[name])

    def p99(self, name: str) -> float:
        found = sorted(self.of[name])
        return found[min(len(found) - 1, int(0.99 * len(found)))]


def verdict(ratio: float, target: float) -> str:
    return f"missed by {ratio - target:.2f} ×" if ratio > target else "reached"


def print_lines(title: str, found: Sequence[Line]) -> None:
    keys = [key for key in found[-1] if key != "row"]
    cells = [[_cell(line.get(key, "")) for key in keys] for line in found]
    print_table(title, [key.replace("_", " ") for key in keys], cells)


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
