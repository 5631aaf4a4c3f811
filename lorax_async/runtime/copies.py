"""Copies of layer groups in the I/O threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf
from queue import SimpleQueue
from threading import Lock, Thread
from time import perf_counter

import torch

from lorax_async.concurrency import Inbox
from lorax_async.devices.transfer import GroupCopy, GroupTransfer
from lorax_async.errors import CapacityError, LoraxError, as_lorax_error
from lorax_async.files import Reader
from lorax_async.lifecycle.commands import CopyGroups, WipeExtents
from lorax_async.lifecycle.rules import COPIES_AHEAD
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

    def group_copies(self) -> list[GroupCopy]:
        plan, grant = self.occupancy.plan, self.command.grant
        rest = (grant.slot.index, self.image, self.command.warm)
        return [
            GroupCopy(self.reader, plan.groups[group], plan.dtype, grant.extents[group], *rest)
            for group in self.command.groups
        ]


LOW_RUNS, LOW_BYTES = COPIES_AHEAD // 2, 8 << 20
"""In flight per thread when the threads may soon have nothing to do."""


class CopyThreads:
    """Runs copies, and the zeroing of failed slots, in `threads` I/O threads.

    `copied` is called on the loop with runs of an adapter that have ended, or with one that failed;
    `wiped` once per failed slot, in any thread. The loop is woken at the latest when `LOW_RUNS`
    and `LOW_BYTES` for each thread are in flight. `images` is the page-locked memory to which the
    extents of commands refer.
    """

    def __init__(
        self,
        files: FetchTasks,
        lease_table: LeaseTable,
        transfer: GroupTransfer,
        copied: Callable[[list[CopyJob]], None],
        wiped: Callable[[AdapterKey], None],
        *,
        threads: int,
        images: torch.Tensor,
    ) -> None:
        self._files = files
        self._lease_table = lease_table
        self._transfer = transfer
        self._images = images
        self._wiped = wiped
        self._work: list[tuple[float, int, CopyJob | WipeExtents | None]] = []
        """A heap: the least tag first, of equal ones the oldest."""
        self._numbers = count()
        self._ready: SimpleQueue[None] = SimpleQueue()
        """One item for each of the heap; without any, threads wait for one."""
        self._lock = Lock()
        self._copied = copied
        self._inbox: Inbox[CopyJob] = Inbox(asyncio.get_running_loop(), self._report)
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
            occupancy.copying += 1
        self._put(command.tag, job)

    def wipe(self, command: WipeExtents) -> None:
        self._put(0, command)

    def _put(self, tag: float, work: CopyJob | WipeExtents | None) -> None:
        with self._lock:
            heappush(self._work, (tag, next(self._numbers), work))
        self._ready.put(None)

    def _next(self) -> CopyJob | WipeExtents | None:
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

    def _run(self, work: CopyJob) -> None:
        """Start a run, in an I/O thread. Every run reaches `_end` exactly once."""
        work.started = perf_counter()
        try:
            submitted = self._transfer.run(work.group_copies())
        except BaseException as problem:  # noqa: BLE001 - becomes the run's outcome
            self._end(work, problem)
            return
        work.staging_seconds = submitted.staging_seconds
        with suppress(MemoryError):  # without the tickets, only queue_behind has to do without
            tickets = zip(work.command.groups, submitted.tickets, strict=True)
            work.occupancy.group_tickets.update(tickets)
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

    def _end(self, work: CopyJob, problem: BaseException | None) -> None:
        """Leave a run's outcome for the loop, in an I/O thread or one of the device's."""
        if problem is not None:
            work.error = as_lorax_error(problem, "a copy to the device failed", "copy")
        work.copy_seconds = perf_counter() - work.started - work.staging_seconds
        # Leave it before it is counted: the last to be counted wakes the loop for all.
        self._inbox.items.append(work)
        occupancy = work.occupancy
        with self._lock:
            self._in_flight -= 1
            self._bytes_in_flight -= work.command.nbytes
            occupancy.copying -= 1
            few = self._in_flight <= self._low_runs and self._bytes_in_flight <= self._low_bytes
        # Waking the loop costs as much as copying half a megabyte. While the adapter has other
        # runs in flight, and the threads have work, outcomes may gather, except of streamed ones.
        if not occupancy.copying or few or occupancy.streamed or work.error is not None:
            self._inbox.wake()

    def _report(self, job: CopyJob) -> None:
        """Report the outcome of a run, with those of its adapter that are next in the inbox."""
        jobs, following = [job], self._inbox.items
        while job.error is None and following and following[0].occupancy is job.occupancy:
            if following[0].error is not None:
                break
            jobs.append(following.popleft())
        self._copied(jobs)
