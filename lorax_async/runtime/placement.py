"""The tier of each adapter, and its use of the budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

from lorax_async.events import Event, SlotId
from lorax_async.lifecycle.adapter_state import (
    AdapterState,
    FileState,
    HostState,
    SlotState,
    WantedTier,
)
from lorax_async.runtime.host_tier import MappedFile
from lorax_async.runtime.resolver import Resolver
from lorax_async.telemetry import Usage
from lorax_async.types import AdapterId, AdapterKey, as_ref

TierName = Literal["disk", "host", "device"]

_FROM_NEAR_TO_FAR: tuple[TierName, ...] = ("device", "host", "disk")

TIERS: Mapping[str, WantedTier] = {
    "disk": WantedTier.DISK,
    "host": WantedTier.HOST,
    "device": WantedTier.DEVICE,
}
"""The tiers of a prefetch, by name."""


@dataclass(frozen=True, slots=True)
class AdapterResidency:
    """The nearest tier of one adapter, and its use of each budget."""

    tier: TierName
    """"device": it has a slot; "host": its bytes are in host memory; "disk": its files are on disk
    and checked."""
    state: str
    """The slot's state: "filling", "resident" or "leaving"; without a slot, the file's: "present",
    "populating" (or waiting for its turn), "held", "read ahead" or "releasing"."""
    slot: SlotId | None
    device_bytes: int
    """In the arena."""
    host_bytes: int
    """Of held file pages or a copy of tensors."""
    pinned_bytes: int
    """Of page-locked memory."""
    locked: bool
    """Whether the host memory is locked. If it is not, or if a file was only read ahead (0
    `host_bytes`), the kernel may reclaim it."""
    leases: int
    """Handles that are not released."""
    pins: int
    layers: tuple[int, int] | None
    """The numbers of layer groups on the device, and of all; None without a slot."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Placement:
    """Where a loader's adapters are, and their use of the budgets.

    A live view without I/O: each access shows the present state. For the loader's event loop. An id
    is looked up by the key that it meant last.
    """

    _states: Mapping[AdapterKey, AdapterState]
    _maps: Mapping[AdapterKey, MappedFile]
    _copies: Mapping[AdapterKey, int]
    _resolver: Resolver
    _story: Callable[[AdapterKey], tuple[Event, ...]]
    _usage: Callable[[], Usage]

    @property
    def usage(self) -> Usage:
        """The use of each budget, and the numbers of leases and waiters."""
        return self._usage()

    @property
    def adapters(self) -> dict[AdapterKey, AdapterResidency]:
        """All adapters on disk, in host memory or on the device, by key."""
        return self._residencies(self._states)

    @property
    def by_id(self) -> dict[str, AdapterResidency]:
        """The same adapters by their ids as callers name them: what a router of requests knows.

        Of an id that callers named with several revisions or tokens, the last that is here.
        """
        ids = list(self._resolver.ids())
        found = self._residencies({key for _, key in ids})
        return {text: found[key] for text, key in ids if key in found}

    def nearest(self, limit: int) -> dict[AdapterKey, AdapterResidency]:
        """Return at most `limit` adapters: those on the device first, then those in host memory."""
        # In one pass over possibly thousands: each tier keeps its first `limit` keys.
        copies = self._copies
        tiers: dict[TierName, list[AdapterKey]] = {tier: [] for tier in _FROM_NEAR_TO_FAR}
        for key, life in self._states.items():
            if _is_here(life):
                tier = tiers[_tier(life, copies.get(key, 0) if copies else 0)]
                if len(tier) < limit:
                    tier.append(key)
        return self._residencies(islice(chain.from_iterable(tiers.values()), limit))

    def key(self, adapter_id: AdapterId) -> AdapterKey | None:
        """Return the version that an id meant last; None if it was not resolved."""
        return self._resolver.known(as_ref(adapter_id))

    def find(self, adapter_id: AdapterId) -> AdapterResidency | None:
        """Return where one adapter is; None if it is not on this machine."""
        key = self.key(adapter_id)
        return None if key is None else self._residencies([key]).get(key)

    def story(self, adapter_id: AdapterId) -> tuple[Event, ...]:
        """Return the last events of one adapter, oldest first; also after its load failed."""
        key = self.key(adapter_id)
        return () if key is None else self._story(key)

    def _residencies(self, keys: Iterable[AdapterKey]) -> dict[AdapterKey, AdapterResidency]:
        states = ((key, self._states.get(key)) for key in keys)
        return {
            key: _residency(life, self._maps.get(key), self._copies.get(key, 0))
            for key, life in states
            if life is not None and _is_here(life)
        }


def _is_here(life: AdapterState) -> bool:
    return life.grant is not None or life.file is FileState.PRESENT


def _tier(life: AdapterState, copied: int) -> TierName:
    return "device" if life.grant else "host" if life.in_host or copied else "disk"


def _residency(life: AdapterState, pages: MappedFile | None, copied: int) -> AdapterResidency:
    grant = life.grant
    return AdapterResidency(
        _tier(life, copied),
        "held" if copied and not grant else _state(life),
        grant.slot if grant else None,
        grant.nbytes if grant else 0,
        pages.nbytes if pages is not None else copied,
        sum(extent.nbytes for extent in life.image or ()),
        life.has_whole_image or (pages is not None and pages.locked),
        life.leases,
        life.pins,
        (life.done.bit_count(), len(grant.extents)) if grant else None,
    )


def _state(life: AdapterState) -> str:
    if life.slot is not SlotState.NONE:
        leaving = life.departing or life.slot is SlotState.DRAINING
        return "leaving" if leaving else life.slot.value
    if life.host in (HostState.NONE, HostState.WANTED):
        return life.file.value
    ahead = life.host is HostState.HELD and not life.is_held
    return "read ahead" if ahead else life.host.value
