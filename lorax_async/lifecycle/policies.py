"""Who gives up its room first: least recently used, least often used, or cheapest to bring back."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from lorax_async.config import Eviction
from lorax_async.errors import InternalError
from lorax_async.types import AdapterKey

_Mark = TypeVar("_Mark")

PolicyName = Eviction


class EvictionPolicy(Protocol):
    """Ranks the adapters that hold room, and remembers nothing of any other.

    Whoever asks may pass over the first of the ranking (they may be in use) and take a later one.
    The first is found at once, those behind it by sorting all. But for that and `state`, calls take
    the time of a heap's push, now and then that of one walk over the holders.
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
        """The holders, the first to go first: they may go meanwhile, but none may be used."""

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
        return _first_before(next(iter(self._marks), None), lambda: tuple(self._marks))

    def state(self) -> Hashable:
        return tuple(self._marks)


class _ByRank(_ByRecency[_Mark]):
    """The holders in a heap by rank, of equal rank the least recently used first.

    Whoever is used goes into the heap anew; what it left there is dropped when it comes up.
    """

    __slots__ = ("_clock", "_entries", "_heap")

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0
        self._heap: list[tuple[int, int, AdapterKey]] = []
        self._entries: dict[AdapterKey, int] = {}

    @abstractmethod
    def _rank(self, mark: _Mark) -> int: ...

    def ranked(self) -> Iterator[AdapterKey]:
        # Sorting keeps the order of equals, which is that of recency.
        return _first_before(
            self._first, lambda: sorted(self._marks, key=lambda key: self._rank(self._marks[key]))
        )

    def copy(self) -> Self:
        twin = super().copy()
        twin._heap = self._heap.copy()  # noqa: SLF001 (its own)
        twin._entries = self._entries.copy()  # noqa: SLF001
        return twin

    @property
    def _first(self) -> AdapterKey | None:
        heap = self._heap
        while heap and self._entries.get(heap[0][2]) != heap[0][1]:
            heappop(heap)
        return heap[0][2] if heap else None

    def _enter(self, key: AdapterKey, mark: _Mark) -> None:
        super()._enter(key, mark)
        self._clock += 1
        self._entries[key] = self._clock
        heappush(self._heap, (self._rank(mark), self._clock, key))
        if len(self._heap) > 2 * len(self._marks) + _SPARE:
            self._rebuild()

    def _leave(self, key: AdapterKey) -> _Mark:
        mark = super()._leave(key)
        del self._entries[key]
        return mark

    def _rebuild(self) -> None:
        marks, entries = self._marks, self._entries
        self._heap = [(self._rank(mark), entries[key], key) for key, mark in marks.items()]
        heapify(self._heap)


_SPARE = 64
"""Entries that a heap may have beyond two for each holder before it is made anew."""


def _first_before(
    first: AdapterKey | None, ranking: Callable[[], Iterable[AdapterKey]]
) -> Iterator[AdapterKey]:
    """`first`, and then the rest of `ranking`, which is asked for only where more are wanted."""
    if first is not None:
        yield first
        yield from [key for key in ranking() if key != first]


class LFU(_ByRank[int]):
    """The one with the fewest uses goes first; of equals the one that was not used for longest.

    Parameters
    ----------
    half_life
        Uses, of all adapters together, after which every count is halved (rounded down), so that
        an adapter that was popular once goes in the end. Counts stay below twice this. None is 8
        for each holder, and 1,024 or more: with fewer, nearly all counts are halved to 0.
    """

    __slots__ = ("_half_life", "_uses")

    def __init__(self, half_life: int | None = None) -> None:
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

    def state(self) -> Hashable:
        return (self._uses, tuple(self._marks.items()))

    def _rank(self, mark: int) -> int:
        return mark

    def _age(self) -> None:
        self._uses += 1
        half_life = self._half_life
        if half_life is None:
            half_life = max(_LEAST_USES, _USES_EACH * len(self._marks))
        if self._uses >= half_life:
            self._uses = 0
            for key, count in self._marks.items():
                self._marks[key] = count // 2
            self._rebuild()


_LEAST_USES = 1024
_USES_EACH = 8

_FINE = 1 << 20
"""Priorities are integers, in parts of this: they grow for ever, and no sum may be rounded."""


class _Worth(NamedTuple):
    """`per_use` and `priority` in parts of `_FINE`."""

    per_use: int
    uses: int = 0
    priority: int = 0

    def used(self, age: int, most_uses: int) -> _Worth:
        uses = min(self.uses + 1, most_uses)
        return _Worth(self.per_use, uses, age + uses * self.per_use)


class GDSF(_ByRank[_Worth]):
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
        """As `EvictionPolicy.admit`. Raises `InternalError` if a number is out of range."""
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

    def state(self) -> Hashable:
        """Priorities count from L on: all that come are above. Of those below only the order."""
        return tuple(
            (key, worth.per_use, worth.uses, max(worth.priority - self._age, 0))
            for key, worth in ((key, self._marks[key]) for key in self.ranked())
        )

    def _rank(self, mark: _Worth) -> int:
        return mark.priority


_POLICIES: dict[PolicyName, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "gdsf": GDSF}

EVICTION_POLICIES: tuple[PolicyName, ...] = tuple(_POLICIES)


def policy(name: PolicyName) -> EvictionPolicy:
    """A new policy that knows no adapter yet."""
    return _POLICIES[name]()
