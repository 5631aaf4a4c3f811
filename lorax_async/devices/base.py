"""The interface of a device, and what it copies."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch

from lorax_async.files import Reader
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.transfer_plan import ReadMove, TableRow

CopyTicket = Future[None]
"""Done when the bytes and the table rows of one copy are on the device; carries its error."""


@dataclass(frozen=True, slots=True, eq=False)
class StagedPiece:
    """Bytes in the device's format: copy `memory` to `target` in the extent.

    `memory` is a uint8 `[nbytes]` view of the device's `staging_memory`, not to be written to
    before the copy's ticket is done.
    """

    memory: torch.Tensor
    target: int


class PointerTables(Protocol):
    """What kernels read: a row per module of the layout, a column per slot.

    `layout.index(name)` is a module's row, and `handle.slot.index` an adapter's column. The tensors
    keep their addresses. `lorax_kernels.Tables` is the same protocol.
    """

    @property
    def address(self) -> torch.Tensor:
        """Int64 `[2, modules, slots]`: the addresses of A (0) and B (1)."""

    @property
    def rank(self) -> torch.Tensor:
        """Int32 `[modules, slots]`; 0 if the slot's adapter does not change the module."""

    @property
    def scale(self) -> torch.Tensor:
        """Float32 `[modules, slots]`."""

    def operands(self, module: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return A `[rank, in]`, B `[out, rank]` and the scale of a module in a slot, or None.

        A and B are views on the device. They show copies whose tickets are done.
        """


class Device(PointerTables, Protocol):
    """One arena, one pointer table, and copies into them. Sizes and offsets are in bytes.

    A copy writes its bytes, then its rows; then its ticket is done. Copies, wipes and clearings of
    columns take effect in the order of the calls. The driver clears a column before it reuses the
    slot or its extents.

    A `stream` is an object of the device's library; None is the current stream. Devices with
    `reads_files` compute synchronously, and ignore it.
    """

    name: str
    alignment: int
    """Every extent and tensor starts at a multiple of this."""
    rank_multiple: int
    """Ranks are padded with zeros to a multiple of this."""
    reads_files: bool
    """Whether the arena is host memory. Then `read` fills an extent, and casts write into its
    `host_view`, before a `copy` of the rows alone; other devices copy `StagedPiece`s."""

    def open(self) -> None:
        """Allocate the arena and the tables. Blocks.

        Raises `CapacityError` if memory is short, `ConfigError` if the device does not exist.
        """

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        """Allocate host memory that copies read at full speed: uint8 `[nbytes]`, writable. Blocks.

        Raises `CapacityError` if memory is short.
        """

    def host_view(self, extent: Extent) -> torch.Tensor:
        """Return the extent as writable uint8 `[nbytes]`.

        Raises `UsageError` unless `reads_files`.
        """

    def read(self, reader: Reader, moves: Sequence[ReadMove]) -> None:
        """Read bytes of a file to their targets, which are offsets in the arena. Blocks.

        Raises `UsageError` unless `reads_files`, else as the reader does.
        """

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        """Copy the bytes into the extent, then write the rows into the slot's column.

        Without a `piece` the bytes are there already: for devices with `reads_files` only.

        May block; call in an I/O thread. Errors before the copy starts are raised, later ones set
        on the ticket. Errors of the device are `TransferError`s.
        """

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        """Order work submitted to `stream` from now on after the copy. Does not block.

        A failed copy or a lost device is not waited for; check the ticket. Raises `UsageError` for
        a ticket of another device.
        """

    def note_use(self, stream: object | None = None) -> CopyTicket:
        """Return a ticket that is done once the work now on `stream` has run. Does not block.

        On a lost device, it is done at once.
        """

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        """Zero these extents, which no work reads any more.

        May block; call in an I/O thread. Errors are as for `copy`.
        """

    def clear_column(self, slot: int) -> None:
        """Clear the slot's column, after the copies submitted so far. Does not block."""

    def view(self, extent: Extent) -> torch.Tensor:
        """Return the bytes of an extent, or of a part, on the device: uint8 `[nbytes]`.

        They show copies whose tickets are done. Read-only for the caller.
        """

    def close(self) -> None:
        """Finish running work and release the arena. Views keep their memory alive.

        Blocks. Idempotent.
        """
