"""Which requests get the engine's places, and which lose theirs to others.

The engine keeps keys and values of a limited number of sequences. While others wait, one adapter,
and one client, has at most a share of these places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from lorax_async.scheduling.guests import Guest
from lorax_async.scheduling.requests import Client, Ticket

Holder = Guest | Client
"""Has requests, places and tokens: an adapter or a client."""

_Group = tuple[Guest, Client | None]
"""Requests for one adapter by one client."""

_LOSS, _SAME, _GAIN = -1, 0, 1

Queue = tuple[Guest, list[Ticket]]
"""An adapter, and those of its requests that could be in the next batch, by urgency."""


class Places:
    """The engine's places: a request takes one with its first batch, and has it until its end.

    Attributes
    ----------
    count
        How many there are; `inf` where the engine sets no limit.
    most
        How many one adapter, or one client, may have while others wait.
    level
        A request that is this many seconds old by its urgency comes before those whose adapters
        got fewer tokens.
    taken
        The requests that have places, with their adapters, in the order in which they began.
    """

    def __init__(self, count: float, share: float, level: float) -> None:
        self.count = count
        self.most = inf if count == inf else max(1, int(count * share))
        self.level = level
        self.taken: dict[Ticket, Guest] = {}
        self._clients: dict[Hashable, Client] = {}

    @property
    def free(self) -> float:
        return self.count - len(self.taken)

    def client_of(self, name: Hashable) -> Client | None:
        """Return the client of this name, with one more request; None is none that is known."""
        if name is None:
            return None
        client = self._clients.get(name)
        if client is None:
            least = min((other.tokens for other in self._clients.values()), default=0)
            client = self._clients[name] = Client(name, least)
        client.requests += 1
        return client

    def leave(self, ticket: Ticket) -> None:
        """Forget a request that is done. Call once."""
        self.vacate(ticket)
        client = ticket.client
        if client is not None:
            client.requests -= 1
            if not client.requests:
                del self._clients[client.name]

    def take(self, guest: Guest, ticket: Ticket) -> None:
        self.taken[ticket] = guest
        ticket.begun = True
        for holder in _holders(guest, ticket):
            holder.begun += 1

    def vacate(self, ticket: Ticket) -> None:
        """Without effect if it has no place."""
        guest = self.taken.pop(ticket, None)
        if guest is not None:
            ticket.begun = False
            for holder in _holders(guest, ticket):
                holder.begun -= 1

    def is_contended(self, guests: Iterable[Guest]) -> bool:
        """Return whether a holder has more than its share while another one of its kind waits."""
        adapters = [each for each in set(self.taken.values()) if each.begun > self.most]
        clients = [each for each in self._clients.values() if each.begun > self.most]
        if not adapters and not clients:
            return False
        waiting = [guest for guest in guests if guest.waits]
        if any(guest is not large for guest in waiting for large in adapters):
            return True
        return any(
            ticket.client is not large and not ticket.begun
            for guest in waiting
            for ticket in guest.tickets
            for large in clients
        )


@dataclass(slots=True)
class Admission:
    """What was decided for one batch.

    Attributes
    ----------
    admitted
        Requests that may begin.
    preempted
        Requests that lose their places to the last ones of these.
    """

    admitted: set[Ticket] = field(default_factory=set)
    preempted: list[Ticket] = field(default_factory=list)


def admit(queues: Sequence[Queue], places: Places, now: float, *, preempt: bool) -> Admission:
    """Decide which requests without a place may take one.

    Free places go to holders below their share first; then the youngest requests of holders above
    theirs are preempted for the others. In either case the adapter and the
    client that got the fewest tokens come first. That nobody waits for ever, requests older than
    `Places.level` come before these, the oldest first.

    A place goes from a holder above its share to one with at least two fewer; so a preempted
    request begins again only when a place becomes free, and two never take turns.
    """
    return _Round(places, now).decide(queues, preempt=preempt)


class _Round:
    """The counts while one batch is decided."""

    def __init__(self, places: Places, now: float) -> None:
        self._places = places
        self._now = now
        self._more: Counter[Holder] = Counter()
        self._tokens: Counter[Holder] = Counter()
        self._result = Admission()

    def decide(self, queues: Sequence[Queue], *, preempt: bool) -> Admission:
        waiting: dict[_Group, list[Ticket]] = {}
        for guest, tickets in queues:
            for ticket in tickets:
                if not ticket.begun:
                    waiting.setdefault((guest, ticket.client), []).append(ticket)
        for tickets in waiting.values():
            tickets.reverse()  # the most urgent one is the last
        free = self._places.free
        while waiting and free >= 1:
            self._begin(self._next(waiting), waiting)
            free -= 1
        while waiting and preempt:
            found = self._first_with_victim(waiting)
            if found is None:
                break
            first, victim = found
            self._result.preempted.append(victim)
            self._count(self._places.taken[victim], victim, -1)
            self._begin(first, waiting)
        return self._result

    def _first_with_victim(
        self, waiting: Mapping[_Group, Sequence[Ticket]]
    ) -> tuple[_Group, Ticket] | None:
        """Return who gets a place that is taken away, and from whom.

        All clients without a place are alike, and there may be hundreds of them.
        """
        in_vain: set[tuple[Guest, Client | None]] = set()
        for group in sorted(waiting, key=lambda each: self._key(each, waiting)):
            guest, client = group
            alike = guest, client if self._has(client) else None
            if alike in in_vain:
                continue
            victim = self._victim(guest, client)
            if victim is not None:
                return group, victim
            in_vain.add(alike)
        return None

    def _next(self, waiting: dict[_Group, list[Ticket]]) -> _Group:
        """Return who gets a free place."""
        below = [each for each in waiting if not self._exceeds(each, waiting)]
        if below:
            return min(below, key=lambda each: self._key(each, waiting))
        # In the order in which places would be taken away again.
        return min(waiting, key=lambda each: (max(map(self._has, each)), self._key(each, waiting)))

    def _begin(
        self,
        group: _Group,
        waiting: dict[_Group, list[Ticket]],
    ) -> None:
        ticket = waiting[group].pop()
        if not waiting[group]:
            del waiting[group]
        self._result.admitted.add(ticket)
        self._count(group[0], ticket, 1)
        for holder in _holders(group[0], ticket):
            self._tokens[holder] += ticket.progress.wants

    def _count(self, guest: Guest, ticket: Ticket, change: int) -> None:
        for holder in _holders(guest, ticket):
            self._more[holder] += change

    def _has(self, holder: Holder | None) -> int:
        """Return the places that it has by now."""
        return 0 if holder is None else holder.begun + self._more[holder]

    def _exceeds(
        self,
        group: _Group,
        waiting: Mapping[_Group, object],
    ) -> bool:
        """Return whether one more place would be above a share that another one waits for."""
        guest, client = group
        if self._has(guest) >= self._places.most and any(
            other is not guest for other, _ in waiting
        ):
            return True
        return self._has(client) >= self._places.most and any(
            other is not client for _, other in waiting
        )

    def _key(
        self,
        group: _Group,
        waiting: Mapping[_Group, Sequence[Ticket]],
    ) -> tuple[bool, float, tuple[float, int]]:
        order = waiting[group][-1].order
        overdue = self._now - order[0] >= self._places.level
        got = sum(each.tokens + self._tokens[each] for each in group if each is not None)
        return not overdue, 0 if overdue else got, order

    def _victim(self, guest: Guest, client: Client | None) -> Ticket | None:
        """Return the youngest request that gives way to this adapter and client, if any does.

        One whose adapter and client both have too much comes first.
        """
        found: tuple[int, tuple[float, int]] | None = None
        victim = None
        for ticket, holder in self._places.taken.items():
            if ticket.flying or ticket in self._result.preempted:
                continue
            moves = self._move(holder, guest), self._move(ticket.client, client)
            gains = moves.count(_GAIN)
            if gains and _LOSS not in moves and (found is None or (gains, ticket.order) > found):
                found, victim = (gains, ticket.order), ticket
        return victim

    def _move(self, giver: Holder | None, taker: Holder | None) -> int:
        """Return what is gained for one kind of holder if one gives a place to the other.

        The sum of squares of what holders have above their share becomes less with a gain, and no
        more without a loss: so preempting comes to an end.
        """
        if giver is taker:
            return _SAME
        most, has, gets = self._places.most, self._has(giver), self._has(taker)
        if giver is not None and has > most and has > gets + 1:
            return _GAIN
        return _SAME if taker is None or gets < most else _LOSS


def _holders(guest: Guest, ticket: Ticket) -> Sequence[Holder]:
    return (guest,) if ticket.client is None else (guest, ticket.client)
