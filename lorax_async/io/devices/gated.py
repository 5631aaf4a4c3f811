"""A CPU device for tests: copies wait to be allowed, fail when told to, and poison shows gaps."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from lorax_async.core.arena import Extent
from lorax_async.core.layout import ModelLayout
from lorax_async.core.moves import Row
from lorax_async.errors import TransferError
from lorax_async.io.devices.cpu import CpuDevice
from lorax_async.io.ports import CopyTicket, FilePieces, StagedPiece

POISON = 0x7E
"""Memory full of it is huge in F32 and BF16 and NaN in F16: whoever computes with it shows it."""


class GatedDevice(CpuDevice):
    """As `CpuDevice`, with an arena that starts as poison.

    Attributes
    ----------
    gate
        Copies wait until it is set; it is at first.
    failing
        Numbers of copies, counted from 0, that raise instead.
    copies
        Copies begun so far.
    """

    name = "gated"

    def __init__(self, layout: ModelLayout, *, dtype: str, nbytes: int, slots: int) -> None:
        super().__init__(layout, dtype=dtype, nbytes=nbytes, slots=slots)
        self.gate = threading.Event()
        self.gate.set()
        self.failing: set[int] = set()
        self.copies = 0
        self._count = threading.Lock()

    def open(self) -> None:
        super().open()
        self._arena.fill_(POISON)

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        with self._count:
            number = self.copies
            self.copies += 1
        self.gate.wait()
        if number in self.failing:
            raise TransferError(f"copy {number} was told to fail")
        return super().copy(pieces, rows, extent, slot)
