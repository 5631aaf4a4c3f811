"""What the page shows: adapters with their tiers, and the last cold request."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from time import monotonic
from typing import Any, Generic, TypeVar

from lorax_async.adapter import AdapterKey
from lorax_async.errors import shorten
from lorax_async.events import Event, Failed
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.whereabouts import AdapterResidency
from lorax_async.server.cold_requests import ColdRequests
from lorax_async.server.names import Names

MOST = 200
"""Adapters with names, and as many others, of which the nearest are shown."""

FRESH = 0.2
"""Seconds for which all who look are told the same."""

SHARE = 20
"""And so many times as long as a look took: of thousands of adapters, it takes milliseconds."""

ERROR_LENGTH = 300

Row = dict[str, Any]
Rows = Mapping[str, Row]
T = TypeVar("T")


_WHO = (False, True)
"""The operator?"""


class _Look(Generic[T]):
    """What `look` finds, or found a moment ago."""

    def __init__(self, look: Callable[[], T]) -> None:
        self._look = look
        self._until = 0.0

    def found(self) -> T:
        began = monotonic()
        if began >= self._until:
            self._found = self._look()
            took = monotonic() - began
            self._until = began + took + max(FRESH, SHARE * took)
        return self._found


class Board:
    """Rows by their ids. Anybody sees adapters that have names; the operator sees all."""

    def __init__(self, loader: AdapterLoader, names: Names, cold: ColdRequests) -> None:
        self._loader = loader
        self._names = names
        self._rows = {operator: _Look(partial(self._all_rows, operator)) for operator in _WHO}
        self._cold = {
            operator: _Look(partial(self._last_cold, cold, operator)) for operator in _WHO
        }

    @property
    def base(self) -> str:
        return self._names.base

    def rows(self, *, operator: bool) -> Rows:
        """As they are now, or were a moment ago."""
        return self._rows[operator].found()

    def more(self) -> int:
        """How many adapters that have names are not shown."""
        return max(0, len(self._names.adapters) - MOST)

    def cold(self, *, operator: bool) -> Row | None:
        """The last cold request that is shown."""
        return self._cold[operator].found()

    def _all_rows(self, operator: bool) -> Rows:
        return dict(self._all() if operator else self._named())

    def _last_cold(self, cold: ColdRequests, operator: bool) -> Row | None:
        last = cold.last(named=not operator)
        if last is None:
            return None
        return {
            "number": last.number,
            "name": self._names.name_of(last.adapter) or last.names[0],
            "outcome": last.outcome,
            "seconds": last.seconds,
            "ended": last.ended,
        }

    def _named(self) -> Iterator[tuple[str, Row]]:
        for name, where, story in self._by_name():
            yield name, _row(name, where, story, named=True)

    def _all(self) -> Iterator[tuple[str, Row]]:
        """By names where they have some; other ids begin with a NUL, which is in no name."""
        known: set[AdapterKey] = set()
        for name, where, story in self._by_name():
            known.update(event.key for event in story[-1:])
            yield name, _row(name, where, story, named=True)
        for key, found in self._loader.residency(nearest=MOST).items():
            if key not in known:
                yield f"\0{key}", _row(str(key), found, self._loader.story(key), named=False)

    def _by_name(self) -> Iterator[tuple[str, AdapterResidency | None, tuple[Event, ...]]]:
        for name, adapter in tuple(self._names.adapters.items())[:MOST]:
            yield name, self._loader.whereabouts(adapter), self._loader.story(adapter)


def _row(
    name: str, where: AdapterResidency | None, story: tuple[Event, ...], *, named: bool
) -> Row:
    last = story[-1] if story else None
    error = last.error if isinstance(last, Failed) else None
    # The operator's name stands for an id that may be a path.
    said = None if error is None else shorten(str(error.located(id=name)), ERROR_LENGTH)
    row: Row = {"name": name, "named": named, "error": said}
    if where is None:
        return row | {"tier": "source", "state": "", "layers": None, "bytes": 0, "leases": 0}
    return row | {
        "tier": where.tier,
        "state": where.state,
        "layers": where.layers,
        "bytes": where.device_bytes or where.host_bytes or where.pinned_bytes,
        "leases": where.leases,
    }
