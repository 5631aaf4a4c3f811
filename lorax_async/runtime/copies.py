"""Copies of layer groups in the I/O threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread
from time import perf_counter

import torch

from lorax_async.concurrency import Inbox
from lorax_async.devices.base import CopyTicket
from lorax_async.devices.transfer import GroupCopy, GroupTransfer
from lorax_async.errors import CapacityError, LoraxError, as_lorax_error
from lorax_async.lifecycle.commands import CopyGroup, WipeExtents
from lorax_async.runtime.fetches import FetchTasks
from lorax_async.runtime.leases import LeaseTable, SlotOccupancy
from lorax_async.types import AdapterKey

_logger = logging.getLogger("lorax_async")


@dataclass(slots=True, eq=False)
class CopyJob:
    """One copy; `error` and the times are its outcome, once it has ended."""

    command: CopyGroup
    copy: GroupCopy
    occupancy: SlotOccupancy
    started: float = 0.0
    staging_seconds: float = 0.0
    copy_seconds: float = 0.0
    error: LoraxError | None = None


class CopyThreads:
    """Runs copies, and the zeroing of failed slots, in `threads` I/O threads.

    `copied` is called once per copy, on the loop; `wiped` once per failed slot, in any thread. The
    loop is woken at the latest when at most `low_water` copies are in flight. `images` is the
    page-locked memory to which the extents of commands refer.
    """

    def __init__(
        self,
        files: FetchTasks,
        lease_table: LeaseTable,
        transfer: GroupTransfer,
        copied: Callable[[CopyJob], None],
        wiped: Callable[[AdapterKey], None],
        *,
        threads: int,
        low_water: int,
        images: torch.Tensor,
    ) -> None:
        self._files = files
        self._lease_table = lease_table
        self._transfer = transfer
        self._images = images
        self._wiped = wiped
        self._queue: SimpleQueue[CopyJob | WipeExtents | None] = SimpleQueue()
        # Daemons: a loader that was not closed must not keep the interpreter from exiting.
        self._threads = [
            Thread(target=self._serve, name=f"lorax-io-{n}", daemon=True) for n in range(threads)
        ]
        self._start_threads()
        self._inbox: Inbox[CopyJob] = Inbox(asyncio.get_running_loop(), copied)
        self._low_water = low_water
        self._in_flight = 0
        self._lock = Lock()

    def stop(self) -> None:
        """Let the threads end after the copies that were started."""
        for _ in self._threads:
            self._queue.put(None)

    def join(self) -> None:
        """Wait for the threads to end. Blocks."""
        for thread in self._threads:
            thread.join()

    def take_outcomes(self) -> None:
        """Handle outcomes that have not woken the loop yet."""
        self._inbox.take()

    def start(self, command: CopyGroup) -> None:
        occupancy = self._lease_table.occupancies[command.key]
        group, image = occupancy.plan.groups[command.group], command.image
        copy = GroupCopy(
            self._files.reader(command.key),
            group,
            occupancy.plan.dtype,
            command.grant.extents[command.group],
            command.grant.slot.index,
            None if image is None else self._images[image.offset : image.offset + group.nbytes],
            command.warm,
        )
        with self._lock:
            self._in_flight += 1
        self._queue.put(CopyJob(command, copy, occupancy))

    def wipe(self, command: WipeExtents) -> None:
        self._queue.put(command)

    def _start_threads(self) -> None:
        for started, thread in enumerate(self._threads):
            try:
                thread.start()
            except RuntimeError as error:  # the process has reached its limit of threads
                del self._threads[started:]
                self.stop()
                self.join()
                raise CapacityError(
                    f"I/O thread {started + 1} did not start; lower io_threads"
                ) from error

    def _serve(self) -> None:
        """Take work in an I/O thread. An executor's queue would cost more than a small copy."""
        while (work := self._queue.get()) is not None:
            if isinstance(work, WipeExtents):
                self._zero(work)
            else:
                self._run(work)

    def _run(self, work: CopyJob) -> None:
        """Start a copy, in an I/O thread. Every copy reaches `_end` exactly once."""
        work.started = perf_counter()
        try:
            moved = self._transfer.run(work.copy)
        except BaseException as problem:  # noqa: BLE001 - becomes the copy's outcome
            self._end(work, problem)
            return
        work.staging_seconds = moved.staging_seconds
        with suppress(MemoryError):  # without the ticket, only queue_behind has to do without
            work.occupancy.group_tickets[work.command.group] = moved.ticket
        moved.done.add_done_callback(lambda done: self._end(work, done.exception()))

    def _zero(self, command: WipeExtents) -> None:
        """Zero a failed slot, in an I/O thread.

        A failure is only logged: extents are overwritten before the pointer table names them again.
        """

        def report(ticket: CopyTicket) -> None:
            if ticket.exception() is not None:
                _logger.warning("a failed slot was not zeroed: %s", ticket.exception())
            self._wiped(command.key)

        try:
            ticket = self._transfer.wipe(command.grant.extents)
        except BaseException as problem:  # noqa: BLE001 - reported like a ticket's error
            ticket = Future()
            ticket.set_exception(problem)
        ticket.add_done_callback(report)

    def _end(self, work: CopyJob, problem: BaseException | None) -> None:
        """Leave a copy's outcome for the loop, in an I/O thread or one of the device's."""
        if problem is not None:
            work.error = as_lorax_error(problem, "a copy to the device failed", "copy")
        work.copy_seconds = perf_counter() - work.started - work.staging_seconds
        # Leave it before it is counted: the last to be counted wakes the loop for all.
        self._inbox.leave(work)
        occupancy = work.occupancy
        with self._lock:
            self._in_flight -= 1
            occupancy.copied += 1
            last = occupancy.copied == len(occupancy.layers)
            few = self._in_flight <= self._low_water
        # Waking the loop costs as much as copying half a megabyte. While the threads have work,
        # outcomes may gather, except the last of an adapter and those of a streamed one.
        if last or few or occupancy.streamed or work.error is not None:
            self._inbox.wake()
