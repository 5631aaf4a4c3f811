"""An origin on loopback whose files, validators and manners a test changes between two loads."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fault_server import Asked, Client, FaultServer, Hangup
from user_loads import at, contents, loader

from lorax_async import AdapterLoader

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass
class Origin:
    """Serves the files of one folder.

    `etag` is that of every file, whatever is in it; None sends none. `stop_at` ends each answer for
    weights before the file's byte of that number. `status`, if set, is every answer; `silent` sends
    the head of an answer and then nothing. `promises` sends each file's sha256 beside it.
    """

    files: dict[str, bytes] = field(repr=False)
    etag: str | None = '"fixed"'
    ranges: bool = True
    promises: bool = False
    stop_at: int | None = None
    status: str | None = None
    silent: bool = False
    asked: list[Asked] = field(default_factory=list, repr=False)

    def __call__(self, asked: Asked, client: Client) -> None:
        self.asked.append(asked)
        name = asked.target.rpartition("/")[2]
        data = self.files.get(name)
        status = self.status or (None if data is not None else "404 Not Found")
        if status is not None:
            client.head(status, "Content-Length: 0")
            return
        assert data is not None
        self._send(name, data, asked, client)

    def _send(self, name: str, data: bytes, asked: Asked, client: Client) -> None:
        start, stop = 0, len(data)
        if asked.span is not None and self.ranges:
            start, stop = asked.span[0], min(asked.span[1], len(data))
            if start >= stop:
                client.head(
                    "416 Range Not Satisfiable",
                    f"Content-Range: bytes */{len(data)}",
                    "Content-Length: 0",
                )
                return
            client.part(start, stop, len(data), *self._fields(data))
        else:
            client.head("200 OK", f"Content-Length: {len(data)}", *self._fields(data))
        if self.silent:
            client.stall()
        last = stop
        if name == WEIGHTS and self.stop_at is not None:
            last = max(start, min(stop, self.stop_at))
        client.send(data[start:last])
        if last < stop:
            raise Hangup

    def _fields(self, data: bytes) -> list[str]:
        tag = [] if self.etag is None else [f"ETag: {self.etag}"]
        if self.promises:
            digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
            tag.append(f"Repr-Digest: sha-256=:{digest}:")  # RFC 9530
        return tag

    def bytes_asked(self, since: int = 0) -> int:
        """Of weights, by all requests from the number `since` on."""
        size = len(self.files[WEIGHTS])
        spans = [
            asked.span or (0, size)
            for asked in self.asked[since:]
            if asked.target.endswith(WEIGHTS)
        ]
        return sum(min(stop, size) - start for start, stop in spans)


@dataclass
class World:
    """One origin, and loaders of its adapter over one cache below `folder`."""

    origin: Origin
    server: FaultServer
    folder: Path

    @property
    def id(self) -> str:
        return self.server.url("/adapter/")

    def loader(self, **settings: object) -> AdapterLoader:
        plain: dict[str, object] = {
            "layers": 4,
            "revalidate": 0,
            "allow": (at(f"127.0.0.1:{self.server.port}"),),
        }
        return loader(self.folder, **(plain | settings))  # type: ignore[arg-type]

    def stored(self) -> tuple[int, int]:
        """How many entries and partial downloads the cache has."""
        found = ((self.folder / "cache" / kind).glob("*") for kind in ("entries", "partials"))
        entries, partials = (sum(1 for _ in each) for each in found)
        return entries, partials


@contextmanager
def changing(folder: Path, adapter: Path) -> Iterator[World]:
    origin = Origin(contents(adapter))
    with FaultServer(b"", origin) as server:
        yield World(origin, server, folder)
