"""A GPU as a device: pinned staging, one copy stream, events, the pointer table.

The code uses torch's generic streams and events, and runs on any accelerator that has them. It
relies on this order:

1. There is one copy stream. Work is submitted under one lock and runs in that order: a copy's
   bytes, its rows, its event; the clearing of a column, then the next record's bytes and rows.
2. A ticket's event is recorded before the ticket is returned, because waiting on an event that was
   never recorded does not wait.
3. The device reads pinned memory when the copy runs. Staged bytes and row images are kept, and not
   written to, until the ticket is done, which is after its event.
4. No other stream is ordered with the copy stream by itself. Compute that reads a slot waits for
   its tickets on the device (`wait_for`), or is launched once they are done. The copy stream never
   waits: a column is cleared, and its extents reused, only after the tickets of all its uses
   (`note_use`) are done.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch

from lorax_async.devices.base import CopyTicket, StagedPiece
from lorax_async.devices.cpu import Operands, matrix_view
from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer
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
from lorax_async.files import Reader
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.layout import ModelLayout, Module
from lorax_async.planning.transfer_plan import ReadMove, TableRow

ALIGNMENT = 64
_ALLOCATION_ERRORS = (RuntimeError, MemoryError, TypeError)  # torch raises TypeError beyond 63 bits
EMPTY = torch.empty(0, dtype=torch.uint8)
_RELEASED: Any = None
"""Stands for memory and stream before `open` and after `close`."""


def allocate_pinned(nbytes: int) -> torch.Tensor:
    """Allocate host memory that the device reads by DMA, uint8 `[nbytes]`."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


class CudaDevice:
    """A device on a GPU, filled by one copy stream from pinned memory.

    `device` is "cuda:N", or "cuda": the current device of the thread that constructs this. The
    other parameters are as for `CpuDevice`; `open` allocates the arena as one block.

    While a graph is captured in mode "global", CUDA forbids waiting for events in any thread, and
    an attempt invalidates the capture. Capture with ``capture_error_mode="thread_local"``, or while
    no copies and uses are in flight. Copies are not harmed, but reported later.
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
        self._arena = EMPTY
        self._columns: TableColumns = _RELEASED
        self._stream: torch.Stream = _RELEASED
        self._records = [ColumnRecord() for _ in range(slots)]
        self._was_opened = self._is_open = False
        self._failures = DeviceFailures(self.name)
        # Held while work is submitted to the copy stream, to order it. A `torch.Stream` also stores
        # the stream it was entered from, which allows one thread at a time.
        self._order = threading.Lock()
        self._closing = threading.Lock()

    def open(self) -> None:
        """Allocate as `Device.open`. Callable once, so that the tables' addresses stay valid.

        Memory is allocated, and the tables zeroed, on this thread's current stream, which may still
        have work of the memory's last owner. The copy stream starts behind that, and both are
        synchronized on return: the tables are empty for every stream. Raises `ConfigError` also if
        the device cannot be used.
        """
        if self._was_opened:
            raise UsageError("the device was opened before; make a new one")
        require_device(self._device)
        self._copies = EventWatcher("lorax-watch-copies", self._failures.record)
        self._uses = EventWatcher("lorax-watch-uses", self._failures.record_use)
        try:
            self._stream = new_stream(self._device)
            self._allocate()
            self._start_behind_current()
            start_watchers(self._copies, self._uses)
        except RuntimeError as error:
            self._release()
            raise ConfigError(f"{self._device} cannot be used ({first_line(error)})") from error
        except BaseException:
            self._release()
            raise
        tables = self._columns
        self.address, self.rank, self.scale = tables.address, tables.rank, tables.scale
        self._was_opened = self._is_open = True

    def _allocate(self) -> None:
        layers = [module.layer for module in self._layout.modules]
        try:
            self._arena = torch.empty(self._nbytes, dtype=torch.uint8, device=self._device)
            base = self._arena.data_ptr()
            self._columns = TableColumns(layers, self._slots, self._device, base, allocate_pinned)
        except _ALLOCATION_ERRORS as error:
            traceback.clear_frames(error.__traceback__)  # frames keep the allocations alive
            raise CapacityError(
                f"no memory on {self._device} for an arena of {self._nbytes:,} bytes and"
                f" {self._slots:,} slots ({first_line(error)}); lower device_bytes or max_slots"
            ) from error
        if base % ALIGNMENT:
            raise InternalError(
                f"{self._device} returned memory that is not aligned to {ALIGNMENT}"
            )

    def _start_behind_current(self) -> None:
        before = new_event(self._device)
        before.record(stream_on(self._device, None))
        before.wait(self._stream)
        self._stream.synchronize()

    def _release(self) -> None:
        """Release the memory.

        The allocator may reuse it at once, in the order of the stream on which it was allocated.
        The copy stream must be idle, and no other stream may read the memory.
        """
        self._arena, self._columns, self._stream = EMPTY, _RELEASED, _RELEASED

    def staging_memory(self, nbytes: int) -> torch.Tensor:
        """Allocate pinned memory, before or after `open`.

        torch's allocator rounds up to a power of two, and keeps freed memory for later pinned
        tensors. Raises `ConfigError` without the device.
        """
        require_device(self._device)
        try:
            return allocate_pinned(nbytes)
        except _ALLOCATION_ERRORS as error:
            raise CapacityError(
                f"no {nbytes:,} bytes of pinned host memory ({first_line(error)});"
                " lower staging_bytes or pinned_bytes"
            ) from error

    def host_view(self, extent: Extent) -> torch.Tensor:  # noqa: ARG002 - there is none
        raise UsageError(f"the arena of {self.name} is not host memory; copy staged bytes to it")

    def read(self, reader: Reader, moves: Sequence[ReadMove]) -> None:  # noqa: ARG002
        raise UsageError(f"{self.name} cannot read files; copy staged bytes to it")

    def copy(
        self, piece: StagedPiece | None, rows: Sequence[TableRow], extent: Extent, slot: int
    ) -> CopyTicket:
        """Submit to the copy stream: one memcpy of bytes, two per layer of rows, an event.

        The work is DMA from pinned memory and allocates nothing. Blocks only while all row images
        are in use or the driver's queue is full. A watcher completes the ticket after the event.
        Errors after the first submission are set on the ticket, also after the event, because the
        memory is in use until then.
        """
        if piece is None:
            raise UsageError(f"{self.name} cannot read files; copy staged bytes to it")
        columns = self._columns  # before the check: `close` may release them meanwhile
        self._require_working()
        self._check(piece, extent)
        cells = {
            module: TableCell(extent.offset + a, extent.offset + b, rank, scale)
            for module, a, b, _, rank, scale in rows
        }
        image = columns.image_for(cells) if cells else None
        ticket = self._ticket(piece, image, columns)
        with self._order:
            try:
                self._require_working()
                record = self._records[slot]
            except BaseException:
                ticket.finish()  # nothing was submitted; release the image
                raise
            start, column = extent.offset + piece.target, record.cells | cells
            ticket.error = self._put(piece, start, slot, cells, column, image)
            if ticket.error is None:
                record.add(cells, ticket)
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
            raise self._failures.record(error) from error
        if not pinned:  # the driver would copy it synchronously, under the lock
            raise InternalError("staged bytes are not in pinned memory; use staging_memory")

    def _ticket(
        self, piece: StagedPiece, image: RowImage | None, columns: TableColumns
    ) -> EventTicket:
        release = None if image is None else partial(columns.release, image)
        return EventTicket(self, new_event(self._device), piece, release)

    def _put(
        self,
        piece: StagedPiece,
        start: int,
        slot: int,
        modules: Iterable[int],
        column: Mapping[int, TableCell],
        image: RowImage | None,
    ) -> TransferError | None:
        """Submit bytes, then rows, to the copy stream. Return the error, if any."""
        target = self._arena[start : start + piece.memory.nbytes]
        try:
            with self._stream:
                target.copy_(piece.memory, non_blocking=True)
                if image is not None:
                    self._columns.write(slot, modules, column, image)
        except RuntimeError as error:
            return self._failures.record(error)
        return None

    def _record(self, ticket: EventTicket) -> None:
        """Record the event behind the ticket's work, then let a watcher wait for it."""
        try:
            ticket.event.record(self._stream)
        except RuntimeError as error:  # nothing runs or reads the memory any more
            ticket.finish(ticket.error or self._failures.record(error))
        else:
            self._copies.watch(ticket)

    def wait_for(self, ticket: CopyTicket, stream: object | None = None) -> None:
        """Let `stream` wait on the device for the ticket's event.

        Raises `UsageError` on a stream that is being captured: wait before the replay. A ticket
        that is done needs no wait; a failed one carries its error.
        """
        if not isinstance(ticket, EventTicket) or ticket.owner is not self:
            raise UsageError("the ticket belongs to another device")
        try:
            where = stream_on(self._device, stream)
            if not ticket.done():
                ticket.event.wait(where)
        except RuntimeError as error:
            problem = self._failures.record(error)
            if problem.retryable:  # later work on the stream would run too early
                raise problem from error

    def note_use(self, stream: object | None = None) -> CopyTicket:
        """Record an event on `stream`; the ticket is done when earlier work has run.

        Raises `UsageError` on a stream that is being captured: note the use after the replay. On a
        lost device nothing runs, and the ticket is done at once.
        """
        self._require_open()
        ticket, where = EventTicket(self, new_event(self._device)), stream_on(self._device, stream)
        try:
            ticket.event.record(where)
        except RuntimeError as error:
            if self._failures.record(error).retryable:  # no event, but earlier work runs
                where.synchronize()
            ticket.finish()
        else:
            self._uses.watch(ticket)
        return ticket

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        """Zero the extents by kernels on the copy stream, which compete with the model's."""
        ticket = EventTicket(self, new_event(self._device))
        with self._order:
            self._require_working()
            try:
                with self._stream:
                    for extent in extents:
                        self.view(extent).zero_()
            except RuntimeError as error:
                ticket.error = self._failures.record(error)
            self._record(ticket)
        return ticket

    def clear_column(self, slot: int) -> None:
        """Submit an empty column to the copy stream, before any later copy.

        Blocks only for the lock, which `copy` holds while submitting.
        """
        with self._order:
            self._require_open()
            self._records[slot] = ColumnRecord()
            try:
                with self._stream:
                    self._columns.clear(slot)
            except RuntimeError as error:
                self._failures.record(error)  # nothing reads the rows any more

    def operands(self, module: int, slot: int) -> Operands | None:
        """Return views into the arena once a watcher has seen the copy's event, else None.

        Work submitted to any stream from then on can read the bytes without a wait.
        """
        shape = self._layout.modules[module]
        return self._records[slot].operands(module, shape, self._arena, self._dtype)

    def view(self, extent: Extent) -> torch.Tensor:
        """Return the bytes of an extent, which streams can read as those of `operands`."""
        return self._arena[extent.offset : extent.offset + extent.nbytes]

    def close(self) -> None:
        """Wait for the copy stream and all noted uses, then release the memory.

        Not to be called in a callback of a ticket.
        """
        with self._closing:
            with self._order:  # nothing is submitted from now on
                was_working, self._is_open = self._is_open, False
            if not was_working:
                return
            self._copies.end()
            self._uses.end()
            try:
                self._stream.synchronize()  # clearings have no ticket
            except RuntimeError as error:
                self._failures.record(error)
            self._records = [ColumnRecord() for _ in range(self._slots)]
            self.address = self.rank = self.scale = EMPTY
            self._release()

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError(f"{self.name} is not open")

    def _require_working(self) -> None:
        self._require_open()
        self._failures.require_working()


# -- the pointer table -----------------------------------------------------------------------------


class TableCell(NamedTuple):
    """A module's row: the arena offsets `a` and `b` of A and B, the padded rank, the scale."""

    a: int
    b: int
    rank: int
    scale: float


class ColumnRecord:
    """The rows submitted to one column since it was last cleared."""

    def __init__(self) -> None:
        self.cells: dict[int, TableCell] = {}
        self._tickets: dict[int, EventTicket] = {}
        self._views: dict[int, Operands] = {}

    def add(self, cells: dict[int, TableCell], ticket: EventTicket) -> None:
        self.cells.update(cells)
        self._tickets.update(dict.fromkeys(cells, ticket))

    def operands(
        self, module: int, shape: Module, arena: torch.Tensor, dtype: torch.dtype
    ) -> Operands | None:
        """Return views into the arena, created once; None before the copy's ticket is done."""
        operands = self._views.get(module)
        if operands is None:
            ticket = self._tickets.get(module)
            if ticket is None or not ticket.succeeded:
                return None
            a, b, rank, scale = self.cells[module]
            operands = self._views[module] = (
                matrix_view(arena, a, dtype, (rank, shape.in_features)),
                matrix_view(arena, b, dtype, (shape.out_features, rank)),
                scale,
            )
        return operands


IMAGES = 64
"""The number of copies with rows that can be in flight; one more waits."""

_EMPTY = TableCell(0, 0, 0, 0.0)


def row_ranges(modules: Iterable[int], layers: Sequence[int]) -> list[range]:
    """Return, for each layer of `modules`, the range from its first to its last module."""
    groups = groupby(sorted(modules), key=layers.__getitem__)
    spans = [list(members) for _, members in groups]
    return [range(span[0], span[-1] + 1) for span in spans]


class RowImage:
    """Pinned rows in the layout of a column: int64 `[rows, 3]` (A, B, scale), int32 ranks `[rows]`.

    The host writes through the memoryviews, which takes nanoseconds per element; the tensors keep
    the memory alive.
    """

    def __init__(self, entries: torch.Tensor, ranks: torch.Tensor) -> None:
        self.entries = entries
        self.ranks = ranks
        words = StagingBuffer.of(entries.view(torch.uint8)).memory
        self.words, self.scales = words.cast("q"), words.cast("f")
        self.rank_words = StagingBuffer.of(ranks.view(torch.uint8)).memory.cast("i")


class TableColumns:
    """The pointer tables, as transposed views of `[slots, modules, …]`, and the row images.

    Call `write` and `clear` with the copy stream current, one call at a time. They only enqueue
    memcpys from pinned memory, in the order of the calls.

    `layers` are those of the modules, and `base` is the address of the arena. The tables are zeroed
    on the device's current stream. `pinned` allocates host memory, here and for copies of more rows
    than a layer has.
    """

    def __init__(
        self,
        layers: Sequence[int],
        slots: int,
        device: torch.device,
        base: int,
        pinned: Callable[[int], torch.Tensor],
    ) -> None:
        modules = len(layers)
        self._layers = layers
        self._base = base
        self._pinned = pinned
        self._entries = torch.zeros(slots, modules, 3, dtype=torch.int64, device=device)
        self._ranks = torch.zeros(slots, modules, dtype=torch.int32, device=device)
        self.address = self._entries[:, :, :2].permute(2, 1, 0)
        self.scale = self._entries.view(torch.float32)[:, :, 4].permute(1, 0)
        self.rank = self._ranks.permute(1, 0)
        self._zeros = self._images(1, modules)[0]
        self._zeros.entries.zero_()
        self._zeros.ranks.zero_()
        self._capacity = max(len(list(members)) for _, members in groupby(layers))
        self._free: SimpleQueue[RowImage] = SimpleQueue()
        for image in self._images(IMAGES, self._capacity):
            self._free.put(image)

    def _images(self, count: int, rows: int) -> list[RowImage]:
        """Create images in two allocations, as pinned ones are rounded up to a power of two."""
        entries = self._pinned(count * rows * 24).view(torch.int64).view(count, rows, 3)
        ranks = self._pinned(count * rows * 4).view(torch.int32).view(count, rows)
        return [RowImage(entries[n], ranks[n]) for n in range(count)]

    def image_for(self, modules: Iterable[int]) -> RowImage:
        """Take an image for the row ranges of these modules. Blocks until one is free."""
        rows = sum(map(len, row_ranges(modules, self._layers)))
        # Copies of a transfer plan have the rows of one layer; others may have more.
        return self._free.get() if rows <= self._capacity else self._images(1, rows)[0]

    def release(self, image: RowImage) -> None:
        """Return an image that no copy reads any more. Thread-safe."""
        if len(image.ranks) == self._capacity:
            self._free.put(image)

    def write(
        self, slot: int, modules: Iterable[int], column: Mapping[int, TableCell], image: RowImage
    ) -> None:
        """Enqueue the rows of `modules` with the content of `column`, and rewrite those between.

        The image holds the rows until the copies are done. Ranks are written last, so that a row
        with a rank is complete.
        """
        spans = row_ranges(modules, self._layers)
        for place, module in enumerate(module for span in spans for module in span):
            a, b, rank, scale = column.get(module, _EMPTY)
            image.words[3 * place] = self._base + a if rank else 0
            image.words[3 * place + 1] = self._base + b if rank else 0
            image.scales[6 * place + 4] = scale
            image.rank_words[place] = rank
        place = 0
        for span in spans:
            rows, copied = slice(span.start, span.stop), slice(place, place + len(span))
            self._entries[slot, rows].copy_(image.entries[copied], non_blocking=True)
            self._ranks[slot, rows].copy_(image.ranks[copied], non_blocking=True)
            place += len(span)

    def clear(self, slot: int) -> None:
        """Enqueue an empty column, the ranks first."""
        self._ranks[slot].copy_(self._zeros.ranks, non_blocking=True)
        self._entries[slot].copy_(self._zeros.entries, non_blocking=True)
