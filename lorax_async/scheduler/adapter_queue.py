"""The requests of one adapter, and when its layers will have arrived."""

from __future__ import annotations

from bisect import insort
from collections.abc import Hashable, Sequence
from math import inf
from operator import attrgetter

from lorax_async.errors import Stage
from lorax_async.handle import AdapterHandle
from lorax_async.planning.batch_plan import NO_SLOT, SlotRef
from lorax_async.runtime.acquire import MAX_PRIORITY
from lorax_async.scheduler.requests import Ticket
from lorax_async.types import Ref, text_of

STEPS = 16
"""Into so many parts a load is cut, to remember its course."""

LATE = 1.1
"""A group that is late is taken to need so many times as long as it has been waited for."""

WEIGHT = 0.5
"""Of the latest load, in what is remembered of loads."""

_SOME = 1e-6
"""The least part of a load's time: what comes first may take none."""


class LoadProfile:
    """How loads of one kind went: seconds per byte, and when how much of one was there.

    Layers need not come evenly: from a server, the first come alone and the others together.
    """

    def __init__(self) -> None:
        self.per_byte: float | None = None
        self._at = [step / STEPS for step in range(STEPS + 1)]

    def note(self, times: Sequence[float], nbytes: int) -> None:
        """A load of so many bytes: seconds after its beginning at which each group was there."""
        total = times[-1]
        if total <= 0 or nbytes <= 0:
            return
        seen = [0.0] + [_between([0.0, *times], step / STEPS) / total for step in range(1, STEPS)]
        seen.append(1.0)
        if self.per_byte is None:
            self.per_byte, self._at = total / nbytes, seen
            return
        self.per_byte += WEIGHT * (total / nbytes - self.per_byte)
        self._at = [old + WEIGHT * (new - old) for old, new in zip(self._at, seen, strict=True)]

    def part(self, fraction: float) -> float:
        """Which part of a load's time has passed when this fraction of its groups is there."""
        return _between(self._at, fraction)


def _between(points: Sequence[float], fraction: float) -> float:
    """The value at `fraction` of the way through points that are evenly apart."""
    place = fraction * (len(points) - 1)
    below = min(int(place), len(points) - 2)
    return points[below] + (place - below) * (points[below + 1] - points[below])


class LoadProfiles:
    """One course for each kind of adapters: what lies in files, elsewhere, in memory."""

    def __init__(self) -> None:
        self._by_kind: dict[Hashable, LoadProfile] = {}

    def of(self, kind: Hashable) -> LoadProfile:
        return self._by_kind.setdefault(kind, LoadProfile())


class LoadEstimate:
    """One load under way. All times are moments, in seconds of one clock.

    Parameters
    ----------
    layers
        The groups that it has, in order: -1 before the layers, 0 … L-1, L after them.
    nbytes
        All of it.
    since
        When it was given its slot.
    course
        What is known of such loads; told of this one when it is complete.
    """

    def __init__(
        self, layers: Sequence[int], nbytes: int, since: float, profile: LoadProfile
    ) -> None:
        self._layers = tuple(layers)
        self._nbytes = nbytes
        self._since = since
        self._profile = profile
        self._times: list[float] = []
        self._missed = False

    @property
    def arrived(self) -> int:
        """Groups that are there."""
        return len(self._times)

    @property
    def latest(self) -> float:
        """When something of it came last."""
        return self._since + self._times[-1] if self._times else self._since

    def missed(self, groups: int) -> None:
        """So many were there before anybody looked; when they came is not known."""
        self._missed = True
        self._times = [0.0] * groups

    def note(self, layer: int, now: float) -> None:
        """All groups up to `layer` are there."""
        there = sum(each <= layer for each in self._layers)
        self._times += [now - self._since] * (there - len(self._times))
        if there == len(self._layers) and not self._missed:
            self._missed = True  # once is enough
            self._profile.note(self._times, self._nbytes)

    def expected(self, now: float) -> list[float] | None:
        """When each group that is not there will be; None while nothing of it has come, or all that
        is known came in no time.
        """
        here, groups = len(self._times), len(self._layers)
        if not here:
            return None
        parts = [
            max(_SOME, self._profile.part(number / groups)) for number in range(here, groups + 1)
        ]
        # What a whole load takes, by how far this one has come, or by all that is known.
        elapsed = self._times[-1]
        whole = elapsed / parts[0] if elapsed else self._usual
        if not whole:
            return None
        if here < groups and parts[1] * whole < now - self._since:
            whole = LATE * (now - self._since) / parts[1]
        return [self._since + part * whole for part in parts[1:]]

    @property
    def _usual(self) -> float:
        return (self._profile.per_byte or 0.0) * self._nbytes

    def joins_at(self, now: float, seconds: float | None, num_layers: int) -> float:
        """The first moment at which a pass may begin: no layer is computed before it is expected.

        `seconds` are those of the pass, over all its layers alike; None: not known, and every layer
        is awaited. `inf` while nothing is known of the arrival.
        """
        expected = self.expected(now)
        if expected is None:
            return inf
        per_layer = (seconds or 0.0) / max(1, num_layers)
        waits = [
            moment - per_layer * max(0, layer)
            for layer, moment in zip(self._layers[len(self._times) :], expected, strict=True)
        ]
        return max(waits, default=now)


Urgency = tuple[bool, float, int]
"""Sorts adapters: where the engine keeps something of a request comes first, then the oldest."""

_order = attrgetter("order")


class AdapterQueue:
    """All requests for one adapter; `ref` None are those for the base alone.

    Attributes
    ----------
    tickets
        Those that are not done, by urgency; some of them in a batch.
    handle, place
        Once it has a slot.
    flights
        Batches that it is in. The handle is kept for them, whatever becomes of the requests.
    arrival
        While its layers come.
    trusted
        May its rows join a batch before the last layer is there?
    leaving
        The slot is to be given back.
    gave_way
        When it last did, to those who have begun.
    priority
        The highest that a request had.
    begun
        Requests of which the engine keeps something.
    reloaded
        Whether it was loaded once more, since its files were saved while they were read.
    tokens
        Tokens that were computed with it; a new one begins with the fewest of the others.
    """

    def __init__(self, ref: Ref | None, tokens: int = 0) -> None:
        self.ref = ref
        self.tickets: list[Ticket] = []
        self.handle: AdapterHandle | None = None
        self.place: SlotRef = NO_SLOT
        self.flights = 0
        self.arrival: LoadEstimate | None = None
        self.trusted = True
        self.leaving = False
        self.gave_way = -inf
        self.priority = -MAX_PRIORITY
        self.begun = 0
        self.reloaded = False
        self.tokens = tokens

    @property
    def id(self) -> str | None:
        return None if self.ref is None else text_of(self.ref)

    @property
    def is_ready(self) -> bool:
        """All of it is there."""
        return self.ref is None or (self.handle is not None and self.handle.resident)

    @property
    def stage(self) -> Stage:
        """How far it is, in the words of errors."""
        if self.is_ready:
            return "ready"
        return "queue" if self.handle is None else "copy"

    @property
    def urgency(self) -> Urgency:
        """Of the adapter as a whole; there must be a request."""
        since, number = self.tickets[0].order
        return not self.begun, since, number

    def add(self, ticket: Ticket) -> None:
        insort(self.tickets, ticket, key=_order)
        self.priority = max(self.priority, ticket.request.priority)

    def remove(self, ticket: Ticket) -> None:
        """It is done."""
        self.tickets.remove(ticket)

    @property
    def waits(self) -> bool:
        """Whether there are requests that have not begun."""
        return len(self.tickets) > self.begun

    def waiting(self, most: int, fresh: float) -> list[Ticket]:
        """The first ones that are in no batch; at most so many of those that have not begun."""
        found = []
        for ticket in self.tickets:
            if ticket.flying or (fresh <= 0 and not ticket.begun):
                continue
            found.append(ticket)
            if len(found) == most:
                break
            fresh -= not ticket.begun
        return found
