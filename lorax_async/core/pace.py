"""How long a forward pass takes, from those that were seen."""

from __future__ import annotations

DECAY = 0.9
"""What counts of a pass once there was another one."""


class Pace:
    """Seconds of a pass by its tokens: a line through what was seen, the latest most of all.

    Where all were of one size, smaller ones are taken to be shorter in proportion, and larger ones
    to be as long: a pass that turns out longer than was said does no harm.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        self._weight = self._weight * DECAY + 1
        self._x = self._x * DECAY + tokens
        self._y = self._y * DECAY + seconds
        self._xx = self._xx * DECAY + tokens * tokens
        self._xy = self._xy * DECAY + tokens * seconds

    def predict(self, tokens: int) -> float | None:
        """Seconds; None before the first pass."""
        if not self._weight:
            return None
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        if spread < 1e-6 * x * x:
            return y * min(1.0, tokens / x)
        slope = max(0.0, (self._xy / self._weight - x * y) / spread)
        if slope * x > y:  # nothing is left for the pass itself
            return y * tokens / x
        return y + slope * (tokens - x)
