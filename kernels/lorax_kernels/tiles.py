"""The tiles of a batch: runs of rows that one GPU program computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

DECODE_ROWS = 16
PREFILL_ROWS = 32
"""The limit: from 64 rows, the compiler for sm_90 generates wrong code
(triton-lang/triton#9433)."""


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Runs of at most `rows` rows of one slot, in a tensor with a fixed address.

    `table` is int32 `[tiles, 3]` of (start, stop, slot) on the plan's device. Unused tiles have
    slot -1.
    """

    rows: int
    table: Tensor

    @classmethod
    def of(
        cls,
        segments: Sequence[tuple[int, int, int]],
        *,
        rows: int | None,
        room: int | None,
        device: torch.device | str,
    ) -> Self:
        """Return the tiles of (start, stop, slot) segments.

        `rows` is 16, for decoding, or 32; None chooses by the longest segment. `room` is the number
        of tiles; None means as many as needed. Raises ValueError for other rows or too little
        room.
        """
        longest = max((stop - start for start, stop, _ in segments), default=0)
        if rows is None:
            rows = DECODE_ROWS if longest <= DECODE_ROWS else PREFILL_ROWS
        if rows not in {DECODE_ROWS, PREFILL_ROWS}:
            raise ValueError(f"expected tiles of {DECODE_ROWS} or {PREFILL_ROWS} rows, got {rows}")
        lines = _lines(segments, rows)
        table = _padded(lines, len(lines) if room is None else room)
        return cls(rows, table.to(device))

    def refill(self, segments: Sequence[tuple[int, int, int]]) -> None:
        """Replace the segments in the table, which a captured graph reads.

        Enqueued on the current stream. Raises ValueError for more tiles than the table has.
        """
        self.table.copy_(_padded(_lines(segments, self.rows), len(self.table)))


def _lines(segments: Sequence[tuple[int, int, int]], rows: int) -> list[tuple[int, int, int]]:
    return [
        (first, min(first + rows, stop), slot)
        for start, stop, slot in segments
        for first in range(start, stop, rows)
    ]


def _padded(lines: list[tuple[int, int, int]], room: int) -> Tensor:
    if len(lines) > room:
        raise ValueError(f"expected at most {room} tiles, the segments need {len(lines)}")
    lines = lines + [(0, 0, -1)] * (room - len(lines))
    return torch.tensor(lines, dtype=torch.int32).view(room, 3)
