"""Those who wait for one adapter. Thousands may, so that no question looks at each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

_K = TypeVar("_K")

Urgency = tuple[bool, float]
"""Sorts queues: foreground first, then the oldest wish, where priority counts as age (seconds)."""


class Tier(IntEnum):
    """How far an adapter has to come before a waiter is served."""

    DISK = 0
    HOST = 1
    STREAM = 2
    DEVICE = 3


@dataclass(frozen=True, slots=True)
class Waiter:
    """Somebody who wants an adapter; `since` in seconds of the loop's clock."""

    id: int
    tier: Tier
    since: float
    foreground: bool = True
    priority: int = 0


_NOBODY: dict[int, Waiter] = {}
_NO_KINDS: dict[tuple[Tier, bool], int] = {}
_NO_PRIORITIES: dict[tuple[bool, int], int] = {}


class Waiters:
    """Waiters in the order in which they came, and how many there are of each kind."""

    __slots__ = ("_ahead", "_by_id", "_kinds", "_priorities")

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        """Nobody waits for most adapters: they share what is empty, and is not written to."""
        self._by_id: dict[int, Waiter] = _NOBODY
        self._ahead: dict[int, Waiter] = _NOBODY
        self._kinds: dict[tuple[Tier, bool], int] = _NO_KINDS
        self._priorities: dict[tuple[bool, int], int] = _NO_PRIORITIES

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Waiter]:
        return iter(self._by_id.values())

    def add(self, waiter: Waiter) -> None:
        if not self._by_id:
            self._by_id, self._ahead, self._kinds, self._priorities = {}, {}, {}, {}
        self._by_id[waiter.id] = waiter
        if waiter.foreground:
            self._ahead[waiter.id] = waiter
        _count(self._kinds, (waiter.tier, waiter.foreground), 1)
        _count(self._priorities, (waiter.foreground, waiter.priority), 1)

    def remove(self, waiter_id: int) -> bool:
        """Whether there was such a waiter."""
        waiter = self._by_id.pop(waiter_id, None)
        if waiter is None:
            return False
        if not self._by_id:
            self._clear()
            return True
        self._ahead.pop(waiter_id, None)
        _count(self._kinds, (waiter.tier, waiter.foreground), -1)
        _count(self._priorities, (waiter.foreground, waiter.priority), -1)
        return True

    @property
    def kinds(self) -> tuple[tuple[Tier, bool], ...]:
        """The (tier, foreground) that somebody waits for."""
        return tuple(self._kinds)

    def of_tiers(self, tiers: set[Tier]) -> list[Waiter]:
        return [waiter for waiter in self if waiter.tier in tiers]

    @property
    def for_slot(self) -> list[int]:
        """Ids of those who wait for the slot."""
        return [waiter.id for waiter in self.of_tiers({Tier.STREAM, Tier.DEVICE})]

    @property
    def has_foreground(self) -> bool:
        return bool(self._ahead)

    def has_tier(self, tier: Tier) -> bool:
        return (tier, True) in self._kinds or (tier, False) in self._kinds

    @property
    def oldest(self) -> float:
        """Since when somebody has been waiting, in the foreground if anybody is there.

        There must be a waiter.
        """
        return next(iter((self._ahead or self._by_id).values())).since

    def urgency(self, level: float) -> Urgency:
        """Of the adapter as a whole; each level of priority counts as `level` seconds of waiting.

        So a low priority waits longer, and not for ever.
        """
        foreground = self.has_foreground
        highest = max((p for ahead, p in self._priorities if ahead or not foreground), default=0)
        return not foreground, self.oldest - highest * level


def _count(counts: dict[_K, int], key: _K, more: int) -> None:
    left = counts.get(key, 0) + more
    if left:
        counts[key] = left
    else:
        del counts[key]
