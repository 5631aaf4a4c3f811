"""Files served on loopback over a slow link, as a demonstration needs it. For nothing else."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

CHUNK = 8 << 10
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})")


class Link:
    """A line that brings `rate` bytes per second, for all who use it together."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._ended = threading.Event()

    def wait(self, nbytes: int) -> None:
        """Until so many bytes are through. Raises `BrokenPipeError` when the line is cut."""
        with self._lock:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + nbytes / self._rate
            seconds = self._free_at - now
        if self._ended.wait(seconds):
            raise BrokenPipeError("the link was cut")

    def cut(self) -> None:
        self._ended.set()


@dataclass(frozen=True, slots=True)
class Served:
    """A file with its strong ETag and its digest, as fields of a response have them."""

    content: memoryview
    etag: str
    digest: str

    @classmethod
    def of(cls, content: bytes) -> Self:
        found = hashlib.sha256(content)
        digest = f"sha-256=:{b64encode(found.digest()).decode()}:"
        return cls(memoryview(content), f'"{found.hexdigest()[:32]}"', digest)


class SlowServer(ThreadingHTTPServer):
    """Serves `files` by their targets, in threads of its own, while it is entered.

    Ranges are served, and the digest is sent along; all else is a 404.
    """

    daemon_threads = False

    def __init__(self, files: Mapping[str, bytes], rate: float) -> None:
        self.served = {target: Served.of(content) for target, content in files.items()}
        self.link = Link(rate)
        super().__init__(("127.0.0.1", 0), _Handler)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(
            target=self.serve_forever, args=(0.01,), name="lorax-slow-server"
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Clients are to have left: their threads are waited for."""
        self.link.cut()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def url(self, folder: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{folder}/"


class _Handler(BaseHTTPRequestHandler):
    server: SlowServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def do_GET(self) -> None:
        served = self.server.served.get(self.path)
        if served is None:
            self._head(404, 0)
            return
        size = len(served.content)
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        fields = {"ETag": served.etag, "Repr-Digest": served.digest}
        if asked is None:
            self._head(200, size, **fields)
            self._send(served.content)
            return
        start, stop = int(asked[1]), min(int(asked[2]) + 1, size)
        if start >= stop:
            self._head(416, 0)
            return
        fields["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._head(206, stop - start, **fields)
        self._send(served.content[start:stop])

    def finish(self) -> None:
        with suppress(OSError):  # the other end is gone
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # the other end is gone
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""

    def _head(self, status: int, length: int, **fields: str) -> None:
        self.send_response(status)
        for name, value in {**fields, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, content: memoryview) -> None:
        for start in range(0, len(content), CHUNK):
            chunk = content[start : start + CHUNK]
            self.server.link.wait(len(chunk))
            self.wfile.write(chunk)
