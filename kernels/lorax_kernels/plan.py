"""The segments of one batch, as the kernels read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lorax_kernels.tables import Segment
from lorax_kernels.thresholds import Thresholds
from lorax_kernels.tiles import Tiles
from lorax_kernels.workspace import Workspace

DEFAULTS = Thresholds()
MAX_RANK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The assignment of a batch's rows to slots, made once per batch for all modules.

    `segments` are host integers, without segments that are empty or have no adapter. `top_slot` is
    the highest slot, or -1. `bounds` (int32 `[n + 1]`) and `slots` (int32 `[n]`, -1: no adapter)
    are all n segments as tensors on the batch's device. `workspace` is the CPU's memory between
    calls; it is thread-safe. `tiles` cover `segments`; None on the CPU unless `tile_rows` is set.
    On a GPU, no slot's rank exceeds `max_rank`, a multiple of 8.
    """

    tokens: int
    segments: tuple[Segment, ...]
    top_slot: int
    bounds: Tensor
    slots: Tensor
    workspace: Workspace
    tiles: Tiles | None
    max_rank: int

    @classmethod
    def from_segments(
        cls,
        bounds: Sequence[int],
        slots: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        thresholds: Thresholds = DEFAULTS,
        max_rank: int = MAX_RANK,
        tile_rows: int | None = None,
        tile_room: int | None = None,
    ) -> Self:
        """Return a plan whose segment i is rows `bounds[i]` to `bounds[i + 1]`, of slot `slots[i]`.

        A slot of -1 means no adapter. `thresholds` are for the CPU. `max_rank` is rounded up to a
        multiple of 8. `tile_rows` and `tile_room` are those of :meth:`Tiles.of`, for a graph that
        is captured once and replayed with other segments.

        Raises ValueError unless bounds are 0, …, tokens in ascending order, one more than slots,
        and for invalid tiles.
        """
        if len(bounds) != len(slots) + 1 or bounds[0] != 0:
            raise ValueError(
                f"expected {len(slots) + 1} bounds from 0 for {len(slots)} slots, "
                f"got {len(bounds)} from {bounds[0] if bounds else 'nothing'}"
            )
        if list(bounds) != sorted(bounds):
            raise ValueError("expected bounds in ascending order")
        top_slot = max(slots, default=-1)
        if min(slots, default=-1) < -1:
            raise ValueError(f"expected slots of at least -1, got {min(slots)}")
        segments = tuple(
            (start, stop, slot)
            for start, stop, slot in zip(bounds[:-1], bounds[1:], slots, strict=True)
            if start < stop and slot >= 0
        )
        tiles = None
        if tile_rows is not None or torch.device(device).type == "cuda":
            tiles = Tiles.of(segments, rows=tile_rows, room=tile_room, device=device)
        return cls(
            tokens=bounds[-1],
            segments=segments,
            top_slot=top_slot,
            bounds=torch.tensor(bounds, dtype=torch.int32, device=device),
            slots=torch.tensor(slots, dtype=torch.int32, device=device),
            workspace=Workspace(thresholds),
            tiles=tiles,
            max_rank=max_rank + -max_rank % 8,
        )
