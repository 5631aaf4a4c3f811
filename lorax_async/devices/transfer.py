"""Copy one layer group to its extent: read, cast, check for NaN, send."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from threading import Lock, current_thread
from time import perf_counter
from typing import NamedTuple

import torch

from lorax_async.devices.base import CopyTicket, Device, FilePieces, StagedPiece
from lorax_async.devices.staging import TORCH_DTYPES, StagingBuffer, StagingRing, read, zero
from lorax_async.errors import AdapterFormatError, InternalError
from lorax_async.files import Reader
from lorax_async.lifecycle.arena import Extent
from lorax_async.planning.transfer_plan import (
    GroupPlan,
    ReadMove,
    StagingWindow,
    VectorPlace,
    windows,
)
from lorax_async.tracing import IMAGE, NO_SPAN, STREAM, Row, Span, Tracer


def _written_ranges(
    window: StagingWindow, kind: torch.dtype, vectors: Sequence[VectorPlace]
) -> Iterator[tuple[int, int, torch.dtype]]:
    """Yield [first, last) of the window and its dtype, which for vectors is the file's."""
    whole = sorted((v.offset - window.start, v.nbytes, TORCH_DTYPES[v.dtype]) for v in vectors)
    for move in window.converts:
        yield move.target, move.target + move.rows * move.row_pitch * kind.itemsize, kind
    for part in window.reads:
        first, last = part.target, part.target + part.nbytes
        for start, nbytes, own in whole:
            if start < last and first < start + nbytes:
                if first < start:
                    yield first, start, kind
                yield max(first, start), min(last, start + nbytes), own
                first = start + nbytes
        if first < last:
            yield first, last, kind


def _module_at(place: int, group: GroupPlan) -> int:
    """Return the module of the last tensor that begins at or before `place` in the extent."""
    starts = [(start, row.module) for row in group.rows for start in (row.a, row.b)]
    starts += [(vector.offset, vector.module) for vector in group.vectors]
    return max(start for start in starts if start[0] <= place)[1]


class GroupCopy(NamedTuple):
    """The copy of one layer group: its bytes, file, extent and slot.

    `image` is for devices that do not read files: uint8 `[group.nbytes]` of `staging_memory` that
    keeps the group in the device's format. The copy fills it; if `warm`, it is filled already and
    the file is not read. It must not be written to or freed before the copy is `done`.
    """

    reader: Reader
    group: GroupPlan
    dtype: str
    extent: Extent
    slot: int
    image: torch.Tensor | None = None
    warm: bool = False


class CopyResult(NamedTuple):
    """A submitted copy of a layer group.

    `ticket` is the device's ticket of the part that writes the rows. `done` completes when all
    parts have, with the error of the first that failed. `staging_seconds` is the time for casts
    and padding.
    """

    ticket: CopyTicket
    done: CopyTicket
    staging_seconds: float


class GroupTransfer:
    """Copy layer groups to a device: cast and pad through the ring, check, send.

    `module_names` are the layout's, for errors; `check_finite` refuses NaN and infinity. The ring
    is in the device's `staging_memory`, with at least two buffers unless the device reads files.
    """

    def __init__(
        self,
        device: Device,
        staging: StagingRing,
        module_names: Sequence[str],
        *,
        check_finite: bool,
        tracer: Tracer | None = None,
    ) -> None:
        if staging.buffers < 2 and not device.reads_files:
            raise InternalError("a device that does not read files needs two staging buffers")
        self._device = device
        self._staging = staging
        self._module_names = module_names
        self._check_finite = check_finite
        self._tracer = tracer or Tracer()

    def run_all(self, copies: Sequence[GroupCopy]) -> list[CopyResult]:
        """Copy groups of one adapter in order, each as `run` does.

        A device that reads files reads those of several groups with one call, if they adjoin in the
        file: after each call, the code of the next is no longer in the processor's cache.
        """
        results: list[CopyResult] = []
        try:
            if not self._device.reads_files:
                results += map(self.run, copies)
                return results
            if len(copies) == 1:
                results.append(self._run_from_file(copies[0]))
                return results
            with self._span(copies[0], "copies", None, f"{len(copies)} layers") as span:
                self._read_at_once(copies)
                for copy in copies:
                    results.append(self._run_from_file(copy, is_read=True))
                layers = [copy.group.layer for copy in copies]
                span.set(layers=layers, bytes=sum(copy.group.nbytes for copy in copies))
        except BaseException:
            wait([result.done for result in results])
            raise
        return results

    def _read_at_once(self, copies: Sequence[GroupCopy]) -> None:
        """Read what is not cast or padded into the arena."""
        moves = [
            ReadMove(part.file_offset, part.nbytes, part.target + base, part.rows, part.pitch)
            for copy, base in ((copy, copy.extent.offset) for copy in copies)
            for part in copy.group.reads
        ]
        if moves:
            self._device.read(copies[0].reader, moves)

    def run(self, copy: GroupCopy) -> CopyResult:
        """Copy one group. Return when all its parts have been submitted.

        Blocks while reading and while no buffer is free. Raises the errors of the reader, the
        device and the check, after the parts in flight have ended.
        """
        group, image = copy.group, copy.image
        if self._device.reads_files:
            return self._run_from_file(copy)
        pending = _PendingCopy(self._device, copy, partial(self._span, copy, "copies", STREAM))
        try:
            if image is None:
                self._send_windows(pending)
            else:
                if not copy.warm:
                    scratch = self._staging.take(1) if group.converts else []
                    whole = StagingWindow.whole(group)
                    self._fill(pending, whole, StagingBuffer.of(image), scratch)
                pending.send(image, 0)
        except BaseException:
            wait(pending.tickets)
            raise
        tickets = pending.tickets
        return CopyResult(tickets[-1], join_tickets(tickets), pending.staging_seconds)

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        """Zero extents that no work reads any more. Blocks as `run` does."""
        return self._device.wipe(extents)

    def _span(self, copy: GroupCopy, row: Row, lane: Hashable, name: str = "") -> Span:
        """Begin a span of a group's copy, named after its layer by default.

        Without a `lane`, it is the thread's.
        """
        if self._tracer.on is None:
            return NO_SPAN
        if lane is None:
            lane = current_thread().name.removeprefix("lorax-")
        layer = copy.group.layer
        return self._tracer.span(row, lane, name or f"layer {layer}", slot=copy.slot, layer=layer)

    def _run_from_file(self, copy: GroupCopy, *, is_read: bool = False) -> CopyResult:
        """Write converted bytes first, so that the device writes the rows last.

        With `is_read`, the other bytes are in the arena already, and a span of several groups runs.
        """
        group, started = copy.group, perf_counter()
        if group.converts or group.zeros:
            target = self._device.host_view(copy.extent)
            if group.converts:
                with (
                    self._staging.buffer() as scratch,
                    self._span(copy, "staging", scratch.number, "cast"),
                ):
                    scratch.convert(copy.reader, group.converts, copy.dtype, target)
            zero(group.zeros, target)
        seconds = perf_counter() - started
        pieces = FilePieces(copy.reader, () if is_read else group.reads)
        span = NO_SPAN if is_read else self._span(copy, "copies", None)
        try:
            ticket = self._device.copy(pieces, group.rows, copy.extent, copy.slot)
        except BaseException as error:
            span.end(outcome=type(error).__name__)
            raise
        span.end_with(ticket, bytes=group.nbytes)
        if self._check_finite:
            ticket.result()
            content = self._device.host_view(copy.extent)
            self._require_finite(content, StagingWindow.whole(group), copy)
        return CopyResult(ticket, ticket, seconds)

    def _send_windows(self, pending: _PendingCopy) -> None:
        """Send the group through the ring. A buffer is free again when its copy is done."""
        copy, staging = pending.copy, self._staging
        item_bytes = TORCH_DTYPES[copy.dtype].itemsize
        for window in windows(copy.group, staging.move_bytes, item_bytes):
            pending.raise_failures()
            buffer, *scratch = staging.take(2 if window.converts else 1)
            release = partial(self._release, buffer, self._span(copy, "staging", buffer.number))
            try:
                self._fill(pending, window, buffer, scratch)
                ticket = pending.send(buffer.tensor[: window.nbytes], window.start)
            except BaseException:
                release()
                raise
            ticket.add_done_callback(release)

    def _release(self, buffer: StagingBuffer, span: Span, _: object = None) -> None:
        span.end()
        self._staging.release(buffer)

    def _fill(
        self,
        pending: _PendingCopy,
        window: StagingWindow,
        buffer: StagingBuffer,
        scratch: list[StagingBuffer],
    ) -> None:
        """Read a window into `buffer`; release `scratch`, one buffer if the window has casts."""
        copy = pending.copy
        lane = IMAGE if buffer.number is None else buffer.number
        try:
            with self._span(copy, "staging", lane, "fill"):
                read(copy.reader, window.reads, buffer.memory)
                started = perf_counter()
                for spare in scratch:
                    spare.convert(copy.reader, window.converts, copy.dtype, buffer.tensor)
                zero(window.zeros, buffer.tensor)
                pending.staging_seconds += perf_counter() - started
        finally:
            for spare in scratch:
                self._staging.release(spare)
        if self._check_finite:
            self._require_finite(buffer.tensor, window, copy)

    def _require_finite(
        self, content: torch.Tensor, window: StagingWindow, copy: GroupCopy
    ) -> None:
        """Raise `AdapterFormatError` if a window has NaN or infinite values.

        `content`, uint8, begins with the window's bytes. Gaps that no move writes are not checked.
        """
        group = copy.group
        for first, last, kind in _written_ranges(window, TORCH_DTYPES[copy.dtype], group.vectors):
            good = content[first:last].view(kind).isfinite()
            if not good.all():
                place = window.start + first + int(good.logical_not().nonzero()[0]) * kind.itemsize
                raise AdapterFormatError(
                    f"module {self._module_names[_module_at(place, group)]!r} has NaN or infinite"
                    " weights; load it with check_finite=False if that is intended"
                )


class _PendingCopy:
    """The parts of one group that have been submitted to the device."""

    def __init__(self, device: Device, copy: GroupCopy, span: Callable[[], Span]) -> None:
        self.copy = copy
        self.tickets: list[CopyTicket] = []
        self.staging_seconds = 0.0
        self._device = device
        self._span = span

    def send(self, memory: torch.Tensor, target: int) -> CopyTicket:
        """Submit a part. The one that reaches the end of the extent writes the rows."""
        copy = self.copy
        rows = copy.group.rows if target + memory.nbytes == copy.group.nbytes else ()
        ticket = self._device.copy(StagedPiece(memory, target), rows, copy.extent, copy.slot)
        self.tickets.append(ticket)
        self._span().end_with(ticket, bytes=memory.nbytes)
        return ticket

    def raise_failures(self) -> None:
        """Forget the parts that are done; raise the error of one that failed."""
        for ticket in [ticket for ticket in self.tickets if ticket.done()]:
            ticket.result()
            self.tickets.remove(ticket)


def join_tickets(tickets: Sequence[CopyTicket]) -> CopyTicket:
    """Return a ticket that is done when all are, with the error of the first that failed."""
    tickets = list(dict.fromkeys(tickets))  # a device may have one for all that are done
    if len(tickets) == 1:
        return tickets[0]
    done: CopyTicket = Future()
    left, lock = len(tickets), Lock()
    failure: BaseException | None = None

    def count(ticket: CopyTicket) -> None:
        nonlocal left, failure
        with lock:
            left -= 1
            failure = failure or ticket.exception()
            if left:
                return
        if failure is None:
            done.set_result(None)
        else:
            done.set_exception(failure)

    for ticket in tickets:
        ticket.add_done_callback(count)
    return done
