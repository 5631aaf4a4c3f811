"""What the host knows of a slot's column."""

from __future__ import annotations

from typing import NamedTuple

import torch

from lorax_async.core.layout import Module
from lorax_async.io.devices.cpu import Operands
from lorax_async.io.devices.watcher import EventTicket


class Cell(NamedTuple):
    """A module's row: A and B begin at `a` and `b`, bytes into the arena; `rank` is padded."""

    a: int
    b: int
    rank: int
    scale: float


class Tenant:
    """What copies into one column have been asked to write since it was cleared last."""

    def __init__(self) -> None:
        self.cells: dict[int, Cell] = {}
        self._tickets: dict[int, EventTicket] = {}
        self._views: dict[int, Operands] = {}

    def add(self, cells: dict[int, Cell], ticket: EventTicket) -> None:
        self.cells.update(cells)
        self._tickets.update(dict.fromkeys(cells, ticket))

    def operands(
        self, module: int, shape: Module, arena: torch.Tensor, dtype: torch.dtype
    ) -> Operands | None:
        """Views into the arena, made once; None before the copy's ticket is done."""
        found = self._views.get(module)
        if found is None:
            ticket = self._tickets.get(module)
            if ticket is None or not ticket.succeeded:
                return None
            a, b, rank, scale = self.cells[module]
            found = self._views[module] = (
                _view(arena, a, dtype, (rank, shape.in_features)),
                _view(arena, b, dtype, (shape.out_features, rank)),
                scale,
            )
        return found


def _view(
    arena: torch.Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, int]
) -> torch.Tensor:
    nbytes = shape[0] * shape[1] * dtype.itemsize
    return arena[offset : offset + nbytes].view(dtype).view(shape)
