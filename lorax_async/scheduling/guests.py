"""One adapter that requests are waiting for, or are computed with."""

from __future__ import annotations

from bisect import insort
from math import inf
from operator import attrgetter

from lorax_async.adapter import Ref, text_of
from lorax_async.core.arrival_estimate import Arrival
from lorax_async.core.batch_plan import NOWHERE, Place
from lorax_async.errors import Stage
from lorax_async.handle import AdapterHandle
from lorax_async.runtime.acquiring import MAX_PRIORITY
from lorax_async.scheduling.requests import Ticket

Urgency = tuple[bool, float, int]
"""Sorts adapters: where the engine keeps something of a request comes first, then the oldest."""

_order = attrgetter("order")


class Guest:
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
        self.place: Place = NOWHERE
        self.flights = 0
        self.arrival: Arrival | None = None
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
