"""Tickets that stand behind events, and the threads that bring the news of them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from lorax_async.errors import CapacityError, LoraxError, UsageError
from lorax_async.io.devices.failures import is_forbidden_by_capture
from lorax_async.io.devices.streams import DeviceEvent

_AGAIN_SECONDS = 0.005
_logger = logging.getLogger("lorax_async")


def _nothing() -> None: ...


class EventTicket(Future[None]):
    """Done soon after its event is: a watcher, which waits for the event, says so.

    Cannot be cancelled: what is on a stream runs. Until it is done it keeps `held` alive, the
    memory that the device may still read; then it calls `release`, before its callbacks.

    Attributes
    ----------
    owner
        The device that gave it.
    event
        Recorded before anybody else sees the ticket.
    error
        What the ticket shall fail with once the event is done: some of the work was not begun.
    """

    def __init__(
        self,
        owner: object,
        event: DeviceEvent,
        held: object = None,
        release: Callable[[], None] = _nothing,
    ) -> None:
        super().__init__()
        self.owner = owner
        self.event = event
        self.error: LoraxError | None = None
        self._held = held
        self._release = release
        self.set_running_or_notify_cancel()

    def finish(self, error: LoraxError | None = None) -> None:
        """Nothing on the device uses the memory any more."""
        release, self._held, self._release = self._release, None, _nothing
        release()
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)

    @property
    def succeeded(self) -> bool:
        return self.done() and self.exception() is None


def start_watchers(*watchers: Watcher) -> None:
    """All of them, or `CapacityError` and none."""
    started: list[Watcher] = []
    try:
        for watcher in watchers:
            watcher.start()
            started.append(watcher)
    except CapacityError:
        for watcher in started:
            watcher.end()
        raise


class Watcher:
    """A thread that waits for events, one after the other, and finishes their tickets.

    A device has two. Copies are done in the order in which they were asked for, and one thread in
    `synchronize` of the oldest costs nothing until it is done, and no polling. Uses are of compute
    streams: one long kernel at the head of a shared queue would keep the news of every copy behind
    it, and with it staging buffers and readiness. Among uses of several streams the longest delays
    the others' news; that is late, which only keeps memory longer, and never early.

    The thread knows no event loop. Callbacks of tickets run in it, and must be quick; what they
    raise is logged.

    Parameters
    ----------
    name
        The thread's.
    failed
        Turns what `synchronize` raised into the ticket's error, or None if it is no error.
    """

    def __init__(self, name: str, failed: Callable[[RuntimeError], LoraxError | None]) -> None:
        self._failed = failed
        self._queue: SimpleQueue[EventTicket | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._ended = False
        # A daemon: a device that nobody closed must not keep the interpreter from ending.
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    def start(self) -> None:
        """`CapacityError` if the process may have no more threads."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise CapacityError(f"no thread {self._thread.name!r}: {error}") from error

    def watch(self, ticket: EventTicket) -> None:
        """Its event is recorded, and no earlier than those of the tickets before. Quick."""
        with self._lock:
            if self._ended:
                raise UsageError("the device is closed")
            self._queue.put(ticket)

    def end(self) -> None:
        """Wait for all events that are watched. Blocks, but not in a callback. Idempotent."""
        with self._lock:
            if not self._ended:
                self._queue.put(None)
            self._ended = True
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while self._finish_next():
            pass

    def _finish_next(self) -> bool:
        """In its own function, so that an idle watcher keeps nothing of its last ticket alive."""
        ticket = self._queue.get()
        if ticket is None:
            return False
        error = self._wait(ticket)
        try:
            ticket.finish(error or ticket.error)
        except BaseException:
            # Futures log an Exception; SystemExit must not end the news of later tickets either.
            _logger.exception("a callback of a ticket raised")
        return True

    def _wait(self, ticket: EventTicket) -> LoraxError | None:
        while True:
            try:
                ticket.event.synchronize()
            except RuntimeError as error:
                if not is_forbidden_by_capture(error):
                    return self._failed(error)
                time.sleep(_AGAIN_SECONDS)
            else:
                return None
