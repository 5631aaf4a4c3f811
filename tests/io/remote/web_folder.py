"""A server of a folder, which does as told; and a locator that may ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fault_server import Asked, Behaviour, Client, FaultServer
from fetching import PATIENT, Anywhere, engine

from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import Rules
from lorax_async.io.remote.web import WebLocator

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INDEX = "adapter_model.safetensors.index.json"


@dataclass
class Folder:
    """Files by name, with the fields that each is sent with; what is not here is a 404."""

    files: dict[str, bytes]
    fields: dict[str, list[str]] = field(default_factory=dict)
    instead: dict[str, Behaviour] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def __call__(self, asked: Asked, client: Client) -> None:
        self.asked.append(asked)
        name = asked.target.rpartition("/")[2]
        if name in self.instead:
            self.instead[name](asked, client)
        elif name in self.files:
            self._serve(name, asked, client)
        else:
            refuse("404 Not Found")(asked, client)

    def _serve(self, name: str, asked: Asked, client: Client) -> None:
        data = self.files[name]
        fields = self.fields.get(name, [f'ETag: "{name}-1"'])
        if asked.span is None:
            client.head("200 OK", f"Content-Length: {len(data)}", *fields)
            client.send(data)
            return
        start, stop = asked.span[0], min(asked.span[1], len(data))
        client.part(start, stop, len(data), *fields)
        client.send(data[start:stop])

    @property
    def names(self) -> list[str]:
        return [asked.target.rpartition("/")[2] for asked in self.asked]


def refuse(status: str) -> Behaviour:
    def behave(asked: Asked, client: Client) -> None:
        client.head(status, "Content-Length: 0")

    return behave


@dataclass
class World:
    folder: Folder
    server: FaultServer
    engine: RangeEngine
    locator: WebLocator

    def ref(
        self,
        token: str | None = None,
        revision: str | None = None,
        *,
        path: str = "/adapters/one/",
    ) -> AdapterRef:
        return AdapterRef(self.server.url(path), token=token, revision=revision)


@contextmanager
def world(
    files: dict[str, bytes], *, limits: Limits | None = None, rules: Rules | None = None
) -> Iterator[World]:
    folder = Folder(dict(files))
    with FaultServer(b"", folder) as server, engine(8, timeouts=PATIENT) as asking:
        locator = WebLocator(asking, rules or Anywhere(), limits or Limits())
        yield World(folder, server, asking, locator)
