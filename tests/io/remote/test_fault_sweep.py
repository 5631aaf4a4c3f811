"""Given up, or closed, at every moment at which a remote source waits for anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import pytest
from fault_world import FaultyWorld, assert_at_rest, at, silent
from remote_world import over

import tiny
from common import LOOPS, our_threads, until
from lorax_async.cache.maintenance import ls
from lorax_async.errors import LoaderClosedError
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.sources.base import Source
from lorax_async.types import AdapterRef
from sweeping import stepwise

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

RANK = 100
"""Some 300 KB: ranges are asked for after the first."""

LEAST = {"download": 7, "resumed": 7, "cached": 2}
"""Suspensions: of a download, at least for the version, the beginning, two places, bytes, the end."""


class Stepping:
    """Counts the suspensions of the source's own calls, and tells of each before it."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.steps = 0
        self.at_step: Callable[[int], None] = lambda step: None

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._source, name)
        if name not in {"resolve", "open", "bring"}:
            return call
        return lambda *given: self._stepped(call(*given))

    async def _stepped(self, work: Coroutine[Any, Any, Any]) -> Any:
        def told(_: int) -> None:
            self.steps += 1
            self.at_step(self.steps)

        return await stepwise(work, told)


def stepping(world: FaultyWorld) -> tuple[AdapterLoader, Stepping]:
    source = Stepping(world.source)
    return over(world, source=cast(Source, source)), source


async def prepared(world: FaultyWorld, what: str, step: int, contents: tuple[bytes, bytes]) -> str:
    """An adapter that nobody has loaded, or somebody in part, or as a whole."""
    name = f"{what}-{step}"
    ref = world.put(name, *contents)
    world.versions.append((name, world.locator.there[name]))
    if what == "cached":
        async with over(world) as loader:
            (await loader.load(ref)).release()
    if what == "resumed":
        await part_of_it(world, ref)
    return name


async def part_of_it(world: FaultyWorld, ref: AdapterRef) -> None:
    """Its first bytes are on the disk, and no more come."""
    world.faults[ref.text] = at("body", silent)
    async with over(world) as loader:
        loading = asyncio.create_task(loader.load(ref))
        await until(lambda: len(world.spans_of(ref.text)) > 1)
        loading.cancel()
        await asyncio.wait([loading])
        await assert_at_rest(loader, world)
    del world.faults[ref.text]
    assert any(listed.is_partial for listed in ls(world.cache))


async def ended(loading: asyncio.Task[AdapterHandle]) -> None:
    """By a cancellation, by the loader's end, or well."""
    await asyncio.wait([loading])
    if not loading.cancelled():
        error = loading.exception()
        assert error is None or type(error) is LoaderClosedError, error
        if error is None:
            loading.result().release()


async def given_up(world: FaultyWorld, name: str, step: int) -> bool:
    """Cancel a load at that step; whether there was one. Then it loads right, in that loader."""
    loader, source = stepping(world)
    async with loader:
        loading = asyncio.create_task(loader.load(world.ref(name)))

        def cancel(current: int) -> None:
            if current == step:
                loading.cancel()

        source.at_step = cancel
        await ended(loading)
        reached = source.steps >= step
        source.at_step = lambda step: None
        await assert_at_rest(loader, world)
        await loads(loader, world, name)
        await assert_at_rest(loader, world)
    return reached


async def closed(world: FaultyWorld, name: str, step: int) -> bool:
    """Close the loader at that step. Then another loader loads it right."""
    loader, source = stepping(world)
    closing: list[asyncio.Task[None]] = []

    def close(current: int) -> None:
        if current == step:
            closing.append(asyncio.create_task(loader.close(timeout=10)))

    async with loader:
        source.at_step = close
        await ended(asyncio.create_task(loader.load(world.ref(name))))
        if closing:
            await closing[0]
    assert not {name for name in our_threads() if "http" not in name and "remote" not in name}
    async with over(world) as other:
        await loads(other, world, name)
        await assert_at_rest(other, world)
    return bool(closing)


async def loads(loader: AdapterLoader, world: FaultyWorld, name: str) -> None:
    async with await loader.load(world.ref(name)) as handle:
        tiny.assert_equal_to_file(handle, world.adapters / "a")


ENDS = {"given up": given_up, "closed": closed}
CASES = [
    ("asyncio", "download", "given up"),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("uvloop", "download", "given up"),
            *((loop, "download", "closed") for loop in LOOPS),
            *(("asyncio", "resumed", "given up"), ("uvloop", "resumed", "closed")),
            *(("uvloop", "cached", "given up"), ("asyncio", "cached", "closed")),
        )
    ),
]


@pytest.mark.parametrize(("anyio_backend", "what", "end"), CASES, indirect=["anyio_backend"])
async def test_it_ends_at_every_step(tmp_path: Path, what: str, end: str) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path, cache_bytes=1_000_000) as world:
        contents = tiny.files(tiny.write(tmp_path / "a", 0, RANK))
        step, missed = 0, 0
        while missed < 2:  # how often threads are waited for depends on how quick they are
            step += 1
            name = await prepared(world, what, step, contents)
            missed = 0 if await ENDS[end](world, name, step) else missed + 1
        assert step - 2 >= LEAST[what]
