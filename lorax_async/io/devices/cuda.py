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
from collections.abc import Iterable, Mapping, Sequence

import torch

from lorax_async.core.arena import Extent
from lorax_async.core.layout import ModelLayout
from lorax_async.core.moves import Row
from lorax_async.errors import CapacityError, InternalError, TransferError, UsageError
from lorax_async.io.devices import device_memory
from lorax_async.io.devices.columns import RowImage
from lorax_async.io.devices.cpu import Operands
from lorax_async.io.devices.device_memory import DeviceMemory
from lorax_async.io.devices.failures import Failures
from lorax_async.io.devices.streams import new_event, resolve_device, stream_on
from lorax_async.io.devices.tenants import Cell, Tenant
from lorax_async.io.devices.watcher import EventTicket, Watcher, start_watchers
from lorax_async.io.ports import CopyTicket, FilePieces, StagedPiece
from lorax_async.io.staging import TORCH_DTYPES


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

    alignment = device_memory.ALIGNMENT
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
        self._tenants = [Tenant() for _ in range(slots)]
        self._opened = self._working = False
        self._failures = Failures(self.name)
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
        self._copies = Watcher("lorax-watch-copies", self._failures.note)
        self._uses = Watcher("lorax-watch-uses", self._failures.note_use)
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
        return device_memory.staging(self._device, nbytes)

    def host_view(self, extent: Extent) -> torch.Tensor:  # noqa: ARG002 - there is none
        raise UsageError(f"the arena of {self.name} is not host memory; copy staged bytes to it")

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
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
            module: Cell(extent.offset + a, extent.offset + b, rank, scale)
            for module, a, b, _, rank, scale in rows
        }
        image = self._memory.columns.image_for(cells) if cells else None
        ticket = self._ticket(pieces, image)
        with self._order:
            try:
                self._require_working()
                tenant = self._tenants[slot]
            except BaseException:
                ticket.finish()  # nobody has seen it, nothing was put; the image goes back
                raise
            start, column = extent.offset + pieces.target, tenant.cells | cells
            ticket.error = self._put(pieces, start, slot, cells, column, image)
            if ticket.error is None:
                tenant.add(cells, ticket)
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
        column: Mapping[int, Cell],
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
            self._tenants[slot] = Tenant()
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
        return self._tenants[slot].operands(module, shape, self._memory.arena, self._dtype)

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
            self._tenants = [Tenant() for _ in range(self._slots)]
            self.address = self.rank = self.scale = device_memory.NOTHING
            self._memory.let_go()

    def _require_open(self) -> None:
        if not self._working:
            raise UsageError(f"{self.name} is not open")

    def _require_working(self) -> None:
        self._require_open()
        self._failures.heed()
