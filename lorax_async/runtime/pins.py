"""Pins: adapters that are not evicted, each for the id that pinned it."""

from __future__ import annotations

from collections.abc import Callable

from lorax_async.lifecycle.adapter_state import SlotGrant
from lorax_async.lifecycle.commands import Command
from lorax_async.lifecycle.lifecycle import Lifecycle
from lorax_async.runtime.leases import Lease
from lorax_async.types import AdapterKey


class PinTable:
    """The pins of a loader by name. On the loop; `execute` carries out the lifecycle's commands."""

    def __init__(self, lifecycle: Lifecycle, execute: Callable[[list[Command]], None]) -> None:
        self._lifecycle = lifecycle
        self._execute = execute
        self._pins: dict[object, tuple[AdapterKey, SlotGrant]] = {}

    @property
    def names(self) -> tuple[object, ...]:
        return tuple(self._pins)

    def pin(self, name: object, lease: Lease) -> bool:
        """Pin the leased adapter for `name`, in place of its earlier pin.

        Return False, without effect, if the adapter is leaving.
        """
        lease.check()
        key, grant = lease.occupancy.key, lease.occupancy.grant
        if self._pins.get(name) == (key, grant):
            return True
        if not self._lifecycle.pin(key):
            return False
        self.unpin(name)
        self._pins[name] = (key, grant)
        return True

    def unpin(self, name: object) -> bool:
        """Remove the pin of `name`; return whether it had one."""
        pinned = self._pins.pop(name, None)
        if pinned is None:
            return False
        self._execute(self._lifecycle.unpin(*pinned))
        return True

    def drop(self, key: AdapterKey) -> None:
        """Remove all pins of an adapter that is about to be unloaded, which ends them."""
        self._pins = {name: pin for name, pin in self._pins.items() if pin[0] != key}
