"""The interface of a device: one arena, one pointer table, and copies into them."""

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


@dataclass(frozen=True, slots=True)
class FilePieces:
    """Bytes that a device may read from a file by itself, into one extent of its arena."""

    reader: Reader
    reads: tuple[ReadMove, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StagedPiece:
    """Bytes that lie as they shall on the device: `memory` goes to `target` in the extent.

    `memory` is a uint8 `[nbytes]` view of what the device's `staging_memory` gave; it is not
    written to until the copy's ticket is done.
    """

    memory: torch.Tensor
    target: int


class Device(Protocol):
    """One arena, one table, and copies into them. Sizes and offsets in bytes.

    A copy writes its bytes, then its rows, and only then is its ticket done. Copies, wipes, and
    clearings of columns, take effect in the order in which they were asked for. A column is cleared
    before its slot or extents are given to somebody else; that is the driver's word to keep.

    A `stream` is what the device's library calls one, and None is the current one; a device that
    computes when it is called (`reads_files`) has none, and ignores it.
    """

    name: str
    alignment: int
    """Every extent and tensor starts on a multiple of it."""
    rank_multiple: int
    """Ranks are padded with zeros to a multiple of it."""
    reads_files: bool
    """Its arena is host memory: it copies `FilePieces`, and casts write into its `host_view`.
    Other devices copy `StagedPiece`s alone."""

    def open(self) -> None:
        """Claim the arena and the tables. Blocks.

        Raises `CapacityError` if they do not fit, `ConfigError` if there is no such device here.
        """

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        """Host memory that copies can read at full speed: uint8 `[nbytes]`, writable. Blocks.

        Raises `CapacityError` if there is not so much.
        """

    def host_view(self, extent: Extent) -> torch.Tensor:
        """The extent as writable uint8 `[nbytes]`. Quick. `UsageError` unless `reads_files`."""

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        """Move the bytes into the extent, then write the rows into the slot's column.

        May block, in an I/O thread. What fails before the copy was begun is raised, what fails
        later is the ticket's; `TransferError` is the device's own.
        """

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        """Let what is put on `stream` from here on run after the copy, wherever it stands. Quick.

        Blocks no thread. A copy that failed, or a device that was lost, is not waited for: the
        ticket tells. `UsageError` for a ticket of another device.
        """

    def note_use(self, stream: object | None = None) -> CopyTicket:
        """A ticket that is done once all that is on `stream` by now has run. Quick.

        On a device that was lost nothing runs any more: it is done at once.
        """

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        """Zero these extents; whoever asks has seen all done that reads them.

        May block, in an I/O thread. Errors are as those of `copy`.
        """

    def clear_column(self, slot: int) -> None:
        """Let the slot's column name nobody, after the copies asked for so far. Quick."""

    def operands(self, module: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A `[rank, in]`, B `[out, rank]`, scale of one module in one slot; None if it has none.

        Views on the device. They tell what copies whose tickets are done have written.
        """

    def view(self, extent: Extent) -> torch.Tensor:
        """The bytes of an extent, or of a part of one, on the device: uint8 `[nbytes]`. Quick.

        They tell what copies whose tickets are done have written; nobody else may write to them.
        """

    def close(self) -> None:
        """End what runs, let the arena go; views that are still held keep their memory alive.

        Blocks. Idempotent.
        """
