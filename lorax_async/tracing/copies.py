"""One layer group's way through staging and the copy stream, as a trace has it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import current_thread

from lorax_async.tracing.recorder import Recorder, now

IMAGE = "image"
"""The lane of page-locked images, which are no buffers of the ring."""

STREAM = "stream"
"""The lane of copies that a device carries out by itself, one after the other."""


class CopyTimes:
    """Of one copy, in whatever threads it goes on. Made when it begins."""

    def __init__(self, recorder: Recorder, slot: int, layer: int) -> None:
        stay = recorder.stay_in(slot)
        self.start = now()
        self._recorder = recorder
        self._name = f"layer {layer}"
        self._args = {"stay": stay.number, "layer": layer, "adapter": stay.name}

    def staged(self, buffer: int | None, start: int, what: str) -> None:
        """A buffer was filled from `start` until now; None is an image."""
        lane = IMAGE if buffer is None else buffer
        self._recorder.add("staging", lane, what, start, now(), self._args)

    def until_free(self, buffer: int | None, start: int) -> Callable[[Future[None]], None]:
        """For the ticket of the copy that a buffer is held for."""

        def free(_: Future[None]) -> None:
            self.staged(buffer, start, self._name)

        return free

    def asked(self, ticket: Future[None], nbytes: int, *, in_stream: bool) -> None:
        """The device was asked for a copy just now; in a stream, or else in this thread."""
        lane: Hashable = STREAM if in_stream else current_thread().name.removeprefix("lorax-")
        start = now() if in_stream else self.start

        def done(ticket: Future[None]) -> None:
            error = ticket.exception()
            outcome = "done" if error is None else type(error).__name__
            args = {**self._args, "bytes": nbytes, "outcome": outcome}
            self._recorder.add("copies", lane, self._name, start, now(), args)

        ticket.add_done_callback(done)
