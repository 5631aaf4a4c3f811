"""The seams between deciding and doing: what the driver needs of sources and devices.

Methods that are not `async` and not said to be quick block, and run in an I/O thread of the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Event
from typing import Protocol

import torch

from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.core.arena import Extent
from lorax_async.core.moves import Read, Row

Cancel = Event
"""Set when nobody wants a fetch any more; looked at between chunks."""

CopyTicket = Future[None]
"""Done when the bytes and the table rows of one copy are on the device; carries its error."""


class Reader(Protocol):
    """Checked access to the bytes of one adapter's weights. Whoever opened it closes it."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill the buffers, one after the other, from `offset` on. Blocks.

        Raises `IntegrityError` if the file is shorter or is no longer the one that was opened, and
        `FetchError` if it cannot be read.
        """

    def close(self) -> None:
        """Quick and idempotent."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An opened adapter: its config, the beginning of its weights (the whole header), a reader."""

    config: bytes
    prefix: bytes
    reader: Reader


class Source(Protocol):
    """Where adapters come from.

    Errors are those of `lorax_async.errors`, without id and story; nothing stays open on an error
    or a cancellation.
    """

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        """Which bytes `ref` names now. Checks that the caller may have them; reads none."""

    async def open(self, key: AdapterKey) -> AdapterFile:
        """Open these bytes and no others: a file that changed since is an `IntegrityError`."""

    def reopen(self, key: AdapterKey) -> Reader:
        """A reader of an adapter whose config and header are known.

        Quick: the file is opened, and checked as `open` does, by the first read.
        """

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[tuple[int, int]]],
        arrived: Callable[[int], None],
        cancel: Cancel,
    ) -> None:
        """Make the byte ranges [start, stop) of every group readable, in this order.

        Calls `arrived` with a group's index, on the loop, when all its bytes are here and others
        are still on their way; returns when all are here and checked. Ends early, with
        `FetchError`, when `cancel` is set.
        """

    async def populate(self, key: AdapterKey) -> None:
        """Bring the bytes close (into memory), as far as the source can."""


@dataclass(frozen=True, slots=True)
class FilePieces:
    """Bytes that a device may read from a file by itself, into one extent of its arena."""

    reader: Reader
    reads: tuple[Read, ...]


class Device(Protocol):
    """One arena, one table, and copies into them. Sizes and offsets in bytes.

    A copy writes its bytes, then its rows, and only then is its ticket done. A column is cleared
    before its slot or extents are given to somebody else; that is the driver's word to keep.
    """

    name: str
    alignment: int
    """Every extent and tensor starts on a multiple of it."""
    rank_multiple: int
    """Ranks are padded with zeros to a multiple of it."""

    def open(self) -> None:
        """Claim the arena and the tables. Blocks. Raises `CapacityError` if they do not fit."""

    def host_memory(self, extent: Extent) -> torch.Tensor:
        """The extent as writable uint8 `[nbytes]` of host memory. Quick."""

    def copy(
        self, pieces: FilePieces, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        """Read the pieces into the extent, then write the rows into the slot's column. Blocks."""

    def clear_column(self, slot: int) -> None:
        """From here on the slot's column names nobody. Quick."""

    def operands(self, module: int, slot: int) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """A `[rank, in]`, B `[out, rank]`, scale of one module in one slot; None if it has none."""

    def close(self) -> None:
        """Let the arena go; views that are still held keep their memory alive."""
