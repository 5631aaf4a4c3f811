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
from lorax_async.devices.transfer import GroupCopy, GroupTransfer, join_tickets
from lorax_async.errors import CapacityError, LoraxError, as_lorax_error
from lorax_async.files import Reader
from lorax_async.lifecycle.commands import CopyGroups, WipeExtents
from lorax_async.runtime.fetches import FetchTasks
from lorax_async.runtime.leases import LeaseTable, SlotOccupancy
from lorax_async.types import AdapterKey

_logger = logging.getLogger("lorax_async")


@dataclass(slots=True, eq=False)
class CopyJob:
    """One run of groups; `error` and the times are its outcome, once it has ended."""

    command: CopyGroups
    occupancy: SlotOccupancy
    reader: Reader
    image: torch.Tensor | None
    """uint8 `[command.nbytes]` of pinned memory."""
    started: float = 0.0
    staging_seconds: float = 0.0
    copy_seconds: float = 0.0
    error: LoraxError | None = None

    @property
    def is_fast(self) -> bool:
        """Whether it was as fast as from memory."""
        seconds = self.staging_seconds + self.copy_seconds
        return self.command.nbytes > seconds * FAST_BYTES_PER_SECOND

    def group_copies(self) -> list[GroupCopy]:
        plan, grant = self.occupancy.plan, self.command.grant
        return [
            GroupCopy(
                self.reader,
                plan.groups[group],
                plan.dtype,
                grant.extents[group],
                grant.slot.index,
                self.image,
                self.command.warm,
            )
            for group in self.command.groups
        ]


FAST_BYTES_PER_SECOND = 1e9
"""Faster than a thread reads from most disks, and slower than from the page cache."""

LOW_BYTES = 16 << 20
"""Bytes in flight at which the threads may soon have nothing to do."""


class CopyThreads:
    """Runs copies, and the zeroing of failed slots, in `threads` I/O threads.

    `copied` is called once per run, on the loop; `wiped` once per failed slot, in any thread. The
    loop is woken at the latest when at most `low_water` runs and `LOW_BYTES` are in flight.
    `images` is the page-locked memory to which the extents of commands refer.
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
        self._in_flight = self._bytes_in_flight = 0
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

    def start(self, command: CopyGroups) -> None:
        occupancy, image = self._lease_table.occupancies[command.key], command.image
        memory = None
        if image is not None:
            memory = self._images[image.offset : image.offset + command.nbytes]
        job = CopyJob(command, occupancy, self._files.reader(command.key), memory)
        with self._lock:
            self._in_flight += 1
            self._bytes_in_flight += command.nbytes
        self._queue.put(job)

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
        """Start a run, in an I/O thread. Every run reaches `_end` exactly once."""
        work.started = perf_counter()
        try:
            results = self._transfer.run_all(work.group_copies())
        except BaseException as problem:  # noqa: BLE001 - becomes the run's outcome
            self._end(work, problem)
            return
        work.staging_seconds = sum(result.staging_seconds for result in results)
        with suppress(MemoryError):  # without the tickets, only queue_behind has to do without
            tickets = (result.ticket for result in results)
            work.occupancy.group_tickets.update(zip(work.command.groups, tickets, strict=True))
        done = join_tickets([result.done for result in results])
        done.add_done_callback(lambda done: self._end(work, done.exception()))

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
        """Leave a run's outcome for the loop, in an I/O thread or one of the device's."""
        if problem is not None:
            work.error = as_lorax_error(problem, "a copy to the device failed", "copy")
        work.copy_seconds = perf_counter() - work.started - work.staging_seconds
        # Leave it before it is counted: the last to be counted wakes the loop for all.
        self._inbox.leave(work)
        occupancy = work.occupancy
        with self._lock:
            self._in_flight -= 1
            self._bytes_in_flight -= work.command.nbytes
            occupancy.copied += len(work.command.groups)
            last = occupancy.copied == len(occupancy.layers)
            few = self._in_flight <= self._low_water and self._bytes_in_flight <= LOW_BYTES
        # Waking the loop costs as much as copying half a megabyte. While the threads have work,
        # outcomes may gather, except the last of an adapter and those of a streamed one.
        if last or few or occupancy.streamed or work.error is not None:
            self._inbox.wake()
