"""Adapters that nobody wants and that hold nothing: how many of them are remembered."""

from __future__ import annotations

from collections.abc import Iterator

from lorax_async.adapter import AdapterKey
from lorax_async.core.life import Needs

MAX_WEIGHT = 262_144
"""Of all, in rows of plans: some 60 MB."""

OWN_WEIGHT = 8
"""What an adapter takes besides its plan: some 2 KB."""


class Idle:
    """In the order in which they came to rest. Plans that several share count once.

    `most` are remembered, and fewer if their plans are large.
    """

    __slots__ = ("_entries", "_most", "_sharing", "weight")

    def __init__(self, most: int) -> None:
        self._most = most
        self.weight = 0
        """In rows of plans."""
        self._entries: dict[AdapterKey, Needs | None] = {}
        self._sharing: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[AdapterKey]:
        return iter(self._entries)

    def add(self, key: AdapterKey, needs: Needs | None) -> None:
        """`key` rests; `needs` is that of its plan, the same object for a plan that is shared."""
        if key in self._entries:
            if self._entries[key] is needs:
                return
            self.discard(key)
        self._entries[key] = needs
        self.weight += OWN_WEIGHT
        if needs is not None:
            sharing = self._sharing.get(id(needs), 0)
            self._sharing[id(needs)] = sharing + 1
            self.weight += 0 if sharing else needs.weight

    def discard(self, key: AdapterKey) -> None:
        """`key` rests no longer, if it did."""
        if key not in self._entries:
            return
        needs = self._entries.pop(key)
        self.weight -= OWN_WEIGHT
        if needs is not None:
            self._sharing[id(needs)] -= 1
            if not self._sharing[id(needs)]:
                del self._sharing[id(needs)]
                self.weight -= needs.weight

    @property
    def one_too_many(self) -> AdapterKey | None:
        """The first to be forgotten, if one has to be."""
        if len(self._entries) > self._most or self.weight > MAX_WEIGHT:
            return next(iter(self._entries))
        return None

    def adopt(self, other: Idle) -> None:
        """Become an independent one in the state of `other`."""
        self._entries = other._entries.copy()
        self._sharing = other._sharing.copy()
        self.weight = other.weight
