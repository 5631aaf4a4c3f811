"""The budgets of device memory and of pinned images, and their eviction order."""

from __future__ import annotations

from collections.abc import Iterable

from lorax_async.events import SlotId
from lorax_async.lifecycle.adapter_state import AdapterState, GroupSizes, SlotGrant
from lorax_async.lifecycle.arena import Arena, Extent
from lorax_async.lifecycle.policies import EvictionPolicy
from lorax_async.types import AdapterKey

FIXED_COST = 4 << 20
"""The fixed cost of a reload, in bytes that could be read in the same time."""


def reload_cost(needs: GroupSizes) -> float:
    """Return the cost of loading an evicted adapter again, in bytes."""
    return FIXED_COST + (needs.file_nbytes or sum(needs.group_nbytes))


class Residency:
    """The slots and the arena of a device.

    `copies` runs of groups, each of `run_bytes` at most if it has several, may be in flight at
    once; `policy` ranks the slot holders for eviction.
    """

    def __init__(
        self,
        *,
        device_bytes: int,
        alignment: int,
        max_slots: int,
        copies: int,
        run_bytes: int,
        policy: EvictionPolicy,
    ) -> None:
        self.arena = Arena(device_bytes, alignment)
        self.copies = copies
        self.run_bytes = run_bytes
        self.policy = policy
        self.evictions = 0
        self._alignment = alignment
        self.max_slots = max_slots
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._generation = 0

    def claim(self, key: AdapterKey, needs: GroupSizes) -> SlotGrant | None:
        """Claim a slot and all extents, or return None."""
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
        """Free a grant; `evicted` if the policy picked it."""
        self.arena.free(grant.extents)
        self._free_slots.append(grant.slot.index)
        self.policy.remove(key, evicted=evicted)
        self.evictions += evicted

    def fits_beside(self, staying: Iterable[SlotGrant], sizes: tuple[int, ...]) -> bool:
        """Return whether `sizes` would fit if only `staying` kept their extents."""
        grants = tuple(staying)
        if not grants:
            return self.arena.can_hold(sizes)
        arena = Arena(self.arena.nbytes, self._alignment)
        arena.reserve(extent for grant in grants for extent in grant.extents)
        return len(grants) < self.max_slots and arena.can_allocate(sizes)

    def fits_after(self, departing: Iterable[SlotGrant], sizes: tuple[int, ...]) -> bool:
        """Return whether `sizes` will fit once `departing` are freed; False if there are none."""
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


class ImageBudget:
    """An arena of pinned host memory. Its extents hold adapters in the device's format."""

    def __init__(self, nbytes: int, alignment: int, policy: EvictionPolicy) -> None:
        self.arena = Arena(nbytes, alignment)
        self.alignment = alignment
        self.policy = policy
        self.evictions = 0

    def assign(self, state: AdapterState, extents: tuple[Extent, ...], cost: float) -> None:
        state.image = extents
        self.policy.admit(state.key, sum(extent.nbytes for extent in extents), cost)

    def drop(self, state: AdapterState, *, evicted: bool = False) -> None:
        """Free the adapter's image, if it has one."""
        if state.image is not None:
            self.arena.free(state.image)
            self.policy.remove(state.key, evicted=evicted)
            self.evictions += evicted
            state.image = None
            state.imaged = 0
