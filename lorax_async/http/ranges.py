"""Plan what a download requests next, and track which layer groups have arrived."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil
from typing import NamedTuple

from lorax_async.errors import InternalError
from lorax_async.formats.spans import ByteRange, SpanSet
from lorax_async.http.link_model import LinkEstimate

KiB = 1 << 10
MiB = 1 << 20

_FIRST_CONNECTIONS = 4
"""Used at an origin of which nothing is known: enough to see whether they share a rate."""

_FIRST_PART = 1 / 25
"""Of the file, requested before anything is known."""

_FIRST_SECONDS = 0.01
"""A first piece is as large as one connection brings in this time, or in its delay if longer."""

_FLIGHT_PART = 1 / 32
"""Of the file, in flight where that is enough: layers come in order but for this."""

_TURN_SECONDS = 0.005
"""Of the whole link, for each piece: a request costs 0.5 ms of a core."""

_FILLED = 2.0
"""Delays of the link that are in flight where connections share a rate. One is needed to hide a
delay; with two, an estimate that is too low grows.
"""

_OWN_DELAYS = 25
"""Where each connection has a rate of its own, its pieces last this many delays: 4 % are lost."""

_FIRST_GROUP_COST = 0.15
"""A delay for the first group alone may be this part of the time of all bytes, where that is known.
"""

_ORDER_COST = 0.05
"""The same where it is not known, of the time that one connection would need: else order gains
nothing.
"""

_UNKNOWN_RATE = 10e6
"""Bytes per second of a connection of which only the delay is known, for that decision."""

_SPLIT_SECONDS = 0.02
"""The least gain of a split: measured rates are inexact."""

_SLOW = 0.5
"""A straggler brings less than this part of what the others bring."""


@dataclass(frozen=True, slots=True)
class PieceSizes:
    """Minimum and maximum bytes of one request, as far as the spans allow."""

    least: int = 64 * KiB
    most: int = 32 * MiB


class Pace(NamedTuple):
    """How many connections a download uses, and how many bytes each of them requests at once.

    If it is `staggered`, what fewer connections than these request is smaller, so that they do not
    end together: the link would pause for a delay.
    """

    connections: int
    piece: float
    staggered: bool = False


class RangePlan:
    """Cut a download into pieces while it runs.

    `groups` are the file's spans of each layer group, in the order to fetch them; no byte is in two
    groups. The `first` ones are urgent. In a round each connection has one piece: of the next
    groups that have so many bytes, in the file's order, as only spans that are adjacent there can
    share a request.
    """

    def __init__(
        self, groups: Sequence[Sequence[ByteRange]], first: int, sizes: PieceSizes
    ) -> None:
        self._groups = groups
        self._nbytes = [size_of(group) for group in groups]
        self._first = first
        self._sizes = sizes
        self._total = self.left = sum(self._nbytes)
        """Bytes in all, and those that were not requested."""

        self.stop = max([stop for group in groups for _, stop in group], default=0)
        """Where the last of them ends."""

        self._first_bytes = max(sum(self._nbytes[:first]), self._total * _FIRST_PART)
        self._next = 0
        self._spans: list[ByteRange] = []
        self._piece = 0.0
        self._taken = 0

    def pace(self, link: LinkEstimate, connections: int) -> Pace:
        """Return the pace for this link, with so many connections at most."""
        if not link.is_compared:
            return self._first_pace(link, connections)
        enough = min(connections, link.connections)
        flow = link.flow * enough / link.connections
        own = _OWN_DELAYS * link.delay * (link.rate or 0.0)
        flight = self._total * _FLIGHT_PART / (enough + 1)
        least = max(self._sizes.least, flight, flow * _TURN_SECONDS)
        if enough == connections:
            return Pace(connections, max(least, own))
        waiting = _FILLED * flow * link.delay
        spare = min(connections - enough, max(1, ceil(waiting / least)))
        piece = max(least, min(own, waiting / spare))
        return Pace(min(connections, max(enough + spare, link.trial)), piece, staggered=True)

    def _first_pace(self, link: LinkEstimate, connections: int) -> Pace:
        """Request little until it is known whether connections share a rate, then as much again."""
        number = float(_FIRST_CONNECTIONS)
        if link.delay > _ORDER_COST * self._total / (link.rate or _UNKNOWN_RATE):
            return Pace(connections, self._total / connections)
        if link.rate is not None:
            seconds = max(link.delay, _FIRST_SECONDS)
            number = max(number, self._first_bytes / (link.rate * seconds))
        number = max(1, min(connections, int(number)))
        again = min(self._total - self.left, self._total / 8)
        piece = max(self._sizes.least, self._first_bytes / number, again / number)
        return Pace(number, piece, staggered=link.rate is None)

    def take(
        self, link: LinkEstimate, connections: int, used: int, flight: int
    ) -> ByteRange | None:
        """Return the bytes to request next; None if `used` connections are enough.

        `connections` is how many there may be; `flight` bytes are on their way.
        """
        pace = self.pace(link, connections)
        if used >= pace.connections or not self.left:
            return None
        if not self._spans:
            self._take_groups(link, connections, pace)
        start, stop = self._spans[0]
        if pace.staggered:
            piece = min(self._piece, pace.piece) * 2 * (used + 1) / (pace.connections + 1)
            parts = max(1, round((stop - start) / max(piece, self._sizes.least)))
            cut = start + (stop - start) // parts
        else:
            least = max(self._sizes.least, 2 * link.delay * (link.rate or 0.0))
            last = max(least, (self.left + flight) / pace.connections)
            cut = self._cut_evenly(start, stop, last)
        cut = min(cut, start + self._sizes.most)
        self._spans[:1] = [(cut, stop)] if cut < stop else []
        self._taken += cut - start
        self.left -= cut - start
        return start, cut

    def _cut_evenly(self, start: int, stop: int, last: float) -> int:
        """Return where a piece of the span ends so that the round's pieces are equal.

        It is at most `last`, with which all connections end together. A part of less than a
        quarter, or of too few bytes, joins the one before it.
        """
        least = max(self._piece / 4, self._sizes.least)
        end = (self._taken // self._piece + 1) * self._piece - self._taken
        end = end if end >= least else end + self._piece
        if last < 0.9 * end:
            end, least = last, last / 2
        cut = start + ceil(end)
        return cut if stop - cut >= least else stop

    def take_all(self) -> list[ByteRange]:
        """Return all that was not requested."""
        rest = [*self._spans, *chain.from_iterable(self._groups[self._next :])]
        self._spans, self._next, self.left = [], len(self._groups), 0
        return [(start, stop) for start, stop in rest if start < stop]

    def _take_groups(self, link: LinkEstimate, connections: int, pace: Pace) -> None:
        """Take the groups of the next round, in which each connection has one piece."""
        wanted = self.left / max(1, round(self.left / (pace.connections * pace.piece)))
        stop = self._next
        if not stop and self._first_comes_alone(link, connections, pace):
            stop, wanted = self._first, min(wanted, self._first_bytes)
        nbytes = sum(self._nbytes[self._next : stop])
        while stop < len(self._groups) and (
            not nbytes or nbytes + self._nbytes[stop] / 2 <= wanted
        ):
            nbytes += self._nbytes[stop]
            stop += 1
        spans = chain.from_iterable(self._groups[self._next : stop])
        self._spans = list(SpanSet([span for span in spans if span[0] < span[1]]))
        is_whole_round = self._next == 0 or stop == len(self._groups)
        self._piece = (nbytes if is_whole_round else wanted) / pace.connections
        self._next, self._taken = stop, 0

    def _first_comes_alone(self, link: LinkEstimate, connections: int, pace: Pace) -> bool:
        """Whether the first group is worth a delay in which nothing else is requested."""
        if pace.piece * connections >= self.left:
            return False
        own = link.is_compared and link.connections >= connections and link.rate is not None
        if not own or link.rate is None:
            return True
        return link.delay <= _FIRST_GROUP_COST * self.left / (link.rate * connections)


def size_of(spans: Iterable[ByteRange]) -> int:
    return sum([stop - start for start, stop in spans])


def split_of(
    left: ByteRange, own_rate: float, others: float, delay: float, least: int
) -> int | None:
    """Return where another connection should take over a straggler's piece; None for little gain.

    `left` is the range that the straggler has not begun to read, `own_rate` its bytes per second,
    `others` those of another connection to the same origin at the same time: a straggler has less
    than half. Both connections would end at the same moment. That must be two delays (and 20 ms)
    earlier than the straggler alone, because its connection is lost and another must be opened.
    """
    start, stop = left
    if own_rate >= _SLOW * others:
        return None
    alone = (stop - start) / own_rate
    together = (stop - start + delay * others) / (own_rate + others)
    taken = int((together - delay) * others)
    if (
        alone - together <= max(2 * delay, _SPLIT_SECONDS)
        or taken < least
        or stop - taken - start < 1
    ):
        return None
    return stop - taken


class GroupArrivals:
    """Counts the missing bytes of each group.

    `groups` are the spans of each group; no byte is in two groups.
    """

    def __init__(self, groups: Sequence[Sequence[ByteRange]]) -> None:
        self._missing = [size_of(group) for group in groups]
        self._spans = sorted(
            [(*span, n) for n, group in enumerate(groups) for span in group if span[0] < span[1]]
        )
        self._starts = [start for start, _, _ in self._spans]

    def landed(self, span: ByteRange) -> list[int]:
        """Record that these bytes arrived, for the first time; return the groups they complete."""
        complete = []
        for group, nbytes in self._overlaps(span):
            self._missing[group] -= nbytes
            if self._missing[group] < 0:
                raise InternalError(f"bytes {span[0]:,}-{span[1]:,} arrived twice")
            if not self._missing[group]:
                complete.append(group)
        return complete

    def groups_in(self, span: ByteRange) -> list[int]:
        """Return the first and the last group with bytes in the span; empty if no group has any."""
        groups = [group for group, _ in self._overlaps(span)]
        return [min(groups), max(groups)] if groups else []

    def _overlaps(self, span: ByteRange) -> list[tuple[int, int]]:
        """Return the group and the size of each overlap of its spans with this one."""
        first = max(0, bisect_right(self._starts, span[0]) - 1)
        return [
            (group, min(stop, span[1]) - max(start, span[0]))
            for start, stop, group in self._spans[first : bisect_left(self._starts, span[1])]
            if span[0] < stop
        ]
