"""Which layer groups are whole, told in their order."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from lorax_async.core.ranges import overlaps, size_of
from lorax_async.core.spans import Span
from lorax_async.errors import InternalError


class Arrivals:
    """Counts the bytes of each group that are still missing.

    `groups` are the spans of each group, in the order in which they are told of; no byte is in two.
    A group without bytes is whole as soon as those before it are.
    """

    def __init__(self, groups: Sequence[Sequence[Span]]) -> None:
        self._missing = [size_of(group) for group in groups]
        self._told = 0
        self._spans = sorted(
            (*span, n) for n, group in enumerate(groups) for span in group if span[0] < span[1]
        )
        self._starts = [start for start, _, _ in self._spans]

    @property
    def missing(self) -> int:
        """Bytes that have not landed."""
        return sum(self._missing)

    def landed(self, span: Span) -> None:
        """These bytes are here, for the first time."""
        n = max(0, bisect_right(self._starts, span[0]) - 1)
        while n < len(self._spans) and self._spans[n][0] < span[1]:
            start, stop, group = self._spans[n]
            self._missing[group] -= size_of(overlaps([(start, stop)], span))
            if self._missing[group] < 0:
                raise InternalError(f"bytes {span[0]:,}-{span[1]:,} landed twice")
            n += 1

    def groups_in(self, span: Span) -> tuple[int, int] | None:
        """The first and the last group that have bytes in the span; None if no group has."""
        first = max(0, bisect_right(self._starts, span[0]) - 1)
        found = [
            group
            for start, stop, group in self._spans[first : bisect_left(self._starts, span[1])]
            if start < span[1] and span[0] < stop
        ]
        return (min(found), max(found)) if found else None

    def take(self) -> list[int]:
        """The groups that are whole, as are all before them, and were not taken yet."""
        first = self._told
        while self._told < len(self._missing) and not self._missing[self._told]:
            self._told += 1
        return list(range(first, self._told))
