"""From adapters with requests to the rows of one batch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf

from lorax_async.core.pace import Pace
from lorax_async.core.shares import share
from lorax_async.scheduling.admission import Places, Queue, admit
from lorax_async.scheduling.guests import Guest
from lorax_async.scheduling.requests import Ticket


@dataclass(frozen=True, slots=True)
class Room:
    """What a batch may have: tokens and sequences."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Picked:
    """Rows, by adapter; and the next moment at which there may be others without any news.

    The `preempted` lose their places to some of the rows.
    """

    rows: list[tuple[Guest, Ticket, int]]
    due: float
    preempted: Sequence[Ticket] = ()


def pick(
    guests: Collection[Guest], room: Room, places: Places, pace: Pace, layers: int, now: float
) -> Picked:
    """Choose rows among the adapters that are there, or will be when their layers are computed."""
    if places.count < inf:
        picked = _admitted(guests, room, places, pace, layers, now)
        if picked is not None:
            return picked
    queues, due = _queues(guests, room, places.free, pace, layers, now)
    return Picked(_without_too_many_fresh(_shared(queues, room), places.free), due)


def _admitted(
    guests: Collection[Guest], room: Room, places: Places, pace: Pace, layers: int, now: float
) -> Picked | None:
    """Choose rows so that places are shared; None if none that may begin finds room."""
    preempt = places.is_contended(guests)
    fresh = max(places.free, 1 if preempt else 0)
    queues, due = _queues(guests, room, fresh, pace, layers, now)
    if fresh:  # whoever may get a place, not only the most urgent ones
        queues = [(guest, guest.waiting(len(guest.tickets), inf)) for guest, _ in queues]
    while True:
        decided = admit(queues, places, now, preempt=preempt)
        out = set(decided.preempted)
        admitted = [
            (guest, kept)
            for guest, tickets in queues
            if (kept := [t for t in tickets if (t.begun and t not in out) or t in decided.admitted])
        ]
        rows = _shared(admitted, room)
        fitting = decided.admitted & {ticket for _, ticket, _ in rows}
        if fitting == decided.admitted:
            return Picked(rows, due, decided.preempted)
        if not fitting:
            return None
        # No place is taken, and nobody preempted, for a request that finds no room in the batch.
        queues = [
            (guest, [t for t in tickets if t.begun or t in fitting]) for guest, tickets in queues
        ]


def _queues(
    guests: Iterable[Guest], room: Room, fresh: float, pace: Pace, layers: int, now: float
) -> tuple[list[Queue], float]:
    """Requests that could be computed, `fresh` of an adapter's that have not begun at most.

    Also the next moment at which there may be others.
    """
    ready, coming = list[Queue](), list[Queue]()
    for guest in guests:
        if guest.leaving:
            continue
        tickets = guest.waiting(room.sequences, fresh)
        if tickets:
            (ready if guest.is_ready else coming).append((guest, tickets))
    due = _join(ready, coming, room, pace, layers, now) if coming else inf
    return ready, due


def _shared(queues: Iterable[Queue], room: Room) -> list[tuple[Guest, Ticket, int]]:
    queues = sorted(queues, key=lambda queue: queue[1][0].order)
    wants = [[ticket.progress.wants for ticket in tickets] for _, tickets in queues]
    return [
        (guest, ticket, tokens)
        for (guest, tickets), given in zip(
            queues, share(wants, room.tokens, room.sequences), strict=True
        )
        for ticket, tokens in zip(tickets, given, strict=False)
    ]


def _join(
    ready: list[Queue], coming: list[Queue], room: Room, pace: Pace, layers: int, now: float
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
