"""One adapter served wrongly beside others: what a server can do wrong, and what must be left."""

from __future__ import annotations

import asyncio
import gzip
import stat
import struct
import time
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from threading import Lock
from typing import Any, cast

from fault_server import Asked, Client, Hangup
from remote_world import RemoteWorld, Stored

import tiny
from common import until
from lorax_async.cache.maintenance import ls
from lorax_async.cache.records import CacheKey
from lorax_async.formats.split_weights import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.remote.metadata import FIRST_BYTES
from sweeping import Bench

RANK = 128
"""Some 400 KB: more than comes with the first request."""

CHUNK = 256 << 10
_MAP = struct.Struct("<8s16sQQ")

Fault = Callable[["FaultyWorld", Asked, Client], None]


class FaultyWorld(RemoteWorld):
    """As `RemoteWorld`; `faults` has what is done wrong, by the name of the adapter."""

    def __init__(self, folder: Path, adapters: Path, **settings: Any) -> None:
        self.faults: dict[str, Fault] = {}
        self.adapters = adapters
        self.versions: list[tuple[str, Stored]] = []
        super().__init__(folder, **settings)

    def stock(self, name: str, seed: int = 0, rank: int = RANK) -> Path:
        """An adapter at the source; the folder that is returned has the same files."""
        folder = tiny.write(self.adapters / name, seed, rank)
        self.put(name, *tiny.files(folder))
        self.versions.append((name, self.locator.there[name]))
        return folder

    def serve(self, asked: Asked, client: Client) -> None:
        name = adapter_of(asked)
        fault = self.faults.get(name)
        (FaultyWorld.well if fault is None else fault)(self, asked, client)

    def well(self, asked: Asked, client: Client) -> None:
        """As if there were no fault."""
        super().serve(asked, client)

    def asked_of(self, name: str) -> list[Asked]:
        return [each for each in list(self.server.asked) if adapter_of(each) == name]

    def spans_of(self, name: str) -> list[tuple[int, int]]:
        """What was asked for of its weights."""
        return [asked.span for asked in self.asked_of(name) if is_weights(asked) and asked.span]


def adapter_of(asked: Asked) -> str:
    return asked.target.split("/")[1]


def is_weights(asked: Asked) -> bool:
    return asked.target.endswith(WEIGHTS_FILE.file_name)


def part_of(asked: Asked) -> str:
    """Which step of a load asks so."""
    if asked.target.endswith(CONFIG_FILE.file_name):
        return "config"
    return "header" if asked.span == (0, FIRST_BYTES) else "body"


def at(part: str, fault: Fault, times: int = 1 << 30) -> Fault:
    """Wrong in that part of a load, so many times; else right."""
    left, lock = [times], Lock()

    def behave(world: FaultyWorld, asked: Asked, client: Client) -> None:
        with lock:
            wrong = part_of(asked) == part and left[0] > 0
            left[0] -= wrong
        (fault if wrong else FaultyWorld.well)(world, asked, client)

    return behave


async def loads_right(loader: AdapterLoader, world: RemoteWorld, folder: Path) -> AdapterHandle:
    """What was loaded, released by now."""
    async with await loader.load(world.ref(folder.name)) as handle:
        tiny.assert_equal_to_file(handle, folder)
    return handle


async def assert_at_rest(loader: AdapterLoader, world: FaultyWorld) -> None:
    """Nobody waits, nothing is held or under way, and what is in the cache is true."""
    bench = Bench(loader, cast(Any, loader.device), "")
    await bench.assert_clean()
    await until(lambda: not any(listed.in_use for listed in ls(world.cache)))
    await asyncio.to_thread(assert_true_cache, world.folder, world.versions)


def assert_true_cache(folder: Path, versions: list[tuple[str, Stored]]) -> None:
    """All is private; entries are whole, partials tell the truth, nothing is locked or half gone."""
    contents = {CacheKey(name, each.version).name: each for name, each in versions}
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.lstat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert {path.name for path in folder.iterdir()} <= FOLDERS
    assert not list((folder / "trash").iterdir())
    for entry in (folder / "entries").iterdir():
        stored = contents[entry.name]
        assert (entry / CONFIG_FILE.file_name).read_bytes() == stored.config
        assert (entry / WEIGHTS_FILE.file_name).read_bytes() == stored.weights
        assert not list(entry.glob("*.chunks"))
    for partial in (folder / "partials").iterdir():
        digest, _, _ = partial.name.partition(".")
        for map_file in partial.glob("*.chunks"):
            file = partial / map_file.stem
            stored = contents[digest]
            true = stored.config if file.name == CONFIG_FILE.file_name else stored.weights
            written = file.read_bytes()
            for start, stop in chunks_in(map_file.read_bytes()):
                assert written[start:stop] == true[start:stop], (file.name, start)


FOLDERS = {"entries", "partials", "trash", "answers", "lock"}


def chunks_in(content: bytes) -> list[tuple[int, int]]:
    """The spans that a chunk map tells to be here, by hand: a bit for each, lowest first."""
    magic, _, nbytes, size = _MAP.unpack_from(content)
    assert (magic, size) == (b"LRXCHNK2", CHUNK)
    bits = content[_MAP.size :]
    return [
        (n * size, min((n + 1) * size, nbytes))
        for n in range(-(-nbytes // size))
        if bits[n // 8] >> n % 8 & 1
    ]


BOMB = gzip.compress(bytes(1 << 20))


def begin(world: FaultyWorld, asked: Asked, client: Client, *, etag: str | None = None) -> bytes:
    """The head of a good answer; returns the body that should follow."""
    data, tag = world.content(asked.target)
    tag = etag or tag
    if asked.span is None:
        client.head("200 OK", f"Content-Length: {len(data)}", f"ETag: {tag}")
        return data
    start, stop = asked.span[0], min(asked.span[1], len(data))
    client.part(start, stop, len(data), f"ETag: {tag}")
    return data[start:stop]


def of_body(change: Callable[[bytes], bytes], etag: str | None = None) -> Fault:
    """A good head, and then another body."""

    def answer(world: FaultyWorld, asked: Asked, client: Client) -> None:
        client.send(change(begin(world, asked, client, etag=etag)))

    return answer


def half_and(then: Callable[[Client], None]) -> Fault:
    def answer(world: FaultyWorld, asked: Asked, client: Client) -> None:
        body = begin(world, asked, client)
        client.send(body[: len(body) // 2])
        then(client)

    return answer


def of_all(change: Callable[[bytes], bytes], *, told: bool = False) -> Fault:
    """All of the file in place of a range, with its length or until the connection ends."""

    def answer(world: FaultyWorld, asked: Asked, client: Client) -> None:
        data, etag = world.content(asked.target)
        length = [f"Content-Length: {len(data)}", f"ETag: {etag}"]
        client.head("200 OK", *(length if told else ["Connection: close"]))
        client.send(change(data))
        if not told:
            raise Hangup

    return answer


def _hangup(client: Client) -> None:
    raise Hangup


def _reset(client: Client) -> None:
    time.sleep(0.02)
    client.reset()


def _flipped(body: bytes) -> bytes:
    return body[:-1] + bytes([body[-1] ^ 1])


truncated, reset, stalled = half_and(_hangup), half_and(_reset), half_and(Client.stall)
wrong_bytes, other_etag = of_body(_flipped), of_body(bytes, '"another"')
more_than_said = of_body(lambda body: body + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n!")
short_without_length = of_all(lambda data: data[: len(data) // 2])
long_without_length = of_all(lambda data: data + b" and then some")
whole_without_length, whole_in_place_of_range = of_all(bytes), of_all(bytes, told=True)


def tagged(etag: str) -> Fault:
    """Right, with that ETag."""
    return of_body(bytes, etag)


def wrong_range(world: FaultyWorld, asked: Asked, client: Client) -> None:
    data, etag = world.content(asked.target)
    assert asked.span is not None
    start, stop = asked.span[0], min(asked.span[1], len(data))
    client.part(start + 1, stop + 1, len(data), f"ETag: {etag}")
    client.send(data[start:stop])


def other_size(world: FaultyWorld, asked: Asked, client: Client) -> None:
    """One byte more than there was."""
    data, etag = world.content(asked.target)
    world.answer(asked, client, data + b"!", etag)


def bomb(world: FaultyWorld, asked: Asked, client: Client) -> None:
    fields = [f"Content-Length: {len(BOMB)}", "Content-Encoding: gzip"]
    if asked.span is None:
        client.head("200 OK", *fields)
    else:
        start = asked.span[0]
        place = f"Content-Range: bytes {start}-{start + len(BOMB) - 1}/{1 << 20}"
        client.head("206 Partial Content", *fields, place)
    client.send(BOMB)


def silent(world: FaultyWorld, asked: Asked, client: Client) -> None:
    client.stall()


def dripping(world: FaultyWorld, asked: Asked, client: Client) -> None:
    """One byte per second."""
    client.drip(begin(world, asked, client), 1.0)


def status(line: str, *fields: str) -> Fault:
    return lambda world, asked, client: client.head(line, "Content-Length: 0", *fields)


def in_an_hour() -> Fault:
    """Unavailable until a date."""
    date = formatdate(time.time() + 3_600, usegmt=True)
    return status("503 Unavailable", f"Retry-After: {date}")


def refused_range(world: FaultyWorld, asked: Asked, client: Client) -> None:
    """416, and yet it says that it has these bytes."""
    size = len(world.content(asked.target)[0])
    client.head("416 No", "Content-Length: 0", f"Content-Range: bytes */{size}")


def redirected(to: str) -> Fault:
    return status("302 Found", f"Location: {to}")


def redirected_for_ever(world: FaultyWorld, asked: Asked, client: Client) -> None:
    client.head("302 Found", "Content-Length: 0", f"Location: {asked.target}")
