"""A link in virtual time, and downloads over it.

Bytes flow as a fluid: between two events each connection has a constant rate, by fair shares of
what the connections have together. No real time passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite
from random import Random
from typing import Protocol

from lorax_async.formats.spans import ByteRange
from lorax_async.http.link_model import LinkModel, Reception
from lorax_async.http.ranges import GroupArrivals, PieceSizes, RangePlan, size_of

MACHINE = 1.5e9
"""Bytes per second that nothing exceeds, not even a burst."""

HEAD = 256 << 10
"""Bytes that the request for the header brings."""

_EPSILON = 1e-9


@dataclass(frozen=True)
class LinkConditions:
    """Seconds before each response; the rate of one connection; the rate that all share.

    `burst` bytes come at once after an idle time, of one connection where that has a rate of its
    own, else of all. `rtt` makes new connections begin slowly, as TCP does. `changes` are later
    values of the shared rate, by their time; `pause` is a time in which nothing comes.
    """

    delay: float
    own: float = inf
    shared: float = inf
    burst: float = 64 << 10
    rtt: float = 0.0
    changes: tuple[tuple[float, float], ...] = ()
    pause: tuple[float, float] | None = None


@dataclass(eq=False)
class SimulatedConnection:
    """A connection: what it fetches, when that begins, and its bucket."""

    number: int
    owner: Downloading
    begins: float = 0.0
    opened: float = -1.0
    span: ByteRange = (0, 0)
    read: int = 0
    part: int = 0
    """Bytes that were read, and those that are read next."""

    left: float = 0.0
    tokens: float = 0.0
    rate: float = 0.0
    busy: bool = False
    receiving: bool = False


class Downloading(Protocol):
    """What the simulation asks of a download, and tells it. Connections have numbers."""

    connections: int

    def start(self, now: float) -> None: ...

    def next(self, now: float) -> ByteRange | None:
        """Return the bytes to request next on a free connection."""

    def began(self, now: float, delay: float, number: int) -> None: ...

    def received(self, now: float, span: ByteRange, number: int) -> None: ...

    def ended(self, now: float, number: int) -> None: ...


@dataclass
class Simulation:
    """Downloads that share a link, each begun at its time."""

    conditions: LinkConditions
    downloads: Sequence[tuple[float, Downloading]]
    requests: int = 0
    opened: int = 0
    now: float = 0.0
    _connections: list[SimulatedConnection] = field(default_factory=list)

    def run(self, limit: float = 1e5) -> None:
        tokens, conditions = self.conditions.burst, self.conditions
        waiting = sorted(self.downloads, key=lambda each: each[0])
        changes = sorted(conditions.changes)
        shared = conditions.shared
        while self.now < limit:
            while waiting and waiting[0][0] <= self.now + _EPSILON:
                _, download = waiting.pop(0)
                download.start(self.now)
            while changes and changes[0][0] <= self.now + _EPSILON:
                shared = changes.pop(0)[1]
            self._request()
            busy = [each for each in self._connections if each.busy]
            if not busy and not waiting:
                return
            paused = conditions.pause is not None and (
                conditions.pause[0] <= self.now + _EPSILON < conditions.pause[1]
            )
            flowing = [each for each in busy if each.receiving]
            most = 0.0 if paused else min(MACHINE, shared if tokens <= 1.0 else inf)
            self._divide(flowing, most)
            total = sum(each.rate for each in flowing)
            step = self._next_event(busy, flowing, tokens, total, shared)
            for moment, _ in waiting[:1] + changes[:1]:
                step = min(step, moment - self.now)
            if conditions.pause is not None:
                for moment in conditions.pause:
                    if moment > self.now + _EPSILON:
                        step = min(step, moment - self.now)
            assert isfinite(step), "the simulation stands still"
            step = max(step, _EPSILON)
            self.now += step
            if isfinite(shared):
                tokens = max(0.0, min(conditions.burst, tokens + (shared - total) * step))
            for each in self._connections:
                if isfinite(conditions.own):
                    fill = (conditions.own - (each.rate if each.receiving else 0.0)) * step
                    each.tokens = max(0.0, min(conditions.burst, each.tokens + fill))
            for each in flowing:
                each.left -= each.rate * step
            for each in busy:
                self._advance(each)
        raise AssertionError("the simulation takes too long")

    def _divide(self, flowing: list[SimulatedConnection], most: float) -> None:
        """Share the rate fairly; what one cannot use is the others'."""
        caps = {each: self._cap(each) for each in flowing}
        for count, each in enumerate(sorted(flowing, key=lambda each: caps[each])):
            each.rate = min(caps[each], most / (len(flowing) - count))
            most -= each.rate

    def _cap(self, each: SimulatedConnection) -> float:
        own = self.conditions.own
        cap = own if isfinite(own) and each.tokens <= 1.0 else MACHINE
        if self.conditions.rtt:
            rounds = int((self.now - each.opened + _EPSILON) / self.conditions.rtt)
            cap = min(cap, 14_600 * 2 ** min(rounds, 30) / self.conditions.rtt)
        return cap

    def _next_event(
        self,
        busy: list[SimulatedConnection],
        flowing: list[SimulatedConnection],
        tokens: float,
        total: float,
        shared: float,
    ) -> float:
        step = inf
        for each in busy:
            if not each.receiving:
                step = min(step, each.begins - self.now)
        for each in flowing:
            if each.rate > 0:
                step = min(step, each.left / each.rate)
            own = self.conditions.own
            if isfinite(own) and each.tokens > 1.0 and each.rate > own:
                step = min(step, max(1e-6, each.tokens / (each.rate - own)))
            if self.conditions.rtt and each.rate > 0:
                past = (self.now - each.opened) / self.conditions.rtt
                if past < 30:
                    step = min(step, (int(past + _EPSILON) + 1 - past) * self.conditions.rtt)
        if isfinite(shared) and tokens > 1.0 and total > shared:
            step = min(step, max(1e-6, tokens / (total - shared)))
        return step

    def _request(self) -> None:
        for _, download in self.downloads:
            while (span := self._asked(download)) is not None:
                idle = next(
                    (c for c in self._connections if not c.busy and c.owner is download), None
                )
                if idle is None:
                    idle = SimulatedConnection(len(self._connections), download)
                    idle.tokens = self.conditions.burst
                    self._connections.append(idle)
                    self.opened += 1
                idle.busy, idle.receiving = True, False
                idle.span, idle.read, idle.rate = span, 0, 0.0
                idle.begins = self.now + max(self.conditions.delay, 1e-5)
                self.requests += 1

    def _asked(self, download: Downloading) -> ByteRange | None:
        used = sum(each.busy and each.owner is download for each in self._connections)
        return download.next(self.now) if used < download.connections else None

    def _advance(self, each: SimulatedConnection) -> None:
        if not each.receiving:
            if each.begins <= self.now + _EPSILON:
                each.receiving = True
                if each.opened < 0:
                    each.opened = self.now
                each.owner.began(self.now, self.conditions.delay, each.number)
                each.part = self._part(each)
                each.left = float(each.part)
            return
        if each.left <= 1e-3:
            start, stop = each.span
            part = each.part
            each.read += part
            each.owner.received(
                self.now, (start + each.read - part, start + each.read), each.number
            )
            if start + each.read >= stop:
                each.busy = each.receiving = False
                each.owner.ended(self.now, each.number)
            else:
                each.part = self._part(each)
                each.left = float(each.part)

    def _part(self, each: SimulatedConnection) -> int:
        """How much is read at once: as much as before, at most what comes in about 20 ms."""
        left = each.span[1] - each.span[0] - each.read
        return min(left, max(32 << 10, min(1 << 20, each.read, int(each.rate * 0.02))))


def layers_of(nbytes: int, layers: int, header: int = 50_000) -> list[list[ByteRange]]:
    """Groups of a file as PEFT writes it: layers by name, so 1 lies before 10, and 10 before 2."""
    layer = (nbytes - header) // layers
    place = {n: header + layer * at for at, n in enumerate(sorted(range(layers), key=str))}
    return [[(place[n], place[n] + layer)] for n in range(layers)]


def without(groups: Sequence[Sequence[ByteRange]], here: int) -> list[list[ByteRange]]:
    """The groups without the file's first bytes."""
    return [[(max(a, here), b) for a, b in group if b > here] for group in groups]


class ProbedDownload:
    """A download as `RangeDownloader` makes it: the header first, then ranges.

    `stolen` seconds at most are taken from this machine now and then: what came meanwhile is seen
    later.
    """

    def __init__(
        self,
        nbytes: int,
        layers: int,
        *,
        connections: int = 16,
        links: LinkModel | None = None,
        stolen: float = 0.0,
    ) -> None:
        self.nbytes = nbytes
        self.groups = without(layers_of(nbytes, layers), HEAD)
        self.connections = connections
        self.links = LinkModel() if links is None else links
        self.arrivals = GroupArrivals(self.groups)
        self.times = {n: 0.0 for n, group in enumerate(self.groups) if not size_of(group)}
        self.header = self.finished = 0.0
        self.used = self.flight = self.most = 0
        self._stolen = stolen
        self._draw = Random(5)
        self._seen = 0.0
        self._probed = False
        self._receptions: dict[int, Reception] = {}
        self._probe: list[ByteRange] = [(0, HEAD)]

    def start(self, now: float) -> None:
        pass

    def begin(self) -> None:
        """The header is here."""

    def choose(self) -> ByteRange | None:
        raise NotImplementedError

    def next(self, now: float) -> ByteRange | None:
        span = self.choose() if self._probed else (self._probe.pop() if self._probe else None)
        if span is not None:
            self.used += 1
            self.flight += span[1] - span[0]
            self.most = max(self.most, self.used)
        return span

    def began(self, now: float, delay: float, number: int) -> None:
        self._receptions[number] = self.links.began(self._now(now), delay)

    def received(self, now: float, span: ByteRange, number: int) -> None:
        self.links.received(self._receptions[number], self._now(now), span[1] - span[0])
        self.flight -= span[1] - span[0]
        if self._probed:
            self.times |= dict.fromkeys(self.arrivals.landed(span), now)
            self.finished = now

    def ended(self, now: float, number: int) -> None:
        self.used -= 1
        self.links.ended(self._receptions[number], self._now(now))
        if not self._probed:
            self._probed, self.header = True, now
            self.begin()

    def _now(self, now: float) -> float:
        seen = max(now, self._seen)
        if self._stolen and self._draw.random() < 0.05:
            self._seen = seen + self._draw.uniform(0, self._stolen)
        return seen

    @property
    def seconds(self) -> float:
        """After the header."""
        return self.finished - self.header

    def late(self, part: float) -> float:
        """When that part of the layers was there, as a part of the transfer, beyond that part."""
        last = max(self.times[n] for n in range(int(len(self.groups) * part)))
        return (max(last, self.header) - self.header) / self.seconds - part


class PlannedDownload(ProbedDownload):
    """Cuts its ranges by the plan, from what the link's model says."""

    def begin(self) -> None:
        self.plan = RangePlan(self.groups, 1, PieceSizes())

    def choose(self) -> ByteRange | None:
        return self.plan.take(self.links.estimate(), self.connections, self.used, self.flight)


class FixedDownload(ProbedDownload):
    """So many balanced ranges, all at once: what a simple client does."""

    def begin(self) -> None:
        count, size = self.connections, self.nbytes - HEAD
        cuts = [HEAD + size * n // count for n in range(count + 1)]
        self._ranges = list(pairwise(cuts))

    def choose(self) -> ByteRange | None:
        return self._ranges.pop(0) if self._ranges else None


def simulate(conditions: LinkConditions, *downloads: Downloading) -> Simulation:
    """Run downloads that begin together; return what was counted."""
    simulation = Simulation(conditions, [(0.0, download) for download in downloads])
    simulation.run()
    return simulation
