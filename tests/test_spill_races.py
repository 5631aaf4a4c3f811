"""What happens while an adapter is on its way from memory to the disk cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import tiny
from common import until
from given import assert_holds, give, put, used
from lorax_async import AdapterLoader, AdapterNotFoundError, Merge
from lorax_async.adapter import AdapterKey
from merges import weights_of
from spilling_loaders import (
    STEPS,
    Stalled,
    entries,
    entry_of,
    given,
    in_memory,
    off_device,
    roomy,
    stalled,
)
from tiny_sources import where

pytestmark = [
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.parametrize("step", STEPS),
]


class Midway:
    """A loader in which adapter 0 is being spilled for the sake of 1, and waits at a step."""

    def __init__(
        self, loader: AdapterLoader, folder: Path, key: AdapterKey, stall: Stalled
    ) -> None:
        self.loader = loader
        self.folder = folder
        self.key = key
        self._stall = stall
        self.giving = asyncio.create_task(given(loader, 1))

    async def end(self) -> None:
        """Let it go on; 1 is there."""
        assert not self.giving.done()
        self._stall.go_on.set()
        await self.giving
        await off_device(self.loader)
        async with await self.loader.load("1") as handle:
            assert_holds(handle, tiny.tensors(1))

    def assert_spilled(self) -> None:
        assert self.key not in in_memory(self.loader)
        assert entries(self.folder) == [entry_of(self.folder, self.key).name]


@asynccontextmanager
async def midway(
    monkeypatch: pytest.MonkeyPatch, folder: Path, step: str, device: str = "cpu"
) -> AsyncIterator[Midway]:
    async with roomy(folder, 1, device=device) as there:
        key = await given(there, 0)
        await off_device(there)
        with stalled(monkeypatch, step) as stall:
            there_now = Midway(there, folder, key, stall)
            await stall.reached()
            assert used(there) == sum(there._machinery.given.values())
            yield there_now
        await until(lambda: used(there) == sum(there._machinery.given.values()))
    assert used(there) == 0
    assert entries(folder) == []


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, device: str
) -> None:
    async with midway(monkeypatch, tmp_path, step, device) as now:
        async with await now.loader.load("0") as handle:  # from memory
            assert_holds(handle, tiny.tensors(0))
        assert in_memory(now.loader) == [now.key]
        await now.end()
        now.assert_spilled()
        async with await now.loader.load("0") as handle:  # from the disk
            assert_holds(handle, tiny.tensors(0))


async def test_it_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    async with midway(monkeypatch, tmp_path, step) as now:
        merge = Merge("linear", ["0", "0"], [1, 0.5])
        async with await now.loader.load(merge) as handle:
            before = {name: t.clone() for name, t in weights_of(handle).items()}
        await now.end()
        async with await now.loader.load(merge) as handle:
            after = weights_of(handle)
            assert all((after[name] == tensor).all() for name, tensor in before.items())


async def test_it_is_unloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    async with midway(monkeypatch, tmp_path, step) as now:
        await now.loader.unload("0")
        with pytest.raises(AdapterNotFoundError):
            await now.loader.load("0")
        await now.end()
        await until(lambda: entries(tmp_path) == [])
        with pytest.raises(AdapterNotFoundError):
            await now.loader.load(now.key)


async def test_it_is_unloaded_and_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with midway(monkeypatch, tmp_path, step) as now:
        await now.loader.unload("0")
        again = asyncio.create_task(given(now.loader, 0))
        await asyncio.sleep(0.01)
        await now.end()
        assert await again == now.key
        await off_device(now.loader)
        for seed in (0, 1):
            async with await now.loader.load(str(seed)) as handle:
                assert_holds(handle, tiny.tensors(seed))
        await until(lambda: len(entries(tmp_path)) == 1)


async def test_the_same_is_given_by_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with midway(monkeypatch, tmp_path, step) as now:
        giving = asyncio.create_task(give(now.loader, 0, "other"))
        await asyncio.sleep(0.01)
        await now.end()
        async with await giving as handle:
            assert handle.key == now.key
            assert_holds(handle, tiny.tensors(0))
        await now.loader.unload("0")
        async with await now.loader.load("other") as handle:
            assert_holds(handle, tiny.tensors(0))


async def test_it_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    async with midway(monkeypatch, tmp_path, step) as now:
        replacing = asyncio.create_task(put(now.loader, 2, "0"))
        await asyncio.sleep(0.01)
        assert not replacing.done()
        await now.end()
        async with await replacing as handle:
            assert_holds(handle, tiny.tensors(2))
        await until(lambda: not entry_of(tmp_path, now.key).exists())
        await off_device(now.loader)
        async with await now.loader.load("0") as handle:
            assert_holds(handle, tiny.tensors(2))


async def test_who_needs_the_room_gives_up_and_others_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with midway(monkeypatch, tmp_path, step) as now:
        second = asyncio.create_task(given(now.loader, 2))
        third = asyncio.create_task(given(now.loader, 3))
        await asyncio.sleep(0.01)
        second.cancel()
        now.giving.cancel()
        await asyncio.wait([second, now.giving])
        assert (second.cancelled(), now.giving.cancelled()) == (True, True)
        assert not third.done()
        now._stall.go_on.set()
        await third
        now.assert_spilled()
        assert now.loader.statistics().spills == 1
        for seed in (0, 3):
            async with await now.loader.load(str(seed)) as handle:
                assert_holds(handle, tiny.tensors(seed))


async def test_others_come_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async with midway(monkeypatch, tmp_path, step) as now:
        order: list[int] = []

        async def one(seed: int) -> None:
            await given(now.loader, seed)
            order.append(seed)

        tasks = []
        for seed in range(2, 6):
            tasks.append(asyncio.create_task(one(seed)))
            await asyncio.sleep(0.005)
        await now.end()
        await asyncio.gather(*tasks)
        assert order == sorted(order)
        assert len(entries(tmp_path)) == 5
        assert where(now.loader, "5").host_bytes == used(now.loader)
