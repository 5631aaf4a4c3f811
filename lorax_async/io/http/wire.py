"""One socket, which one thread uses and any thread may end."""

from __future__ import annotations

import select
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from lorax_async.io.http.failures import AbortedError


class Wire:
    """A socket from before it connects until it is closed.

    `abort` shuts the socket down, which ends every call that waits on it, and lets go of nothing:
    the thread that uses it closes it, so that no descriptor's number is reused under a call.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._socket: socket.socket | None = None
        self._tls: ssl.SSLSocket | None = None
        self._aborted = False
        self.received = 0
        """Bytes so far, over all requests; written by the thread that reads."""

    def attach(self, opened: socket.socket) -> None:
        """The socket is the wire's from here on. Raises `AbortedError` after an `abort`."""
        with self._lock:
            self._socket = opened
            aborted = self._aborted
        if aborted:
            raise AbortedError

    def secure(self, context: ssl.SSLContext, host: str, timeout: float) -> None:
        """Speak TLS from here on. Blocks; raises `OSError`."""
        plain = self.socket
        plain.settimeout(timeout)
        with self._lock:  # wrapping moves the descriptor to another object
            tls = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
            self._socket, self._tls = tls, tls
        tls.do_handshake()

    def set_timeout(self, seconds: float) -> None:
        """For every call from here on: how long it waits for a byte to come or go."""
        if self._tls is not None:
            self._tls.settimeout(seconds)
            return
        # The system's own timeout: a socket with one of Python's would be asked first, then read,
        # and could not wait for a whole buffer in one call.
        whole, part = divmod(seconds, 1)
        wait = struct.pack("@ll", int(whole), int(part * 1e6))
        plain = self.socket
        plain.setblocking(True)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, wait)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, wait)

    @property
    def socket(self) -> socket.socket:
        assert self._socket is not None
        return self._socket

    def send(self, data: bytes) -> None:
        self._checked(lambda: self.socket.sendall(data))

    def receive(self, view: memoryview) -> int:
        """What is there, at most as much as fits; 0 at the end."""
        return self._received(lambda: self.socket.recv_into(view))

    def receive_all(self, view: memoryview) -> int:
        """As `receive`, waiting for all of it where the system can: fewer calls, no GIL between."""
        flags = 0 if self._tls is not None else socket.MSG_WAITALL
        return self._received(lambda: self.socket.recv_into(view, 0, flags))

    def _received(self, call: Callable[[], int]) -> int:
        count = self._checked(call)
        self.received += count
        return count

    def _checked(self, call: Callable[[], int | None]) -> int:
        try:
            count = call() or 0
        except OSError:
            if self._aborted:
                raise AbortedError from None
            raise
        if self._aborted and not count:  # what came before is good
            raise AbortedError
        return count

    @property
    def quiet(self) -> bool:
        """Nothing came on an idle connection, nor was it closed."""
        watch = select.poll()
        watch.register(self.socket.fileno(), select.POLLIN | select.POLLRDHUP)
        return not watch.poll(0)

    def abort(self) -> None:
        """From any thread. Quick, idempotent."""
        with self._lock:
            self._aborted = True
            if self._socket is not None:
                with suppress(OSError):  # not connected yet, or not any more
                    # The base class's: a TLS socket would drop its state under the reading thread.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """By the thread that uses it. Idempotent."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
