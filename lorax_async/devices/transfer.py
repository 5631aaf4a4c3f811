"""Copy layer groups to their extents, in I/O threads: read, cast, check for NaN, send."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from math import inf
from queue import SimpleQueue
from threading import Lock, Thread, current_thread
from time import perf_counter
from typing import NamedTuple

import torch

from lorax_async.concurrency import Inbox
from lorax_async.devices.base import CopyTicket, Device, StagedPiece
from lorax_async.devices.base_copies import BaseCopies
from lorax_async.devices.staging import (
    TORCH_DTYPES,
    StagingBuffer,
    StagingRing,
    is_finite,
    read,
    zero,
)
from lorax_async.errors import AdapterFormatError, CapacityError, LoraxError, as_lorax_error
from lorax_async.files import Reader
from lorax_async.lifecycle.adapter_state import SlotGrant
from lorax_async.lifecycle.arena import Extent
from lorax_async.lifecycle.commands import CopyGroups, WipeExtents
from lorax_async.lifecycle.rules import COPIES_AHEAD
from lorax_async.planning.transfer_plan import (
    ExtraSlot,
    GroupPlan,
    ReadMove,
    StagingWindow,
    TransferPlan,
    windows,
)
from lorax_async.telemetry import IMAGE, NO_SPAN, STREAM, Row, Span, Tracer
from lorax_async.types import AdapterKey

_logger = logging.getLogger("lorax_async")


def _written_ranges(
    part: GroupPlan | StagingWindow, kind: torch.dtype, extras: Sequence[ExtraSlot], start: int
) -> list[tuple[int, int, torch.dtype]]:
    """Return [first, last) of what is written, and its dtype, which for some extras is the file's.

    `part` begins at `start` of the extent.
    """
    if not (extras or part.converts):
        return [(move.target, move.target + move.nbytes, kind) for move in part.reads]
    written = [
        (move.target, move.target + move.rows * move.row_pitch * kind.itemsize, kind)
        for move in part.converts
    ]
    own = sorted((v.offset - start, v.nbytes, TORCH_DTYPES[v.dtype]) for v in extras)
    for copied in part.reads:
        first, last = copied.target, copied.target + copied.nbytes
        for begin, nbytes, dtype in own:
            if begin < last and first < begin + nbytes:
                if first < begin:
                    written.append((first, begin, kind))
                written.append((max(first, begin), min(last, begin + nbytes), dtype))
                first = begin + nbytes
        if first < last:
            written.append((first, last, kind))
    return written


def _module_at(offset: int, group: GroupPlan) -> int:
    """Return the module of the last tensor that begins at or before `offset` in the extent."""
    starts = [(start, row.module) for row in group.rows for start in (row.a, row.b)]
    starts += [(extra.offset, extra.module) for extra in group.extras]
    return max(start for start in starts if start[0] <= offset)[1]


class GroupCopy(NamedTuple):
    """The copy of one layer group: its bytes, file, extent and slot.

    `image` is for devices that do not read files: uint8 `[group.nbytes]` of `staging_memory` that
    keeps the group in the device's format. The copy fills it; if `warm`, it is filled already and
    the file is not read. It must not be written to or freed before the copy is `done`. Weights that
    were checked before (`was_checked`) are not looked at again.
    """

    reader: Reader
    group: GroupPlan
    dtype: str
    extent: Extent
    slot: int
    image: torch.Tensor | None = None
    warm: bool = False
    was_checked: bool = False


@dataclass(slots=True, eq=False)
class SubmittedCopies:
    """The parts of layer groups that have been submitted to the device.

    `tickets` are those of each group's last part, which writes its rows. `staging_seconds` is the
    time for casts and padding.
    """

    parts: list[CopyTicket] = field(default_factory=list)
    tickets: list[CopyTicket] = field(default_factory=list)
    staging_seconds: float = 0.0

    def raise_failures(self) -> None:
        """Forget the parts that are done; raise the error of one that failed."""
        for ticket in [ticket for ticket in self.parts if ticket.done()]:
            ticket.result()
            self.parts.remove(ticket)

    def joined(self) -> CopyTicket:
        """Return a ticket that is done when all parts are, with the first failure's error."""
        parts = set(self.parts)  # a device may have one ticket for all that are done
        if len(parts) == 1:
            return parts.pop()
        done: CopyTicket = Future()
        left, lock = len(parts), Lock()
        failure: BaseException | None = None

        def end(ticket: CopyTicket) -> None:
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

        for ticket in parts:
            ticket.add_done_callback(end)
        return done


@dataclass(slots=True, eq=False)
class GroupTransfer:
    """Copy layer groups to a device: cast and pad through the ring, check, send.

    `module_names` are the layout's, for errors; `check_finite` refuses NaN and infinity; `base` is
    what copies of its weights are compared with. The ring is in the device's `staging_memory`, with
    at least two buffers unless the device reads files.
    """

    device: Device
    staging: StagingRing
    module_names: Sequence[str]
    check_finite: bool
    tracer: Tracer = field(default_factory=Tracer)
    base: BaseCopies | None = None

    def run(self, copies: Sequence[GroupCopy]) -> SubmittedCopies:
        """Copy groups of one adapter in order. Return when all their parts have been submitted.

        Blocks while reading and while no buffer is free. Raises the errors of the reader, the
        device and the check, after the parts in flight have ended.
        """
        pending = SubmittedCopies()
        try:
            if self.device.reads_files:
                self._run_from_file(copies, pending)
            else:
                for copy in copies:
                    self._send_group(copy, pending)
        except BaseException:
            wait(pending.parts)
            raise
        return pending

    def _span(self, copy: GroupCopy, row: Row, lane: Hashable, name: str = "") -> Span:
        """Begin a span of a group's copy, named after its layer by default.

        Without a `lane`, it is the thread's.
        """
        if self.tracer.on is None:
            return NO_SPAN
        if lane is None:
            lane = current_thread().name.removeprefix("lorax-")
        layer = copy.group.layer
        return self.tracer.span(row, lane, name or f"layer {layer}", slot=copy.slot, layer=layer)

    def _run_from_file(self, copies: Sequence[GroupCopy], pending: SubmittedCopies) -> None:
        """Read with one call what is not cast or padded and adjoins in the file.

        After each call, the code of the next is no longer in the processor's cache. Rows are
        written last.
        """
        name = f"{len(copies)} layers" if len(copies) > 1 else ""
        with self._span(copies[0], "copies", None, name) as span:
            # As `ReadMove._make` does, without a call of Python code for each group.
            moves = [
                tuple.__new__(ReadMove, (start, nbytes, copy.extent.offset + target, rows, pitch))
                for copy in copies
                for start, nbytes, target, rows, pitch in copy.group.reads
            ]
            if moves:
                self.device.read(copies[0].reader, moves)
            for copy in copies:
                self._finish_in_place(copy, pending)
            if span.recording:
                layers = [copy.group.layer for copy in copies]
                nbytes = sum(copy.group.nbytes for copy in copies)
                span.set(layers=layers, bytes=nbytes, outcome="done")

    def _finish_in_place(self, copy: GroupCopy, pending: SubmittedCopies) -> None:
        """Cast, pad and check in the arena, which has the group's other bytes; write the rows."""
        group = copy.group
        if group.copies:
            self._compare(copy)
        if group.converts or group.zeros:
            scratch = self.staging.take(1) if group.converts else []
            self._convert(copy, group, self.device.host_view(copy.extent), scratch, pending)
        if self.check_finite and not copy.was_checked:
            content = self.device.host_view(copy.extent)
            self._require_finite(content, group, 0, copy)
        ticket = self.device.copy(None, group.rows, copy.extent, copy.slot)
        pending.parts.append(ticket)
        pending.tickets.append(ticket)

    def _send_group(self, copy: GroupCopy, pending: SubmittedCopies) -> None:
        """Send the group from its image, or through the ring.

        A buffer is free again when its copy is done.
        """
        group, image, staging = copy.group, copy.image, self.staging
        if group.copies:
            self._compare(copy)
        if image is not None:
            if not copy.warm:
                scratch = staging.take(1) if group.converts else []
                buffer, window = StagingBuffer.of(image), StagingWindow.whole(group)
                self._fill(copy, window, buffer, scratch, pending)
            self._send(copy, image, 0, pending)
            return
        item_bytes = TORCH_DTYPES[copy.dtype].itemsize
        for window in windows(group, staging.move_bytes, item_bytes):
            pending.raise_failures()
            buffer, *scratch = staging.take(2 if window.converts else 1)
            span = self._span(copy, "staging", buffer.number)
            try:
                self._fill(copy, window, buffer, scratch, pending)
                ticket = self._send(copy, buffer.tensor[: window.nbytes], window.start, pending)
            except BaseException:
                span.end()
                staging.release(buffer)
                raise
            span.end_with(ticket)
            ticket.add_done_callback(partial(staging.release, buffer))

    def _send(
        self, copy: GroupCopy, memory: torch.Tensor, target: int, pending: SubmittedCopies
    ) -> CopyTicket:
        """Submit a part. The one that reaches the end of the extent writes the rows."""
        is_last = target + memory.nbytes == copy.group.nbytes
        rows = copy.group.rows if is_last else ()
        ticket = self.device.copy(StagedPiece(memory, target), rows, copy.extent, copy.slot)
        pending.parts.append(ticket)
        if is_last:
            pending.tickets.append(ticket)
        self._span(copy, "copies", STREAM).end_with(ticket, bytes=memory.nbytes)
        return ticket

    def _fill(
        self,
        copy: GroupCopy,
        window: StagingWindow,
        buffer: StagingBuffer,
        scratch: list[StagingBuffer],
        pending: SubmittedCopies,
    ) -> None:
        """Read a window into `buffer`, and convert what is cast with `scratch`."""
        lane = IMAGE if buffer.number is None else buffer.number
        with self._span(copy, "staging", lane, "fill"):
            self._convert(copy, window, buffer.tensor, scratch, pending)
            read(copy.reader, window.reads, buffer.memory)
        if self.check_finite and not copy.was_checked:
            self._require_finite(buffer.tensor, window, window.start, copy)

    def _convert(
        self,
        copy: GroupCopy,
        part: GroupPlan | StagingWindow,
        target: torch.Tensor,
        scratch: list[StagingBuffer],
        pending: SubmittedCopies,
    ) -> None:
        """Cast and pad into `target`; release `scratch`, one buffer if the part has casts."""
        started = perf_counter()
        try:
            for spare in scratch:
                with self._span(copy, "staging", spare.number, "cast"):
                    spare.convert(copy.reader, part.converts, copy.dtype, target)
        finally:
            for spare in scratch:
                self.staging.release(spare)
        zero(part.zeros, target)
        pending.staging_seconds += perf_counter() - started

    def _compare(self, copy: GroupCopy) -> None:
        """Compare copies of the base's weights in the group with the base."""
        for base_copy in copy.group.copies if not copy.was_checked else ():
            assert self.base is not None, "plans of this device have no copies"
            self.base.require_equal(base_copy, copy.reader)

    def _require_finite(
        self, content: torch.Tensor, part: GroupPlan | StagingWindow, start: int, copy: GroupCopy
    ) -> None:
        """Raise `AdapterFormatError` if a part of the group has NaN or infinite values.

        `content`, uint8, begins with the bytes from `start` of the extent on. Gaps that no move
        writes are not checked.
        """
        group, dtype = copy.group, TORCH_DTYPES[copy.dtype]
        for first, last, kind in _written_ranges(part, dtype, group.extras, start):
            values = content[first:last].view(kind)
            if not is_finite(values):
                bad = first + int(values.isfinite().logical_not().nonzero()[0]) * kind.itemsize
                module = self.module_names[_module_at(start + bad, group)]
                raise AdapterFormatError(
                    f"module {module!r} has NaN or infinite"
                    " weights; load it with check_finite=False if that is intended"
                )


# -- the I/O threads -------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class SlotCopies:
    """The copies that fill one slot, as the I/O threads and the loop share them."""

    plan: TransferPlan
    grant: SlotGrant
    was_checked: bool = False
    """Whether a copy of the same version was checked."""
    streamed: bool = False
    """Whether a caller may wait for single layers."""
    copying: int = 0
    """Runs of groups in flight; counted by `CopyThreads` under its lock."""
    group_tickets: dict[int, CopyTicket] = field(default_factory=dict)
    """The tickets of enqueued copies, by group; added by the I/O threads."""


@dataclass(slots=True, eq=False)
class CopyRun:
    """A run of groups that one thread copies; `error` and the times are its outcome."""

    command: CopyGroups
    slot: SlotCopies
    reader: Reader
    image: torch.Tensor | None
    """uint8 `[command.nbytes]` of pinned memory."""
    started: float = 0.0
    staging_seconds: float = 0.0
    copy_seconds: float = 0.0
    error: LoraxError | None = None

    def group_copies(self) -> list[GroupCopy]:
        plan, grant = self.slot.plan, self.command.grant
        was_checked = self.slot.was_checked
        rest = (grant.slot.index, self.image, self.command.warm, was_checked)
        return [
            GroupCopy(self.reader, plan.groups[group], plan.dtype, grant.extents[group], *rest)
            for group in self.command.groups
        ]


LOW_RUNS, LOW_BYTES = COPIES_AHEAD // 2, 8 << 20
"""In flight per thread when the threads may soon have nothing to do."""


class CopyThreads:
    """Runs copies, and the zeroing of failed slots, in `threads` I/O threads.

    Runs that have ended come to `ended`, which is woken at the latest when `LOW_RUNS` and
    `LOW_BYTES` for each thread are in flight. `wiped` is called once per failed slot, in any
    thread. `images` is the page-locked memory to which the extents of commands refer.
    """

    def __init__(
        self,
        transfer: GroupTransfer,
        ended: Inbox[CopyRun],
        wiped: Callable[[AdapterKey], None],
        *,
        threads: int,
        images: torch.Tensor,
    ) -> None:
        self._transfer = transfer
        self._ended = ended
        self._wiped = wiped
        self._images = images
        self._work: list[tuple[float, int, CopyRun | WipeExtents | None]] = []
        """A heap: the least tag first, of equal ones the oldest."""
        self._numbers = count()
        self._ready: SimpleQueue[None] = SimpleQueue()
        """One item for each of the heap; without any, threads wait for one."""
        self._lock = Lock()
        self._low_runs, self._low_bytes = LOW_RUNS * threads, LOW_BYTES * threads
        self._in_flight = self._bytes_in_flight = 0
        self._threads: list[Thread] = []
        for number in range(threads):
            self._start_thread(number)

    def stop(self) -> None:
        """Let the threads end after the copies that were started."""
        for _ in self._threads:
            self._put(inf, None)

    def join(self) -> None:
        """Wait for the threads to end. Blocks."""
        for thread in self._threads:
            thread.join()

    def start(self, command: CopyGroups, slot: SlotCopies, reader: Reader) -> None:
        image, memory = command.image, None
        if image is not None:
            memory = self._images[image.offset : image.offset + command.nbytes]
        with self._lock:
            self._in_flight += 1
            self._bytes_in_flight += command.nbytes
            slot.copying += 1
        self._put(command.tag, CopyRun(command, slot, reader, memory))

    def wipe(self, command: WipeExtents) -> None:
        self._put(0, command)

    def _put(self, tag: float, work: CopyRun | WipeExtents | None) -> None:
        with self._lock:
            heappush(self._work, (tag, next(self._numbers), work))
        self._ready.put(None)

    def _next(self) -> CopyRun | WipeExtents | None:
        self._ready.get()
        with self._lock:
            return heappop(self._work)[2]

    def _start_thread(self, number: int) -> None:
        # A daemon: a loader that was not closed must not keep the interpreter from exiting.
        thread = Thread(target=self._serve, name=f"lorax-io-{number}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process has reached its limit of threads
            self.stop()
            self.join()
            raise CapacityError(
                f"I/O thread {number + 1} did not start; lower io_threads"
            ) from error
        self._threads.append(thread)

    def _serve(self) -> None:
        """Take work in an I/O thread. An executor's queue would cost more than a small copy."""
        while (work := self._next()) is not None:
            if isinstance(work, WipeExtents):
                self._zero(work)
            else:
                self._run(work)

    def _run(self, work: CopyRun) -> None:
        """Start a run, in an I/O thread. Every run reaches `_end` exactly once."""
        work.started = perf_counter()
        try:
            submitted = self._transfer.run(work.group_copies())
        except BaseException as problem:  # noqa: BLE001 - becomes the run's outcome
            self._end(work, problem)
            return
        work.staging_seconds = submitted.staging_seconds
        with suppress(MemoryError):  # only `queue_behind` needs the tickets
            tickets = zip(work.command.groups, submitted.tickets, strict=True)
            work.slot.group_tickets.update(tickets)
        submitted.joined().add_done_callback(lambda done: self._end(work, done.exception()))

    def _zero(self, command: WipeExtents) -> None:
        """Zero a failed slot, in an I/O thread.

        A failure is only logged: extents are overwritten before the pointer table names them again.
        """

        def end(problem: BaseException | None) -> None:
            if problem is not None:
                _logger.warning("a failed slot was not zeroed: %s", problem)
            self._wiped(command.key)

        try:
            ticket = self._transfer.device.wipe(command.grant.extents)
        except BaseException as problem:  # noqa: BLE001 - reported like a ticket's error
            end(problem)
        else:
            ticket.add_done_callback(lambda done: end(done.exception()))

    def _end(self, work: CopyRun, problem: BaseException | None) -> None:
        """Leave a run's outcome for the loop, in an I/O thread or one of the device's."""
        if problem is not None:
            work.error = as_lorax_error(problem, "a copy to the device failed", "copy")
        work.copy_seconds = perf_counter() - work.started - work.staging_seconds
        # Leave it before it is counted: the last to be counted wakes the loop for all.
        self._ended.items.append(work)
        slot = work.slot
        with self._lock:
            self._in_flight -= 1
            self._bytes_in_flight -= work.command.nbytes
            slot.copying -= 1
            few = self._in_flight <= self._low_runs and self._bytes_in_flight <= self._low_bytes
        # Waking the loop costs as much as copying half a megabyte. While the adapter has other
        # runs in flight, and the threads have work, outcomes may gather, except of streamed ones.
        if not slot.copying or few or slot.streamed or work.error is not None:
            self._ended.wake()
