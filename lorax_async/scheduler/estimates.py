"""Estimates from the past: when a load's layers arrive, and how long a pass takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

PROFILE_STEPS = 16
"""The number of points at which a load profile is sampled."""

LATE_FACTOR = 1.1
"""The wait for a late group times this is its expected total wait."""

LATEST_WEIGHT = 0.5
"""The latest load's weight in a moving average."""

_MIN_FRACTION = 1e-6
"""The smallest fraction of a load's time: the first groups may arrive in no time."""

DECAY = 0.9
"""The factor by which a pass's weight falls with each later one."""


class LoadProfile:
    """A moving average over loads of one kind: seconds per byte, and the arrival curve.

    Layers need not arrive evenly: from a server, the first arrive one by one, the rest together.
    """

    def __init__(self) -> None:
        self.per_byte: float | None = None
        self._curve = [step / PROFILE_STEPS for step in range(PROFILE_STEPS + 1)]

    def record(self, times: Sequence[float], nbytes: int) -> None:
        """Add a load of `nbytes`: for each group, the seconds from the start to its arrival."""
        total = times[-1]
        if total <= 0 or nbytes <= 0:
            return
        steps = range(1, PROFILE_STEPS)
        curve = [_interpolate([0.0, *times], step / PROFILE_STEPS) / total for step in steps]
        curve = [0.0, *curve, 1.0]
        if self.per_byte is None:
            self.per_byte, self._curve = total / nbytes, curve
            return
        self.per_byte += LATEST_WEIGHT * (total / nbytes - self.per_byte)
        self._curve = [
            old + LATEST_WEIGHT * (new - old) for old, new in zip(self._curve, curve, strict=True)
        ]

    def time_fraction(self, fraction: float) -> float:
        """Return the fraction of a load's time after which `fraction` of its groups is there."""
        return _interpolate(self._curve, fraction)


def _interpolate(points: Sequence[float], fraction: float) -> float:
    """Interpolate linearly between evenly spaced points."""
    place = fraction * (len(points) - 1)
    below = min(int(place), len(points) - 2)
    return points[below] + (place - below) * (points[below + 1] - points[below])


@dataclass(eq=False)
class LoadEstimate:
    """The expected arrival of one load's layer groups. Times are seconds of one clock.

    `layers` are the adapter's groups in order, `nbytes` is its size. The slot was granted at
    `since`. `profile` has past loads of this kind; this load is added when it is complete.
    """

    layers: Sequence[int]
    nbytes: int
    since: float
    profile: LoadProfile
    _times: list[float] = field(default_factory=list, init=False)
    _recorded: bool = field(default=False, init=False)

    @property
    def arrived(self) -> int:
        """The number of layer groups that have arrived."""
        return len(self._times)

    @property
    def latest(self) -> float:
        """When the last group arrived, or when the slot was granted."""
        return self.since + self._times[-1] if self._times else self.since

    def skip(self, groups: int) -> None:
        """Mark the first `groups` as arrived at an unknown time; keep this load off the profile."""
        self._recorded = True
        self._times = [0.0] * groups

    def record(self, layer: int, now: float) -> None:
        """Mark all groups up to `layer` as arrived."""
        arrived = sum(group <= layer for group in self.layers)
        self._times += [now - self.since] * (arrived - len(self._times))
        if arrived == len(self.layers) and not self._recorded:
            self._recorded = True
            self.profile.record(self._times, self.nbytes)

    def expected(self, now: float) -> list[float] | None:
        """Return when each missing group will arrive; None without an observed arrival time."""
        arrived, groups = len(self._times), len(self.layers)
        if not arrived:
            return None
        fractions = [
            max(_MIN_FRACTION, self.profile.time_fraction(number / groups))
            for number in range(arrived, groups + 1)
        ]
        # Extrapolate the whole load from its own progress, or else from the profile.
        elapsed = self._times[-1]
        usual = (self.profile.per_byte or 0.0) * self.nbytes
        total = elapsed / fractions[0] if elapsed else usual
        if not total:
            return None
        if arrived < groups and fractions[1] * total < now - self.since:
            total = LATE_FACTOR * (now - self.since) / fractions[1]
        return [self.since + fraction * total for fraction in fractions[1:]]

    def earliest_pass(self, now: float, seconds: float | None, num_layers: int) -> float:
        """Return the earliest start of a pass that reaches no layer before its expected arrival.

        `seconds` is the duration of the pass, spread evenly over its layers; None if unknown: then
        the pass starts when all layers have arrived. `inf` while `expected` is None.
        """
        expected = self.expected(now)
        if expected is None:
            return inf
        per_layer = (seconds or 0.0) / max(1, num_layers)
        waits = [
            moment - per_layer * max(0, layer)
            for layer, moment in zip(self.layers[len(self._times) :], expected, strict=True)
        ]
        return max(waits, default=now)


class PassTimeModel:
    """Predicts the seconds of a pass from its tokens: a weighted linear fit of past passes.

    If all passes had one size, smaller ones are predicted in proportion and larger ones as equally
    long: a pass longer than predicted does no harm.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Add the duration of a pass."""
        self._weight = self._weight * DECAY + 1
        self._x = self._x * DECAY + tokens
        self._y = self._y * DECAY + seconds
        self._xx = self._xx * DECAY + tokens * tokens
        self._xy = self._xy * DECAY + tokens * seconds

    def predict(self, tokens: int) -> float | None:
        """Return the seconds of a pass of `tokens`; None before the first pass."""
        if not self._weight:
            return None
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        if spread < 1e-6 * x * x:
            return y * min(1.0, tokens / x)
        slope = max(0.0, (self._xy / self._weight - x * y) / spread)
        if slope * x > y:  # the fixed cost must not be negative
            return y * tokens / x
        return y + slope * (tokens - x)
