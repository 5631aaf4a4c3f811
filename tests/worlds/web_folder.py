"""Loopback servers of adapter folders, and a locator for them."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from fault_server import Asked, Behaviour, Client, FaultServer, Hangup, answer
from range_downloads import PATIENT, Anywhere, engine

from lorax_async import AdapterRef, Limits
from lorax_async.http.range_downloader import RangeDownloader
from lorax_async.http.settings import Rules
from lorax_async.ids import parse_ref
from lorax_async.remote.base import LocatedAdapter
from lorax_async.remote.web import WebBackend

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"


def name_of(asked: Asked) -> str:
    return asked.target.rpartition("/")[2]


def refuse(status: str) -> Behaviour:
    return lambda asked, client: client.head(status, "Content-Length: 0")


def redirect(url: str) -> Behaviour:
    return lambda asked, client: client.head("302 Found", "Content-Length: 0", f"Location: {url}")


def hold(client: Client) -> None:
    """Send nothing more until the other end closes the connection."""
    client.socket.settimeout(0.05)
    while not client.ending.is_set():
        with suppress(TimeoutError):
            if not client.socket.recv(1):
                break
    raise Hangup


@dataclass
class Folder:
    """Files by name, with their response fields; other names are a 404."""

    files: dict[str, bytes]
    fields: dict[str, list[str]] = field(default_factory=dict)
    instead: dict[str, Behaviour] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def __call__(self, asked: Asked, client: Client) -> None:
        self.asked.append(asked)
        name = name_of(asked)
        if name in self.instead:
            self.instead[name](asked, client)
        elif name in self.files:
            self.serve(asked, client)
        else:
            refuse("404 Not Found")(asked, client)

    def serve(self, asked: Asked, client: Client) -> None:
        name = name_of(asked)
        answer(asked, client, self.files[name], *self.fields.get(name, [f'ETag: "{name}-1"']))

    @property
    def names(self) -> list[str]:
        return [name_of(asked) for asked in self.asked]


class Locator:
    """Locates refs by a backend that takes parsed ones."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        parsed_ref = parse_ref(ref)
        located: LocatedAdapter = await self.backend.locate(parsed_ref.location, parsed_ref)
        return located

    async def scope(self, ref: AdapterRef) -> str:
        scope: str = await self.backend.scope(parse_ref(ref).location, ref)
        return scope

    def is_version(self, revision: str) -> bool:
        return bool(self.backend.is_version(revision))


@dataclass(eq=False)
class World:
    folder: Folder
    server: FaultServer
    engine: RangeDownloader
    locator: Locator

    def ref(
        self, token: str | None = None, revision: str | None = None, *, path: str = "/adapters/one/"
    ) -> AdapterRef:
        return AdapterRef(self.server.url(path), token=token, revision=revision)


@contextmanager
def world(
    files: dict[str, bytes], *, limits: Limits | None = None, rules: Rules | None = None
) -> Iterator[World]:
    folder = Folder(dict(files))
    with FaultServer(b"", folder) as server, engine(8, timeouts=PATIENT) as asking:
        locator = Locator(WebBackend(asking, rules or Anywhere(), limits or Limits()))
        yield World(folder, server, asking, locator)
