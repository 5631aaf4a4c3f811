"""Simulate requests to one device, or to a fleet of replicas, for `lorax-async plan`."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random
from typing import Literal, NamedTuple, get_args

from lorax_async.engines.ray.routing import MAX_IDS, ReplicaResidency, RoutingPolicy
from lorax_async.lifecycle.adapter_state import GroupSizes
from lorax_async.lifecycle.arena import FreeRuns, Kinds, Run, kinds_of
from lorax_async.lifecycle.policies import EvictionPolicy, policy
from lorax_async.lifecycle.residency import reload_cost
from lorax_async.types import AdapterKey

# -- a device -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """Counts of a simulation.

    `hits` found their adapter on the device. `refused` requests name adapters that do not fit an
    empty device. `first_loads` counts distinct loaded adapters. `device_bytes` are copied by all
    loads, `file_bytes` is the size of the files these read.
    """

    requests: int = 0
    hits: int = 0
    refused: int = 0
    loads: int = 0
    first_loads: int = 0
    evictions: int = 0
    device_bytes: int = 0
    file_bytes: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests if self.requests else 0.0


class DeviceCapacity(NamedTuple):
    """The budget for adapters on a device: bytes, their alignment, and slots."""

    device_bytes: int
    alignment: int
    max_slots: int

    def free(self) -> FreeRuns:
        """Return the empty arena."""
        return FreeRuns.of_whole(self.device_bytes & -self.alignment)


class DeviceContents:
    """The adapters on one simulated device, by their positions in `needs`.

    Evicts and loads as `Residency`, whose arena it uses without the extents of each group. `policy`
    is a new one, which ranks the adapters on the device afterwards. Devices of a fleet share
    `keys`, which has a key for each adapter that was ever loaded.
    """

    def __init__(
        self,
        needs: Sequence[GroupSizes],
        capacity: DeviceCapacity,
        policy: EvictionPolicy,
        keys: dict[int, AdapterKey],
    ) -> None:
        self._needs = needs
        self._capacity = capacity
        self._policy = policy
        self._keys = keys
        self._free = capacity.free()
        self._total = self._free.nbytes
        self._kinds: dict[int, Kinds] = {}
        self.occupied: dict[AdapterKey, list[Run]] = {}
        self.evictions = self.device_bytes = self.file_bytes = 0

    def use(self, position: int) -> bool:
        """Count a request; return whether it finds its adapter on the device."""
        key = self._keys.get(position)
        if key not in self.occupied:
            return False
        self._policy.use(key)
        return True

    def load(self, position: int) -> bool:
        """Load an adapter; return whether it fits an empty device."""
        need, capacity, free, policy = (
            self._needs[position],
            self._capacity,
            self._free,
            self._policy,
        )
        kinds = self._kinds.get(id(need))
        if kinds is None:
            kinds = self._kinds[id(need)] = kinds_of(need.group_nbytes, capacity.alignment)
        nbytes = sum(size * count for size, count in kinds)
        if nbytes > self._total:
            return False
        key = self._keys.get(position)
        if key is None:
            key = self._keys[position] = AdapterKey(str(position), ())
        while (
            len(self.occupied) == capacity.max_slots
            or nbytes > free.nbytes
            or (runs := free.take(kinds)) is None
        ):
            victim = next(policy.ranked())
            free.give(self.occupied.pop(victim))
            policy.remove(victim, evicted=True)
            self.evictions += 1
        self.occupied[key] = runs
        policy.admit(key, nbytes, reload_cost(need))
        self.device_bytes += nbytes
        self.file_bytes += need.file_nbytes
        return True


def simulate(
    requests: Iterable[int],
    needs: Sequence[GroupSizes],
    capacity: DeviceCapacity,
    policy: EvictionPolicy,
) -> SimulationResult:
    """Simulate requests that find their adapter on the device, or evict others and load it.

    Requests are positions in `needs`; each ends before the next begins. `policy` is a new one.
    """
    keys: dict[int, AdapterKey] = {}
    device = DeviceContents(needs, capacity, policy, keys)
    hits = refused = loads = 0
    for position in requests:
        if device.use(position):
            hits += 1
        elif device.load(position):
            loads += 1
        else:
            refused += 1
    return SimulationResult(
        requests=hits + refused + loads,
        hits=hits,
        refused=refused,
        loads=loads,
        first_loads=len(keys),
        evictions=device.evictions,
        device_bytes=device.device_bytes,
        file_bytes=device.file_bytes,
    )


def count_fitting(needs: GroupSizes, capacity: DeviceCapacity) -> int:
    """Count the adapters with these needs that fit an empty device."""
    free, kinds = capacity.free(), kinds_of(needs.group_nbytes, capacity.alignment)
    count = 0
    while count < capacity.max_slots and free.take(kinds) is not None:
        count += 1
    return count


# -- a fleet --------------------------------------------------------------------------------------

PUBLISHED_AFTER = 100
"""Requests of a replica after which it publishes what it has: 10 s at 10 requests per second."""

Routing = Literal["adapters", "hash", "random"]
"""`RoutingPolicy`; consistent hashing alone; or any replica, as Ray's default while none queues."""


@dataclass(slots=True, kw_only=True)
class FleetResult:
    """Counts of a simulation.

    `hits` found their adapter on the device of their replica. `refused` requests name adapters that
    do not fit an empty device. Of the requests whose adapter some replica `had`, `affine` went to
    one that had it. A replica that does not have it fetches it: of these `fetches`, `repeated` are
    of adapters that the fleet has fetched before. `busiest` is the most requests of a replica, as a
    multiple of the mean.
    """

    routing: Routing
    requests: int = 0
    hits: int = 0
    refused: int = 0
    had: int = 0
    affine: int = 0
    fetches: int = 0
    repeated: int = 0
    fetched_bytes: int = 0
    busiest: float = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Affinity, and the share of requests that waited for a load."""
        cold = self.requests - self.hits - self.refused
        return {
            "affinity": self.affine / self.had if self.had else 1.0,
            "cold": cold / self.requests if self.requests else 0.0,
        }


@dataclass(slots=True, eq=False)
class SimulatedReplica:
    """What a replica has on its device, and on its disk, the least recently used first."""

    device: DeviceContents
    disk: OrderedDict[int, None] = field(default_factory=OrderedDict)
    disk_bytes: int = 0
    requests: int = 0


class SimulatedFleet:
    """Replicas that serve one request after the other. Requests are positions in `needs`."""

    def __init__(
        self,
        names: Sequence[str],
        needs: Sequence[GroupSizes],
        capacity: DeviceCapacity,
        cache_bytes: int,
        result: FleetResult,
    ) -> None:
        self.replicas: dict[str, SimulatedReplica] = {}
        self.result = result
        self.router = RoutingPolicy()
        self._names = names
        self._needs = needs
        self._capacity = capacity
        self._cache_bytes = cache_bytes
        self._keys: dict[int, AdapterKey] = {}
        self._holders: Counter[int] = Counter()
        self._fetched: set[int] = set()
        self._made = 0

    def add(self, count: int) -> None:
        """Let empty replicas join."""
        for _ in range(count):
            device = DeviceContents(self._needs, self._capacity, policy("lru"), self._keys)
            self.replicas[f"replica {self._made}"] = SimulatedReplica(device)
            self._made += 1
        self.router.set_replicas(self.replicas)

    def lose(self, name: str) -> None:
        """Let a replica die with all that it has."""
        self._holders.subtract(self.replicas.pop(name).disk.keys())
        self.router.set_replicas(self.replicas)

    def serve(self, name: str, position: int) -> None:
        """Serve a request at a replica, and count it."""
        replica, result = self.replicas[name], self.result
        replica.requests += 1
        has = position in replica.disk
        result.had += self._holders[position] > 0
        result.affine += has
        if replica.device.use(position):
            result.hits += 1
        elif not replica.device.load(position):
            result.refused += 1
            return
        if has:
            replica.disk.move_to_end(position)
        else:
            self._fetch(replica, position)

    def _fetch(self, replica: SimulatedReplica, position: int) -> None:
        result, nbytes = self.result, self._needs[position].file_nbytes
        result.fetches += 1
        result.fetched_bytes += nbytes
        result.repeated += position in self._fetched
        self._fetched.add(position)
        replica.disk[position] = None
        replica.disk_bytes += nbytes
        self._holders[position] += 1
        while replica.disk_bytes > self._cache_bytes and len(replica.disk) > 1:
            oldest, _ = replica.disk.popitem(last=False)
            replica.disk_bytes -= self._needs[oldest].file_nbytes
            self._holders[oldest] -= 1

    def publish(self, name: str) -> None:
        """Tell the router what a replica has, as the replicas of Ray Serve do."""
        replica, names = self.replicas[name], self._names
        tiers = {names[int(key.location)]: "device" for key in replica.device.occupied}
        for position in islice(reversed(replica.disk), MAX_IDS):
            if len(tiers) == MAX_IDS:
                break
            tiers.setdefault(names[position], "disk")
        self.router.publish(name, ReplicaResidency(tiers))


def simulate_fleet(
    requests: Sequence[int],
    names: Sequence[str],
    needs: Sequence[GroupSizes],
    capacity: DeviceCapacity,
    cache_bytes: int,
    replicas: int,
    deaths: int = 0,
) -> list[FleetResult]:
    """Return the counts of each routing.

    `deaths` replicas, at equal distances in time, die, and empty ones take their places. A replica
    keeps on its disk what it has on its device: `cache_bytes` is at least the device's.
    """
    results = []
    for routing in get_args(Routing):
        result = FleetResult(routing=routing, requests=len(requests))
        fleet = SimulatedFleet(names, needs, capacity, cache_bytes, result)
        fleet.add(replicas)
        choose = _chooser(routing, fleet, names)
        lost, busiest = 0, 0
        for number, position in enumerate(requests):
            if lost < deaths and number * (deaths + 1) >= len(requests) * (lost + 1):
                dying = next(iter(fleet.replicas))
                busiest = max(busiest, fleet.replicas[dying].requests)
                fleet.lose(dying)
                fleet.add(1)
                lost += 1
            name = choose(position)
            fleet.serve(name, position)
            if routing == "adapters" and fleet.replicas[name].requests % PUBLISHED_AFTER == 0:
                fleet.publish(name)
        busiest = max(busiest, *(replica.requests for replica in fleet.replicas.values()))
        result.busiest = busiest * replicas / len(requests) if requests else 0.0
        results.append(result)
    return results


def _chooser(routing: Routing, fleet: SimulatedFleet, names: Sequence[str]) -> Callable[[int], str]:
    """Return a function that chooses the replica of a request."""
    router, random = fleet.router, Random(0)  # noqa: S311 - not for secrets
    if routing == "random":
        return lambda _: random.choice(router.replicas)
    if routing == "hash":
        return lambda position: router.first_on_ring(names[position])

    def choose(position: int) -> str:
        (name,) = router.choose(names[position])
        router.sent(names[position], name)
        return name

    return choose
