"""One connection: a socket that any thread may shut down, and the responses read from it.

`http.client.HTTPResponse` parses. Below it, `_Receiver` bounds what a server may do: the size and
the time of a head, and the throughput of a body.
"""

from __future__ import annotations

import io
import re
import select
import socket
import ssl
import struct
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.errors import FirstHeaderLineIsContinuationDefect, MissingHeaderBodySeparatorDefect
from http.client import HTTPException, HTTPMessage, HTTPResponse, IncompleteRead
from threading import Lock
from typing import TYPE_CHECKING, cast

from lorax_async.errors import FetchError
from lorax_async.http.failures import AbortedError, RetryableError, broken_off, timeout_error
from lorax_async.http.settings import Proxy, Timeouts
from lorax_async.urls import Origin

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


MAX_HEAD_BYTES = 64 << 10
_BUFFER_BYTES = 8 << 10
_MIN_READ_BYTES = 64 << 10
_REPORTED_SECONDS = 0.05
"""Wait this long, at most, for bytes before progress is visible to others."""

_LENGTH = re.compile(r"[0-9]{1,18}")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_UNIQUE = frozenset(
    {
        *("content-length", "content-range", "transfer-encoding", "content-encoding", "location"),
        *("etag", "retry-after"),
    }
)
"""Refused when they are repeated with different values: it is not clear which one counts."""

_DEFECTS = (FirstHeaderLineIsContinuationDefect, MissingHeaderBodySeparatorDefect)


class Connection:
    """A connection to one origin, from before it connects; one thread uses it at a time.

    `abort` shuts it down from any thread, which ends every call that waits on it, and does not
    close it: the thread that uses it does, so that no descriptor's number is reused under a call.

    Errors name the `peer`: the origin, or the proxy while that opens a tunnel. Requests name their
    URL whole if `proxy` is set. `address` is that of the other end, where that is the host;
    `number` is unique in a pool. `received` counts bytes over all requests, in the thread that
    reads.
    """

    def __init__(
        self, origin: Origin, timeouts: Timeouts, clock: Callable[[], float], number: int = 0
    ) -> None:
        self.origin = origin
        self.peer = str(origin)
        self.proxy: Proxy | None = None
        self.address: str | None = None
        self.number = number
        self.idle_since = 0.0
        self.received = 0
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self._is_tls = False
        self._aborted = False
        self._receiver = _Receiver(self, timeouts, clock)
        self._reader = _SocketReader(self._receiver, _BUFFER_BYTES)
        self._response: HTTPResponse | None = None
        self._broken = False

    # -- the socket -------------------------------------------------------------------------------

    def attach(self, opened: socket.socket) -> None:
        """Own this socket from here on. Raises `AbortedError` after an `abort`."""
        with self._lock:
            self._socket = opened
            aborted = self._aborted
        if aborted:
            raise AbortedError

    def secure(self, context: ssl.SSLContext, host: str, timeout: float) -> None:
        """Start TLS. Blocks; raises `OSError`."""
        plain = self._open_socket
        plain.settimeout(timeout)
        with self._lock:  # wrapping moves the descriptor to another object
            tls = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            self._socket, self._is_tls = tls, True
        tls.do_handshake()

    def set_timeout(self, seconds: float) -> None:
        """Bound how long each later call waits for a byte to come or go."""
        if self._is_tls:
            self._open_socket.settimeout(seconds)
            return
        # The kernel's own timeout: with one of Python's, a socket is polled before each read and
        # cannot wait for a whole buffer in one call.
        whole, part = divmod(seconds, 1)
        wait = struct.pack("@ll", int(whole), int(part * 1e6))
        self._open_socket.setblocking(True)
        self._open_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        self._open_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)

    @property
    def _open_socket(self) -> socket.socket:
        assert self._socket is not None
        return self._socket

    def send(self, lines: list[str]) -> None:
        """Send a request without a body. Raises `OSError`."""
        # An ETag goes back as it came, and may have any byte from 0x80 on (RFC 9110, 8.8.3).
        self._open_socket.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def receive(self, view: memoryview, *, all_of_it: bool) -> int:
        """Receive what is there; 0 at the end. Raises `OSError`, and `AbortedError` if aborted.

        `all_of_it` waits for a full view where the kernel can: fewer calls, no GIL between.
        """
        assert self._socket is not None
        flags = socket.MSG_WAITALL if all_of_it and not self._is_tls else 0
        count = self._socket.recv_into(view, 0, flags)
        if self._aborted and not count:  # what came before the abort is good
            raise AbortedError
        self.received += count
        return count

    @property
    def is_quiet(self) -> bool:
        """Whether an idle connection is open and nothing came on it."""
        poll = select.poll()
        poll.register(self._open_socket.fileno(), select.POLLIN | select.POLLRDHUP)
        return not poll.poll(0)

    def abort(self) -> None:
        """Shut the socket down. From any thread; quick, idempotent."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with suppress(OSError):  # not connected yet, or not any more
                    # The base class's: a TLS socket would drop its state under the reading thread.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, and the last response, from the thread that uses it. Idempotent."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
        # Its finaliser flushes the reader, which the garbage collector may have closed before it.
        if self._response is not None:
            self._response.close()

    # -- responses --------------------------------------------------------------------------------

    def makefile(self, *_: object) -> io.BufferedReader:
        """Return what `http.client` reads from: the same for each response."""
        return self._reader

    def receive_head(self) -> ResponseHead:
        """Receive the next head that is no interim one.

        Raises `OSError`, `RetryableError`, `AbortedError`, and `FetchError` for what is malformed.
        """
        self._receiver.begin_head()
        response = None
        while response is None or response.status in {102, 103}:
            response = HTTPResponse(cast(socket.socket, self), method="GET")
            self._response = response
            try:
                response.begin()
            except OSError:
                raise
            except HTTPException as error:
                raise self._malformed(type(error).__name__) from None
        self._receiver.begin_body()
        fields = self._fields(response.msg)
        coding, length = fields.get("transfer-encoding"), fields.get("content-length")
        if coding is not None and (coding.lower() != "chunked" or length is not None):
            raise self._malformed("the form of its body is not clear")
        if length is not None and not _LENGTH.fullmatch(length):
            raise self._malformed("its Content-Length is no number")
        return ResponseHead(response.status, fields, response.length)

    def _fields(self, message: HTTPMessage) -> dict[str, str]:
        """Return the fields, which `http.client` takes as they come."""
        if any(isinstance(defect, _DEFECTS) for defect in message.defects):
            raise self._malformed("a field of it is malformed")
        fields: dict[str, str] = {}
        for name, text in message.raw_items():
            name, value = name.lower(), text.strip(" \t")  # noqa: PLW2901 - normalized
            if not _VALUE.fullmatch(value):
                raise self._malformed("a field of it has control characters")
            before = fields.get(name)
            if before is not None and name in _UNIQUE and before != value:
                raise self._malformed(f"it has two different {name} fields")
            joined = before is not None and name not in _UNIQUE
            fields[name] = f"{before}, {value}" if joined else value
        return fields

    def _malformed(self, problem: str) -> FetchError:
        return FetchError(f"{self.peer} sent a malformed response: {problem}")

    def fill(self, view: memoryview) -> int:
        """Read the body until the view is full or the body ends; return the number of bytes.

        A failure is raised by the call that has no byte to return. Raises as `receive_head` does.
        """
        assert self._response is not None
        receiver, got = self._receiver, 0
        while got < len(view):
            # Wait for few bytes in one call on a slow link, so that progress is visible there.
            size = _MIN_READ_BYTES
            if receiver.seconds > 0:
                size = max(size, int(receiver.nbytes / receiver.seconds * _REPORTED_SECONDS))
            part = view[got : got + size]
            try:
                count = self._response.readinto(part)
            except IncompleteRead as error:
                count, self._broken = len(error.partial), True
            except HTTPException as error:
                raise self._malformed(type(error).__name__) from None
            got += count
            if count < len(part):
                break
        if not got and len(view):
            if self._receiver.failure is not None:
                raise self._receiver.failure
            if self._broken or self._response.length:
                raise broken_off(self.peer)
        return got

    def measured(self) -> tuple[int, float | None]:
        """Return the body's bytes so far, and how many came per second of waiting for them."""
        nbytes, seconds = self._receiver.nbytes, self._receiver.seconds
        return nbytes, nbytes / seconds if seconds > 0 else None

    @property
    def body_ended(self) -> bool:
        """Whether the body was read whole."""
        response = self._response
        if response is None or self._broken or self._receiver.failure is not None:
            return False
        return response.isclosed() if response.length is None else not response.length

    @property
    def is_reusable(self) -> bool:
        """Whether another request may follow."""
        response = self._response
        stays_open = response is not None and not response.will_close
        return stays_open and self.body_ended and self.is_drained

    @property
    def is_drained(self) -> bool:
        """Whether nothing is left of what came."""
        self._receiver.paused = True
        try:
            return not self._reader.peek()
        finally:
            self._receiver.paused = False


class _Receiver(io.RawIOBase):
    """The raw stream below `http.client`.

    In a head it raises. In a body it keeps the failure and reports the end instead, so that the
    buffer above returns the bytes that came before. It measures the seconds of waiting for the
    body's bytes, and refuses what is too slow for too long.
    """

    def __init__(
        self, connection: Connection, timeouts: Timeouts, clock: Callable[[], float]
    ) -> None:
        self._connection = connection
        self._timeouts = timeouts
        self._clock = clock
        self._head_deadline: float | None = None
        self._head_bytes = 0
        self.paused = False
        """Read nothing: for a look at what is buffered."""

        self.failure: Exception | None = None
        self.begin_body()

    def begin_head(self) -> None:
        self._head_deadline = self._clock() + self._timeouts.read
        self._head_bytes = 0

    def begin_body(self) -> None:
        self._head_deadline = None
        self.nbytes, self.seconds = 0, 0.0
        self._checked = (0, 0.0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer)
        if self.paused or self.failure is not None:
            return 0
        if self._head_deadline is not None:
            return self._receive_head(view, self._head_deadline)
        begun = self._clock()
        try:
            # A larger view than the buffer is the caller's own, and has room for no other bytes.
            count = self._connection.receive(view, all_of_it=len(view) > _BUFFER_BYTES)
            self.nbytes += count
            self.seconds += self._clock() - begun
            if self.seconds - self._checked[1] >= self._timeouts.over:
                self._check_rate()
        except (OSError, AbortedError, RetryableError) as error:
            self.failure = error
            return 0
        return count

    def _check_rate(self) -> None:
        """Raise `RetryableError` below `Timeouts.slowest`, on average since the last check."""
        nbytes, seconds = self.nbytes - self._checked[0], self.seconds - self._checked[1]
        if nbytes / seconds < self._timeouts.slowest:
            raise timeout_error(
                f"{self._connection.peer} sent {nbytes / seconds:,.0f} bytes per second, less"
                f" than the {self._timeouts.slowest:,.0f} that are required"
            )
        self._checked = (self.nbytes, self.seconds)

    def _receive_head(self, view: memoryview, deadline: float) -> int:
        peer = self._connection.peer
        if self._head_bytes > MAX_HEAD_BYTES:
            raise FetchError(f"{peer} sent a response whose head has no end")
        count = self._connection.receive(view, all_of_it=False)
        if not count and self._head_bytes:  # http.client would take the part for the whole
            raise broken_off(peer)
        if count and self._clock() > deadline:
            raise timeout_error(f"{peer} did not send the head of its response in time")
        self._head_bytes += count
        return count


class _SocketReader(io.BufferedReader):
    def close(self) -> None:
        """Stay open: `http.client` closes it after each response, and the connection goes on."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """The head of a response: names in lower case, repeated fields joined by a comma.

    `length` is that of the body, where the server says so.
    """

    status: int
    fields: Mapping[str, str]
    length: int | None


class Attempt:
    """One thread's try at one piece, which any thread may end.

    `origin` is the one that it waits for now: redirects may lead to another one.
    """

    def __init__(self, origin: Hashable = None) -> None:
        self.origin = origin
        self.ended = False
        self._lock = Lock()
        self._connection: Connection | None = None
        self._received = 0

    @property
    def received(self) -> int:
        """Bytes received for it so far, on all its connections."""
        with self._lock:
            return self._received + (self._connection.received if self._connection else 0)

    def use(self, connection: Connection) -> None:
        """Let `end` abort this connection from here on. Raises `AbortedError` after an `end`."""
        self.release()
        with self._lock:
            self._connection = connection
            self._received -= connection.received  # those came for earlier requests
        self.check()

    def check(self) -> None:
        """Raise `AbortedError` after an `end`."""
        if self.ended:
            raise AbortedError

    def end(self) -> None:
        """End it, wherever its thread waits. From any thread; quick, idempotent."""
        with self._lock:
            self.ended = True
            if self._connection is not None:
                self._connection.abort()

    def release(self) -> None:
        """Leave the connection to others."""
        with self._lock:
            if self._connection is not None:
                self._received += self._connection.received
            self._connection = None
