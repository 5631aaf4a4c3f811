"""Where adapters are, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal, NamedTuple

from lorax_async.events import SlotId
from lorax_async.lifecycle.adapter_state import AdapterState, HostState, WantedTier
from lorax_async.lifecycle.transitions import FileState, SlotState
from lorax_async.sources.base import PinnedPages
from lorax_async.types import AdapterKey

TierName = Literal["disk", "host", "device"]

_FROM_NEAR_TO_FAR: tuple[TierName, ...] = ("device", "host", "disk")

TIERS: Mapping[str, WantedTier] = {
    "disk": WantedTier.DISK,
    "host": WantedTier.HOST,
    "device": WantedTier.DEVICE,
}
"""What a caller asks for, and which bytes that is."""


@dataclass(frozen=True, slots=True)
class AdapterResidency:
    """The nearest tier at which one adapter is, and what it takes of each budget.

    Attributes
    ----------
    tier
        "device": it has a slot; "host": its bytes are in host memory; "disk": its files are here
        and were checked.
    state
        Of the slot: "filling", "resident" or "leaving"; where there is no slot, of the file:
        "present", "populating", "held", "read ahead" or "releasing".
    slot
        None where it has none.
    device_bytes, host_bytes, pinned_bytes
        Of the arena; of held file pages, or of a copy of tensors; of page-locked memory.
    locked
        The kernel may not take the host memory back. Where it may, or where a file was only read
        ahead (0 `host_bytes`), the host tier is best effort.
    leases, pins
        Handles that are out, and callers of `pin`.
    layers
        Layer groups whose bytes are on the device, and all of them; None where it has no slot.
    """

    tier: TierName
    state: str
    slot: SlotId | None
    device_bytes: int
    host_bytes: int
    pinned_bytes: int
    locked: bool
    leases: int
    pins: int
    layers: tuple[int, int] | None


class Placement(NamedTuple):
    """What is known of all adapters; of those that are kept in memory, `given` has the bytes."""

    states: Mapping[AdapterKey, AdapterState]
    holds: Mapping[AdapterKey, PinnedPages]
    given: Mapping[AdapterKey, int]

    def of(self, key: AdapterKey) -> AdapterResidency | None:
        """None where it is nowhere."""
        life = self.states.get(key)
        if life is None or not _is_here(life):
            return None
        return _residency(life, self.holds.get(key), self.given.get(key, 0))

    def all(self, nearest: int | None) -> dict[AdapterKey, AdapterResidency]:
        """The adapters that are anywhere, or so many of them, those on the device first."""
        keys = self.states if nearest is None else self._nearest(nearest)
        found = ((key, self.of(key)) for key in keys)
        return {key: where for key, where in found if where is not None}

    def _nearest(self, most: int) -> Iterable[AdapterKey]:
        """In one pass, for there may be thousands: each tier keeps its first `most`."""
        given = self.given
        tiers: dict[TierName, list[AdapterKey]] = {tier: [] for tier in _FROM_NEAR_TO_FAR}
        for key, life in self.states.items():
            if _is_here(life):
                tier = tiers[_tier(life, given.get(key, 0) if given else 0)]
                if len(tier) < most:
                    tier.append(key)
        return islice(chain.from_iterable(tiers.values()), most)


def _is_here(life: AdapterState) -> bool:
    return life.grant is not None or life.file is FileState.PRESENT


def _tier(life: AdapterState, given: int) -> TierName:
    return "device" if life.grant else "host" if life.in_host or given else "disk"


def _residency(life: AdapterState, hold: PinnedPages | None, given: int) -> AdapterResidency:
    grant = life.grant
    return AdapterResidency(
        _tier(life, given),
        "held" if given and not grant else _state(life),
        grant.slot if grant else None,
        grant.nbytes if grant else 0,
        hold.nbytes if hold is not None else given,
        sum(extent.nbytes for extent in life.image or ()),
        life.has_whole_image or (hold is not None and hold.locked),
        life.leases,
        life.pins,
        (life.done.bit_count(), len(grant.extents)) if grant else None,
    )


def _state(life: AdapterState) -> str:
    if life.slot is not SlotState.NONE:
        leaving = life.departing or life.slot is SlotState.DRAINING
        return "leaving" if leaving else life.slot.value
    if life.host is HostState.NONE:
        return life.file.value
    ahead = life.host is HostState.HELD and not life.is_held
    return "read ahead" if ahead else life.host.value
