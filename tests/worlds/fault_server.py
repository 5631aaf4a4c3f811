"""A loopback server with scripted, also wrong, behaviour: one thread per connection."""

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

ETAG = '"v1"'


class Hangup(Exception):
    """Ends the connection from within a behaviour."""


@dataclass
class Asked:
    """A received request; field names are in lower case."""

    line: str
    fields: dict[str, str]
    raw: str
    body: bytes = b""

    @property
    def method(self) -> str:
        return self.line.split(" ")[0]

    @property
    def target(self) -> str:
        return self.line.split(" ")[1]

    @property
    def span(self) -> tuple[int, int] | None:
        text = self.fields.get("range")
        if text is None:
            return None
        first, last = text.removeprefix("bytes=").split("-")
        return int(first), int(last) + 1


@dataclass
class Client:
    """The server's end of one connection."""

    socket: socket.socket
    ending: threading.Event
    number: int
    requests: int = 0

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def head(self, status: str, *fields: str) -> None:
        self.send("\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode("latin-1"))

    def part(
        self, start: int, stop: int, total: int, *fields: str, length: int | None = None
    ) -> None:
        """Send the head of a response with bytes [start, stop); `length` may be wrong."""
        self.head(
            "206 Partial Content",
            f"Content-Length: {stop - start if length is None else length}",
            f"Content-Range: bytes {start}-{stop - 1}/{total}",
            *fields,
        )

    def drip(self, data: bytes, seconds: float = 0.01) -> None:
        for n in range(len(data)):
            self.send(data[n : n + 1])
            if self.ending.wait(seconds):
                raise Hangup

    def stall(self) -> None:
        self.ending.wait(30)
        raise Hangup

    def hang_up(self) -> None:
        raise Hangup

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Hangup


Behaviour = Callable[[Asked, Client], None]


def begin(asked: Asked, client: Client, data: bytes, *fields: str) -> bytes:
    """Send the head of the correct response; return the body that should follow."""
    if asked.span is None:
        client.head("200 OK", f"Content-Length: {len(data)}", *fields)
        return data
    start, stop = asked.span[0], min(asked.span[1], len(data))
    client.part(start, stop, len(data), *fields)
    return data[start:stop]


def answer(asked: Asked, client: Client, data: bytes, *fields: str) -> None:
    """Send the correct response: the requested range, or the whole content."""
    client.send(begin(asked, client, data, *fields))


@dataclass
class FaultServer:
    """Serves `data` at every target; `behave` answers each request instead, if given."""

    data: bytes
    behave: Behaviour | None = None
    etag: str | None = ETAG
    asked: list[Asked] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._ending = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for client in list(self.clients):
            with suppress(OSError):  # it is closed already
                client.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self._listener.close()

    def url(self, path: str = "/weights") -> str:
        return f"http://{self.netloc}{path}"

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[tuple[int, int] | None]:
        return [asked.span for asked in self.asked]

    def connected(self) -> int:
        """Return the number of connections that are open at both ends."""
        return sum(client.socket.fileno() >= 0 for client in self.clients)

    def right(self, asked: Asked, client: Client) -> None:
        """Answer as a correct server does."""
        answer(asked, client, self.data, *([f"ETag: {self.etag}"] if self.etag else []))

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                return
            client = Client(connected, self._ending, len(self.clients))
            self.clients.append(client)
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: Client) -> None:
        try:
            while (asked := self._read(client)) is not None:
                client.requests += 1
                self.asked.append(asked)
                (self.behave or self.right)(asked, client)
        except (Hangup, OSError):
            pass
        finally:
            client.socket.close()

    def _read(self, client: Client) -> Asked | None:
        data = b""
        while b"\r\n\r\n" not in data:
            part = client.socket.recv(65_536)
            if not part:
                return None
            data += part
        head, _, body = data.partition(b"\r\n\r\n")
        raw = f"{head.decode('latin-1')}\r\n\r\n"
        line, *lines = raw.strip().split("\r\n")
        fields = {name.lower(): text.strip() for name, _, text in (x.partition(":") for x in lines)}
        while len(body) < int(fields.get("content-length", 0)):
            body += client.socket.recv(65_536)
        return Asked(line, fields, raw, body)

    def stalled(self, asked: Asked, client: Client) -> None:
        """Answer a range from 0 correctly; of all others send 100 bytes, then stall."""
        body = begin(asked, client, self.data, f"ETag: {ETAG}")
        if asked.span and asked.span[0] == 0:
            client.send(body)
            return
        client.send(body[:100])
        client.stall()


def until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late, "it never happened"
        time.sleep(0.002)


def meanwhile(call: Callable[[], object]) -> threading.Thread:
    """Run it in another thread, and wait a moment for it."""
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(0.2)
    return thread
