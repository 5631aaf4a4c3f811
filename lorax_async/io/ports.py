"""The seams between deciding and doing: what the driver needs of sources and devices.

Methods that are not `async` and not said to be quick block, and run in an I/O thread of the loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.core.arena import Extent
from lorax_async.core.moves import Read, Row
from lorax_async.core.runs import Span
from lorax_async.errors import LoraxError
from lorax_async.verification import Verification


class Demand:
    """How much a fetch is wanted. Changed on the loop, asked for in any thread.

    `urgent`: somebody waits for it, and it is no prefetch.
    """

    def __init__(self, *, urgent: bool = True) -> None:
        self.urgent = urgent
        self.refused: LoraxError | None = None
        """The error with which a check refused the bytes received so far."""
        self._ended = Event()
        self._watchers: list[Callable[[], None]] = []

    @property
    def ended(self) -> bool:
        """Nobody wants it any more; looked at between chunks."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds. Blocks."""
        return self._ended.wait(seconds)

    def end(self) -> None:
        self._ended.set()
        self._tell()

    def hasten(self) -> None:
        """Somebody waits for it now."""
        if not self.urgent:
            self.urgent = True
            self._tell()

    @contextmanager
    def watched(self, changed: Callable[[], None]) -> Iterator[None]:
        """Call `changed` at each change, on the loop, and once at the beginning. Quick."""
        self._watchers.append(changed)
        try:
            changed()
            yield
        finally:
            self._watchers.remove(changed)

    def _tell(self) -> None:
        for changed in tuple(self._watchers):
            changed()


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

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        """Fill the buffer with `rows` equal parts of the file, `pitch` bytes from one to the next.

        Each has a byte or more; the first begins at `offset`. Nothing between them is read. Blocks,
        and raises as `read_into` does.
        """

    def close(self) -> None:
        """Quick and idempotent."""


class Hold(Protocol):
    """Keeps the bytes of one adapter in memory until it is closed."""

    @property
    def nbytes(self) -> int:
        """Bytes that it maps; 0 where the kernel was merely asked to read ahead."""

    @property
    def locked(self) -> bool:
        """The kernel may not take the pages back; else they stay for as long as it likes."""

    def close(self) -> None:
        """Blocks. Idempotent."""


class Refuse(Protocol):
    """How a source is told that what it opened was refused."""

    async def __call__(self, error: LoraxError, *, weights: bool) -> bool:
        """After a check of the config or the header failed: see `AdapterFile.refused`.

        With `weights`, after a check of the weights' bytes failed: a copy that nobody vouched for
        is dropped. The reader stays open.
        """


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An opened adapter: its config, the beginning of its weights (the whole header), a reader.

    `holdable` says whether `populate` would hold the bytes, and not only read ahead.
    `refuse`, where the source needs to know: see `refused`.
    """

    config: bytes
    prefix: bytes
    reader: Reader
    holdable: bool = False
    refuse: Refuse | None = None

    async def refused(self, error: LoraxError) -> bool:
        """Close it, after a check of its config or header failed with `error`.

        Return whether `Source.open` may return other bytes now: a copy that nobody vouched for, and
        that is not what the source has, is dropped.
        """
        if self.refuse is None:
            self.reader.close()
            return False
        return await self.refuse(error, weights=False)


class Source(Protocol):
    """Where adapters come from.

    Errors are those of `lorax_async.errors`, without id and story; nothing stays open on an error
    or a cancellation.
    """

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        """Which bytes `ref` names now. Checks that the caller may have them; reads none."""

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        """Open these bytes and no others: a file that changed since is an `IntegrityError`.

        Ends early, with `FetchError`, when `demand` ends, if it takes long at all.
        """

    def reopen(self, key: AdapterKey) -> Reader:
        """A reader of an adapter whose config and header are known.

        Quick: the file is opened, and checked as `open` does, by the first read.
        """

    async def bring(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[Span]],
        arrived: Callable[[int], None],
        demand: Demand,
    ) -> Verification:
        """Make the bytes of every group readable, in this order.

        Calls `arrived` with a group's index, on the loop, when its bytes may be used before all of
        the file was checked; returns how it was, when all are here. Ends early, with `FetchError`,
        when `demand` ends.
        """

    async def digest(self, key: AdapterKey) -> str:
        """What the weights, which are here, come to: `Verification.digest`, by sha256.

        Raises as `open` does.
        """

    async def populate(self, key: AdapterKey) -> Hold:
        """Bring all bytes into memory, and keep them there as far as the source can.

        Raises as `open` does.
        """


class StoredFolder(NamedTuple):
    """The folder with an adapter's files, and how many bytes these have."""

    path: str
    nbytes: int


@runtime_checkable
class FolderSource(Source, Protocol):
    """A `Source` whose adapters are files in a folder of this machine, once they are brought."""

    def folder(self, key: AdapterKey, reader: Reader) -> StoredFolder:
        """Return the folder of what `bring` has brought. Its files stay until `reader` is closed.

        Quick. Of folders that are not the cache's own, their owner may still remove files.
        """


@dataclass(frozen=True, slots=True)
class FilePieces:
    """Bytes that a device may read from a file by itself, into one extent of its arena."""

    reader: Reader
    reads: tuple[Read, ...]


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
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
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
