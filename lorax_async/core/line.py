"""A queue of adapters whose urgency may change while they wait."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any, Generic, TypeVar

from lorax_async.adapter import AdapterKey

_Order = TypeVar("_Order", bound=tuple[Any, ...])

_SLACK = 64
"""Entries that may be left over before they are looked for."""


class Line(Generic[_Order]):
    """Sorted by urgency; of equals, the one whose urgency was told first comes first."""

    __slots__ = ("_entries", "_heap", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[AdapterKey, _Order] = {}
        # Entries of the heap count while they say what `_waiting` says; others are passed over.
        self._heap: list[tuple[_Order, int, AdapterKey]] = []
        self._entries = 0

    def update(self, key: AdapterKey, urgency: _Order | None) -> None:
        """Let `key` wait with this urgency, or no longer (None)."""
        if urgency is None:
            self._waiting.pop(key, None)
        elif self._waiting.get(key) != urgency:
            self._waiting[key] = urgency
            self._entries += 1
            heappush(self._heap, (urgency, self._entries, key))
            self._sweep()

    @property
    def head(self) -> AdapterKey | None:
        while self._heap:
            urgency, _, key = self._heap[0]
            if self._waiting.get(key) == urgency:
                return key
            heappop(self._heap)
        return None

    def _sweep(self) -> None:
        """Drop what is passed over once it is the most: a head that stays would keep it."""
        if len(self._heap) <= 2 * len(self._waiting) + _SLACK:
            return
        counting: dict[AdapterKey, tuple[_Order, int, AdapterKey]] = {}
        for entry in sorted(self._heap):
            urgency, _, key = entry
            if self._waiting.get(key) == urgency:
                counting.setdefault(key, entry)
        self._heap = list(counting.values())

    def adopt(self, other: Line[_Order]) -> None:
        """Become an independent queue in the state of `other`."""
        self._waiting = other._waiting.copy()
        self._heap = other._heap.copy()
        self._entries = other._entries
