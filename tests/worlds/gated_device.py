"""A device in host memory whose copies can be held and failed."""

import threading
from collections.abc import Sequence

from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.cpu import CpuDevice
from lorax_async.devices.simulated import POISON
from lorax_async.errors import TransferError
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import TableRow


class GatedDevice(CpuDevice):
    """A `CpuDevice` whose arena starts as poison, and whose copies can be held and failed.

    Copies wait while `gate` is cleared. Those whose numbers, from 0, are in `failing` raise.
    `copies` counts those that have begun.
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

    def let_through(self) -> None:
        """Let the copies that have begun go on, and hold later ones."""
        with self._count:
            gate, self.gate = self.gate, threading.Event()
        gate.set()

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        with self._count:
            number, gate = self.copies, self.gate
            self.copies += 1
        gate.wait()
        if number in self.failing:
            raise TransferError(f"copy {number} was told to fail")
        return super().copy(piece, rows, extent, slot)
