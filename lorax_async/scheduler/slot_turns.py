"""Decide which adapters give their slots to others: fairly, and for few loads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import ceil, inf

from lorax_async.scheduler.requests import AdapterQueue, Ticket

FAIR_TIMES = 1.25
"""Fair times after which a request is overdue.

The mean wait is about one fair time. If adapters yielded earlier, each load would serve fewer
requests; if later, some requests would wait for more than two.
"""

USUAL_TURNS = 5
"""Usual turns without the end of a request after which an adapter may lose its slot amid one.

A mean bounds its tail: at most one turn in five lasts as long, however lengths are distributed.
"""

_WEIGHT = 0.1
"""The latest turn's weight in the moving average."""


class FairTimes:
    """Which requests are overdue.

    The fair time of a request is the length of the queue up to it, by urgency, divided by the
    throughput: the time in which as many requests end. It is counted in these, so that it needs no
    estimate. No request is overdue whose age, by urgency, is below `level` seconds.
    """

    def __init__(self, level: float) -> None:
        self._level = level
        self._orders: list[tuple[float, int]] = []
        """Of all requests that are not done, sorted."""
        self._ended = 0
        self._last_end = -inf

    def enter(self, ticket: Ticket) -> None:
        """Add a request, once; set its `overdue_end`."""
        place = bisect_left(self._orders, ticket.order)
        self._orders.insert(place, ticket.order)
        ticket.overdue_end = self._ended + ceil(FAIR_TIMES * (place + 1))

    def leave(self, ticket: Ticket, now: float) -> None:
        """Count the end of a request. No effect if it did not enter."""
        place = bisect_left(self._orders, ticket.order)
        if place < len(self._orders) and self._orders[place] == ticket.order:
            del self._orders[place]
            self._ended += 1
            self._last_end = now

    def is_overdue(self, ticket: Ticket, now: float, patience: float) -> bool:
        """Return whether it has waited for `FAIR_TIMES`.

        It also is if no request has ended for `patience` seconds, nor has it come in these.
        """
        since = ticket.order[0]
        stuck = now - max(since, self._last_end) >= patience
        return stuck or (self._ended >= ticket.overdue_end and now - since >= self._level)


class SlotTurns:
    """The turns of adapters: each keeps its slot from a grant until it gives it to others.

    An adapter with requests keeps its slot until requests of another one are overdue. Then those
    that have had theirs longest yield: only requests begin that were queued when the turn began. A
    turn ends with the last of these, or amid them if none ends for `patience` seconds.
    """

    def __init__(self, level: float) -> None:
        self._level = level
        self._usual = 0.0
        self._ended = 0

    def record(self, seconds: float) -> None:
        """Add a turn that ended."""
        self._ended += 1
        self._usual += max(_WEIGHT, 1 / self._ended) * (seconds - self._usual)

    @property
    def patience(self) -> float:
        """Seconds without the end of a request; a usual turn counts as `level` seconds at least."""
        return USUAL_TURNS * max(self._level, self._usual)

    def share(
        self, holders: Sequence[AdapterQueue], overdue: int, now: float, *, may_interrupt: bool
    ) -> None:
        """Let the first `overdue` of the holders, which are in the order of their grants, yield.

        With `may_interrupt`, those leave of which no request ends.
        """
        stuck_since = now - self.patience
        for number, holder in enumerate(holders):
            holder.yields = number < overdue
            stuck = holder.progress_at <= stuck_since
            holder.leaving = may_interrupt and holder.yields and stuck
