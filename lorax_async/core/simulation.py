"""What becomes of requests that come one after the other: a loader's budgets, without bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lorax_async.adapter import AdapterKey
from lorax_async.core.arena import Kinds, kinds_of
from lorax_async.core.free_runs import FreeRuns, Run
from lorax_async.core.life import Needs
from lorax_async.core.policies import Policy
from lorax_async.core.residency import reload_cost


@dataclass(frozen=True, slots=True)
class Outcome:
    """How often an adapter was on the device when it was asked for, and what moved where not.

    `refused` requests ask for what does not fit an empty device. `first_loads` are the loads of
    adapters that were not loaded before. `device_bytes` are copied by all loads, `file_bytes` are
    those of the files they come from.
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


@dataclass(frozen=True, slots=True)
class Room:
    """What adapters have on a device: its bytes, which are aligned, and its slots."""

    device_bytes: int
    alignment: int
    max_slots: int

    def free(self) -> FreeRuns:
        """All of it."""
        return FreeRuns.of_whole(self.device_bytes & -self.alignment)


class _Residents:
    """What `Residency` holds, without where each layer group lies."""

    def __init__(self, room: Room, needs: Sequence[Needs], policy: Policy) -> None:
        self.policy = policy
        self.keys: dict[int, AdapterKey] = {}
        self.held: dict[int, list[Run]] = {}
        self.evictions = 0
        self._needs = needs
        self._free = room.free()
        self._whole = self._free.nbytes
        self._slots = room.max_slots
        self._sizes = {
            id(need): _Sizes.of(need, room.alignment) for need in {id(n): n for n in needs}.values()
        }
        self._positions: dict[AdapterKey, int] = {}

    def load(self, position: int) -> int | None:
        """The bytes of this one, which is not held, once there is room; None if there never is."""
        sizes = self._sizes[id(self._needs[position])]
        if sizes.nbytes > self._whole:
            return None
        key = self.keys.get(position) or self._key(position)
        while (runs := self._taken(sizes)) is None:
            self._evict()
        self.held[position] = runs
        self.policy.admit(key, sizes.nbytes, sizes.cost)
        return sizes.nbytes

    def _taken(self, sizes: _Sizes) -> list[Run] | None:
        full = len(self.held) == self._slots or sizes.nbytes > self._free.nbytes
        return None if full else self._free.take(sizes.kinds)

    def _evict(self) -> None:
        victim = next(self.policy.ranked())
        self._free.give(self.held.pop(self._positions[victim]))
        self.policy.remove(victim, evicted=True)
        self.evictions += 1

    def _key(self, position: int) -> AdapterKey:
        key = self.keys[position] = AdapterKey(str(position), ())
        self._positions[key] = position
        return key


class _Sizes(NamedTuple):
    """What one adapter takes, and what its reload costs."""

    kinds: Kinds
    nbytes: int
    cost: float

    @classmethod
    def of(cls, needs: Needs, alignment: int) -> _Sizes:
        kinds = kinds_of(needs.group_nbytes, alignment)
        return cls(kinds, sum(nbytes * count for nbytes, count in kinds), reload_cost(needs))


def simulate(
    requests: Iterable[int], needs: Sequence[Needs], room: Room, policy: Policy
) -> Outcome:
    """Let each request find its adapter on the device, or make room and load it.

    Parameters
    ----------
    requests
        Positions in `needs`, in the order in which they come; each is through before the next.
    policy
        Of nobody yet; it ranks those that are on the device afterwards.
    """
    residents = _Residents(room, needs, policy)
    held, keys = residents.held, residents.keys
    hits = refused = loads = device_bytes = file_bytes = 0
    for position in requests:
        if position in held:
            policy.use(keys[position])
            hits += 1
        elif (nbytes := residents.load(position)) is None:
            refused += 1
        else:
            loads += 1
            device_bytes += nbytes
            file_bytes += needs[position].file_nbytes
    return Outcome(
        requests=hits + refused + loads,
        hits=hits,
        refused=refused,
        loads=loads,
        first_loads=len(keys),
        evictions=residents.evictions,
        device_bytes=device_bytes,
        file_bytes=file_bytes,
    )


def fitting(needs: Needs, room: Room) -> int:
    """How many adapters of this kind an empty device holds."""
    free, kinds = room.free(), kinds_of(needs.group_nbytes, room.alignment)
    count = 0
    while count < room.max_slots and free.take(kinds) is not None:
        count += 1
    return count
