"""Eviction policies: least recently used, least frequently used, or cheapest to reload."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any, NamedTuple, Self

from lorax_async.config import Eviction
from lorax_async.errors import InternalError
from lorax_async.types import AdapterKey

PolicyName = Eviction


class EvictionPolicy(ABC):
    """Rank the adapters that hold memory. `_marks` has them, the least recently used first.

    A caller may skip the first of the ranking, which may be in use. The first is found in constant
    time, the rest by sorting. Other calls take O(log n) amortised, `state` O(n log n).
    `InternalError` is raised for an unknown holder, and for admitting one twice.
    """

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: dict[AdapterKey, Any] = {}

    @abstractmethod
    def admit(self, key: AdapterKey, nbytes: int, cost: float) -> None:
        """Add a holder of `nbytes` (at least 1), which counts as its first use.

        `cost` (bytes, not negative) is the cost of a reload: the bytes to read and a fixed part.
        """

    @abstractmethod
    def use(self, key: AdapterKey) -> None:
        """Count a use of `key`."""

    def remove(self, key: AdapterKey, *, evicted: bool) -> None:  # noqa: ARG002 - some need it
        """Remove `key`: `evicted` to make room, or else failed or unloaded."""
        self._leave(key)

    @abstractmethod
    def ranked(self) -> Iterator[AdapterKey]:
        """Return the holders in eviction order. While iterating, remove holders but use none."""

    def copy(self) -> Self:
        """Return an independent copy."""
        clone = copy.copy(self)
        clone._marks = self._marks.copy()  # noqa: SLF001 (its own)
        return clone

    @abstractmethod
    def state(self) -> Hashable:
        """Return the ranking state: equal states of equal policies rank alike from now on.

        All counts are bounded, so that a model checker sees finitely many states.
        """

    def _enter(self, key: AdapterKey, mark: Any) -> None:
        if key in self._marks:
            raise InternalError(f"{key} is a holder already")
        self._marks[key] = mark

    def _leave(self, key: AdapterKey) -> Any:
        try:
            return self._marks.pop(key)
        except KeyError:
            raise InternalError(f"{key} is not a holder") from None


def _iterate_lazily(
    first: AdapterKey | None, ranking: Callable[[], Iterable[AdapterKey]]
) -> Iterator[AdapterKey]:
    """Yield `first`, then the rest of `ranking`, which is computed only if more are needed."""
    if first is not None:
        yield first
        yield from [key for key in ranking() if key != first]


class LRU(EvictionPolicy):
    """Evict the least recently used."""

    __slots__ = ()

    def admit(self, key: AdapterKey, nbytes: int, cost: float) -> None:  # noqa: ARG002 - Policy's
        self._enter(key, None)

    def use(self, key: AdapterKey) -> None:
        self._marks[key] = self._leave(key)

    def ranked(self) -> Iterator[AdapterKey]:
        return _iterate_lazily(next(iter(self._marks), None), lambda: tuple(self._marks))

    def state(self) -> Hashable:
        return tuple(self._marks)


_SPARE = 64
"""Heap entries beyond two per holder before the heap is rebuilt."""


class _RankedPolicy(EvictionPolicy):
    """Evict the lowest rank, of equal ones the least recently used.

    A use pushes a new heap entry; the stale one is dropped when it reaches the top.
    """

    __slots__ = ("_clock", "_entries", "_heap")

    def __init__(self) -> None:
        super().__init__()
        self._clock = 0
        self._heap: list[tuple[int, int, AdapterKey]] = []
        self._entries: dict[AdapterKey, int] = {}

    @abstractmethod
    def _rank(self, mark: Any) -> int: ...

    def ranked(self) -> Iterator[AdapterKey]:
        heap = self._heap
        while heap and self._entries.get(heap[0][2]) != heap[0][1]:
            heappop(heap)
        # Sorting keeps the order of equals, which is that of recency.
        return _iterate_lazily(
            heap[0][2] if heap else None,
            lambda: sorted(self._marks, key=lambda key: self._rank(self._marks[key])),
        )

    def copy(self) -> Self:
        clone = super().copy()
        clone._heap = self._heap.copy()  # noqa: SLF001 (its own)
        clone._entries = self._entries.copy()  # noqa: SLF001
        return clone

    def _enter(self, key: AdapterKey, mark: Any) -> None:
        super()._enter(key, mark)
        self._clock += 1
        self._entries[key] = self._clock
        heappush(self._heap, (self._rank(mark), self._clock, key))
        if len(self._heap) > 2 * len(self._marks) + _SPARE:
            self._rebuild()

    def _leave(self, key: AdapterKey) -> Any:
        mark = super()._leave(key)
        del self._entries[key]
        return mark

    def _rebuild(self) -> None:
        marks, entries = self._marks, self._entries
        self._heap = [(self._rank(mark), entries[key], key) for key, mark in marks.items()]
        heapify(self._heap)


_MIN_HALF_LIFE = 1024
_USES_PER_HOLDER = 8


class LFU(_RankedPolicy):
    """Evict the least frequently used; of equal ones, the least recently used.

    After `half_life` uses, of all adapters together, every count is halved (rounded down), so that
    formerly popular adapters are evicted in the end. Counts stay below twice this. None means 8 per
    holder, at least 1,024: with fewer, nearly all counts are halved to 0.
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

    def state(self) -> Hashable:
        return (self._uses, tuple(self._marks.items()))

    def _rank(self, mark: int) -> int:
        return mark

    def _age(self) -> None:
        self._uses += 1
        half_life = self._half_life
        if half_life is None:
            half_life = max(_MIN_HALF_LIFE, _USES_PER_HOLDER * len(self._marks))
        if self._uses >= half_life:
            self._uses = 0
            for key, count in self._marks.items():
                self._marks[key] = count // 2
            self._rebuild()


_PRIORITY_SCALE = 1 << 20
"""Priorities are integers in units of 1/this: they grow forever, and sums must be exact."""


class _Worth(NamedTuple):
    """`per_use` and `priority`, in units of 1/`_PRIORITY_SCALE`."""

    per_use: int
    uses: int = 0
    priority: int = 0


class GDSF(_RankedPolicy):
    """Evict the lowest priority; of equal ones, the least recently used.

    Greedy-Dual-Size-Frequency (L. Cherkasova, HP Laboratories report HPL-98-69R1, 1998): a use
    sets an adapter's priority to L + uses x cost / nbytes, where L is the highest priority of
    those evicted so far. A small or often used adapter stays until others in use overtake it.

    `max_uses` limits the use count of an adapter: one with a million past uses and no future ones
    would stay for as many evictions of others.
    """

    __slots__ = ("_age", "_max_uses")

    def __init__(self, max_uses: int = 64) -> None:
        super().__init__()
        self._max_uses = max_uses
        self._age = 0

    def admit(self, key: AdapterKey, nbytes: int, cost: float) -> None:
        if nbytes < 1 or not 0 <= cost < float("inf"):
            raise InternalError(f"{key}: invalid size {nbytes} or reload cost {cost}")
        self._enter(key, self._used(_Worth(round(cost * _PRIORITY_SCALE / nbytes))))

    def use(self, key: AdapterKey) -> None:
        self._enter(key, self._used(self._leave(key)))

    def _used(self, worth: _Worth) -> _Worth:
        uses = min(worth.uses + 1, self._max_uses)
        return _Worth(worth.per_use, uses, self._age + uses * worth.per_use)

    def remove(self, key: AdapterKey, *, evicted: bool) -> None:
        worth = self._leave(key)
        if evicted:
            # A holder that was in use may have been skipped, and is evicted later below L.
            self._age = max(self._age, worth.priority)

    def state(self) -> Hashable:
        """Return priorities relative to L. New ones are above it; below it, only order matters."""
        return tuple(
            (key, worth.per_use, worth.uses, max(worth.priority - self._age, 0))
            for key, worth in ((key, self._marks[key]) for key in self.ranked())
        )

    def _rank(self, mark: _Worth) -> int:
        return mark.priority


_POLICIES: dict[PolicyName, Callable[[], EvictionPolicy]] = {"lru": LRU, "lfu": LFU, "gdsf": GDSF}

EVICTION_POLICIES: tuple[PolicyName, ...] = tuple(_POLICIES)


def policy(name: PolicyName) -> EvictionPolicy:
    """Return a new policy without holders."""
    return _POLICIES[name]()
