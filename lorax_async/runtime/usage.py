"""What a loader's budgets are used for now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lorax_async.core.settling import Budgets
from lorax_async.io.host_copies import HostCopies
from lorax_async.runtime.tenants import Tenants


class Budget(NamedTuple):
    """How much of a budget is taken, and all of it."""

    used: int
    limit: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What is taken of each budget now; bytes, but for `slots`.

    Attributes
    ----------
    slots
        Of the device's tables; what is being filled or drained counts.
    device_bytes
        Of the arena, in aligned extents.
    host_bytes
        Of file pages that are held; what was only read ahead counts nothing.
    pinned_bytes
        Of page-locked memory, in aligned extents.
    memory_bytes
        Of adapters that were given as tensors, and of merges.
    cache_bytes
        Of the disk cache's folder, whoever of its processes put them there, as this loader saw it
        last; None before it did.
    leases
        Handles that are out.
    waiting
        Wishes that have not come true: of callers who wait, and of prefetches.
    """

    slots: Budget
    device_bytes: Budget
    host_bytes: Budget
    pinned_bytes: Budget
    memory_bytes: Budget
    cache_bytes: Budget | None
    leases: int
    waiting: int


def usage_of(
    budgets: Budgets, tenants: Tenants, copies: HostCopies, cache: tuple[int | None, int]
) -> Usage:
    """Of the disk cache, `cache` has the bytes that were seen last, if any were, and the limit."""
    device, host, pinned = budgets.device, budgets.host, budgets.images.arena
    arena, (seen, most) = device.arena, cache
    return Usage(
        slots=Budget(device.slots_used, device.max_slots),
        device_bytes=Budget(arena.nbytes - arena.free_bytes, arena.nbytes),
        host_bytes=Budget(host.nbytes - host.free, host.nbytes),
        pinned_bytes=Budget(pinned.nbytes - pinned.free_bytes, pinned.nbytes),
        memory_bytes=Budget(copies.used, copies.nbytes),
        cache_bytes=None if seen is None else Budget(seen, most),
        leases=sum(len(held) for held in tenants.leases.values()),
        waiting=tenants.waiting,
    )
