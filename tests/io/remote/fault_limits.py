"""Loads in a process that may have little: run as a script, it tells by JSON.

The server is in another process, the test's; here are only the loader and its limits.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fault_processes import LAYOUT, Place
from fault_world import FaultyWorld, assert_at_rest, over

import tiny
from common import open_files, until
from lorax_async import AdapterLoader, LoraxError

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


def file_size(place: Place) -> list[Told]:
    """No file of a megabyte: the large one does not come, the small one does; then both."""

    async def body(world: FaultyWorld) -> list[Told]:
        async with over(world, LAYOUT) as loader:
            told = await within(loader, world, resource.RLIMIT_FSIZE, 1 << 20, ["large", "small"])
            await assert_at_rest(loader, world)
            told.append(await outcome(loader, world, "large"))
            await assert_at_rest(loader, world)
            return told

    return loaded(place, body)


def descriptors(place: Place) -> list[Told]:
    """Each time a few more files may be open than are; what fails leaves none."""

    async def body(world: FaultyWorld) -> list[Told]:
        told: list[Told] = []
        async with over(world, LAYOUT) as loader:
            told.append(await outcome(loader, world, "small"))
            for more in range(0, 24, 2):
                name = f"n{more}"
                world.engine._pool.close()  # what is idle would be used again
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


KINDS = {"file size": file_size, "descriptors": descriptors, "small disk": small_disk}

if __name__ == "__main__":
    what, folder, adapters, port = sys.argv[1:]
    told = KINDS[what](Place(Path(folder), Path(adapters), int(port)))
    sys.stdout.write(json.dumps(told))
