"""Which requests get the engine's places, and how many rows and tokens each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from lorax_async.scheduler.adapter_queue import AdapterQueue
from lorax_async.scheduler.requests import Client, Ticket
from lorax_async.scheduler.step import PassTimeModel

Holder = AdapterQueue | Client
"""Has requests, places and tokens: an adapter or a client."""

_Group = tuple[AdapterQueue, Client | None]
"""Requests for one adapter by one client."""

_LOSS, _SAME, _GAIN = -1, 0, 1

Queue = tuple[AdapterQueue, list[Ticket]]
"""An adapter, and those of its requests that could be in the next batch, by urgency."""


class EngineSlots:
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
        self.taken: dict[Ticket, AdapterQueue] = {}
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

    def take(self, adapter_queue: AdapterQueue, ticket: Ticket) -> None:
        self.taken[ticket] = adapter_queue
        ticket.begun = True
        for holder in _holders(adapter_queue, ticket):
            holder.begun += 1

    def vacate(self, ticket: Ticket) -> None:
        """Without effect if it has no place."""
        adapter_queue = self.taken.pop(ticket, None)
        if adapter_queue is not None:
            ticket.begun = False
            for holder in _holders(adapter_queue, ticket):
                holder.begun -= 1

    def is_contended(self, adapter_queues: Iterable[AdapterQueue]) -> bool:
        """Return whether a holder has more than its share while another one of its kind waits."""
        adapters = [each for each in set(self.taken.values()) if each.begun > self.most]
        clients = [each for each in self._clients.values() if each.begun > self.most]
        if not adapters and not clients:
            return False
        waiting = [adapter_queue for adapter_queue in adapter_queues if adapter_queue.waits]
        if any(adapter_queue is not large for adapter_queue in waiting for large in adapters):
            return True
        return any(
            ticket.client is not large and not ticket.begun
            for adapter_queue in waiting
            for ticket in adapter_queue.tickets
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


def admit(queues: Sequence[Queue], places: EngineSlots, now: float, *, preempt: bool) -> Admission:
    """Decide which requests without a place may take one.

    Free places go to holders below their share first; then the youngest requests of holders above
    theirs are preempted for the others. In either case the adapter and the
    client that got the fewest tokens come first. That nobody waits for ever, requests older than
    `EngineSlots.level` come before these, the oldest first.

    A place goes from a holder above its share to one with at least two fewer; so a preempted
    request begins again only when a place becomes free, and two never take turns.
    """
    return _AdmissionRound(places, now).decide(queues, preempt=preempt)


class _AdmissionRound:
    """The counts while one batch is decided."""

    def __init__(self, places: EngineSlots, now: float) -> None:
        self._places = places
        self._now = now
        self._more: Counter[Holder] = Counter()
        self._tokens: Counter[Holder] = Counter()
        self._result = Admission()

    def decide(self, queues: Sequence[Queue], *, preempt: bool) -> Admission:
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
        in_vain: set[tuple[AdapterQueue, Client | None]] = set()
        for group in sorted(waiting, key=lambda each: self._key(each, waiting)):
            adapter_queue, client = group
            alike = adapter_queue, client if self._has(client) else None
            if alike in in_vain:
                continue
            victim = self._victim(adapter_queue, client)
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

    def _count(self, adapter_queue: AdapterQueue, ticket: Ticket, change: int) -> None:
        for holder in _holders(adapter_queue, ticket):
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
        adapter_queue, client = group
        if self._has(adapter_queue) >= self._places.most and any(
            other is not adapter_queue for other, _ in waiting
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

    def _victim(self, adapter_queue: AdapterQueue, client: Client | None) -> Ticket | None:
        """Return the youngest request that gives way to this adapter and client, if any does.

        One whose adapter and client both have too much comes first.
        """
        found: tuple[int, tuple[float, int]] | None = None
        victim = None
        for ticket, holder in self._places.taken.items():
            if ticket.flying or ticket in self._result.preempted:
                continue
            moves = self._move(holder, adapter_queue), self._move(ticket.client, client)
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


def _holders(adapter_queue: AdapterQueue, ticket: Ticket) -> Sequence[Holder]:
    return (adapter_queue,) if ticket.client is None else (adapter_queue, ticket.client)


LEAST = 64
"""Tokens of a prompt that are worth a row; the last ones of it may be fewer."""


def share(
    wants: Sequence[Sequence[int]], max_tokens: int, max_sequences: int, *, least: int = LEAST
) -> Sequence[Sequence[int]]:
    """Tokens for the first sequences of each adapter.

    An adapter gets no less than another one but where it wants less: first rows, one each in turn,
    then the tokens that are left. What one does not want, others have. Where rows do not
    come out even, the more urgent adapter has one more.

    Parameters
    ----------
    wants
        The tokens that each sequence could use, by adapter. Adapters, and the sequences of each,
        by urgency: the first one always gets some.
    max_tokens, max_sequences
        Of the batch; at least 1.
    least
        Nobody's prompt is begun with fewer tokens, unless that is all of it, or of the batch.
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
    """How many sequences of each adapter, and how many tokens are left besides `least` for each."""
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
    """Divide `room`: nobody gets more than it wants, nor more than another that wants more."""
    given = [0] * len(wants)
    ascending = sorted(range(len(wants)), key=lambda number: (wants[number], -number))
    for done, number in enumerate(ascending):
        given[number] = min(wants[number], room // (len(wants) - done))
        room -= given[number]
    return given


def _spread(wants: Sequence[int], least: int, extra: int) -> list[int]:
    """`least` for each, and the rest for the first ones."""
    given = []
    for want in wants:
        more = min(extra, max(0, want - least))
        given.append(min(want, least) + more)
        extra -= more
    return given


@dataclass(frozen=True, slots=True)
class BatchCapacity:
    """What a batch may have: tokens and sequences."""

    tokens: int
    sequences: int


@dataclass(frozen=True, slots=True)
class BatchSelection:
    """Rows, by adapter; and the next moment at which there may be others without any news.

    The `preempted` lose their places to some of the rows.
    """

    rows: list[tuple[AdapterQueue, Ticket, int]]
    due: float
    preempted: Sequence[Ticket] = ()


def pick(
    adapter_queues: Collection[AdapterQueue],
    room: BatchCapacity,
    places: EngineSlots,
    pace: PassTimeModel,
    layers: int,
    now: float,
) -> BatchSelection:
    """Choose rows among the adapters that are there, or will be when their layers are computed."""
    if places.count < inf:
        picked = _admitted(adapter_queues, room, places, pace, layers, now)
        if picked is not None:
            return picked
    queues, due = _queues(adapter_queues, room, places.free, pace, layers, now)
    return BatchSelection(_without_too_many_fresh(_shared(queues, room), places.free), due)


def _admitted(
    adapter_queues: Collection[AdapterQueue],
    room: BatchCapacity,
    places: EngineSlots,
    pace: PassTimeModel,
    layers: int,
    now: float,
) -> BatchSelection | None:
    """Choose rows so that places are shared; None if none that may begin finds room."""
    preempt = places.is_contended(adapter_queues)
    fresh = max(places.free, 1 if preempt else 0)
    queues, due = _queues(adapter_queues, room, fresh, pace, layers, now)
    if fresh:  # whoever may get a place, not only the most urgent ones
        queues = [
            (adapter_queue, adapter_queue.waiting(len(adapter_queue.tickets), inf))
            for adapter_queue, _ in queues
        ]
    while True:
        decided = admit(queues, places, now, preempt=preempt)
        out = set(decided.preempted)
        admitted = [
            (adapter_queue, kept)
            for adapter_queue, tickets in queues
            if (kept := [t for t in tickets if (t.begun and t not in out) or t in decided.admitted])
        ]
        rows = _shared(admitted, room)
        fitting = decided.admitted & {ticket for _, ticket, _ in rows}
        if fitting == decided.admitted:
            return BatchSelection(rows, due, decided.preempted)
        if not fitting:
            return None
        # No place is taken, and nobody preempted, for a request that finds no room in the batch.
        queues = [
            (adapter_queue, [t for t in tickets if t.begun or t in fitting])
            for adapter_queue, tickets in queues
        ]


def _queues(
    adapter_queues: Iterable[AdapterQueue],
    room: BatchCapacity,
    fresh: float,
    pace: PassTimeModel,
    layers: int,
    now: float,
) -> tuple[list[Queue], float]:
    """Requests that could be computed, `fresh` of an adapter's that have not begun at most.

    Also the next moment at which there may be others.
    """
    ready, coming = list[Queue](), list[Queue]()
    for adapter_queue in adapter_queues:
        if adapter_queue.leaving:
            continue
        tickets = adapter_queue.waiting(room.sequences, fresh)
        if tickets:
            (ready if adapter_queue.is_ready else coming).append((adapter_queue, tickets))
    due = _join(ready, coming, room, pace, layers, now) if coming else inf
    return ready, due


def _shared(queues: Iterable[Queue], room: BatchCapacity) -> list[tuple[AdapterQueue, Ticket, int]]:
    queues = sorted(queues, key=lambda queue: queue[1][0].order)
    wants = [[ticket.progress.wants for ticket in tickets] for _, tickets in queues]
    return [
        (adapter_queue, ticket, tokens)
        for (adapter_queue, tickets), given in zip(
            queues, share(wants, room.tokens, room.sequences), strict=True
        )
        for ticket, tokens in zip(tickets, given, strict=False)
    ]


def _join(
    ready: list[Queue],
    coming: list[Queue],
    room: BatchCapacity,
    pace: PassTimeModel,
    layers: int,
    now: float,
) -> float:
    """Add to `ready` who may join a pass that begins now; when the next one may, if nothing comes.

    Who joins makes the pass longer, for the others as well.
    """
    tokens = sum(ticket.progress.wants for _, tickets in ready for ticket in tickets)
    due = inf
    for adapter_queue, tickets in sorted(coming, key=lambda queue: queue[1][0].order):
        if not adapter_queue.trusted or adapter_queue.arrival is None:
            continue
        more = sum(ticket.progress.wants for ticket in tickets)
        seconds = pace.predict(min(room.tokens, tokens + more))
        if seconds is None and not ready:  # nobody else is kept waiting, and this shows the pace
            at = now if adapter_queue.arrival.arrived else inf
        else:
            at = adapter_queue.arrival.joins_at(now, seconds, layers)
        if at <= now:
            ready.append((adapter_queue, tickets))
            tokens += more
        else:
            due = min(due, at)
    return due


def _without_too_many_fresh(
    rows: list[tuple[AdapterQueue, Ticket, int]], fresh: float
) -> list[tuple[AdapterQueue, Ticket, int]]:
    """The most urgent of those that have not begun begin."""
    metadata = [ticket for _, ticket, _ in rows if not ticket.begun]
    if len(metadata) <= fresh:
        return rows
    metadata.sort(key=lambda ticket: ticket.order)
    later = set(metadata[int(fresh) :])
    return [row for row in rows if row[1] not in later]
