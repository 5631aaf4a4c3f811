"""Budgets of device and host: who holds what, and in which order they must make room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lorax_async.events import SlotId
from lorax_async.lifecycle.adapter_state import AdapterState, GroupSizes, SlotGrant
from lorax_async.lifecycle.arena import Arena, Extent
from lorax_async.lifecycle.policies import EvictionPolicy
from lorax_async.types import AdapterKey

FIXED_COST = 4 << 20
"""What a reload costs besides its bytes, in bytes that could be read meanwhile."""


def reload_cost(needs: GroupSizes) -> float:
    """What has to be read, once the adapter has gone, to have it back; in bytes."""
    return FIXED_COST + (needs.file_nbytes or sum(needs.group_nbytes))


class Residency:
    """Owns the slots and the arena. Claiming and picking happen in one synchronous step.

    Parameters
    ----------
    device_bytes, alignment
        The arena, in bytes.
    max_slots
        Columns of the device's tables.
    copies
        Copies that may be in flight at once.
    policy
        In which order those that hold a slot have to go.
    """

    def __init__(
        self,
        *,
        device_bytes: int,
        alignment: int,
        max_slots: int,
        copies: int,
        policy: EvictionPolicy,
    ) -> None:
        self.arena = Arena(device_bytes, alignment)
        self.copies_free = copies
        self.policy = policy
        self.evictions = 0
        self._alignment = alignment
        self.max_slots = max_slots
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._generation = 0

    def claim(self, key: AdapterKey, needs: GroupSizes) -> SlotGrant | None:
        """A slot and all extents, or nothing."""
        if not self._free_slots:
            return None
        extents = self.arena.allocate(needs.group_nbytes)
        if extents is None:
            return None
        self._generation += 1
        grant = SlotGrant(SlotId(self._free_slots.pop(), self._generation), extents)
        self.policy.admit(key, grant.nbytes, reload_cost(needs))
        return grant

    def release(self, key: AdapterKey, grant: SlotGrant, *, evicted: bool) -> None:
        """Take back what was claimed; `evicted` if the policy had picked it."""
        self.arena.free(grant.extents)
        self._free_slots.append(grant.slot.index)
        self.policy.remove(key, evicted=evicted)
        self.evictions += evicted

    def ranked(self) -> Iterator[AdapterKey]:
        """Holders of slots, the first to go first."""
        return self.policy.ranked()

    def fits_beside(self, staying: Iterable[SlotGrant], sizes: tuple[int, ...]) -> bool:
        """Whether there would be room if `staying` alone kept what they hold."""
        grants = tuple(staying)
        if not grants:
            return sum(-(-size // self._alignment) for size in sizes) * self._alignment <= (
                self.arena.nbytes
            )
        arena = Arena(self.arena.nbytes, self._alignment)
        arena.reserve(extent for grant in grants for extent in grant.extents)
        return len(grants) < self.max_slots and arena.can_allocate(sizes)

    def fits_after(self, departing: Iterable[SlotGrant], sizes: tuple[int, ...]) -> bool:
        """Whether there is room once `departing`, which somebody is waiting for, are gone."""
        grants = tuple(departing)
        if not grants:
            return False
        arena = self.arena.copy()
        for grant in grants:
            arena.free(grant.extents)
        return arena.can_allocate(sizes)

    @property
    def slots_used(self) -> int:
        return self.max_slots - len(self._free_slots)


class HostBudget:
    """Bytes of files held in host memory, by key; what was only read ahead counts nothing."""

    def __init__(self, nbytes: int, policy: EvictionPolicy) -> None:
        self.nbytes = nbytes
        self.free = nbytes
        self.held: dict[AdapterKey, int] = {}
        self.leaving: set[AdapterKey] = set()
        self.populating: AdapterKey | None = None
        """One at a time: foreground loads share the disk with one at most."""
        self.policy = policy
        self.evictions = 0

    def claim(self, key: AdapterKey, nbytes: int, cost: float) -> None:
        if nbytes:
            self.free -= nbytes
            self.held[key] = nbytes
            self.policy.admit(key, nbytes, cost)

    def pick(self, key: AdapterKey, *, evicted: bool) -> None:
        """It is on its way out; its bytes are free when it has gone."""
        if key in self.held:
            self.leaving.add(key)
            self.policy.remove(key, evicted=evicted)
            self.evictions += evicted

    def release(self, key: AdapterKey) -> None:
        self.leaving.discard(key)
        self.free += self.held.pop(key, 0)

    def use(self, key: AdapterKey) -> None:
        if key in self.held and key not in self.leaving:
            self.policy.use(key)


class ImageBudget:
    """An arena of page-locked memory, whose extents hold adapters as they lie on the device."""

    def __init__(self, nbytes: int, alignment: int, policy: EvictionPolicy) -> None:
        self.arena = Arena(nbytes, alignment)
        self.alignment = alignment
        self.policy = policy
        self.evictions = 0

    def give(self, life: AdapterState, extents: tuple[Extent, ...], cost: float) -> None:
        life.image = extents
        self.policy.admit(life.key, sum(extent.nbytes for extent in extents), cost)

    def drop(self, life: AdapterState, *, evicted: bool = False) -> None:
        """Take the image away, if there is one."""
        if life.image is not None:
            self.arena.free(life.image)
            self.policy.remove(life.key, evicted=evicted)
            self.evictions += evicted
            life.image = None
            life.imaged = 0
