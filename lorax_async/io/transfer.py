"""One group's way from its file, or from its image in host memory, to its extent."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from threading import Lock
from time import perf_counter

import torch

from lorax_async.core.arena import Extent
from lorax_async.core.moves import GroupPlan
from lorax_async.core.windows import Window, windows
from lorax_async.errors import InternalError
from lorax_async.io.finite import require_finite_operands, require_finite_window
from lorax_async.io.ports import CopyTicket, Device, FilePieces, Reader, StagedPiece
from lorax_async.io.staging import TORCH_DTYPES, Buffer, StagingRing, read, zero
from lorax_async.tracing.recorder import CopyTimes, Tracer, now


@dataclass(frozen=True, slots=True, eq=False)
class GroupCopy:
    """What one copy needs: which bytes, of which file, into which extent and column.

    `image` is for devices that do not read files: uint8 `[group.nbytes]` of `staging_memory`, in
    which the group's bytes are kept as they are on the device. It is filled on the way, or, if it
    is `warm`, holds them already, and the file is not read. It is not written to, nor given back,
    before the copy's `done`.
    """

    reader: Reader
    group: GroupPlan
    dtype: str
    extent: Extent
    slot: int
    image: torch.Tensor | None = None
    warm: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Moved:
    """A group on its way.

    `ticket` is the device's, of the copy that writes the rows; `done` is done when all copies are,
    and has the error of the first that failed. `staging_seconds` is what casts and padding took.
    """

    ticket: CopyTicket
    done: CopyTicket
    staging_seconds: float


class Transfer:
    """Casts and pads through the ring, lets the device move the rest, checks what is moved.

    `module_names` are the layout's, for errors; `check_finite` refuses NaN and infinity. The ring
    is of the device's `staging_memory`, and has two buffers or more where it copies from there.
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

    def run(self, copy: GroupCopy) -> Moved:
        """Move one group; returns when all its copies have been asked for.

        Blocks while it reads, and while no buffer is free. Raises what the reader, the device or
        the check raises; then none of its copies is on its way any more.
        """
        recorder = self._tracer.on
        times = None
        if recorder is not None:
            times = CopyTimes(recorder, copy.slot, copy.group.layer)
        if self._device.reads_files:
            return self._run_from_file(copy, times)
        sending = _Sending(self._device, copy, times)
        try:
            if copy.image is None:
                self._send_windows(sending)
            else:
                self._send_image(sending, copy.image)
        except BaseException:
            wait(sending.tickets)
            raise
        return sending.moved()

    def wipe(self, extents: Sequence[Extent]) -> CopyTicket:
        """Zero extents that nobody reads any more. Blocks as `run` does."""
        return self._device.wipe(extents)

    def _run_from_file(self, copy: GroupCopy, times: CopyTimes | None) -> Moved:
        """Converted bytes are written before the device is asked, so that its rows come last."""
        group, started = copy.group, perf_counter()
        if group.converts or group.zeros:
            target = self._device.host_view(copy.extent)
            if group.converts:
                with self._staging.buffer() as scratch:
                    begun = 0 if times is None else now()
                    scratch.convert(copy.reader, group.converts, copy.dtype, target)
                if times is not None:
                    times.staged(scratch.number, begun, "cast")
                    times.start = now()
            zero(group.zeros, target)
        seconds = perf_counter() - started
        pieces = FilePieces(copy.reader, group.reads)
        ticket = self._device.copy(pieces, group.rows, copy.extent, copy.slot)
        if times is not None:
            times.asked(ticket, group.nbytes, in_stream=False)
        if self._check_finite:
            ticket.result()
            names = self._module_names
            require_finite_operands(self._device, group, copy.extent, copy.slot, names)
        return Moved(ticket, ticket, seconds)

    def _send_windows(self, sending: _Sending) -> None:
        """Through the ring. A window's buffer is free again when its copy is done."""
        copy, staging = sending.copy, self._staging
        item_bytes = TORCH_DTYPES[copy.dtype].itemsize
        for window in windows(copy.group, staging.move_bytes, item_bytes):
            sending.heed_failures()
            buffer, *scratch = staging.take(2 if window.converts else 1)
            begun = 0 if sending.times is None else now()
            try:
                self._fill(sending, window, buffer, scratch)
                ticket = sending.send(buffer.tensor[: window.nbytes], window.start)
            except BaseException:
                staging.release(buffer)
                raise
            if sending.times is not None:
                ticket.add_done_callback(sending.times.until_free(buffer.number, begun))
            ticket.add_done_callback(partial(_release, staging, buffer))

    def _send_image(self, sending: _Sending, image: torch.Tensor) -> None:
        copy, group = sending.copy, sending.copy.group
        if not copy.warm:
            whole = Window(0, group.nbytes, group.reads, group.converts, group.zeros)
            scratch = self._staging.take(1) if whole.converts else []
            self._fill(sending, whole, Buffer.of(image), scratch)
        sending.send(image, 0)

    def _fill(
        self, sending: _Sending, window: Window, buffer: Buffer, scratch: list[Buffer]
    ) -> None:
        """Bring a window's bytes into `buffer`. `scratch`, one if it converts, is given back."""
        copy, times = sending.copy, sending.times
        begun = 0 if times is None else now()
        try:
            read(copy.reader, window.reads, buffer.memory)
            started = perf_counter()
            for each in scratch:
                each.convert(copy.reader, window.converts, copy.dtype, buffer.tensor)
            zero(window.zeros, buffer.tensor)
            sending.staging_seconds += perf_counter() - started
        finally:
            for each in scratch:
                self._staging.release(each)
        if times is not None:
            times.staged(buffer.number, begun, "fill")
        if self._check_finite:
            names = self._module_names
            require_finite_window(buffer.tensor, window, copy.dtype, copy.group, names)


class _Sending:
    """The copies that one group has been given to the device in."""

    def __init__(self, device: Device, copy: GroupCopy, times: CopyTimes | None) -> None:
        self.copy = copy
        self.times = times
        self.tickets: list[CopyTicket] = []
        self.staging_seconds = 0.0
        self._device = device

    def send(self, memory: torch.Tensor, target: int) -> CopyTicket:
        """The copy that reaches the end of the extent writes the rows."""
        copy = self.copy
        rows = copy.group.rows if target + memory.nbytes == copy.group.nbytes else ()
        ticket = self._device.copy(StagedPiece(memory, target), rows, copy.extent, copy.slot)
        self.tickets.append(ticket)
        if self.times is not None:
            self.times.asked(ticket, memory.nbytes, in_stream=True)
        return ticket

    def heed_failures(self) -> None:
        """Forget the copies that are done; raises what one of them failed with."""
        for ticket in [each for each in self.tickets if each.done()]:
            ticket.result()
            self.tickets.remove(ticket)

    def moved(self) -> Moved:
        return Moved(self.tickets[-1], _all_of(self.tickets), self.staging_seconds)


def _release(staging: StagingRing, buffer: Buffer, _: CopyTicket) -> None:
    staging.release(buffer)


def _all_of(tickets: Sequence[CopyTicket]) -> CopyTicket:
    """Done when all are, with the error of the first that failed."""
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
