"""Which rows of a batch belong to which adapter slot, as plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BASE_ONLY = -1
"""The slot of rows that no adapter touches."""


@dataclass(frozen=True, slots=True)
class Segments:
    """A partition of a batch's tokens into runs of one slot.

    Segment i is the rows `bounds[i]` to `bounds[i + 1]` (not included) and belongs to `slots[i]`.
    No segment is empty and no two neighbours share a slot, so equal batches have equal segments.
    """

    bounds: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return self.bounds[-1]


def plan_rows(slots: Sequence[int], lengths: Sequence[int]) -> Segments:
    """Segments of a batch whose i-th sequence has `lengths[i]` tokens and uses `slots[i]`.

    The order of the sequences is kept. Raises ValueError for a negative length, a slot below
    `BASE_ONLY`, or sequences of different sizes.
    """
    bounds, merged = [0], list[int]()
    for slot, length in zip(slots, lengths, strict=True):
        if length < 0 or slot < BASE_ONLY:
            raise ValueError(f"a sequence cannot have slot {slot} and {length} tokens")
        if length == 0:
            continue
        if merged and merged[-1] == slot:
            bounds[-1] += length
        else:
            merged.append(slot)
            bounds.append(bounds[-1] + length)
    return Segments(tuple(bounds), tuple(merged))
