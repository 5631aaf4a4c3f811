"""What comes on a connection: heads, lines and bytes, each within its time and size."""

from __future__ import annotations

from collections.abc import Callable

from lorax_async.errors import FetchError
from lorax_async.io.http.failures import (
    AbortedError,
    NoAnswerError,
    SetbackError,
    broken_off,
    timed_out,
)
from lorax_async.io.http.head import MAX_HEAD_BYTES, Head, MalformedHeadError, parse_head
from lorax_async.io.http.settings import Timeouts
from lorax_async.io.http.wire import Wire

_LINE = 16 << 10
_LEAST = 64 << 10
_SEEN_SECONDS = 0.05
_INTERIM = 8
_END = b"\r\n\r\n"


class Pace:
    """Whether bytes come fast enough, over the time that was spent waiting for them."""

    def __init__(self, timeouts: Timeouts, what: str) -> None:
        self._timeouts = timeouts
        self._what = what
        self._bytes = 0
        self._seconds = 0.0
        self.nbytes = 0
        self.seconds = 0.0

    def add(self, nbytes: int, seconds: float) -> None:
        """Raises a `SetbackError` when it was too slow for too long."""
        self.nbytes += nbytes
        self.seconds += seconds
        self._bytes += nbytes
        self._seconds += seconds
        if self._seconds >= self._timeouts.over:
            rate = self._bytes / self._seconds
            if rate < self._timeouts.slowest:
                raise timed_out(
                    f"{self._what} sent {rate:,.0f} bytes per second, less than the"
                    f" {self._timeouts.slowest:,.0f} that are asked of it"
                )
            self._bytes, self._seconds = 0, 0.0

    @property
    def rate(self) -> float | None:
        """Bytes per second of waiting; None before there was any."""
        return self.nbytes / self.seconds if self.seconds > 0 else None


class Stream:
    """Reads from a wire. Raises `OSError`s as they come, and `SetbackError`s of its own.

    `what` names the other end in texts.
    """

    def __init__(
        self, wire: Wire, timeouts: Timeouts, clock: Callable[[], float], what: str
    ) -> None:
        self.wire = wire
        self.what = what
        self._timeouts = timeouts
        self._clock = clock
        self._ahead = b""
        self.pace = Pace(timeouts, what)

    @property
    def clean(self) -> bool:
        """Nothing is left of what came."""
        return not self._ahead

    def head(self) -> Head:
        """The next head that is no interim one. All of it must come within the read timeout."""
        self.pace = Pace(self._timeouts, self.what)
        late = self._clock() + self._timeouts.read
        for _ in range(_INTERIM):
            try:
                head = parse_head(self._until(_END, MAX_HEAD_BYTES, late))
            except MalformedHeadError as error:
                raise FetchError(f"{self.what} sent a malformed response: {error}") from error
            if head.status >= 200:
                return head
            if head.status == 101:
                break
        raise FetchError(f"{self.what} sent interim responses and no other")

    def line(self, most: int) -> bytes:
        """Up to the next CRLF, which is not part of it."""
        return self._until(b"\r\n", most, self._clock() + self._timeouts.read)

    def some(self, view: memoryview) -> int:
        """What is there, or comes next; 0 at the end."""
        return self._taken(view) or self._received(view, self.wire.receive)

    def fill(self, view: memoryview) -> int:
        """Until the view is full or the other end has closed; how much came.

        Who is ended meanwhile gets what came before, and is told when he asks for more.
        """
        got = self._taken(view)
        while got < len(view):
            try:
                count = self._received(view[got : got + self._at_once], self.wire.receive_all)
            except AbortedError:
                if not got:
                    raise
                break
            if not count:
                break
            got += count
        return got

    @property
    def _at_once(self) -> int:
        """Bytes to wait for in one call: few on a slow link, so that progress is seen there."""
        return max(_LEAST, int((self.pace.rate or 0.0) * _SEEN_SECONDS))

    def _received(self, view: memoryview, receive: Callable[[memoryview], int]) -> int:
        begun = self._clock()
        count = receive(view)
        self.pace.add(count, self._clock() - begun)
        return count

    def _taken(self, view: memoryview) -> int:
        count = min(len(view), len(self._ahead))
        view[:count] = self._ahead[:count]
        self._ahead = self._ahead[count:]
        return count

    def _until(self, end: bytes, most: int, late: float) -> bytes:
        data = bytearray(self._ahead)
        part = memoryview(bytearray(_LINE))
        looked = 0
        while (place := data.find(end, looked)) < 0:
            if len(data) > most:
                raise FetchError(f"{self.what} sent a response whose head has no end")
            looked = max(0, len(data) - len(end) + 1)
            count = self.wire.receive(part)
            if not count:
                raise self._ended(data)
            if self._clock() > late:
                raise timed_out(f"{self.what} did not send the head of its response in time")
            data += part[:count]
        if place > most:
            raise FetchError(f"{self.what} sent a response whose head has no end")
        self._ahead = bytes(data[place + len(end) :])
        return bytes(data[:place])

    def _ended(self, data: bytes | bytearray) -> SetbackError:
        if data:
            return broken_off(self.what)
        return NoAnswerError(FetchError(f"{self.what} closed the connection without an answer"))
