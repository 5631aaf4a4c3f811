"""The requests for one adapter, and when its layers are expected to arrive."""

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

PROFILE_STEPS = 16
"""The number of points at which a load profile is sampled."""

LATE_FACTOR = 1.1
"""The wait for a late group times this is its expected total wait."""

LATEST_WEIGHT = 0.5
"""The latest load's weight in a moving average."""

_MIN_FRACTION = 1e-6
"""The smallest fraction of a load's time: the first groups may arrive in no time."""


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


class LoadProfiles:
    """A load profile per kind of adapter key: local files, remote, in memory."""

    def __init__(self) -> None:
        self._by_kind: dict[Hashable, LoadProfile] = {}

    def of(self, kind: Hashable) -> LoadProfile:
        return self._by_kind.setdefault(kind, LoadProfile())


class LoadEstimate:
    """The expected arrival of one load's layer groups. Times are seconds of one clock.

    Parameters
    ----------
    layers
        The adapter's layer groups, in order: -1 before the layers, 0 … L-1, L after them.
    nbytes
        The adapter's size.
    since
        When the slot was granted.
    profile
        Past loads of this kind; this load is added when it is complete.
    """

    def __init__(
        self, layers: Sequence[int], nbytes: int, since: float, profile: LoadProfile
    ) -> None:
        self._layers = tuple(layers)
        self._nbytes = nbytes
        self._since = since
        self._profile = profile
        self._times: list[float] = []
        self._recorded = False

    @property
    def arrived(self) -> int:
        """The number of layer groups that have arrived."""
        return len(self._times)

    @property
    def latest(self) -> float:
        """When the last group arrived, or when the slot was granted."""
        return self._since + self._times[-1] if self._times else self._since

    def skip(self, groups: int) -> None:
        """Mark the first `groups` as arrived at an unknown time; keep this load off the profile."""
        self._recorded = True
        self._times = [0.0] * groups

    def record(self, layer: int, now: float) -> None:
        """Mark all groups up to `layer` as arrived."""
        arrived = sum(group <= layer for group in self._layers)
        self._times += [now - self._since] * (arrived - len(self._times))
        if arrived == len(self._layers) and not self._recorded:
            self._recorded = True
            self._profile.record(self._times, self._nbytes)

    def expected(self, now: float) -> list[float] | None:
        """Return when each missing group will arrive; None without an observed arrival time."""
        arrived, groups = len(self._times), len(self._layers)
        if not arrived:
            return None
        fractions = [
            max(_MIN_FRACTION, self._profile.time_fraction(number / groups))
            for number in range(arrived, groups + 1)
        ]
        # Extrapolate the whole load from its own progress, or else from the profile.
        elapsed = self._times[-1]
        usual = (self._profile.per_byte or 0.0) * self._nbytes
        total = elapsed / fractions[0] if elapsed else usual
        if not total:
            return None
        if arrived < groups and fractions[1] * total < now - self._since:
            total = LATE_FACTOR * (now - self._since) / fractions[1]
        return [self._since + fraction * total for fraction in fractions[1:]]

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
            for layer, moment in zip(self._layers[len(self._times) :], expected, strict=True)
        ]
        return max(waits, default=now)


Urgency = tuple[bool, float, int]
"""A sort key of adapters: first those with begun requests, then by the oldest request."""

_order = attrgetter("order")


class AdapterQueue:
    """The requests for one adapter; `ref` None: for the base alone.

    Attributes
    ----------
    tickets
        Requests that are not done, by urgency, including those in a batch.
    handle, place
        The lease and its slot, once granted.
    batch_count
        The number of batches in flight with this adapter, which keep the handle.
    arrival
        The expected arrival of its layers while it streams.
    may_stream
        Whether its rows may join a batch before the last layer is there.
    leaving
        Whether the slot must be released.
    yielded_at
        When it last gave its slot up for requests that had begun.
    priority
        The highest priority of any request so far.
    begun
        The number of requests that occupy a place of the engine.
    reloaded
        Whether the adapter was reloaded because its files changed while they were read.
    tokens
        Tokens computed with this adapter. A new queue starts with the minimum of all queues.
    """

    def __init__(self, ref: Ref | None, tokens: int = 0) -> None:
        self.ref = ref
        self.tickets: list[Ticket] = []
        self.handle: AdapterHandle | None = None
        self.place: SlotRef = NO_SLOT
        self.batch_count = 0
        self.arrival: LoadEstimate | None = None
        self.may_stream = True
        self.leaving = False
        self.yielded_at = -inf
        self.priority = -MAX_PRIORITY
        self.begun = 0
        self.reloaded = False
        self.tokens = tokens

    @property
    def id(self) -> str | None:
        return None if self.ref is None else text_of(self.ref)

    @property
    def is_ready(self) -> bool:
        """Whether every layer is there."""
        return self.ref is None or (self.handle is not None and self.handle.resident)

    @property
    def stage(self) -> Stage:
        """The adapter's stage, as errors name it."""
        if self.is_ready:
            return "ready"
        return "queue" if self.handle is None else "copy"

    @property
    def urgency(self) -> Urgency:
        """The urgency of the adapter; it must have a request."""
        since, number = self.tickets[0].order
        return not self.begun, since, number

    def add(self, ticket: Ticket) -> None:
        insort(self.tickets, ticket, key=_order)
        self.priority = max(self.priority, ticket.request.priority)

    def remove(self, ticket: Ticket) -> None:
        self.tickets.remove(ticket)

    @property
    def has_unbegun(self) -> bool:
        """Whether a request has not begun."""
        return len(self.tickets) > self.begun

    def waiting(self, limit: int, max_new: float) -> list[Ticket]:
        """Return the first `limit` requests in no batch; at most `max_new` that have not begun."""
        waiting = []
        for ticket in self.tickets:
            if ticket.in_batch or (max_new <= 0 and not ticket.begun):
                continue
            waiting.append(ticket)
            if len(waiting) == limit:
                break
            max_new -= not ticket.begun
        return waiting
