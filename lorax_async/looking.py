"""The calls of an `AdapterLoader` that look, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from lorax_async.adapter import AdapterId, AdapterKey, as_ref
from lorax_async.events import Event
from lorax_async.io.ports import Device
from lorax_async.runtime.acquiring import Acquiring
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.journal import Statistics
from lorax_async.runtime.machinery import Machinery
from lorax_async.runtime.whereabouts import AdapterResidency, residency_of


class _Loader(Protocol):
    """What these calls need of the loader."""

    _machinery: Machinery
    _driver: Driver
    _acquiring: Acquiring

    def _check_open(self) -> None: ...


class Looking:
    """Where adapters are, what happened to them, and on which device."""

    @property
    def device(self: _Loader) -> Device:
        """The device, with the tables that kernels read."""
        self._check_open()
        return self._driver.device

    def residency(self: _Loader) -> Mapping[AdapterKey, AdapterResidency]:
        """Where the adapters are that are anywhere, and what each takes."""
        self._check_open()
        driver, given = self._driver, self._machinery.given
        return residency_of(driver.lifecycle.lives, driver.files.holds, given)

    def statistics(self: _Loader) -> Statistics:
        """Totals since the loader was opened."""
        self._check_open()
        return self._machinery.statistics()

    def story(self: _Loader, adapter_id: AdapterId) -> tuple[Event, ...]:
        """The last events of one adapter, oldest first."""
        self._check_open()
        key = self._acquiring.known(as_ref(adapter_id))
        return () if key is None else self._driver.journal.story(key)

    def subscribe(self: _Loader, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event, on the loop; returns what ends that."""
        self._check_open()
        return self._driver.journal.subscribe(callback)
