"""Copies of layer groups: from a command to an I/O thread, and back to the loop as an outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread
from time import perf_counter

from lorax_async.core.life import Copy
from lorax_async.errors import CapacityError, InternalError, LoraxError
from lorax_async.io.inbox import Inbox
from lorax_async.io.transfer import GroupCopy, Transfer
from lorax_async.runtime.files import Files
from lorax_async.runtime.tenancy import Tenancy
from lorax_async.runtime.tenants import Tenants


@dataclass(frozen=True, slots=True)
class CopyOutcome:
    """What an I/O thread says about one copy: `nbytes` on the device, or why not.

    `staged_nbytes` of the file had to be cast or padded.
    """

    command: Copy
    nbytes: int
    staged_nbytes: int
    error: LoraxError | None
    staging_seconds: float
    copy_seconds: float


_Work = tuple[Copy, GroupCopy, Tenancy]


class Copies:
    """Hands copies to the I/O threads; `copied` hears of each once, on the loop.

    Its `threads` serve until `stop`. The loop is woken at the latest when no more than `low_water`
    copies are left in them.
    """

    def __init__(
        self,
        files: Files,
        tenants: Tenants,
        transfer: Transfer,
        copied: Callable[[CopyOutcome], None],
        *,
        threads: int,
        low_water: int,
    ) -> None:
        self._files = files
        self._tenants = tenants
        self._transfer = transfer
        self._queue: SimpleQueue[_Work | None] = SimpleQueue()
        # Daemons: a loader that nobody closed must not keep the interpreter from ending.
        self._threads = [
            Thread(target=self._serve, name=f"lorax-io-{n}", daemon=True) for n in range(threads)
        ]
        self._start(self._threads)
        self._inbox: Inbox[CopyOutcome] = Inbox(asyncio.get_running_loop(), copied)
        self._low_water = low_water
        self._in_threads = 0
        self._lock = Lock()

    def stop(self) -> None:
        """Let the threads end once what was started is done."""
        for _ in self._threads:
            self._queue.put(None)

    def join(self) -> None:
        """Wait until they have. Blocks."""
        for thread in self._threads:
            thread.join()

    def _serve(self) -> None:
        """In an I/O thread: an executor's queue would cost more than a small copy."""
        while (work := self._queue.get()) is not None:
            self._run(*work)

    def hear(self) -> None:
        """Handle the outcomes that have not woken the loop."""
        self._inbox.take()

    def _start(self, threads: list[Thread]) -> None:
        for started, thread in enumerate(threads):
            try:
                thread.start()
            except RuntimeError as error:  # the process may have no more threads
                del threads[started:]
                self.stop()
                self.join()
                raise CapacityError(f"no {len(threads) + 1}th thread; lower io_threads") from error

    def start(self, command: Copy) -> None:
        tenancy = self._tenants.tenancy(command.key)
        copy = GroupCopy(
            self._files.reader(command.key),
            tenancy.plan.groups[command.group],
            tenancy.plan.dtype,
            command.grant.extents[command.group],
            command.grant.slot.index,
        )
        with self._lock:
            self._in_threads += 1
        self._queue.put((command, copy, tenancy))

    def _run(self, command: Copy, copy: GroupCopy, tenancy: Tenancy) -> None:
        """In an I/O thread: whatever happens, the loop hears of it."""
        started = perf_counter()
        error: LoraxError | None = None
        staging_seconds = 0.0
        try:
            staging_seconds = self._transfer.run(copy)
        except LoraxError as problem:
            error = problem.located()  # without its frames, for it is remembered
        except BaseException as problem:  # noqa: BLE001 - it is carried to the loop and told there
            error = InternalError(f"a copy to the device failed: {problem!r}", stage="copy")
            error.__cause__ = problem
        copy_seconds = perf_counter() - started - staging_seconds
        staged = 0 if error else sum(move.nbytes for move in copy.group.converts)
        outcome = CopyOutcome(
            command, copy.group.nbytes, staged, error, staging_seconds, copy_seconds
        )
        # Left before it is counted: whoever counts the last one wakes the loop for all.
        self._inbox.leave(outcome)
        if self._is_urgent(tenancy) or error is not None:
            self._inbox.wake()

    def _is_urgent(self, tenancy: Tenancy) -> bool:
        """Count a copy that ended: does the loop have to hear of it now?

        Waking the loop costs as much as copying half a megabyte. While the threads have work, and
        this is not an adapter's last layer or one that somebody waits for, outcomes may gather.
        """
        with self._lock:
            self._in_threads -= 1
            tenancy.copied += 1
            if tenancy.copied == len(tenancy.layers) or tenancy.streamed:
                return True
            return self._in_threads <= self._low_water
