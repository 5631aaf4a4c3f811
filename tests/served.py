"""Adapters on loopback, as the tests of the command line fetch them: right, slow, or not at all."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fault_server import Asked, Client, FaultServer

NAMES = ("adapter_config.json", "adapter_model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def files_of(folders: Mapping[str, Path]) -> dict[str, bytes]:
    """By target, of folders by theirs."""
    return {
        f"/{where}/{name}": data
        for where, folder in folders.items()
        for name, data in contents(folder).items()
    }


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


def right(files: Mapping[str, bytes]) -> Callable[[Asked, Client], None]:
    """What a good server of these files answers."""

    def behave(asked: Asked, client: Client) -> None:
        data = files.get(asked.target)
        if data is None:
            client.head("404 Not Found", "Content-Length: 0")
        else:
            FaultServer(data, etag=etag(data)).right(asked, client)

    return behave


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[FaultServer]:
    with FaultServer(b"", right(files)) as server:
        yield server
