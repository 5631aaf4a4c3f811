"""What is said of a picture, and the marks of its axis, whatever it is drawn with."""

from __future__ import annotations

import math

from lorax_async.tracing.picture import Picture

LEGEND = "One colour per layer, blue (first) to orange (last); pale red: a wait; grey: no layer."


def summary(picture: Picture) -> str:
    """How much of the computing lay before the end of the last copy; and whether spans are gone."""
    computed, overlapped = picture.overlap()
    span = f"{picture.stop - picture.start:,.1f} ms"
    gone = f"; the oldest {picture.dropped:,} spans are gone" if picture.dropped else ""
    if not computed:
        return f"{span}; no layer was computed{gone}"
    share = 100 * overlapped / computed
    return (
        f"{span}; layers were computed for {computed:,.1f} ms, of which {overlapped:,.1f} ms"
        f" ({share:.0f} %) before the last copy had ended{gone}"
    )


def marks(start: float, stop: float, most: int = 10) -> list[float]:
    """Round milliseconds from `start` to `stop`, `most` at most, of 1, 2 or 5 in a power of ten."""
    length = max(stop - start, 1e-6)
    steps = (digit * 10.0**exponent for exponent in range(-6, 16) for digit in (1, 2, 5))
    step = next(step for step in steps if length / step < most)
    first = math.ceil(start / step)
    found = ((first + n) * step for n in range(most))
    return [mark for mark in found if mark <= stop + 1e-9]
