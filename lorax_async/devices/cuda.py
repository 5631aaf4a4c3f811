"""A GPU as a device: pinned staging, one copy stream, events. Nothing here computes but zeros.

Written on torch's generic streams and events: it runs on any accelerator that has them. The order
that all of it relies on:

1. One copy stream. What is put on it, under one lock, runs in that order: a copy's bytes, its rows,
   its event; a column's clearing, and then the next tenant's bytes and rows.
2. A ticket's event is recorded before anybody is given the ticket, for a wait on an event that was
   never recorded is no wait.
3. The device reads pinned memory when it gets there. Staged bytes and row images are kept, and not
   written to, until the ticket is done, which is after its event.
4. No other stream is ordered with the copy stream by itself. Compute that reads a slot waits for
   its tickets on the device (`wait_for`), or is launched after they were seen done. The copy stream
   waits for nobody: whoever clears a column, and lets its extents be written again, has seen the
   tickets of all its uses (`note_use`) done.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterable, Mapping, Sequence

import torch

from lorax_async.devices.base import CopyTicket, FilePieces, StagedPiece
from lorax_async.devices.cpu import Operands
from lorax_async.devices.pointer_table import ColumnRecord, RowImage, TableCell, TableColumns
from lorax_async.devices.staging import TORCH_DTYPES
from lorax_async.devices.streams import (
    DeviceFailures,
    EventTicket,
    EventWatcher,
    first_line,
    new_event,
    new_stream,
    require_device,
    resolve_device,
    start_watchers,
    stream_on,
)
from lorax_async.errors import CapacityError, ConfigError, InternalError, TransferError, UsageError
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.layout import ModelLayout
from lorax_async.planning.transfer_plan import TableRow

ALIGNMENT = 64
_NO_ROOM = (RuntimeError, MemoryError, TypeError)  # the last is torch's for more than 63 bits
NOTHING = torch.empty(0, dtype=torch.uint8)


class DeviceMemory:
    """One arena, uint8 `[nbytes]`, and its columns; claimed and let go as a whole."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.arena = NOTHING
        self._columns: TableColumns | None = None
        self._stream: torch.Stream | None = None

    @property
    def columns(self) -> TableColumns:
        if self._columns is None:
            raise UsageError("the device is not open")
        return self._columns

    @property
    def stream(self) -> torch.Stream:
        """The copy stream."""
        if self._stream is None:
            raise UsageError("the device is not open")
        return self._stream

    def claim(self, layout: ModelLayout, nbytes: int, slots: int) -> None:
        """Claim all of it, or nothing. Blocks.

        The memory is allocated, and the tables zeroed, on this thread's current stream, where work
        of the memory's last owner may still stand. The copy stream starts behind that, and both
        have got there when this returns.

        Raises
        ------
        ConfigError
            There is no such device here, or it cannot be used.
        CapacityError
            No room for arena and tables there, or for row images here.
        """
        require_device(self._device)
        try:
            self._stream = new_stream(self._device)
            self._allocate(layout, nbytes, slots)
            self._start_behind_current(self._stream)
        except RuntimeError as error:
            self.let_go()
            raise ConfigError(f"{self._device} cannot be used ({first_line(error)})") from error
        except BaseException:
            self.let_go()
            raise

    def _allocate(self, layout: ModelLayout, nbytes: int, slots: int) -> None:
        layers = [module.layer for module in layout.modules]
        try:
            self.arena = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
            base = self.arena.data_ptr()
            self._columns = TableColumns(layers, slots, self._device, base, pinned)
        except _NO_ROOM as error:
            traceback.clear_frames(error.__traceback__)  # they keep what was allocated
            raise CapacityError(
                f"no memory on {self._device} for an arena of {nbytes:,} bytes and {slots:,} slots"
                f" ({first_line(error)}); lower device_bytes or max_slots"
            ) from error
        if base % ALIGNMENT:
            raise InternalError(f"{self._device} gave memory that is not aligned to {ALIGNMENT}")

    def _start_behind_current(self, stream: torch.Stream) -> None:
        before = new_event(self._device)
        before.record(stream_on(self._device, None))
        before.wait(stream)
        stream.synchronize()

    def wipe(self, extents: Sequence[Extent]) -> None:
        """Put zeros on the copy stream, by kernels; raises `RuntimeError` if they cannot be put."""
        with self.stream:
            for extent in extents:
                self.arena[extent.offset : extent.offset + extent.nbytes].zero_()

    def let_go(self) -> None:
        """Drop what was claimed.

        The allocator may give the memory to others at once, in the order of the stream on which it
        was claimed: the copy stream has run dry, and no other reads the memory any more.
        """
        self.arena = NOTHING
        self._columns = None
        self._stream = None


def pinned(nbytes: int) -> torch.Tensor:
    """Host memory that the device reads by DMA, uint8 `[nbytes]`."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def staging(device: torch.device, nbytes: int) -> torch.Tensor:
    """As `pinned`; `CapacityError` if there is not so much, `ConfigError` without the device."""
    require_device(device)
    try:
        return pinned(nbytes)
    except _NO_ROOM as error:
        raise CapacityError(
            f"no {nbytes:,} bytes of pinned host memory ({first_line(error)});"
            " lower staging_bytes or pinned_bytes"
        ) from error


class CudaDevice:
    """An arena on a GPU, filled by one copy stream from pinned memory.

    Parameters
    ----------
    layout
        The base model, which gives the tables their rows.
    dtype
        What adapters are stored as: "F32", "F16" or "BF16".
    nbytes
        Size of the arena, which `open` claims as one allocation.
    slots
        Columns of the tables.
    device
        "cuda:N", or "cuda": the current device of the thread that constructs this.

    Notes
    -----
    CUDA forbids waiting for events, in every thread, while a graph is captured in mode "global",
    and the attempt spoils the capture: capture with ``capture_error_mode="thread_local"``, or while
    no copies and no uses are on their way. Copies are not harmed; the news of them comes later.
    """

    alignment = ALIGNMENT
    rank_multiple = 8
    reads_files = False

    def __init__(
        self, layout: ModelLayout, *, dtype: str, nbytes: int, slots: int, device: str = "cuda"
    ) -> None:
        self._device = resolve_device(device)
        self.name = str(self._device)
        self._layout = layout
        self._dtype = TORCH_DTYPES[dtype]
        self._nbytes = nbytes
        self._slots = slots
        self._memory = DeviceMemory(self._device)
        self._lease_table = [ColumnRecord() for _ in range(slots)]
        self._opened = self._working = False
        self._failures = DeviceFailures(self.name)
        # Held while work is put on the copy stream: its order is the lock's. A `torch.Stream` also
        # keeps, in itself, which stream it was entered from: that takes one thread at a time, too.
        self._order = threading.Lock()
        self._closing = threading.Lock()

    def open(self) -> None:
        """As the port has it, and once: whoever keeps the tables' addresses may rely on them.

        When it returns, the tables are empty for whatever stream reads them. Also raises
        `ConfigError`: there is no such device here, or it cannot be used.
        """
        if self._opened:
            raise UsageError("the device was opened before; make a new one")
        self._memory.claim(self._layout, self._nbytes, self._slots)
        self._copies = EventWatcher("lorax-watch-copies", self._failures.note)
        self._uses = EventWatcher("lorax-watch-uses", self._failures.note_use)
        try:
            start_watchers(self._copies, self._uses)
        except CapacityError:
            self._memory.let_go()
            raise
        tables = self._memory.columns
        self.address, self.rank, self.scale = tables.address, tables.rank, tables.scale
        self._opened = self._working = True

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        """Pinned memory, before or after `open`.

        torch's allocator takes the next power of two of bytes, and keeps them for later pinned
        tensors when this one is freed.
        """
        return staging(self._device, nbytes)

    def host_view(self, extent: Extent) -> torch.Tensor:  # noqa: ARG002 - there is none
        raise UsageError(f"the arena of {self.name} is not host memory; copy staged bytes to it")

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        """Put on the copy stream: the bytes as one memcpy, the rows of a layer as two, an event.

        All of it is DMA from pinned memory and allocates nothing, and this returns while it is on
        its way; it blocks only while all row images are in use, or the driver's queue is full. A
        watcher ends the ticket once the event is done. What fails after something was put on the
        stream is the ticket's, and not before the event: the memory is in use all the same.
        """
        if isinstance(pieces, FilePieces):
            raise UsageError(f"{self.name} cannot read files; copy staged bytes to it")
        self._require_working()
        self._check(pieces, extent)
        cells = {
            module: TableCell(extent.offset + a, extent.offset + b, rank, scale)
            for module, a, b, _, rank, scale in rows
        }
        image = self._memory.columns.image_for(cells) if cells else None
        ticket = self._ticket(pieces, image)
        with self._order:
            try:
                self._require_working()
                occupant = self._lease_table[slot]
            except BaseException:
                ticket.finish()  # nobody has seen it, nothing was put; the image goes back
                raise
            start, column = extent.offset + pieces.target, occupant.cells | cells
            ticket.error = self._put(pieces, start, slot, cells, column, image)
            if ticket.error is None:
                occupant.add(cells, ticket)
            self._record(ticket)
        return ticket

    def _check(self, piece: StagedPiece, extent: Extent) -> None:
        memory = piece.memory
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise InternalError("staged bytes are not contiguous uint8 [nbytes]")
        inside = 0 <= extent.offset <= self._nbytes - extent.nbytes
        if not (inside and 0 <= piece.target <= extent.nbytes - memory.nbytes):
            raise InternalError(f"{memory.nbytes} bytes at {piece.target} do not fit {extent}")
        try:
            pinned = memory.nbytes == 0 or memory.is_pinned()
        except RuntimeError as error:
            raise self._failures.note(error) from error
        if not pinned:  # the driver would read it in this call, under the lock
            raise InternalError("staged bytes are not in pinned memory; use staging_memory")

    def _ticket(self, piece: StagedPiece, image: RowImage | None) -> EventTicket:
        event, columns = new_event(self._device), self._memory.columns
        if image is None:
            return EventTicket(self, event, piece)
        return EventTicket(self, event, piece, lambda: columns.give_back(image))

    def _put(
        self,
        piece: StagedPiece,
        start: int,
        slot: int,
        modules: Iterable[int],
        column: Mapping[int, TableCell],
        image: RowImage | None,
    ) -> TransferError | None:
        """Bytes, then rows, on the copy stream; with its error if not all could be put there."""
        target = self._memory.arena[start : start + piece.memory.nbytes]
        try:
            with self._memory.stream:
                target.copy_(piece.memory, non_blocking=True)
                if image is not None:
                    self._memory.columns.write(slot, modules, column, image)
        except RuntimeError as error:
            return self._failures.note(error)
        return None

    def _record(self, ticket: EventTicket) -> None:
        """On the copy stream, behind all that the ticket stands for; then a watcher may wait."""
        try:
            ticket.event.record(self._memory.stream)
        except RuntimeError as error:  # nothing runs any more, nor reads the memory
            ticket.finish(ticket.error or self._failures.note(error))
        else:
            self._copies.watch(ticket)

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        """`stream` waits on the device for the ticket's event, which `copy` has recorded.

        `UsageError` on a stream that is being captured: wait before the graph is replayed. A ticket
        that is done needs no wait; one that failed has its own error.
        """
        if not isinstance(ticket, EventTicket) or ticket.owner is not self:
            raise UsageError("a ticket of another device")
        try:
            where = stream_on(self._device, stream)
            if not ticket.done():
                ticket.event.wait(where)
        except RuntimeError as error:
            problem = self._failures.note(error)
            if problem.retryable:  # what is put on the stream from here on would run, and too early
                raise problem from error

    def note_use(self, stream: object | None = None) -> CopyTicket:
        """Record an event on `stream`; the ticket is done when all that is before it has run.

        `UsageError` on a stream that is being captured: note the use after the replay. Nothing runs
        on a device that was lost: there the ticket is done at once.
        """
        self._require_open()
        ticket, where = EventTicket(self, new_event(self._device)), stream_on(self._device, stream)
        try:
            ticket.event.record(where)
        except RuntimeError as error:
            if self._failures.note(error).retryable:  # no event, but what is there runs
                where.synchronize()
            ticket.finish()
        else:
            self._uses.watch(ticket)
        return ticket

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        """Put zeros on the copy stream: kernels, which wait for a place beside the model's."""
        ticket = EventTicket(self, new_event(self._device))
        with self._order:
            self._require_working()
            try:
                self._memory.wipe(extents)
            except RuntimeError as error:
                ticket.error = self._failures.note(error)
            self._record(ticket)
        return ticket

    def clear_column(self, slot: int) -> None:
        """Put an empty column on the copy stream, before whatever is copied from here on.

        Quick but for the lock, which `copy` holds while it puts its own.
        """
        with self._order:
            self._require_open()
            self._lease_table[slot] = ColumnRecord()
            try:
                with self._memory.stream:
                    self._memory.columns.clear(slot)
            except RuntimeError as error:
                self._failures.note(error)  # no row is read any more

    def operands(self, module: int, slot: int) -> Operands | None:
        """Views into the arena, there once a watcher has seen the copy's event.

        What is put on any stream from then on reads the bytes without a wait.
        """
        shape = self._layout.modules[module]
        return self._lease_table[slot].operands(module, shape, self._memory.arena, self._dtype)

    def view(self, extent: Extent) -> torch.Tensor:
        """As the port has it, with `operands`' promise to streams."""
        return self._memory.arena[extent.offset : extent.offset + extent.nbytes]

    def close(self) -> None:
        """Wait for all that was put on the copy stream and all uses noted; let the memory go.

        Not in a callback of a ticket.
        """
        with self._closing:
            with self._order:  # nothing is put on the stream from here on
                was_working, self._working = self._working, False
            if not was_working:
                return
            self._copies.end()
            self._uses.end()
            try:
                self._memory.stream.synchronize()  # clearings have no ticket
            except RuntimeError as error:
                self._failures.note(error)
            self._lease_table = [ColumnRecord() for _ in range(self._slots)]
            self.address = self.rank = self.scale = NOTHING
            self._memory.let_go()

    def _require_open(self) -> None:
        if not self._working:
            raise UsageError(f"{self.name} is not open")

    def _require_working(self) -> None:
        self._require_open()
        self._failures.heed()
