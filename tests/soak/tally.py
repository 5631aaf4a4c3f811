"""What came of it, in numbers that take no more room the longer it lasts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorax_async import LoraxError


class SoakError(AssertionError):
    """Something was not as it must be: what, and the story of the adapter."""

    def __init__(self, problem: str, story: Sequence[object] = ()) -> None:
        super().__init__("\n  ".join([problem, *map(str, story)]))


@dataclass
class Tally:
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    peaks: Counter[str] = field(default_factory=Counter)
    lags: Counter[int] = field(default_factory=Counter)
    """Tenths of milliseconds by which the loop was late, and how often."""
    rss: list[int] = field(default_factory=list)
    """Bytes, each second."""

    def failed(self, error: LoraxError) -> None:
        self.errors[f"{type(error).__name__} ({error.stage})"] += 1

    def peak(self, what: str, value: int) -> None:
        self.peaks[what] = max(self.peaks[what], value)

    def lag(self, part: float) -> float:
        """Milliseconds that so large a part of the measurements stayed below."""
        left = part * self.lags.total()
        for tenths, count in sorted(self.lags.items()):
            left -= count
            if left <= 0:
                return tenths / 10
        return 0.0

    def lines(self) -> list[str]:
        step = -(-len(self.rss) // 8) or 1
        grown = [max(self.rss[at : at + step]) for at in range(0, len(self.rss), step)]
        lags = ", ".join(f"p{part * 100:g} {self.lag(part):.1f}" for part in (0.5, 0.99, 0.999))
        return [
            f"outcomes: {_told(self.outcomes)}",
            f"errors: {_told(self.errors)}",
            f"at most: {_told(self.peaks)}",
            f"RSS, in eighths of the time: {[round(value / 1e6) for value in grown]} MB",
            f"loop lag: {lags}, max {max(self.lags, default=0) / 10:.1f} ms",
        ]


def _told(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())) or "none"
