"""The calls of an `AdapterLoader` that look, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from lorax_async.adapter import AdapterId, AdapterKey, as_ref
from lorax_async.errors import UsageError
from lorax_async.events import Event
from lorax_async.io.ports import Device
from lorax_async.runtime.acquiring import Acquiring
from lorax_async.runtime.calls import Watcher
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.journal import Statistics
from lorax_async.runtime.machinery import Machinery
from lorax_async.runtime.tenants import Tenants
from lorax_async.runtime.usage import Usage
from lorax_async.runtime.whereabouts import AdapterResidency, Whereabouts
from lorax_async.tracing.names import name_of
from lorax_async.tracing.recorder import Tracer
from lorax_async.tracing.trace import TRACE_LIMIT, Trace


class _Loader(Protocol):
    """What these calls need of the loader."""

    _machinery: Machinery
    _driver: Driver
    _acquiring: Acquiring

    def _check_open(self) -> None: ...
    def _whereabouts(self) -> Whereabouts: ...


class Looking:
    """Where adapters are, what happened to them, and on which device."""

    @property
    def device(self: _Loader) -> Device:
        """The device, with the tables that kernels read."""
        self._check_open()
        return self._driver.device

    def residency(
        self: _Loader, *, nearest: int | None = None
    ) -> Mapping[AdapterKey, AdapterResidency]:
        """Where the adapters are that are anywhere, and what each takes.

        Parameters
        ----------
        nearest
            At most so many: those on the device first, then those in host memory.
        """
        self._check_open()
        return self._whereabouts().all(nearest)

    def whereabouts(self: _Loader, adapter_id: AdapterId) -> AdapterResidency | None:
        """Where one adapter is, as `residency` has it; None where it is nowhere."""
        self._check_open()
        key = self._acquiring.known(as_ref(adapter_id))
        return None if key is None else self._whereabouts().of(key)

    def _whereabouts(self: _Loader) -> Whereabouts:
        driver, given = self._driver, self._machinery.given
        return Whereabouts(driver.lifecycle.lives, driver.files.holds, given)

    def statistics(self: _Loader) -> Statistics:
        """Totals since the loader was opened."""
        self._check_open()
        return self._machinery.statistics()

    def usage(self: _Loader) -> Usage:
        """What is taken of each budget now."""
        self._check_open()
        return self._machinery.usage()

    def story(self: _Loader, adapter_id: AdapterId) -> tuple[Event, ...]:
        """The last events of one adapter, oldest first."""
        self._check_open()
        key = self._acquiring.known(as_ref(adapter_id))
        return () if key is None else self._driver.journal.story(key)

    def subscribe(self: _Loader, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event, on the loop; returns what ends that."""
        self._check_open()
        return self._driver.journal.subscribe(callback)

    @property
    def tracer(self: _Loader) -> Tracer:
        """What the loader's parts, and engines, report to while a trace is recorded."""
        return self._machinery.tracer

    def trace(self: _Loader, *, limit: int = TRACE_LIMIT) -> Trace:
        """Record what happens when, from `with loader.trace() as trace:` to the block's end.

        Several may be recorded at once, and one for as long as the loader is open.

        Parameters
        ----------
        limit
            Spans that are kept, of about 500 bytes; and as many of "compute", of which each pass
            has some for each layer. Beyond it the oldest go, and are counted.
        """
        self._check_open()
        return Trace(self._machinery.tracer, limit, partial(_tenants, self._driver.tenants))

    def last_numbers(self: _Loader) -> tuple[Statistics, Usage]:
        """`statistics` and `usage`, also once the loader is closed: the last ones, then.

        On the loader's loop, or from any thread once that loop is closed.
        """
        return self._machinery.statistics(), self._machinery.usage()

    def watch_calls(self: _Loader, watcher: Watcher) -> Callable[[], None]:
        """Tell `watcher` of each call of `load`, `stream` and `pin`; returns what ends that.

        Raises `UsageError` if there is one: it can be one only.
        """
        self._check_open()
        calls = self._driver.interest.calls
        if calls.watcher is not None:
            raise UsageError("the loader's calls are watched already")
        calls.watcher = watcher

        def leave() -> None:
            if calls.watcher is watcher:
                calls.watcher = None

        return leave


def _tenants(tenants: Tenants) -> dict[int, str]:
    """What a trace calls the adapters that have slots, by the slots' numbers."""
    return {slot: name_of(key) for slot, key in tenants.in_slots().items()}
