"""Learn what the connections to one origin get, alone and together. Times are given."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil, log2

_WINDOWS = 0.005, 0.003
_LATER_WINDOWS = 0.01
"""Seconds. The second one decides early whether connections share a rate."""

_AT_ONCE = 0.005
"""First bytes that are here within this time came with the head, or out of a bucket."""

_SILENT = 0.025
"""A connection that tells of no bytes for longer had none: a read takes less time."""

_WINDOW_BYTES = 64 << 10
"""Per receiving connection. Less is noise: a buffer empties at once."""

_WEIGHT, _FIRST_WEIGHT = 0.5, 0.7
"""How much a comparison of two numbers of connections counts, and the first one of a number."""

_LATEST = 0.4
"""How much the latest window counts among those of the same number of connections."""

_APART = 0.3
"""Doublings between two numbers of connections, from which on they are compared."""

_PATIENCE = 6, 96
"""Windows before twice as many connections are tried: at first, and at most. Each trial that adds
little doubles them.
"""

_IDLE = 0.25
"""After longer pauses, as a part of a window, what a bucket saved up meanwhile counts as a rate."""

_ENOUGH = 0.8
"""Connections that bring this part of the most are enough: the rest is not worth its requests."""

_PROPORTIONAL = 0.7
"""Connections share nothing that bring this part of what they would bring then."""

_UNKNOWN_DELAY = 0.02
_DELAYS = 32
"""The least of so many counts: the others waited for bytes that were on their way to us."""


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """A link, as far as it is known.

    Attributes
    ----------
    delay
        Seconds from a request to the head of its response.
    connections
        How many bring all that the link has, while each of them receives.
    rate
        Bytes per second of one of these while it receives; None if nothing was measured.
    flow
        Bytes per second of all these together, with the pauses that there were lately.
    is_compared
        Whether different numbers of connections were compared.
    trial
        How many to use for a while, to see whether they bring more; 0 for no trial.
    """

    delay: float
    connections: int = 1
    rate: float | None = None
    flow: float = 0.0
    is_compared: bool = False
    trial: int = 0


@dataclass(slots=True, eq=False)
class Reception:
    """A connection that receives a body: what the model had counted when bytes came last."""

    at: float
    connection_seconds: float
    is_first: bool = True


class LinkModel:
    """What connections to one origin got: the delay, and the rate by how many received together.

    The number is rounded to a power of two. The rate of the latest windows of one number, and that
    of the first one of another number right after them, tell what more connections add: a moment in
    which this machine was busy is not taken for what a number of connections can bring. After a
    trial that brought nothing, two windows have to say otherwise. Times are monotonic seconds.

    A first download of a few hundred KB at once came out of a bucket: one connection is then
    supposed to be as good as any number, until they are compared.
    """

    def __init__(self) -> None:
        self._delays = deque[float](maxlen=_DELAYS)
        self._shape: dict[int, float] = {}
        self._compared = set[int]()
        self._number, self._average = 0, 0.0
        self._rate = 0.0
        """Of the last windows, in which so many connections received."""

        self._held: float | None = None
        """The rate of a window with more connections than were enough; a second one decides."""

        self._untried, self._patience = 0, _PATIENCE[0]
        """Windows since the last trial of more connections, and those before the next one."""

        self._flow: float | None = None
        self._is_burst = False
        self._saved = 0
        self._receptions = set[Reception]()
        self._known: LinkEstimate | None = None
        """The estimate, until something changes it."""

        self._at = 0.0
        self._connection_seconds = 0.0
        self._begin_window()

    def began(self, now: float, delay: float) -> Reception:
        """Record the head of a response, whose connection receives from here on."""
        elapsed = self._advance(now)
        if not self._receptions:
            pause = min(elapsed, delay)
            self._paused += pause
            self._saved = int((self._flow or 0.0) * pause)
        self._delays.append(delay)
        self._known = None
        reception = Reception(self._at, self._connection_seconds)
        self._receptions.add(reception)
        return reception

    @property
    def is_receiving(self) -> bool:
        return bool(self._receptions)

    def received(self, reception: Reception, now: float, nbytes: int) -> bool:
        """Record bytes; return whether the estimate differs now.

        The first ones of a response say nothing about the rate if they came with the head.
        """
        self._advance(now)
        is_first, reception.is_first = reception.is_first, False
        seconds, together = self._take_elapsed(reception)
        if is_first and seconds < _AT_ONCE:
            return False
        return self._count(nbytes, seconds, together)

    def ended(self, reception: Reception, now: float) -> None:
        """Record that a connection receives no more of its response."""
        self._advance(now)
        self._receptions.discard(reception)
        if not self._receptions:
            self._count_burst()

    def _take_elapsed(self, reception: Reception) -> tuple[float, float]:
        """Return the seconds since its last bytes, of this and of all connections; begin anew."""
        seconds = self._at - reception.at
        together = self._connection_seconds - reception.connection_seconds
        reception.at, reception.connection_seconds = self._at, self._connection_seconds
        return seconds, together

    def estimate(self) -> LinkEstimate:
        """Return what is known of the link.

        More connections are expected to go on adding throughput as far again as they have done so.
        Where they added little, twice as many are tried now and then.
        """
        if self._known is None:
            self._known = self._estimate()
        return self._known

    def _estimate(self) -> LinkEstimate:
        delay = min(self._delays, default=_UNKNOWN_DELAY)
        if self._flow is None:
            return LinkEstimate(delay)
        if not self._shape:
            return LinkEstimate(delay, 1, self._flow, self._flow, is_compared=True)
        numbers, enough = sorted(self._shape), self._enough()
        growth = 1.0
        if enough == numbers[-1]:
            growths = (
                enough / n
                for n in numbers
                if self._shape[enough] >= _PROPORTIONAL * enough / n * self._shape[n]
            )
            growth = max(growths) if len(numbers) > 1 else 2.0
        rate = self._rate * self._shape[enough] / self._shape[self._number]
        return LinkEstimate(
            delay,
            round(enough * growth),
            rate / enough,
            min(self._flow, rate) * growth,
            is_compared=len(numbers) > 1,
            trial=2 * ceil(self._average) if self._untried >= self._patience else 0,
        )

    def _enough(self) -> int:
        """Return the least number of connections that bring nearly the most."""
        most = max(self._shape.values())
        return min([n for n, value in self._shape.items() if value >= _ENOUGH * most])

    # -- windows ----------------------------------------------------------------------------------

    def _begin_window(self) -> None:
        """Begin to count anew.

        `_nbytes` came in `_seconds`, the sum over connections, while each of them was one of
        `_together / _seconds` on average, in `_flowed + _paused` of the clock. `_all_bytes` are
        those that all would have brought at the rates of each.
        """
        self._nbytes, self._seconds, self._together, self._all_bytes = 0, 0.0, 0.0, 0.0
        self._flowed, self._paused = 0.0, 0.0

    def _advance(self, now: float) -> float:
        """Move to this moment; return the seconds since the last one."""
        elapsed = max(0.0, now - self._at)
        self._at += elapsed
        self._connection_seconds += elapsed * len(self._receptions)
        if self._receptions:
            self._flowed += elapsed
        return elapsed

    def _count(self, nbytes: int, seconds: float, together: float) -> bool:
        """Count bytes of a connection; return whether a window has ended."""
        if self._saved > 0:
            self._saved -= nbytes
            return False
        if not seconds:
            return False
        self._nbytes += nbytes
        self._seconds += seconds
        self._together += together
        self._all_bytes += nbytes * together / seconds
        number, elapsed = max(1.0, self._together / self._seconds), self._flowed + self._paused
        least = _WINDOWS[len(self._shape)] if len(self._shape) < 2 else _LATER_WINDOWS
        if min(elapsed, self._seconds / number) < least or self._nbytes < _WINDOW_BYTES * number:
            return False
        for reception in self._receptions:
            if self._at - reception.at > _SILENT:
                self._seconds += self._take_elapsed(reception)[0]
        rate = self._all_bytes / self._seconds
        self._flow, self._known = rate * self._flowed / elapsed, None
        if not self._is_burst or self._shape or self._paused <= _IDLE * elapsed:
            self._compare(number, rate)
        self._begin_window()
        return True

    def _count_burst(self) -> None:
        """Record a first response that ended before its rate could be measured."""
        if not self._shape and self._nbytes >= _WINDOW_BYTES:
            self._is_burst = True
            self._begin_window()

    def _compare(self, average: float, rate: float) -> None:
        """Record the rate of a window, in which `average` connections received.

        If that number is far enough from the one of the latest windows, the two rates tell what a
        doubling adds, from nothing to the same rate again. That then holds for the rounded numbers.
        """
        number = 2 ** max(0, round(log2(average)))
        if not self._shape:
            self._shape[number] = 1.0
            if self._is_burst:
                self._shape[1] = 1.0
            self._number = number
        self._untried += 1
        held, self._held = self._held, None
        if number == self._number:
            rate = _mean(rate, self._rate or rate, _LATEST)
        else:
            doublings, enough = log2(average / self._average), self._enough()
            if abs(doublings) < _APART:
                return
            if number > enough and held is None and self._patience > _PATIENCE[0]:
                self._held = rate
                return
            if number > enough and held is not None:
                rate = _mean(rate, held)
            added = max(0.0, min(1.0, log2(rate / self._rate) / doublings))
            self._adjust(number, self._shape[self._number] * (number / self._number) ** added)
            if number > enough:
                self._untried = 0
                is_other = self._enough() != enough
                self._patience = _PATIENCE[0] if is_other else min(2 * self._patience, _PATIENCE[1])
        self._number, self._average, self._rate = number, average, rate

    def _adjust(self, number: int, seen: float) -> None:
        """Move the value of a number towards this one."""
        before = seen
        if len(self._shape) > 1:  # nothing added is what a new number has to disprove
            fewer = max((n for n in self._shape if n <= number), default=min(self._shape))
            before = self._shape[fewer]
        weight = _WEIGHT if number in self._compared else _FIRST_WEIGHT
        self._compared.add(number)
        self._shape[number] = before * (seen / before) ** weight
        for other, value in self._shape.items():  # more connections bring no less
            limit = min if other < number else max
            self._shape[other] = limit(value, self._shape[number])


def _mean(rate: float, other: float, weight: float = 0.5) -> float:
    """Return the mean of two rates by the time that as many bytes take, which no burst raises."""
    return 1 / (weight / rate + (1 - weight) / other)
