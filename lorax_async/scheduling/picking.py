"""From adapters with requests to the rows of one batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from lorax_async.core.pace import Pace
from lorax_async.core.shares import share
from lorax_async.scheduling.guests import Guest
from lorax_async.scheduling.requests import Ticket

_Queue = tuple[Guest, list[Ticket]]
"""A guest, and those of its requests that could be in the batch, by urgency."""


@dataclass(frozen=True, slots=True)
class Room:
    """What a batch may have: tokens, sequences, and sequences of which nothing was computed yet."""

    tokens: int
    sequences: int
    fresh: float


@dataclass(frozen=True, slots=True)
class Picked:
    """Rows, by adapter; and the next moment at which there may be others without any news."""

    rows: list[tuple[Guest, Ticket, int]]
    due: float


def pick(guests: Iterable[Guest], room: Room, pace: Pace, layers: int, now: float) -> Picked:
    """Choose rows among the adapters that are there, or will be when their layers are computed."""
    ready, coming = list[_Queue](), list[_Queue]()
    for guest in guests:
        if guest.leaving:
            continue
        tickets = guest.waiting(room.sequences, room.fresh)
        if tickets:
            (ready if guest.is_ready else coming).append((guest, tickets))
    due = _join(ready, coming, room, pace, layers, now) if coming else inf
    ready.sort(key=lambda queue: queue[1][0].order)
    wants = [[ticket.progress.wants for ticket in tickets] for _, tickets in ready]
    rows = [
        (guest, ticket, tokens)
        for (guest, tickets), given in zip(
            ready, share(wants, room.tokens, room.sequences), strict=True
        )
        for ticket, tokens in zip(tickets, given, strict=False)
    ]
    return Picked(_without_too_many_fresh(rows, room.fresh), due)


def _join(
    ready: list[_Queue], coming: list[_Queue], room: Room, pace: Pace, layers: int, now: float
) -> float:
    """Add to `ready` who may join a pass that begins now; when the next one may, if nothing comes.

    Who joins makes the pass longer, for the others as well.
    """
    tokens = sum(ticket.progress.wants for _, tickets in ready for ticket in tickets)
    due = inf
    for guest, tickets in sorted(coming, key=lambda queue: queue[1][0].order):
        if not guest.trusted or guest.arrival is None:
            continue
        more = sum(ticket.progress.wants for ticket in tickets)
        seconds = pace.predict(min(room.tokens, tokens + more))
        if seconds is None and not ready:  # nobody else is kept waiting, and this shows the pace
            at = now if guest.arrival.arrived else inf
        else:
            at = guest.arrival.joins_at(now, seconds, layers)
        if at <= now:
            ready.append((guest, tickets))
            tokens += more
        else:
            due = min(due, at)
    return due


def _without_too_many_fresh(
    rows: list[tuple[Guest, Ticket, int]], fresh: float
) -> list[tuple[Guest, Ticket, int]]:
    """The most urgent of those that have not begun begin."""
    beginning = [ticket for _, ticket, _ in rows if not ticket.begun]
    if len(beginning) <= fresh:
        return rows
    beginning.sort(key=lambda ticket: ticket.order)
    later = set(beginning[int(fresh) :])
    return [row for row in rows if row[1] not in later]
