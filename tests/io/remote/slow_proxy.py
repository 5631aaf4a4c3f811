"""A link to a server on loopback that can be held, and cut."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Self


class SlowProxy:
    """Passes bytes to a port of this machine and back, a thread for each direction."""

    rate: float | None = None
    """Bytes per second that come back on each connection."""

    def __init__(self, port: int) -> None:
        self._server = port
        self._left: int | None = None
        self._changed = threading.Condition()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        """End all connections, and refuse others. Idempotent."""
        self.go_on()
        accepting = self._threads[0]
        with suppress(OSError):  # it was ended before
            self._listener.shutdown(socket.SHUT_RDWR)
        accepting.join(20)
        for each in self._sockets:
            with suppress(OSError):  # its other end is gone
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()
        self._listener.close()

    close = __exit__

    def stop_after(self, nbytes: int) -> None:
        """Let so many more come back, and no others before `go_on`."""
        with self._changed:
            self._left = nbytes

    @property
    def stopped(self) -> bool:
        return self._left is not None and self._left <= 0

    def go_on(self) -> None:
        with self._changed:
            self._left = self.rate = None
            self._changed.notify_all()

    def _start(self, work: object, *given: object) -> None:
        thread = threading.Thread(target=work, args=given, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):  # at its end
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server), 10)
                except OSError:  # it has ended
                    client.close()
                    continue
                server.settimeout(None)
                self._sockets += [client, server]
                self._start(self._pass_on, client, server)
                self._start(self._pass_back, server, client)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65_536):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)

    def _pass_back(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(self._allowance()):
                with self._changed:
                    if self._left is not None:
                        self._left -= len(data)
                client.sendall(data)
                if self.rate is not None:
                    time.sleep(len(data) / self.rate)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
        client.close()
        server.close()

    def _allowance(self) -> int:
        """How many bytes may come back, once any may."""
        with self._changed:
            self._changed.wait_for(lambda: not self.stopped)
            most = 65_536 if self.rate is None else 4_096
            return most if self._left is None else min(most, self._left)
