"""Who gives up its room first: least recently used, least often used, or cheapest to bring back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, Protocol, Self, TypeVar

from lorax_async.adapter import AdapterKey
from lorax_async.config import Eviction
from lorax_async.errors import InternalError

_Mark = TypeVar("_Mark")

PolicyName = Eviction


class Policy(Protocol):
    """Ranks the adapters that hold room, and remembers nothing of any other.

    Whoever asks may pass over the first of the ranking (they may be in use) and take a later one.
    All but `ranked` and `state` take constant time, now and then that of one walk over the holders.
    Telling a policy of a holder it does not know, or of a new one it knows, is an `InternalError`.
    """

    def admit(self, key: AdapterKey, nbytes: int, cost: float) -> None:
        """`key` takes room, which counts as its first use.

        `nbytes` (at least 1) is that room, `cost` (bytes, not negative) what loading it again
        would take: what must be read, and a fixed part for opening and planning.
        """

    def use(self, key: AdapterKey) -> None:
        """Somebody asked for `key` and found it."""

    def remove(self, key: AdapterKey, *, evicted: bool) -> None:
        """`key` gave its room back: `evicted` for another, or else it failed or was unloaded."""

    def ranked(self) -> Iterator[AdapterKey]:
        """The holders as they are now, the first to go first."""

    def copy(self) -> Self:
        """An independent policy in the same state."""

    def state(self) -> Hashable:
        """Policies of one class and parameters whose states are equal rank alike for ever.

        There are finitely many states of finitely many adapters: all counts are bounded.
        """


class _ByRecency(Generic[_Mark]):
    """The holders, the least recently used first, each with what a policy remembers of it."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: dict[AdapterKey, _Mark] = {}

    def copy(self) -> Self:
        twin = copy.copy(self)
        twin._marks = self._marks.copy()  # noqa: SLF001 (its own)
        return twin

    def _enter(self, key: AdapterKey, mark: _Mark) -> None:
        if key in self._marks:
            raise InternalError(f"{key} holds room already")
        self._marks[key] = mark

    def _leave(self, key: AdapterKey) -> _Mark:
        try:
            return self._marks.pop(key)
        except KeyError:
            raise InternalError(f"{key} holds no room") from None


class LRU(_ByRecency[None]):
    """The one that was not used for longest goes first."""

    __slots__ = ()

    def admit(self, key: AdapterKey, nbytes: int, cost: float) -> None:  # noqa: ARG002 - Policy's
        self._enter(key, None)

    def use(self, key: AdapterKey) -> None:
        self._leave(key)
        self._enter(key, None)

    def remove(self, key: AdapterKey, *, evicted: bool) -> None:  # noqa: ARG002 - Policy's
        self._leave(key)

    def ranked(self) -> Iterator[AdapterKey]:
        return iter(tuple(self._marks))

    def state(self) -> Hashable:
        return tuple(self._marks)


class LFU(_ByRecency[int]):
    """The one with the fewest uses goes first; of equals the one that was not used for longest.

    Parameters
    ----------
    half_life
        Uses, of all adapters together, after which every count is halved (rounded down), so that
        an adapter that was popular once goes in the end. Counts stay below twice this.
    """

    __slots__ = ("_half_life", "_uses")

    def __init__(self, half_life: int = 1024) -> None:
        super().__init__()
        self._half_life = half_life
        self._uses = 0

    def admit(self, key: AdapterKey, nbytes: int, cost: float) -> None:  # noqa: ARG002 - Policy's
        self._enter(key, 1)
        self._age()

    def use(self, key: AdapterKey) -> None:
        self._enter(key, self._leave(key) + 1)
        self._age()

    def remove(self, key: AdapterKey, *, evicted: bool) -> None:  # noqa: ARG002 - Policy's
        self._leave(key)

    def ranked(self) -> Iterator[AdapterKey]:
        # Sorting keeps the order of equals, which is that of recency.
        return iter(sorted(self._marks, key=self._marks.__getitem__))

    def state(self) -> Hashable:
        return (self._uses, tuple(self._marks.items()))

    def _age(self) -> None:
        self._uses += 1
        if self._uses >= self._half_life:
            self._uses = 0
            for key, count in self._marks.items():
                self._marks[key] = count // 2


_FINE = 1 << 20
"""Priorities are integers, in parts of this: they grow for ever, and no sum may be rounded."""


@dataclass(frozen=True, slots=True)
class _Worth:
    """`per_use` and `priority` in parts of `_FINE`."""

    per_use: int
    count: int = 0
    priority: int = 0

    def used(self, age: int, most_uses: int) -> _Worth:
        count = min(self.count + 1, most_uses)
        return replace(self, count=count, priority=age + count * self.per_use)


class GDSF(_ByRecency[_Worth]):
    """The one that is worth least goes first; of equals the one that was not used for longest.

    Greedy-Dual-Size-Frequency (L. Cherkasova, HP Laboratories report HPL-98-69R1, 1998): a use
    sets an adapter's priority to L + uses x cost / nbytes, where L is the highest priority of
    those evicted so far. So a small or often used adapter stays, until what is used rises past it.

    Parameters
    ----------
    most_uses
        An adapter's uses beyond these are not counted. Without that, one with a million uses
        behind it and none to come would go only after as many evictions of others.
    """

    __slots__ = ("_age", "_most_uses")

    def __init__(self, most_uses: int = 64) -> None:
        super().__init__()
        self._most_uses = most_uses
        self._age = 0

    def admit(self, key: AdapterKey, nbytes: int, cost: float) -> None:
        """As `Policy.admit`. Raises `InternalError` if a number is out of range."""
        if nbytes < 1 or not 0 <= cost < float("inf"):
            raise InternalError(f"{key} takes {nbytes} bytes and costs {cost} to load again")
        self._enter(key, _Worth(round(cost * _FINE / nbytes)).used(self._age, self._most_uses))

    def use(self, key: AdapterKey) -> None:
        self._enter(key, self._leave(key).used(self._age, self._most_uses))

    def remove(self, key: AdapterKey, *, evicted: bool) -> None:
        worth = self._leave(key)
        if evicted:
            # One that was in use may have been passed over, and goes later at less than L.
            self._age = max(self._age, worth.priority)

    def ranked(self) -> Iterator[AdapterKey]:
        # Sorting keeps the order of equals, which is that of recency.
        return iter(sorted(self._marks, key=lambda key: self._marks[key].priority))

    def state(self) -> Hashable:
        """Priorities count from L on: all that come are above. Of those below only the order."""
        return tuple(
            (key, worth.per_use, worth.count, max(worth.priority - self._age, 0))
            for key, worth in ((key, self._marks[key]) for key in self.ranked())
        )


_POLICIES: dict[PolicyName, Callable[[], Policy]] = {"lru": LRU, "lfu": LFU, "gdsf": GDSF}

EVICTION_POLICIES: tuple[PolicyName, ...] = tuple(_POLICIES)


def policy(name: PolicyName) -> Policy:
    """A new policy that knows no adapter yet."""
    return _POLICIES[name]()
