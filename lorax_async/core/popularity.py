"""Who is asked for how often: Zipf's law."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from lorax_async.errors import ConfigError

MOST_EXPONENT = 10.0


class Zipf:
    """The n-th of `count`, counted from 1, is asked for in proportion to 1 / n ** exponent.

    0 asks for all alike. Raises `ConfigError` where there is nobody, or for an exponent that is
    negative or over 10.
    """

    def __init__(self, count: int, exponent: float) -> None:
        if count < 1 or not 0 <= exponent <= MOST_EXPONENT:
            raise ConfigError(
                f"Zipf's law is for 1 or more and an exponent from 0 to {MOST_EXPONENT:g}, not for"
                f" {count} and {exponent:g}"
            )
        self._sums = list(accumulate((n + 1) ** -exponent for n in range(count)))

    def pick(self, uniform: float) -> int:
        """Who it is, from 0 on, for a number drawn evenly from [0, 1)."""
        sums = self._sums
        return min(bisect_right(sums, uniform * sums[-1]), len(sums) - 1)
