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
    """Whether a device was lost: CUDA's errors stick, and nothing runs after the first.

    From any thread; the first reason stays.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._reason: str | None = None

    def heed(self) -> None:
        """Raise if the device was lost."""
        if self._reason is not None:
            raise self._loss(self._reason)

    def note(self, error: RuntimeError) -> TransferError:
        """A new error for one copy; all but a passing one means that the device was lost."""
        reason = first_line(error)
        if is_out_of_memory(error) or is_forbidden_by_capture(error):
            return TransferError(f"{self._name} refused a copy ({reason}); try again")
        self._reason = self._reason or reason
        return self._loss(self._reason)

    def note_use(self, error: RuntimeError) -> None:
        """The use has ended, for nothing runs any more; copies tell of the loss."""
        self.note(error)

    def _loss(self, reason: str) -> TransferError:
        return TransferError(
            f"{self._name}: the device was lost ({reason}), nothing runs on it any more;"
            " restart the process",
            retryable=False,
        )


def is_forbidden_by_capture(error: RuntimeError) -> bool:
    """CUDA refused a call because some thread captures a graph in mode "global".

    Nothing is wrong with what was asked for, nor with the device.
    """
    return "operation not permitted when stream is capturing" in str(error)


def is_out_of_memory(error: RuntimeError) -> bool:
    """The allocators of torch have a class for it, the driver has only the text."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def first_line(error: BaseException) -> str:
    """CUDA's errors go on with advice on how to debug kernels."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class DeviceEvent(Protocol):
    """What `torch.Event` and `torch.cuda.Event` have in common.

    Whoever waits on an event that was never recorded does not wait at all, on no backend.
    """

    def record(self, stream: torch.Stream) -> None:
        """Stand behind all that is on the stream by now."""

    def wait(self, stream: torch.Stream) -> None:
        """Let the stream go on, from here, once the event is done. Blocks no thread."""

    def synchronize(self) -> None:
        """Block this thread, without the interpreter's lock, until the event is done."""


def resolve_device(text: str) -> torch.device:
    """The accelerator that `text` names; without a number, this thread's current one.

    Asked here and not when memory is claimed: that happens in another thread, whose current device
    is 0 whatever this one's is. Where there is no such accelerator, `require_device` says so later.
    """
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError(f"there is no device {text!r}; it is 'cuda' or 'cuda:N'") from error
    if str(device) != device.type:  # it has a number
        return device
    index = torch.accelerator.current_device_index() if _is_here(device) else 0
    return torch.device(device.type, index)


def require_device(device: torch.device) -> None:
    """`ConfigError` unless this machine, and this build of torch, have it."""
    if not _is_here(device):
        raise ConfigError(
            f"{device} is not available here; install a torch that has {device.type},"
            " on a machine that has one"
        )
    count = torch.accelerator.device_count()
    if device.index >= count:
        raise ConfigError(f"there is no {device}; this machine has {count}, counted from 0")


def _is_here(device: torch.device) -> bool:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator is not None and accelerator.type == device.type


def new_stream(device: torch.device) -> torch.Stream:
    """A stream that is ordered with no other, the default one included.

    Of CUDA's, torch has a pool of 32, and then gives them again: who shares ours by chance may wait
    for copies, and we for its kernels, but nothing runs out of order.
    """
    if device.type == "cuda":
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return torch.Stream(device)


def new_event(device: torch.device) -> DeviceEvent:
    """An event whose `synchronize` sleeps.

    `torch.Event` takes `blocking` and ignores it: on CUDA a thread in its `synchronize` would spin,
    and burn a core for as long as a copy takes.
    """
    if device.type == "cuda":
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    return torch.Event(device, blocking=True)


def stream_on(device: torch.device, stream: object | None) -> torch.Stream:
    """`stream`, or this thread's current one, as the device's events take it.

    Raises `UsageError` for what is no stream of the device, and for one that is being captured into
    a graph: events of before the capture have no place in it, and events in it are never done.
    """
    if stream is None:
        stream = torch.accelerator.current_stream(device)
    if not isinstance(stream, torch.Stream) or stream.device != device:
        raise UsageError(f"{stream!r} is not a torch stream of {device}")
    if device.type == "cuda" and not isinstance(stream, torch.cuda.Stream):
        # A CUDA event reads fields that the generic class does not have.
        stream = torch.cuda.Stream(  # type: ignore[no-untyped-call]
            stream_id=stream.stream_id,
            device_index=stream.device_index,
            device_type=stream.device_type,
        )
    if _is_capturing(stream):
        raise UsageError(
            "the stream is being captured; wait for copies, and note uses, around the replay"
        )
    return stream


def _is_capturing(stream: torch.Stream) -> bool:
    asked = getattr(stream, "is_capturing", None)  # of younger torch than we ask for
    if asked is not None:
        return bool(asked())
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


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


def start_watchers(*watchers: EventWatcher) -> None:
    """All of them, or `CapacityError` and none."""
    started: list[EventWatcher] = []
    try:
        for watcher in watchers:
            watcher.start()
            started.append(watcher)
    except CapacityError:
        for watcher in started:
            watcher.end()
        raise


class EventWatcher:
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
