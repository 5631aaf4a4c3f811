"""What close waits for, in whatever order things end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from common import our_threads, until
from lorax_async import AdapterKey, AdapterLoader, AdapterRef, LoaderClosedError, LoaderConfig
from lorax_async.core.arena import Extent
from lorax_async.core.moves import Row
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.io.ports import AdapterFile, CopyTicket, Demand, FilePieces, StagedPiece
from lorax_async.runtime.digests import Digests
from lorax_async.runtime.journal import Journal
from lorax_async.runtime.resolver import Resolver
from lorax_async.testing import FakeSource
from tiny_loaders import loader
from tiny_sources import over

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


class NotedDevice(GatedDevice):
    """Writes down when copies and the device ended."""

    def __init__(self) -> None:
        super().__init__(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=1)
        self.ended: list[str] = []

    def copy(
        self, pieces: FilePieces | StagedPiece, rows: Sequence[Row], extent: Extent, slot: int
    ) -> CopyTicket:
        try:
            return super().copy(pieces, rows, extent, slot)
        finally:
            self.ended.append("copy")

    def close(self) -> None:
        super().close()
        self.ended.append("device")


async def test_the_device_ends_after_the_copies_even_if_close_is_broken_off(tmp_path: Path) -> None:
    """As by a loop that is shut down: whoever copies still writes to the arena."""
    folder, device = tiny.write(tmp_path / "a"), NotedDevice()
    config = LoaderConfig(device_bytes=1 << 20, max_slots=1, io_threads=1)
    there = AdapterLoader(tiny.layout(), config, device=device)
    await there.__aenter__()
    device.gate.clear()
    loading = asyncio.create_task(there.load(folder))
    await until(lambda: device.copies == 1)
    closing = asyncio.create_task(there.close())
    await asyncio.sleep(0.01)
    assert there._closing is not None
    there._closing.cancel()
    await asyncio.sleep(0.03)
    device.gate.set()
    ends = await asyncio.gather(loading, closing, return_exceptions=True)
    assert all(isinstance(end, BaseException) for end in ends)
    await until(lambda: "device" in device.ended)
    assert device.ended == ["copy"] * tiny.LAYERS + ["device"]


class DeafSource(FakeSource):
    """Goes on opening, and does not look whether anybody still wants that."""

    asked, undone = False, 0

    async def open(self, key: AdapterKey, demand: Demand) -> AdapterFile:
        self.asked = True
        never: asyncio.Future[AdapterFile] = asyncio.get_running_loop().create_future()
        try:
            return await never
        finally:
            await asyncio.sleep(0.01)
            self.undone += 1


async def test_a_fetch_ends_with_the_loader_even_if_close_is_broken_off(tmp_path: Path) -> None:
    source = DeafSource()
    source.put("a", *tiny.files(tiny.write(tmp_path / "a")))
    there = over(source)
    await there.__aenter__()
    loading = asyncio.create_task(there.load("a"))
    await until(lambda: source.asked)
    closing = asyncio.create_task(there.close())
    await asyncio.sleep(0.01)
    assert there._closing is not None
    there._closing.cancel()
    await asyncio.gather(loading, closing, return_exceptions=True)
    assert source.undone == 1


def _metadata(there: AdapterLoader, may_end: threading.Event) -> None:
    there._machinery._metadata.submit(may_end.wait, 10)


def _prefetch(there: AdapterLoader, may_end: threading.Event) -> None:
    task = asyncio.create_task(asyncio.to_thread(may_end.wait, 10))
    there._machinery._prefetching.add(task)  # type: ignore[arg-type]


@pytest.mark.parametrize("begin", [_metadata, _prefetch])
async def test_close_waits_for_what_still_runs(
    begin: Callable[[AdapterLoader, threading.Event], None],
) -> None:
    there, may_end = loader(), threading.Event()
    await there.__aenter__()
    begin(there, may_end)
    closing = asyncio.create_task(there.close())
    await asyncio.sleep(0.05)
    assert not closing.done()
    may_end.set()
    await closing


def test_not_even_the_thread_that_ended_the_others_is_left() -> None:
    class Loop(asyncio.SelectorEventLoop):
        def call_soon_threadsafe(  # type: ignore[override]
            self, *call: Any, **context: Any
        ) -> asyncio.Handle:
            handle = super().call_soon_threadsafe(*call, **context)
            if threading.current_thread().name == "lorax-stop":
                time.sleep(0.05)
            return handle

    async def body() -> None:
        async with loader():
            pass
        assert not our_threads()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(body())


class NeverAnswers(FakeSource):
    """It has something to undo when a question is stopped."""

    asked, undone = False, 0

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        await self._never()
        raise AssertionError

    async def digest(self, key: AdapterKey) -> str:
        await self._never()
        raise AssertionError

    async def _never(self) -> None:
        self.asked = True
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            await never
        finally:
            await asyncio.sleep(0.01)
            self.undone += 1


@pytest.mark.parametrize("question", ["digest", "id"])
async def test_questions_that_are_stopped_are_waited_for(question: str) -> None:
    source = NeverAnswers()
    if question == "id":
        resolver = Resolver(source, Journal(), 60)
        asked: Coroutine[Any, Any, object] = resolver.resolve(AdapterRef("a"))
        stop = resolver.stop
    else:
        key = source.put("a", b"{}", b"")
        digests = Digests(source, Journal(), lambda: None)
        asked = digests.compare(AdapterRef("a", digest="0" * 64), key, None)
        stop = digests.stop
    asking = asyncio.create_task(asked)
    await until(lambda: source.asked)
    await stop()
    assert source.undone == 1
    with pytest.raises(LoaderClosedError):
        await asking
