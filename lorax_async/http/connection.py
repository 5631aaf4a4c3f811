"""One connection: a socket that any thread may shut down, and the responses read from it.

HTTP/1 is read here (RFC 9112): `http.client` spends 90 Python calls on each head, and each read of
a body passes three of its layers. What a server may do is bounded: the size and the time of a head,
and the throughput of a body.
"""

from __future__ import annotations

import re
import select
import socket
import ssl
import struct
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock

from lorax_async.errors import FetchError
from lorax_async.http.failures import (
    AbortedError,
    RetryableError,
    UnansweredError,
    broken_off,
    timeout_error,
)
from lorax_async.http.settings import Proxy, Rules, Timeouts
from lorax_async.urls import Origin, Url

MAX_HEAD_BYTES = 64 << 10
_BUFFER_BYTES = 8 << 10
_MIN_READ_BYTES = 64 << 10
_REPORTED_SECONDS = 0.05
"""Wait this long, at most, for bytes before progress is visible to others."""

_BEGINNING = b"HTTP/1."
_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS = re.compile(r"HTTP/1\.([0-9]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[\t ]*([\t\x20-\x7e\x80-\xff]*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[\t ]*(?:;.*)?")
_MAX_FIELDS = 100
_INTERIM = frozenset({100, 102, 103})
_BODILESS = frozenset({204, 304})
_UNIQUE = frozenset(
    {
        *("content-length", "content-range", "transfer-encoding", "content-encoding", "location"),
        *("etag", "retry-after"),
    }
)
"""Refused when they are repeated with different values: it is not clear which one counts."""


class Connection:
    """A connection to one origin, from before it connects; one thread uses it at a time.

    `abort` shuts it down from any thread, which ends every call that waits on it, and does not
    close it: the thread that uses it does, so that no descriptor's number is reused under a call.

    Errors name the `peer`: the origin, or the proxy while that opens a tunnel. Requests name their
    URL whole if `proxy` is set. `address` is that of the other end, where that is the host;
    `allowed_for` the last URL and rules that it was compared with. `number` is unique in a pool.
    `received` counts bytes over all requests, in the thread that reads.
    """

    def __init__(
        self, origin: Origin, timeouts: Timeouts, clock: Callable[[], float], number: int = 0
    ) -> None:
        self.origin = origin
        self.peer = str(origin)
        self.proxy: Proxy | None = None
        self.address: str | None = None
        self.allowed_for: tuple[Url | None, Rules | None] = None, None
        self.number = number
        self.idle_since = 0.0
        self.received = 0
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self._is_tls = False
        self._aborted = False
        self._timeouts = timeouts
        self._clock = clock
        self._scratch = memoryview(bytearray(_BUFFER_BYTES))
        self._buffered = bytearray()
        """Received with a head or a line, and not read yet."""

        self._head_bytes = 0
        self._body = _Body(0, chunked=False)
        self._stays_open = False

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
        """Close the socket, from the thread that uses it. Idempotent."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()

    # -- responses --------------------------------------------------------------------------------

    def receive_head(self) -> ResponseHead:
        """Receive the next head that is no interim one.

        Raises `OSError`, `RetryableError`, `AbortedError`, and `FetchError` for what is malformed.
        """
        deadline, self._head_bytes = self._clock() + self._timeouts.read, 0
        while True:
            minor, status, fields = self._parse_head(self._read_head(deadline))
            if status not in _INTERIM:
                break
        coding, length = fields.get("transfer-encoding"), fields.get("content-length")
        if coding is not None and (coding.lower() != "chunked" or length is not None):
            raise self._malformed("the form of its body is not clear")
        if length is not None and not _LENGTH.fullmatch(length):
            raise self._malformed("its Content-Length is no number")
        nbytes = None if length is None else int(length)
        if status < 200 or status in _BODILESS:
            nbytes = 0
        self._body = _Body(nbytes, chunked=coding is not None)
        kept = fields.get("connection", "").lower()
        has_end = nbytes is not None or coding is not None
        self._stays_open = has_end and ("close" not in kept if minor else "keep-alive" in kept)
        return ResponseHead(status, fields, nbytes)

    def _read_head(self, deadline: float) -> bytes:
        """Read on to the empty line, and refuse at once what is no head."""
        seen = 0
        while (end := _HEAD_END.search(self._buffered, seen)) is None:
            seen = max(0, len(self._buffered) - 3)
            if not self._buffered.startswith(_BEGINNING[: len(self._buffered)]):
                raise self._malformed("it does not begin as one")
            if self._head_bytes > MAX_HEAD_BYTES:
                raise FetchError(f"{self.peer} sent a response whose head has no end")
            count = self._buffer(self.receive(self._scratch, all_of_it=False))
            if not count:
                raise broken_off(self.peer) if self._buffered else UnansweredError()
            if self._clock() > deadline:
                raise timeout_error(f"{self.peer} did not send the head of its response in time")
            self._head_bytes += count
        head = bytes(self._buffered[: end.start()])
        del self._buffered[: end.end()]
        return head

    def _parse_head(self, head: bytes) -> tuple[int, int, dict[str, str]]:
        """Return the minor version, the status and the fields."""
        begin, *lines = head.decode("latin-1").replace("\r\n", "\n").split("\n")
        version = _STATUS.fullmatch(begin)
        if version is None:
            raise self._malformed("its first line is none of HTTP/1")
        if len(lines) > _MAX_FIELDS:
            raise self._malformed("it has too many fields")
        fields: dict[str, str] = {}
        for line in lines:
            if (field := _FIELD.fullmatch(line)) is None:
                raise self._malformed("a field of it is malformed")
            name, value = field[1].lower(), field[2].rstrip(" \t")
            before = fields.get(name)
            if before is not None and name in _UNIQUE and before != value:
                raise self._malformed(f"it has two different {name} fields")
            joined = before is not None and name not in _UNIQUE
            fields[name] = f"{before}, {value}" if joined else value
        return int(version[1]), int(version[2]), fields

    def _malformed(self, problem: str) -> FetchError:
        return FetchError(f"{self.peer} sent a malformed response: {problem}")

    def fill(self, view: memoryview) -> int:
        """Read the body until the view is full or the body ends; return the number of bytes.

        A failure is raised by the call that has no byte to return. Raises as `receive_head` does.
        """
        body, got = self._body, 0
        while got < len(view) and not body.ended and body.failure is None:
            # Wait for few bytes in one call on a slow link, so that progress is visible there.
            size = _MIN_READ_BYTES
            if body.seconds > 0:
                size = max(size, int(body.nbytes / body.seconds * _REPORTED_SECONDS))
            try:
                got += self._read(body, view[got : got + size])
            except (OSError, AbortedError, RetryableError, FetchError) as error:
                body.failure = error
        if body.failure is not None and not got and len(view):
            raise body.failure
        return got

    def _read(self, body: _Body, view: memoryview) -> int:
        """Read some bytes of the body; 0 at its end."""
        if body.chunked and not body.left and not self._begin_chunk(body):
            body.ended = True
            return 0
        if body.left is not None:
            view = view[: body.left]
        if self._buffered:
            count = min(len(view), len(self._buffered))
            view[:count] = self._buffered[:count]
            del self._buffered[:count]
        else:
            count = self._receive_body(body, view, all_of_it=True)
        if body.left is None:
            body.ended = not count
        elif not count:
            raise broken_off(self.peer)
        else:
            body.left -= count
            body.ended = not body.left and not body.chunked
        return count

    def _begin_chunk(self, body: _Body) -> int:
        """Read the size of the next chunk, which is 0 after the last one, with its trailer."""
        if body.left is not None and self._read_line(body):
            raise self._malformed("a chunk of it has no end")
        size = _CHUNK.fullmatch(self._read_line(body))
        if size is None:
            raise self._malformed("the size of a chunk is no number")
        body.left = int(size[1], 16)
        if not body.left:
            lines = 0
            while self._read_line(body):
                if (lines := lines + 1) > _MAX_FIELDS:
                    raise self._malformed("it has too many fields")
        return body.left

    def _read_line(self, body: _Body) -> bytes:
        while (end := self._buffered.find(b"\n")) < 0:
            if len(self._buffered) > _BUFFER_BYTES:
                raise self._malformed("a line of it has no end")
            if not self._buffer(self._receive_body(body, self._scratch, all_of_it=False)):
                raise broken_off(self.peer)
        line = bytes(self._buffered[: end + 1])
        del self._buffered[: end + 1]
        if not line.endswith(b"\r\n"):  # a chunk that lost a byte would take the first one
            raise self._malformed("a line of it has no end")
        return line[:-2]

    def _buffer(self, count: int) -> int:
        self._buffered += self._scratch[:count]
        return count

    def _receive_body(self, body: _Body, view: memoryview, *, all_of_it: bool) -> int:
        """Receive, count the seconds, and refuse what is too slow for too long."""
        begun = self._clock()
        count = self.receive(view, all_of_it=all_of_it)
        body.nbytes += count
        body.seconds += self._clock() - begun
        seconds = body.seconds - body.checked[1]
        if seconds >= self._timeouts.over:
            rate = (body.nbytes - body.checked[0]) / seconds
            body.checked = body.nbytes, body.seconds
            if rate < self._timeouts.slowest:
                raise timeout_error(
                    f"{self.peer} sent {rate:,.0f} bytes per second, less than the"
                    f" {self._timeouts.slowest:,.0f} that are required"
                )
        return count

    def measured(self) -> tuple[int, float | None]:
        """Return the body's bytes so far, and how many came per second of waiting for them."""
        nbytes, seconds = self._body.nbytes, self._body.seconds
        return nbytes, nbytes / seconds if seconds > 0 else None

    @property
    def body_ended(self) -> bool:
        """Whether the body was read whole."""
        return self._body.ended

    @property
    def is_reusable(self) -> bool:
        """Whether another request may follow."""
        return self._stays_open and self._body.ended and self.is_drained

    @property
    def is_drained(self) -> bool:
        """Whether nothing is left of what came."""
        return not self._buffered


@dataclass(slots=True)
class _Body:
    """A body that is being read.

    `left` bytes are still to come of it, or of its present chunk; if None, it ends with the
    connection, or no chunk has begun. `nbytes` came in `seconds` of waiting, and those in `checked`
    came fast enough. A `failure` is that of its last read.
    """

    left: int | None
    chunked: bool
    ended: bool = field(init=False)
    failure: Exception | None = None
    nbytes: int = 0
    seconds: float = 0.0
    checked: tuple[int, float] = (0, 0.0)

    def __post_init__(self) -> None:
        self.ended = self.left == 0


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
