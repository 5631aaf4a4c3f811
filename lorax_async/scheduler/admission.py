"""Decide which requests get the engine's places, and how many rows and tokens each gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from lorax_async.scheduler.estimates import PassTimeModel
from lorax_async.scheduler.requests import AdapterQueue, Client, Ticket

Holder = AdapterQueue | Client
"""An adapter or a client: it has requests, places and tokens."""

_Group = tuple[AdapterQueue, Client | None]
"""Requests for one adapter by one client."""

_LOSS, _SAME, _GAIN = -1, 0, 1

Queue = tuple[AdapterQueue, list[Ticket]]
"""An adapter and its requests that could be in the next batch, by urgency."""


class EngineSlots:
    """The engine's places; a request takes one with its first batch and keeps it to its end."""

    def __init__(self, count: float, share: float, level: float) -> None:
        self.count = count
        """The number of places; `inf` without a limit."""
        self.max_per_holder = inf if count == inf else max(1, int(count * share))
        """The most places of one adapter, or of one client, while others wait."""
        self.level = level
        """The age in seconds, by urgency, from which a request precedes those whose adapters got
        fewer tokens."""
        self.taken: dict[Ticket, AdapterQueue] = {}
        """The requests with a place and their adapters, in the order in which they began."""
        self._clients: dict[Hashable, Client] = {}

    @property
    def free(self) -> float:
        return self.count - len(self.taken)

    def client_of(self, name: Hashable) -> Client | None:
        """Return the client of this name and count one more request; None for an unknown client."""
        if name is None:
            return None
        client = self._clients.get(name)
        if client is None:
            least = min((other.tokens for other in self._clients.values()), default=0)
            client = self._clients[name] = Client(name, least)
        client.requests += 1
        return client

    def leave(self, ticket: Ticket) -> None:
        """Forget a request that is done. Call once per request."""
        self.vacate(ticket)
        client = ticket.client
        if client is not None:
            client.requests -= 1
            if not client.requests:
                del self._clients[client.name]

    def take(self, adapter_queue: AdapterQueue, ticket: Ticket) -> None:
        self.taken[ticket] = adapter_queue
        ticket.begun = True
        for holder in _holders(adapter_queue, ticket):
            holder.begun += 1

    def vacate(self, ticket: Ticket) -> None:
        """Free the request's place, if it has one."""
        adapter_queue = self.taken.pop(ticket, None)
        if adapter_queue is not None:
            ticket.begun = False
            for holder in _holders(adapter_queue, ticket):
                holder.begun -= 1

    def is_contended(self, adapter_queues: Iterable[AdapterQueue]) -> bool:
        """Return whether a holder is above its share while another of its kind waits."""
        adapters = [each for each in set(self.taken.values()) if each.begun > self.max_per_holder]
        clients = [each for each in self._clients.values() if each.begun > self.max_per_holder]
        if not adapters and not clients:
            return False
        waiting = [adapter_queue for adapter_queue in adapter_queues if adapter_queue.has_unbegun]
        if any(adapter_queue is not large for adapter_queue in waiting for large in adapters):
            return True
        return any(
            ticket.client is not large and not ticket.begun
            for adapter_queue in waiting
            for ticket in adapter_queue.tickets
            for large in clients
        )


class Admission:
    """The requests without a place that may take one, in one batch.

    Free places go to holders below their share first; then the youngest requests of holders above
    theirs are preempted for the others. In both cases the adapter and client with the fewest tokens
    come first. To prevent starvation, requests older than `EngineSlots.level` precede these, the
    oldest first.

    A place moves only from a holder above its share to one with at least two fewer, so that two
    requests never preempt each other in turns.
    """

    def __init__(
        self, queues: Sequence[Queue], places: EngineSlots, now: float, *, preempt: bool
    ) -> None:
        self.admitted: set[Ticket] = set()
        """Requests that may begin."""
        self.preempted: list[Ticket] = []
        """Requests that lose their places to the last of the admitted ones."""
        self._places = places
        self._now = now
        self._more: Counter[Holder] = Counter()
        self._tokens: Counter[Holder] = Counter()
        waiting: dict[_Group, list[Ticket]] = {}
        for adapter_queue, tickets in queues:
            for ticket in tickets:
                if not ticket.begun:
                    waiting.setdefault((adapter_queue, ticket.client), []).append(ticket)
        for tickets in waiting.values():
            tickets.reverse()  # the most urgent one is the last
        free = self._places.free
        while waiting and free >= 1:
            self._begin(self._next(waiting), waiting)
            free -= 1
        while waiting and preempt:
            move = self._first_with_victim(waiting)
            if move is None:
                break
            first, victim = move
            self.preempted.append(victim)
            self._count(self._places.taken[victim], victim, -1)
            self._begin(first, waiting)

    def _first_with_victim(
        self, waiting: Mapping[_Group, Sequence[Ticket]]
    ) -> tuple[_Group, Ticket] | None:
        """Return the group that takes a place and the request that loses it.

        Clients without a place have the same victims: try one of them per adapter, for there may be
        hundreds.
        """
        tried: set[tuple[AdapterQueue, Client | None]] = set()
        for group in sorted(waiting, key=lambda each: self._key(each, waiting)):
            adapter_queue, client = group
            alike = adapter_queue, client if self._has(client) else None
            if alike in tried:
                continue
            victim = self._victim(adapter_queue, client)
            if victim is not None:
                return group, victim
            tried.add(alike)
        return None

    def _next(self, waiting: dict[_Group, list[Ticket]]) -> _Group:
        """Return the group that gets a free place."""
        below = [each for each in waiting if not self._exceeds(each, waiting)]
        if below:
            return min(below, key=lambda each: self._key(each, waiting))
        # All are above their share: choose the one that would be preempted last.
        return min(waiting, key=lambda each: (max(map(self._has, each)), self._key(each, waiting)))

    def _begin(self, group: _Group, waiting: dict[_Group, list[Ticket]]) -> None:
        ticket = waiting[group].pop()
        if not waiting[group]:
            del waiting[group]
        self.admitted.add(ticket)
        self._count(group[0], ticket, 1)
        for holder in _holders(group[0], ticket):
            self._tokens[holder] += ticket.wants

    def _count(self, adapter_queue: AdapterQueue, ticket: Ticket, change: int) -> None:
        for holder in _holders(adapter_queue, ticket):
            self._more[holder] += change

    def _has(self, holder: Holder | None) -> int:
        """Return the holder's places, with those granted in this round."""
        return 0 if holder is None else holder.begun + self._more[holder]

    def _exceeds(self, group: _Group, waiting: Mapping[_Group, object]) -> bool:
        """Return whether one more place would exceed a share while another holder waits."""
        adapter_queue, client = group
        if self._has(adapter_queue) >= self._places.max_per_holder and any(
            other is not adapter_queue for other, _ in waiting
        ):
            return True
        return self._has(client) >= self._places.max_per_holder and any(
            other is not client for _, other in waiting
        )

    def _key(
        self, group: _Group, waiting: Mapping[_Group, Sequence[Ticket]]
    ) -> tuple[bool, float, tuple[float, int]]:
        order = waiting[group][-1].order
        overdue = self._now - order[0] >= self._places.level
        got = sum(each.tokens + self._tokens[each] for each in group if each is not None)
        return not overdue, 0 if overdue else got, order

    def _victim(self, adapter_queue: AdapterQueue, client: Client | None) -> Ticket | None:
        """Return the youngest request to preempt for this adapter and client, or None.

        Requests whose adapter and client are both above their share come first.
        """
        rank: tuple[int, tuple[float, int]] | None = None
        victim = None
        for ticket, holder in self._places.taken.items():
            if ticket.in_batch or ticket in self.preempted:
                continue
            moves = self._move(holder, adapter_queue), self._move(ticket.client, client)
            gains = moves.count(_GAIN)
            if gains and _LOSS not in moves and (rank is None or (gains, ticket.order) > rank):
                rank, victim = (gains, ticket.order), ticket
        return victim

    def _move(self, giver: Holder | None, taker: Holder | None) -> int:
        """Return whether fairness gains or loses if `giver` passes a place to `taker`.

        The sum of squares of the holders' excess over their share falls with a gain and does not
        rise without a loss; so preemption terminates.
        """
        if giver is taker:
            return _SAME
        limit = self._places.max_per_holder
        giver_has, taker_has = self._has(giver), self._has(taker)
        if giver is not None and giver_has > limit and giver_has > taker_has + 1:
            return _GAIN
        return _SAME if taker is None or taker_has < limit else _LOSS


def _holders(adapter_queue: AdapterQueue, ticket: Ticket) -> Sequence[Holder]:
    return (adapter_queue,) if ticket.client is None else (adapter_queue, ticket.client)


MIN_ROW_TOKENS = 64
"""The fewest tokens of a prompt that are worth a row, except for its last part."""


def share(
    wants: Sequence[Sequence[int]],
    max_tokens: int,
    max_sequences: int,
    *,
    least: int = MIN_ROW_TOKENS,
) -> Sequence[Sequence[int]]:
    """Divide a batch among adapters: return the tokens of each one's first sequences.

    Divide rows first, one per adapter in turn, then the remaining tokens, by max-min fairness: an
    adapter gets less than another only if it wants less. The more urgent adapter gets an odd row.

    `wants` are the tokens that each sequence of each adapter could use; both by urgency. The first
    sequence always gets some. `least` is the fewest tokens of a row, unless the sequence wants or
    the batch holds fewer.
    """
    if sum(map(len, wants)) <= max_sequences and sum(map(sum, wants)) <= max_tokens:
        return wants
    least = min(least, max_tokens)
    counts, left = _rows(wants, max_tokens, max_sequences, least)
    chosen = [each[:count] for each, count in zip(wants, counts, strict=True)]
    more = [sum([want - least for want in each if want > least]) for each in chosen]
    if not any(more):
        return chosen
    return [
        _spread(each, least, extra) for each, extra in zip(chosen, level(more, left), strict=True)
    ]


def _rows(
    wants: Sequence[Sequence[int]], tokens: int, rows: int, least: int
) -> tuple[list[int], int]:
    """Return the number of sequences per adapter, and the tokens left besides `least` for each."""
    counts = [0] * len(wants)
    in_turn = [number for number, each in enumerate(wants) if each]
    while in_turn:
        again = []
        for number in in_turn:
            each, count = wants[number], counts[number]
            needed = min(least, each[count])
            if not rows:
                break
            if needed > tokens:
                continue
            rows -= 1
            tokens -= needed
            counts[number] = count + 1
            if count + 1 < len(each):
                again.append(number)
        in_turn = again
    return counts, tokens


def level(wants: Sequence[int], room: int) -> list[int]:
    """Divide `room` by max-min fairness: no share exceeds its want or a larger want's share."""
    shares = [0] * len(wants)
    ascending = sorted(range(len(wants)), key=lambda number: (wants[number], -number))
    for done, number in enumerate(ascending):
        shares[number] = min(wants[number], room // (len(wants) - done))
        room -= shares[number]
    return shares


def _spread(wants: Sequence[int], least: int, extra: int) -> list[int]:
    """Return up to `least` tokens for each, and the `extra` ones for the first."""
    shares = []
    for want in wants:
        more = min(extra, max(0, want - least))
        shares.append(min(want, least) + more)
        extra -= more
    return shares


@dataclass(frozen=True, slots=True)
class BatchCapacity:
    """The limits of a batch, and what decides whether layers arrive in time.

    `layers` is the number of the base's layers, `now` the time at which the batch is made.
    """

    tokens: int
    sequences: int
    pace: PassTimeModel
    layers: int
    now: float


@dataclass(frozen=True, slots=True)
class BatchSelection:
    """The rows of a batch, by adapter.

    `due` is the next time at which more rows may be ready without any event. The `preempted`
    requests lose their places to some of the rows.
    """

    rows: list[tuple[AdapterQueue, Ticket, int]]
    due: float
    preempted: Sequence[Ticket] = ()


def pick(
    adapter_queues: Collection[AdapterQueue], room: BatchCapacity, places: EngineSlots
) -> BatchSelection:
    """Choose rows of adapters that are ready, or whose layers are expected in time."""
    if places.count < inf:
        picked = _admit(adapter_queues, room, places)
        if picked is not None:
            return picked
    queues, due = _queues(adapter_queues, room, places.free)
    return BatchSelection(_limit_new(_shared(queues, room), places.free), due)


def _admit(
    adapter_queues: Collection[AdapterQueue], room: BatchCapacity, places: EngineSlots
) -> BatchSelection | None:
    """Choose rows so that places are shared; return None if no admitted request finds room."""
    preempt = places.is_contended(adapter_queues)
    max_new = max(places.free, 1 if preempt else 0)
    queues, due = _queues(adapter_queues, room, max_new)
    if max_new:  # consider every request for a place, not only the most urgent ones
        queues = [
            (adapter_queue, adapter_queue.waiting(len(adapter_queue.tickets), inf))
            for adapter_queue, _ in queues
        ]
    while True:
        admission = Admission(queues, places, room.now, preempt=preempt)
        preempted = set(admission.preempted)
        admitted = [
            (adapter_queue, kept)
            for adapter_queue, tickets in queues
            if (
                kept := [
                    ticket
                    for ticket in tickets
                    if (ticket.begun and ticket not in preempted) or ticket in admission.admitted
                ]
            )
        ]
        rows = _shared(admitted, room)
        fitting = admission.admitted & {ticket for _, ticket, _ in rows}
        if fitting == admission.admitted:
            return BatchSelection(rows, due, admission.preempted)
        if not fitting:
            return None
        # Neither take a place nor preempt for a request that finds no room in the batch.
        queues = [
            (adapter_queue, [t for t in tickets if t.begun or t in fitting])
            for adapter_queue, tickets in queues
        ]


def _queues(
    adapter_queues: Iterable[AdapterQueue], room: BatchCapacity, max_new: float
) -> tuple[list[Queue], float]:
    """Return the requests that could be computed, and when the next ones may be.

    At most `max_new` requests per adapter have not begun.
    """
    ready, coming = list[Queue](), list[Queue]()
    for adapter_queue in adapter_queues:
        if adapter_queue.leaving:
            continue
        tickets = adapter_queue.waiting(room.sequences, max_new)
        if tickets:
            (ready if adapter_queue.is_ready else coming).append((adapter_queue, tickets))
    return ready, _join(ready, coming, room)


def _shared(queues: Iterable[Queue], room: BatchCapacity) -> list[tuple[AdapterQueue, Ticket, int]]:
    queues = sorted(queues, key=lambda queue: queue[1][0].order)
    wants = [[ticket.wants for ticket in tickets] for _, tickets in queues]
    return [
        (adapter_queue, ticket, tokens)
        for (adapter_queue, tickets), allotted in zip(
            queues, share(wants, room.tokens, room.sequences), strict=True
        )
        for ticket, tokens in zip(tickets, allotted, strict=False)
    ]


def _join(ready: list[Queue], coming: list[Queue], room: BatchCapacity) -> float:
    """Add to `ready` the streaming adapters that may join a pass now; return when the next may.

    Joining rows lengthen the pass, which gives the layers of the others more time.
    """
    if not coming:
        return inf
    tokens = sum(ticket.wants for _, tickets in ready for ticket in tickets)
    due, now = inf, room.now
    for adapter_queue, tickets in sorted(coming, key=lambda queue: queue[1][0].order):
        if not adapter_queue.may_stream or adapter_queue.arrival is None:
            continue
        more = sum(ticket.wants for ticket in tickets)
        seconds = room.pace.predict(min(room.tokens, tokens + more))
        if seconds is None and not ready:  # it delays no other row, and measures the pass time
            at = now if adapter_queue.arrival.arrived else inf
        else:
            at = adapter_queue.arrival.earliest_pass(now, seconds, room.layers)
        if at <= now:
            ready.append((adapter_queue, tickets))
            tokens += more
        else:
            due = min(due, at)
    return due


def _limit_new(
    rows: list[tuple[AdapterQueue, Ticket, int]], max_new: float
) -> list[tuple[AdapterQueue, Ticket, int]]:
    """Drop all but the `max_new` most urgent rows of requests that have not begun."""
    new = [ticket for _, ticket, _ in rows if not ticket.begun]
    if len(new) <= max_new:
        return rows
    new.sort(key=lambda ticket: ticket.order)
    later = set(new[int(max_new) :])
    return [row for row in rows if row[1] not in later]
