"""Streams, events and errors of an accelerator, and the threads that wait for events."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Protocol

import torch

from lorax_async.errors import CapacityError, ConfigError, LoraxError, TransferError, UsageError


class DeviceFailures:
    """Record whether a device was lost. CUDA errors stick, and nothing runs after the first.

    Thread-safe; the first reason is kept.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reason: str | None = None

    def require_working(self) -> None:
        """Raise if the device was lost."""
        if self._reason is not None:
            raise self._loss(self._reason)

    def record(self, error: RuntimeError) -> TransferError:
        """Return the error of one copy. Unless it is transient, mark the device as lost."""
        reason = first_line(error)
        # torch has a class for a lack of memory, the driver only a message.
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        if full or is_forbidden_by_capture(error):
            return TransferError(f"{self._name} refused a copy ({reason}); retry")
        self._reason = self._reason or reason
        return self._loss(self._reason)

    def record_use(self, error: RuntimeError) -> None:
        """Record a failed use, which counts as ended. The loss is reported by copies."""
        self.record(error)

    def _loss(self, reason: str) -> TransferError:
        return TransferError(
            f"{self._name}: the device was lost ({reason}), nothing runs on it any more;"
            " restart the process",
            retryable=False,
        )


def is_forbidden_by_capture(error: RuntimeError) -> bool:
    """Return whether CUDA refused a call because a thread captures a graph in mode "global".

    The call is valid and the device works.
    """
    return "operation not permitted when stream is capturing" in str(error)


def first_line(error: BaseException) -> str:
    """Return the first line of an error. CUDA appends advice on debugging kernels."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class DeviceEvent(Protocol):
    """The common interface of `torch.Event` and `torch.cuda.Event`.

    Waiting on an event that was never recorded returns at once, on every backend.
    """

    def record(self, stream: torch.Stream) -> None:
        """Record the event behind the work now on the stream."""

    def wait(self, stream: torch.Stream) -> None:
        """Hold later work of the stream until the event is done. Blocks no thread."""

    def synchronize(self) -> None:
        """Block this thread, with the GIL released, until the event is done."""


def resolve_device(text: str) -> torch.device:
    """Return the accelerator that `text` names; without a number, this thread's current one.

    Call in the user's thread: the thread that allocates has current device 0. A missing
    accelerator is reported later, by `require_device`.
    """
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {text!r}; use 'cuda' or 'cuda:N'") from error
    if str(device) != device.type:  # it has a number
        return device
    index = torch.accelerator.current_device_index() if _is_available(device) else 0
    return torch.device(device.type, index)


def require_device(device: torch.device) -> None:
    """Raise `ConfigError` unless this machine and this build of torch have the device."""
    if not _is_available(device):
        raise ConfigError(
            f"{device} is not available here; install a torch that has {device.type},"
            " on a machine that has one"
        )
    count = torch.accelerator.device_count()
    if device.index >= count:
        raise ConfigError(f"there is no {device}; this machine has {count}, counted from 0")


def _is_available(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device.type


def new_stream(device: torch.device) -> torch.Stream:
    """Return a stream that is not ordered with any other, including the default stream.

    torch has a pool of 32 CUDA streams and then reuses them. A shared stream may delay both users,
    but does not break the order.
    """
    if device.type == "cuda":
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.Stream(device)


def new_event(device: torch.device) -> DeviceEvent:
    """Return an event whose `synchronize` sleeps.

    `torch.Event` ignores `blocking` on CUDA: its `synchronize` would spin and occupy a core.
    """
    if device.type == "cuda":
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    return torch.Event(device, blocking=True)


def stream_on(device: torch.device, stream: object | None) -> torch.Stream:
    """Return `stream`, or this thread's current one, in the type that the device's events need.

    Raises `UsageError` if it is not a stream of the device, or is being captured into a graph:
    a capture cannot include earlier events, and events recorded in it are never done.
    """
    if stream is None:
        stream = torch.accelerator.current_stream(device)
    if not isinstance(stream, torch.Stream) or stream.device != device:
        raise UsageError(f"{stream!r} is not a torch stream of {device}")
    if device.type == "cuda" and not isinstance(stream, torch.cuda.Stream):
        # CUDA events read fields that the generic class lacks.
        stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
            stream_id=stream.stream_id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )
    query = getattr(stream, "is_capturing", None)  # newer than the oldest supported torch
    if query is None and torch.cuda.is_available():
        query = torch.cuda.is_current_stream_capturing
    if query is not None and query():
        raise UsageError(
            "the stream is being captured; wait for copies, and note uses, around the replay"
        )
    return stream


_RETRY_SECONDS = 0.005
_logger = logging.getLogger("lorax_async")


class EventTicket(Future[None]):
    """A future that a watcher completes soon after the event.

    It cannot be cancelled, because submitted work runs. Until it is done it keeps `held` alive,
    the memory that the device may still read; then it calls `release`, before its callbacks.

    `owner` is the device. `event` is recorded before the ticket is returned to a caller. `error` is
    set once the event is done, if some of the work was not submitted.
    """

    def __init__(
        self,
        owner: object,
        event: DeviceEvent,
        held: object = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        super().__init__()
        self.owner = owner
        self.event = event
        self.error: LoraxError | None = None
        self._held = held
        self._release = release
        self.set_running_or_notify_cancel()

    def finish(self, error: LoraxError | None = None) -> None:
        """Complete the ticket: the device does not use the memory any more."""
        release, self._held, self._release = self._release, None, None
        if release is not None:
            release()
        if error is None:
            self.set_result(None)
        else:
            self.set_exception(error)

    @property
    def succeeded(self) -> bool:
        return self.done() and self.exception() is None


def start_watchers(*watchers: EventWatcher) -> None:
    """Start all watchers, or none and raise `CapacityError`."""
    try:
        for watcher in watchers:
            watcher.start()
    except CapacityError:
        for watcher in watchers:
            watcher.end()
        raise


class EventWatcher:
    """A thread that waits for events in order, and completes their tickets.

    A device has two. Copies are done in the order of submission, so that waiting for the oldest
    needs no polling. Uses belong to compute streams and have a watcher of their own: behind a long
    kernel, every copy would be reported late, holding back staging buffers and readiness. Among
    uses of several streams, the longest delays the others; late is safe and only keeps memory
    longer.

    The thread knows no event loop. Callbacks of tickets run in it and must be quick; exceptions
    are logged. `translate` converts an error of `synchronize` into the ticket's, or None if the
    ticket succeeds.
    """

    def __init__(self, name: str, translate: Callable[[RuntimeError], LoraxError | None]) -> None:
        self._translate = translate
        self._queue: SimpleQueue[EventTicket | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._ended = False
        # A daemon, so that an unclosed device does not keep the interpreter alive.
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. Raises `CapacityError` if the process may have no more threads."""
        try:
            self._thread.start()
        except RuntimeError as error:
            raise CapacityError(f"cannot start thread {self._thread.name!r}: {error}") from error

    def watch(self, ticket: EventTicket) -> None:
        """Add a ticket, whose event was recorded after those of earlier tickets."""
        with self._lock:
            if self._ended:
                raise UsageError("the device is closed")
            self._queue.put(ticket)

    def end(self) -> None:
        """Wait for all watched events. Blocks; not to be called in a callback. Idempotent."""
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
        """Complete one ticket. A separate function, so an idle watcher keeps no ticket alive."""
        ticket = self._queue.get()
        if ticket is None:
            return False
        error = ticket.error
        while True:
            try:
                ticket.event.synchronize()
            except RuntimeError as problem:
                if is_forbidden_by_capture(problem):
                    time.sleep(_RETRY_SECONDS)
                    continue
                error = self._translate(problem) or error
            break
        try:
            ticket.finish(error)
        except BaseException:
            # Futures log Exceptions, but SystemExit must not stop the watcher either.
            _logger.exception("a callback of a ticket raised")
        return True
