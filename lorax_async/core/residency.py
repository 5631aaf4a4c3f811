"""The device's budget: slots, arena bytes and copies in flight, and who must make room for whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lorax_async.adapter import AdapterKey
from lorax_async.core.arena import Arena
from lorax_async.core.life import Grant
from lorax_async.events import SlotId


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
    """

    def __init__(self, *, device_bytes: int, alignment: int, max_slots: int, copies: int) -> None:
        self.arena = Arena(device_bytes, alignment)
        self.copies_free = copies
        self._alignment = alignment
        self._max_slots = max_slots
        self._free_slots = list(range(max_slots - 1, -1, -1))
        self._generation = 0
        self._recency: dict[AdapterKey, None] = {}

    def claim(self, key: AdapterKey, sizes: tuple[int, ...]) -> Grant | None:
        """A slot and all extents, or nothing."""
        if not self._free_slots:
            return None
        extents = self.arena.allocate(sizes)
        if extents is None:
            return None
        self._generation += 1
        self.touch(key)
        return Grant(SlotId(self._free_slots.pop(), self._generation), extents)

    def release(self, key: AdapterKey, grant: Grant) -> None:
        self.arena.free(grant.extents)
        self._free_slots.append(grant.slot.index)
        self._recency.pop(key, None)

    def touch(self, key: AdapterKey) -> None:
        """`key` was used just now."""
        self._recency.pop(key, None)
        self._recency[key] = None

    def least_recent(self) -> Iterator[AdapterKey]:
        """Holders of slots, the one that was not used for longest first."""
        return iter(tuple(self._recency))

    def fits_empty(self, sizes: tuple[int, ...]) -> bool:
        """Whether an adapter of these sizes could ever be resident here."""
        return sum(-(-size // self._alignment) for size in sizes) * self._alignment <= (
            self.arena.nbytes
        )

    def fits_after(self, departing: Iterable[Grant], sizes: tuple[int, ...]) -> bool:
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
        return self._max_slots - len(self._free_slots)
