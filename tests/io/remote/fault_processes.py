"""Loaders in processes that end as they like, or may have little: run as a script, it tells by JSON.

One Python starts and imports; its children are forks. The server is in another process, the test's.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache_processes import KILLED, ended, fork
from fault_world import FaultyWorld, assert_at_rest, chunks_in, over
from fetching import RETRIES, LoopbackOnly
from remote_world import PATIENT

import tiny
from common import open_files, until
from lorax_async import AdapterLoader, LoraxError
from lorax_async.core.ranges import PieceSizes
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import HttpSettings

CONNECTIONS = 4

LAYERS = 16

LAYOUT = tiny.layout(layers=LAYERS)

LARGE = {"rank": 256, "layers": LAYERS}

"""3 MB: twelve chunks."""

Tell = Callable[[object], None]


class Place:
    """A cache's folder, and the test's server with what it has."""

    def __init__(self, folder: Path, adapters: Path, port: int) -> None:
        self.folder = folder
        self.adapters = adapters
        self.port = port

    def below(self, name: str) -> Place:
        return Place(self.folder / name, self.adapters, self.port)

    def world(self, who: str) -> FaultyWorld:
        """Its requests say who asks. No piece is asked for twice because a connection is slow."""
        settings = HttpSettings(
            connections=CONNECTIONS,
            timeouts=PATIENT,
            retries=RETRIES,
            sizes=PieceSizes(least=1 << 20),
            proxies={},
            user_agent=who,
        )
        http = RangeEngine(settings, network=LoopbackOnly())
        world = FaultyWorld(self.folder, self.adapters, verify="before_use", http=http)
        for folder in self.adapters.iterdir():
            world.put(folder.name, *tiny.files(folder))
            world.locator.elsewhere[folder.name] = f"http://127.0.0.1:{self.port}"
        return world


def load(place: Place, name: str, who: str, tell: Tell) -> None:
    """Load an adapter, compare it with its file, and tell."""
    with place.world(who) as world:

        async def body() -> None:
            async with (
                over(world, LAYOUT) as loader,
                await loader.load(world.ref(name)) as handle,
            ):
                tiny.assert_equal_to_file(handle, place.adapters / name)

        asyncio.run(body())
    tell("loaded")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_weights(args: tuple[Any, ...]) -> bool:
    return str(args[0]) == "adapter_model.safetensors"


def is_large(args: tuple[Any, ...]) -> bool:
    return sum(len(buffer) for buffer in args[1]) > 100_000


def is_publishing(args: tuple[Any, ...]) -> bool:
    """A partial becomes an entry."""
    names = f"{args[0]} {args[1]}"
    return re.fullmatch(r"([0-9a-f]{64})\.[0-9a-f.-]+ \1", names) is not None


def is_of_weights(args: tuple[Any, ...]) -> bool:
    return os.readlink(f"/proc/self/fd/{args[0]}").endswith("adapter_model.safetensors")


Checkpoint = tuple[str, Callable[[tuple[Any, ...]], bool], int, str]

CHECKPOINTS: dict[str, Checkpoint] = {
    "open": ("open", is_weights, 1, "after"),
    "first-write": ("pwritev", is_large, 1, "after"),
    "in-a-write": ("pwritev", is_large, 3, "amid"),
    "mid-write": ("pwritev", is_large, 4, "after"),
    "before-fsync": ("fsync", is_of_weights, 1, "before"),
    "after-fsync": ("fsync", is_of_weights, 1, "after"),
    "before-rename": ("rename", is_publishing, 1, "before"),
    "after-rename": ("rename", is_publishing, 1, "after"),
}

"""The call of `os`, which of them counts, the how manieth it is, and when in it."""


def kill_at(checkpoint: Checkpoint) -> None:
    """Let this process be killed there."""
    name, counts, number, when = checkpoint
    real = getattr(os, name)
    seen = 0

    def call(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += counts(args)
        here = counts(args) and seen == number
        if here and when == "amid":
            real(args[0], [memoryview(args[1][0])[: len(args[1][0]) // 2]], *args[2:])
        if here and when != "after":
            kill()
        done = real(*args, **options)
        if here:
            kill()
        return done

    setattr(os, name, call)


def load_until(place: Place, name: str, tell: Tell) -> None:
    kill_at(CHECKPOINTS[name])
    load(place, name, "first", tell)


def here_in(folder: Path) -> int:
    """How many bytes of weights are there for whoever comes next: whole chunks, or an entry."""
    if list((folder / "entries").glob("*/adapter_model.safetensors")):
        return -1
    maps = list((folder / "partials").glob("*/adapter_model.safetensors.chunks"))
    return sum(stop - start for each in maps for start, stop in chunks_in(each.read_bytes()))


def kills(place: Place) -> list[dict[str, Any]]:
    outcomes = []
    for name in CHECKPOINTS:
        there = place.below(name)
        code, told = ended(*fork(lambda tell, p=there, n=name: load_until(p, n, tell)))  # type: ignore[misc]
        assert (code, told) == (KILLED, []), (name, code, told)
        here = here_in(there.folder)
        code, told = ended(*fork(lambda tell, p=there, n=name: load(p, n, "second", tell)))  # type: ignore[misc]
        outcomes.append({"name": name, "here": here, "code": code, "told": told})
    return outcomes


def together(place: Place) -> list[tuple[int, list[Any]]]:
    children = [fork(lambda tell, w=who: load(place, "wanted", w, tell)) for who in ("one", "two")]  # type: ignore[misc]
    return [ended(*child) for child in children]


def without_locks() -> None:
    fcntl.flock = lambda fd, how: None


Told = dict[str, object]


@contextmanager
def limit(kind: int, most: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


async def outcome(loader: AdapterLoader, world: FaultyWorld, name: str) -> Told:
    """What a caller sees: the right bytes, or an error."""
    try:
        handle = await loader.load(world.ref(name))
    except LoraxError as error:
        return {
            "kind": type(error).__name__,
            "text": error.problem,
            "stage": error.stage,
            "retryable": error.retryable,
        }
    async with handle:
        tiny.assert_equal_to_file(handle, world.adapters / name)
    return {"kind": "right"}


async def within(
    loader: AdapterLoader, world: FaultyWorld, kind: int, most: int, names: list[str]
) -> list[Told]:
    """All of these at once under that limit."""
    with limit(kind, most):
        return list(await asyncio.gather(*(outcome(loader, world, name) for name in names)))


def descriptors(place: Place) -> list[Told]:
    """Each time a few more files may be open than are; what fails leaves none."""

    async def body(world: FaultyWorld) -> list[Told]:
        told: list[Told] = []
        async with over(world, LAYOUT) as loader:
            told.append(await outcome(loader, world, "small"))
            for more in range(0, 24, 2):
                name = f"n{more}"
                before = open_files()
                most = len(os.listdir("/proc/self/fd")) - 1 + more
                told += await within(loader, world, resource.RLIMIT_NOFILE, most, [name])
                await assert_at_rest(loader, world, swept=False)
                await until(lambda: open_files() <= before)
            told.append(await outcome(loader, world, "n0"))
            await assert_at_rest(loader, world)
        return told

    return loaded(place, body)


def small_disk(place: Place) -> list[Told]:
    """The cache is on a disk of 2 MB, which somebody else fills in the midst of it."""

    async def body(world: FaultyWorld) -> list[Told]:
        async with over(world, LAYOUT) as loader:
            told = [await outcome(loader, world, name) for name in ("large", "small")]
            await assert_at_rest(loader, world)
            full = place.folder.parent / "other"
            with full.open("wb", buffering=0) as other, suppress(OSError):
                while True:
                    other.write(bytes(4_096))
            told += [await outcome(loader, world, name) for name in ("small", "n0")]
            await assert_at_rest(loader, world)
            full.unlink()
            told.append(await outcome(loader, world, "n0"))
            await assert_at_rest(loader, world)
            return told

    return loaded(place, body)


def loaded(place: Place, body: Callable[[FaultyWorld], object]) -> list[Told]:
    with place.world("limited") as world:
        for name, stored in world.locator.there.items():
            world.versions.append((name, stored))
        told: list[Told] = asyncio.run(body(world))  # type: ignore[arg-type]
        return told


LIMITED = {"descriptors": descriptors, "small disk": small_disk}


def main(what: str, folder: Path, adapters: Path, port: int) -> object:
    place = Place(folder, adapters, port)
    if what in LIMITED:
        return LIMITED[what](place)
    if what == "kills":
        return kills(place)
    if what == "together without locks":
        without_locks()
    return together(place)


if __name__ == "__main__":
    said, where, served, listening = sys.argv[1:]
    sys.stdout.write(json.dumps(main(said, Path(where), Path(served), int(listening))))
