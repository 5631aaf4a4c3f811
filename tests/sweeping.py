"""How the sweep steps through a call, and what must be true of a loader at rest."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import tiny
from lorax_async import (
    AdapterLoader,
    LoaderConfig,
)
from lorax_async.core.transitions import SlotState
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.io.staging import StagingRing
from lorax_async.testing import FakeSource


@types.coroutine
def stepwise(
    work: Coroutine[Any, Any, Any], at_step: Callable[[int], None]
) -> Generator[Any, Any, Any]:
    """Runs `work`, calling `at_step` with the number of each suspension just before it."""
    steps = 0
    answer: Any = None
    error: BaseException | None = None
    while True:
        try:
            awaited = work.throw(error) if error is not None else work.send(answer)
        except StopIteration as end:
            return end.value
        steps += 1
        at_step(steps)
        try:
            answer, error = (yield awaited), None
        except BaseException as thrown:
            answer, error = None, thrown


async def count_steps(work: Coroutine[Any, Any, Any]) -> int:
    seen = 0

    def note(step: int) -> None:
        nonlocal seen
        seen = step

    await stepwise(work, note)
    return seen


async def cancel_at(work: Coroutine[Any, Any, Any], step: int) -> bool:
    """Cancel `work` at its suspension number `step`; whether it ended cancelled."""

    def cancel(current: int) -> None:
        if current == step:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    async def body() -> Any:
        return await stepwise(work, cancel)

    task = asyncio.create_task(body())
    await asyncio.wait([task])
    if task.cancelled():
        return True
    result = task.result()
    if result is not None:
        result.release()
    return False


class Bench:
    """A loader on real files or on a fake source, and what it must look like at rest."""

    def __init__(self, loader: AdapterLoader, device: GatedDevice, adapter: Path | str) -> None:
        self.loader = loader
        self.device = device
        self.adapter: Any = adapter

    async def load(self) -> Any:
        return await self.loader.load(self.adapter, timeout=20)

    async def stream(self) -> None:
        async with self.loader.stream(self.adapter, timeout=20) as handle:
            for layer in range(tiny.LAYERS):
                await handle.layer_ready(layer)

    async def settle(self) -> None:
        """Until nothing is in flight."""
        lives = self.loader._machinery.driver.lifecycle.lives
        for _ in range(2000):
            busy = any(
                life.copying or life.fetch_running or life.slot is SlotState.DRAINING
                for life in lives.values()
            )
            ours = [t for t in asyncio.all_tasks() if t.get_name().startswith("lorax")]
            if not busy and not ours:
                return
            await asyncio.sleep(0.001)
        raise AssertionError("it did not come to rest")

    async def assert_clean(self) -> None:
        await self.settle()
        driver = self.loader._machinery.driver
        assert not driver.tenants._waiters
        assert not driver.tenants.leases
        assert not driver.files.readers
        assert not driver.files._demands
        for life in driver.lifecycle.lives.values():
            assert (life.leases, life.uses, len(life.waiters)) == (0, 0, 0)
        residency = driver.lifecycle.budgets.device
        held = sum(life.grant is not None for life in driver.lifecycle.lives.values())
        assert residency.slots_used == held
        ring: StagingRing = driver._copies._transfer._staging
        assert ring.free == ring.buffers

    async def assert_works(self, folder: Path) -> None:
        async with await self.load() as handle:
            tiny.assert_equal_to_file(handle, folder)

    async def forget(self) -> None:
        """Make the next load a first sight again."""
        folder = self.adapter
        if isinstance(folder, Path):
            tiny.write(folder)


@asynccontextmanager
async def local_bench(tmp_path: Path, *, dtype: str = "bfloat16") -> AsyncIterator[Bench]:
    folder = tiny.write(tmp_path / "a")
    device = GatedDevice(tiny.layout(), dtype="BF16", nbytes=1 << 20, slots=2)
    config = LoaderConfig(device_bytes=1 << 20, max_slots=2, io_threads=2, dtype=dtype)
    async with AdapterLoader(tiny.layout(), config, device=device) as loader:
        yield Bench(loader, device, folder)


@asynccontextmanager
async def fake_bench(tmp_path: Path) -> AsyncIterator[tuple[Bench, FakeSource]]:
    folder = tiny.write(tmp_path / "a")
    source = FakeSource()
    source.put("a", *tiny.files(folder))
    device = GatedDevice(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=2)
    config = LoaderConfig(device_bytes=1 << 20, max_slots=2, io_threads=2)
    async with AdapterLoader(tiny.layout(), config, source=source, device=device) as loader:
        yield Bench(loader, device, "a"), source


async def released(work: Awaitable[Any]) -> None:
    result = await work
    if result is not None:
        result.release()
