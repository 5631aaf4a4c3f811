"""An HTTP server on loopback that answers by a function, one thread per connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


@dataclass
class Asked:
    """A request as it came, and its answer's status; fields by name in lower case."""

    method: str
    target: str
    fields: dict[str, str]
    body: bytes = field(default=b"", repr=False)
    status: int = 0
    at_store: bool = False


@dataclass
class Reply:
    status: int
    fields: dict[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)


class AnsweringServer(ThreadingHTTPServer):
    """`answer` is called in the thread of the connection, once per request."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, answer: Callable[[Asked], Reply]) -> None:
        self.answer = answer
        self.clients: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join(10)
        assert not self._thread.is_alive()
        for client in list(self.clients):
            with suppress(OSError):  # it is closed already
                client.shutdown(socket.SHUT_RDWR)
        self.server_close()

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: AnsweringServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.clients.add(self.connection)

    def finish(self) -> None:
        self.server.clients.discard(self.connection)
        with suppress(OSError):  # the other end is gone
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """It is in `asked`."""

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        fields = {name.lower(): value for name, value in self.headers.items()}
        reply = self.server.answer(Asked(self.command, self.path, fields, self.rfile.read(length)))
        with suppress(OSError):  # the other end is gone
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.fields}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = _serve
