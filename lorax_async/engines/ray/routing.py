"""Which replica takes a request: one that has its adapter, within a bound on each replica's load.

Plain code without Ray, for its router and for the simulation in `benchmarks/`. An adapter that no
replica has goes to the first one with room on a ring of hashes: consistent hashing with bounded
loads (Mirrokni et al., 2016). When a replica joins or leaves, few adapters move, and routers that
know nothing of each other agree.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice

from lorax_async.lru import remember

BOUND = 1.25
"""No replica gets more than this many times its share of the recent requests."""

WINDOW = 512
"""Requests per replica after which all counts are halved."""

UNBOUNDED = 16
"""Recent requests that a replica may have whatever its share: so few are chance."""

POINTS = 64
"""Points of a replica on the ring."""

HOT, HOT_BOUND = 1 / 8, 1.1
"""An adapter with more than this part of a replica's share spreads to others at a lower bound, so
that it is not the many rare ones beside it which have to move."""

QUEUE_FACTOR, QUEUE_MARGIN = 2, 4
"""A queue longer than this times the second choice's, plus this, gives that one the request."""

REMEMBERED = 65_536
"""Adapters that a router remembers to have sent somewhere; the oldest is dropped first."""

MAX_IDS = 1024
"""Adapters that a replica publishes, the nearest to its device first."""

STATS = "lorax_async"
"""The key of a replica's `ReplicaResidency` in its routing stats."""

TIERS = ("device", "host", "disk")
_SENT = 1
"""The nearness of an adapter that was sent to a replica, which has not published it yet."""


@dataclass(frozen=True, slots=True)
class ReplicaResidency:
    """What a replica publishes."""

    tiers: Mapping[str, str]
    """The tier of each adapter, by the id that requests name: at most `MAX_IDS`."""
    free_bytes: int = 0
    """Of the device."""
    loading: int = 0
    """Loads under way."""


class HashRing:
    """Points of replicas on a ring of 64 bits, the same in every process."""

    def __init__(self) -> None:
        self._points: dict[str, list[int]] = {}
        self._ring: list[tuple[int, str]] = []

    def set_replicas(self, replicas: Iterable[str]) -> None:
        """Make these its replicas; those that stay keep their points."""
        self._points = {
            replica: self._points.get(replica)
            or sorted(hash_text(f"{replica}#{number}") for number in range(POINTS))
            for replica in replicas
        }
        self._ring = sorted(
            (point, replica) for replica, points in self._points.items() for point in points
        )

    def walk(self, start: int) -> Iterator[str]:
        """Yield each replica once, clockwise from `start`."""
        first, seen = bisect(self._ring, (start,)), set[str]()
        for number in range(first, first + len(self._ring)):
            replica = self._ring[number % len(self._ring)][1]
            if replica not in seen:
                seen.add(replica)
                yield replica

    def distance(self, start: int, replica: str) -> int:
        """Return how far the replica is, clockwise from `start`: `walk` is in this order."""
        points = self._points[replica]
        return (points[bisect(points, start) % len(points)] - start) % (1 << 64)


def hash_text(text: str) -> int:
    """Return 64 bits that are the same in every process."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest())


class RoutingPolicy:
    """Choose replicas for requests; on one event loop.

    `queue_of` returns the number of requests in progress at a replica, or None if it is unknown.
    """

    def __init__(self, queue_of: Callable[[str], int | None] = lambda _: None) -> None:
        self._queue_of = queue_of
        self._ring = HashRing()
        self._published: dict[str, ReplicaResidency] = {}
        self._publications: Counter[str] = Counter()
        self._holders: dict[str, dict[str, int]] = {}
        self._sent: OrderedDict[str, dict[str, int]] = OrderedDict()
        self._loads: dict[str, int] = {}
        self._requests: Counter[str] = Counter()
        self._total = 0
        self._fleet: tuple[str, ...] = ()

    def set_replicas(self, replicas: Iterable[str]) -> None:
        """Make these the fleet; forget of others what they published and were sent."""
        fleet = set(replicas)
        for gone in self._loads.keys() - fleet:
            self.publish(gone, ReplicaResidency({}))
            del self._published[gone], self._publications[gone]
        # One that joins counts as if it had had its share: it must not get everything at first.
        stay = [self._loads[replica] for replica in self._loads.keys() & fleet]
        share = sum(stay) // len(stay) if stay else 0
        self._loads = {replica: self._loads.get(replica, share) for replica in fleet}
        self._total = sum(self._loads.values())
        self._ring.set_replicas(fleet)
        self._fleet = tuple(sorted(fleet))

    @property
    def replicas(self) -> Sequence[str]:
        """The fleet."""
        return self._fleet

    def first_on_ring(self, adapter: str) -> str:
        """Return the replica of consistent hashing alone, whatever its load."""
        return next(self._ring.walk(hash_text(adapter)))

    def publish(self, replica: str, residency: ReplicaResidency) -> None:
        """Replace what a replica of the fleet published before."""
        if replica not in self._loads:
            return
        before = self._published.get(replica)
        for adapter in before.tiers if before else ():
            holders = self._holders[adapter]
            del holders[replica]
            if not holders:
                del self._holders[adapter]
        for adapter, tier in residency.tiers.items():
            self._holders.setdefault(adapter, {})[replica] = TIERS.index(tier)
        self._published[replica] = residency
        self._publications[replica] += 1

    def choose(self, adapter: str, count: int = 1) -> list[str]:
        """Return `count` replicas for a request, or all there are, the best first.

        After those with room come others: for the case that none of the former answers.
        """
        if not self._loads:
            return []
        nearness = self._nearness(adapter)
        candidates, new = self._candidates(adapter, nearness), not nearness
        chosen = [next(candidates)]
        if new or count > 1 or self._pressure(chosen[0], new=new) > QUEUE_MARGIN:
            chosen += islice(candidates, max(count - 1, 1))
            if len(chosen) > 1 and self._is_better(chosen[1], chosen[0], new=new):
                chosen[:2] = chosen[1::-1]
        others = (
            replica for replica in self._ring.walk(hash_text(adapter)) if replica not in chosen
        )
        return [*chosen, *islice(others, max(0, count - len(chosen)))][:count]

    def sent(self, adapter: str, replica: str) -> None:
        """Count a request that was sent to a replica."""
        if replica not in self._loads:
            return
        remember(self._sent, adapter, self._sent.get(adapter, {}), REMEMBERED)
        self._sent[adapter][replica] = self._publications[replica]
        self._requests[adapter] += 1
        self._loads[replica] += 1
        self._total += 1
        if self._total > WINDOW * len(self._loads):
            halves = {adapter: count // 2 for adapter, count in self._requests.items()}
            self._requests = Counter({adapter: half for adapter, half in halves.items() if half})
            self._loads = {replica: load // 2 for replica, load in self._loads.items()}
            self._total = sum(self._loads.values())

    def take_back(self, adapter: str, replica: str) -> None:
        """Do not count a request that was meant for a replica, and went to another one."""
        if self._loads.get(replica) and self._requests[adapter]:
            self._requests[adapter] -= 1
            self._loads[replica] -= 1
            self._total -= 1

    def _nearness(self, adapter: str) -> dict[str, int]:
        """Return the replicas that have an adapter, or were sent it since they last published."""
        # What a replica publishes now may have been collected before it was sent the adapter.
        sent = {
            replica: _SENT
            for replica, publication in self._sent.get(adapter, {}).items()
            if replica in self._loads and self._publications[replica] <= publication + 1
        }
        return sent | self._holders.get(adapter, {})

    def _candidates(self, adapter: str, nearness: Mapping[str, int]) -> Iterator[str]:
        """Yield replicas with room: those that have the adapter first, then along the ring.

        At least one: the bounds are above 1, and the least loaded replica has no more than 1 share.
        """
        start, share = hash_text(adapter), (self._total + 1) / len(self._loads)
        hot = self._requests[adapter] > HOT * share
        limit = max((HOT_BOUND if hot else BOUND) * share - 1, UNBOUNDED)
        holders = list(nearness)
        if len(holders) > 1:
            holders.sort(key=lambda r: (nearness[r], self._ring.distance(start, r)))
        others = (replica for replica in self._ring.walk(start) if replica not in nearness)
        for replica in chain(holders, others):
            if self._loads[replica] < limit:
                yield replica

    def _pressure(self, replica: str, *, new: bool) -> int:
        """Return the requests in progress, and for a `new` adapter the loads."""
        published = self._published.get(replica) if new else None
        return (self._queue_of(replica) or 0) + (published.loading if published else 0)

    def _is_better(self, second: str, first: str, *, new: bool) -> bool:
        """Return whether the second choice is better; the adapter is `new` if nobody has it."""
        limit = QUEUE_FACTOR * self._pressure(second, new=new) + QUEUE_MARGIN
        if new and second in self._published and first in self._published:
            without = not self._published[first].free_bytes
            if without and self._published[second].free_bytes:
                return True
        return self._pressure(first, new=new) > limit
