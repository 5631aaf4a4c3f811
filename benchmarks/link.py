"""A throttled link: files over HTTP from one process, by a rate per connection, or one for all.

Each TCP connection has one token bucket, which goes on from request to request, so that many small
ranges are as slow as one large; with `--shared`, all connections have one bucket, and take turns.
Before each response a fixed delay passes.

    python benchmarks/link.py --rate 20e6 --delay 0.01 name=path …     # prints its port as JSON

`GET /-/counts` tells, without delay or throttle, requests and body bytes so far, the connections
that they used, and the most requests on one of them, each of which cost its client a round trip. It
is not counted itself; `?reset` begins anew.

With `--commit`, files are described as the hub describes those of a repository at that commit, and
`hub_files` names them as the hub does.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import mmap
import re
import select
import socket
import subprocess
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Self
from urllib.request import ProxyHandler, build_opener

BURST = 64 << 10
_QUANTUM = BURST // 2
_SHARED_QUANTUM = 16 << 10
_TARGET = re.compile(r"(?:http://[^/]*)?(/[^?]*)(\?reset)?.*")
"""The path of a request, which may name its URL whole."""

_RANGE = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d*)\r\n", re.IGNORECASE)


@dataclass(slots=True, eq=False)
class Bucket:
    """Tokens for bytes."""

    rate: float
    tokens: float = BURST
    filled: float = field(default_factory=monotonic)

    def fill(self) -> None:
        now = monotonic()
        self.tokens = min(float(BURST), self.tokens + (now - self.filled) * self.rate)
        self.filled = now

    def take(self, nbytes: int) -> float:
        """Take tokens in turn, also such that are yet to come; return the seconds until then."""
        self.fill()
        self.tokens -= nbytes
        return -self.tokens / self.rate


@dataclass(slots=True, eq=False)
class Client:
    """One connection: what it has sent, what it is being sent, and where its tokens come from."""

    socket: socket.socket
    bucket: Bucket
    asked: bytes = b""
    head: bytes = b""
    body: memoryview = field(default_factory=lambda: memoryview(b""))
    busy: bool = False
    free: bool = False
    stalls: bool = False
    blocked: bool = False
    granted: int = 0
    """Bytes that it may send of a rate that is shared."""

    since: int = -1
    requests: int = 0


class LinkServer:
    """Serves until it is killed."""

    def __init__(
        self,
        files: Mapping[str, Path],
        rate: float,
        delay: float,
        stall_after: int = 0,
        stalling: str = "",
        commit: str = "",
        *,
        shared: bool = False,
    ) -> None:
        self._stall_after = stall_after
        self._stalling = f"/{stalling}"
        self._shared = Bucket(rate) if shared else None
        self._quantum = _SHARED_QUANTUM if shared else _QUANTUM
        self._files = {f"/{name}": _content(path) for name, path in files.items()}
        self._etags = {name: f'"{zlib.crc32(data):08x}"' for name, data in self._files.items()}
        self._described = {
            name: _describe(commit, data) if commit else "" for name, data in self._files.items()
        }
        self._rate = rate
        self._delay = delay
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._listener.setblocking(False)
        self._clients: dict[int, Client] = {}
        self._timers: list[tuple[float, int, Client]] = []
        self._number = 0
        self.counts = {"requests": 0, "bytes": 0, "connections": 0, "in_sequence": 0}
        self._since = 0
        self.port: int = self._listener.getsockname()[1]

    def serve(self) -> None:
        # `select` wakes by the microsecond, the others by the millisecond.
        while True:
            wait = max(0.0, self._timers[0][0] - monotonic()) if self._timers else None
            full = [fd for fd, client in self._clients.items() if client.blocked]
            sources = [self._listener.fileno(), *self._clients]
            readable, writable, _ = select.select(sources, full, [], wait)
            for source in readable:
                if source == self._listener.fileno():
                    self._accept()
                elif source in self._clients:
                    self._read(self._clients[source])
            for fd in writable:
                if fd in self._clients:
                    self._clients[fd].blocked = False
                    self._pump(self._clients[fd])
            while self._timers and self._timers[0][0] <= monotonic():
                _, _, client = heapq.heappop(self._timers)
                self._pump(client)

    def _accept(self) -> None:
        connected, _ = self._listener.accept()
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients[connected.fileno()] = Client(connected, self._shared or Bucket(self._rate))

    def _read(self, client: Client) -> None:
        try:
            data = client.socket.recv(65_536)
        except ConnectionError:
            data = b""
        if not data:
            self._close(client)
            return
        client.asked += data
        self._next(client)

    def _next(self, client: Client) -> None:
        if client.busy or b"\r\n\r\n" not in client.asked:
            return
        head, _, client.asked = client.asked.partition(b"\r\n\r\n")
        client.busy = True
        self._respond(client, head + b"\r\n")
        self._later(client, 0.0 if client.free else self._delay)

    def _respond(self, client: Client, head: bytes) -> None:
        method, target = head.split(b" ", 2)[:2]
        found = _TARGET.fullmatch(target.decode("latin-1"))
        path, reset = found.groups() if found else ("", None)
        client.free = path == "/-/counts"
        client.stalls = not client.free and path.startswith(self._stalling)
        if client.free:
            body = json.dumps(self.counts).encode()
            if reset:
                self.counts = dict.fromkeys(self.counts, 0)
                self._since += 1
            client.head, client.body = _head("200 OK", len(body)), memoryview(body)
            return
        self._count(client)
        data = self._files.get(path)
        if data is None:
            client.head, client.body = _head("404 Not Found", 0), memoryview(b"")
            return
        tag = f"ETag: {self._etags[path]}\r\nAccept-Ranges: bytes\r\n{self._described[path]}"
        if method == b"HEAD":
            client.head, client.body = _head("200 OK", len(data), tag), memoryview(b"")
            return
        part = _RANGE.search(head)
        if part is None:
            client.head, client.body = _head("200 OK", len(data), tag), data
            return
        start, stop = int(part[1]), min(int(part[2] or len(data)) + 1, len(data))
        if start >= stop:
            tag += f"Content-Range: bytes */{len(data)}\r\n"
            client.head = _head("416 Range Not Satisfiable", 0, tag)
            client.body = memoryview(b"")
            return
        tag += f"Content-Range: bytes {start}-{stop - 1}/{len(data)}\r\n"
        client.head = _head("206 Partial Content", stop - start, tag)
        client.body = data[start:stop]

    def _count(self, client: Client) -> None:
        if client.since != self._since:
            client.since, client.requests = self._since, 0
            self.counts["connections"] += 1
        client.requests += 1
        self.counts["requests"] += 1
        self.counts["in_sequence"] = max(self.counts["in_sequence"], client.requests)

    def _later(self, client: Client, seconds: float) -> None:
        self._number += 1
        heapq.heappush(self._timers, (monotonic() + seconds, self._number, client))

    def _pump(self, client: Client) -> None:
        """Send what the bucket holds."""
        if client.blocked or client.socket.fileno() < 0:
            return
        try:
            if client.head:
                client.socket.sendall(client.head)
                client.head = b""
            self._pour(client)
        except BlockingIOError:
            client.blocked = True
        except ConnectionError:
            self._close(client)

    def _pour(self, client: Client) -> None:
        while client.body:
            if self._stall_after and client.stalls:
                client.socket.send(client.body[: self._stall_after])
                client.body = memoryview(b"")
                return  # busy for good
            most = self._allowed(client)
            if not most:
                return
            sent = client.socket.send(client.body[: min(most, 1 << 20)])
            client.body = client.body[sent:]
            if client.free:
                continue
            self.counts["bytes"] += sent
            if not self._shared:
                client.bucket.tokens -= sent
                continue
            client.granted -= min(sent, client.granted)
            if client.body:
                self._later(client, 0.0)  # the others' turn
                return
        client.busy = False
        self._next(client)

    def _allowed(self, client: Client) -> int:
        """Return how many bytes may be sent now; if none, come back when some may be."""
        most, bucket = len(client.body), client.bucket
        if client.free or not self._rate:
            return most
        enough, wait = min(most, self._quantum), 0.0
        if self._shared and not client.granted:
            client.granted, wait = enough, bucket.take(enough)
        elif not self._shared:
            bucket.fill()
            wait = (enough - bucket.tokens) / self._rate
        if wait > 0:
            self._later(client, wait)
            return 0
        return client.granted if self._shared else int(bucket.tokens)

    def _close(self, client: Client) -> None:
        self._clients.pop(client.socket.fileno(), None)
        client.socket.close()


def _content(path: Path) -> memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def _head(status: str, length: int, more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n{more}\r\n".encode()


def _describe(commit: str, content: memoryview) -> str:
    digest = hashlib.sha256(content).hexdigest()
    linked = f'X-Linked-Etag: "{digest}"\r\nX-Linked-Size: {len(content)}\r\n'
    return f"X-Repo-Commit: {commit}\r\n{linked}"


def hub_files(repo: str, commit: str, folder: Path, work: Path) -> dict[str, Path]:
    """The files of a repository by the hub's names; its descriptions are written to `work`."""
    files = {path.name: path for path in sorted(folder.iterdir())}
    info = {
        "id": repo,
        "modelId": repo,
        "sha": commit,
        "siblings": [{"rfilename": name} for name in files],
    }
    tree = [
        {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
        for name, path in files.items()
    ]
    about = work / repo.replace("/", "-")
    about.mkdir()
    (about / "info.json").write_text(json.dumps(info))
    (about / "tree.json").write_text(json.dumps(tree))
    named = {f"api/models/{repo}": about / "info.json"}
    for revision in ("main", commit):
        named[f"api/models/{repo}/revision/{revision}"] = about / "info.json"
        named[f"api/models/{repo}/tree/{revision}"] = about / "tree.json"
        for name, path in files.items():
            named[f"{repo}/resolve/{revision}/{name}"] = path
    return named


class Link:
    """The server, started in a process of its own; `rate` 0 is no throttle. Closes with `with`.

    The rate is that of each connection, or if `shared` of all together.

    With `stall_after`, each response for a name that begins with `stalling` stalls after so many
    bytes of its body.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        *,
        rate: float,
        delay: float,
        stall_after: int = 0,
        stalling: str = "",
        commit: str = "",
        shared: bool = False,
    ) -> None:
        named = [f"{name}={path}" for name, path in files.items()]
        settings = ["--rate", str(rate), "--delay", str(delay), "--stall-after", str(stall_after)]
        settings += ["--commit", commit, "--stalling", stalling]
        settings += ["--shared"] if shared else []
        command = [sys.executable, __file__, *settings, *named]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self.port: int = json.loads(self._process.stdout.readline())["port"]

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def counts(self, *, reset: bool = False) -> dict[str, int]:
        """Requests, bytes, connections, in_sequence since the start or the last reset."""
        opener = build_opener(ProxyHandler({}))
        query = "?reset" if reset else ""
        with opener.open(f"http://127.0.0.1:{self.port}/-/counts{query}", timeout=10) as answer:
            counts: dict[str, int] = json.load(answer)
        return counts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def main() -> None:
    parser = argparse.ArgumentParser("link", description=__doc__)
    parser.add_argument("--rate", type=float, default=20e6, help="bytes/s per connection; 0: none")
    parser.add_argument("--delay", type=float, default=0.01, help="seconds before each response")
    parser.add_argument("--stall-after", type=int, default=0, help="bytes of a body; 0: never")
    parser.add_argument("--stalling", default="", help="names that stall begin so")
    parser.add_argument("--commit", default="", help="describe files as the hub does, at this one")
    parser.add_argument("--shared", action="store_true", help="the rate is that of all together")
    parser.add_argument("files", nargs="+", help="name=path")
    given = parser.parse_args()
    files = {name: Path(path) for name, _, path in (each.partition("=") for each in given.files)}
    how = given.rate, given.delay, given.stall_after, given.stalling, given.commit
    server = LinkServer(files, *how, shared=given.shared)
    print(json.dumps({"port": server.port}), flush=True)
    server.serve()


if __name__ == "__main__":
    main()
