"""A loader with every tier on the simulated device, and what must be true of it at rest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny
from common import mapped_files, open_files, our_threads
from lorax_async import AdapterLoader, LoaderConfig, LocalRoot
from lorax_async.core.lifecycle import Lifecycle
from lorax_async.io.ports import Source
from lorax_async.runtime.driver import Driver
from lorax_async.runtime.whereabouts import TierName
from lorax_async.testing import FakeSource, SimulatedDevice

RANK = 4
"""Padded to 8 on the device."""
ONE = tiny.LAYERS * len(tiny.TARGETS) * 8 * (tiny.HIDDEN + 2 * tiny.HIDDEN) * 2
"""Device bytes of a tiny adapter of rank 8: A [8, 32] and B [64, 8] in BF16."""
SLOTS = 2
LAYOUT = tiny.layout("BF16")

DEVICE_VERBS = ("load", "stream", "to_device", "pin", "load_from_host")
"""Those in which bytes move to the device."""
HOST_VERBS = ("host", "load_from_host")
VERBS = ("disk", "host", *DEVICE_VERBS)
TIMEOUT = 20


class TierBench:
    """`a` is what is swept; `b` is somebody else's. `folders` have the files of each."""

    def __init__(
        self, loader: AdapterLoader, device: SimulatedDevice, ids: dict[str, Any], base: Path
    ) -> None:
        self.loader = loader
        self.device = device
        self.ids = ids
        self.base = base
        self.files_before = open_files()

    @property
    def driver(self) -> Driver:
        return self.loader._machinery.driver

    @property
    def lifecycle(self) -> Lifecycle:
        return self.driver.lifecycle

    # -- verbs ------------------------------------------------------------------------------------

    def do(self, verb: str) -> Coroutine[Any, Any, None]:
        work: Coroutine[Any, Any, None] = getattr(self, verb)()
        return work

    async def load(self) -> None:
        (await self.loader.load(self.ids["a"], timeout=TIMEOUT)).release()

    async def stream(self) -> None:
        async with self.loader.stream(self.ids["a"], timeout=TIMEOUT) as handle:
            for layer in range(tiny.LAYERS):
                await handle.layer_ready(layer)
                with handle.use():
                    pass

    async def pin(self) -> None:
        await self.loader.pin(self.ids["a"], timeout=TIMEOUT)

    async def disk(self) -> None:
        await self._prefetch("disk")

    async def host(self) -> None:
        await self._prefetch("host")

    async def to_device(self) -> None:
        await self._prefetch("device")

    async def load_from_host(self) -> None:
        await self.host()
        await self.load()

    async def _prefetch(self, tier: TierName) -> None:
        await self.loader.prefetch(self.ids["a"], tier=tier, timeout=TIMEOUT)

    async def unload(self) -> None:
        await self.loader.unload(self.ids["a"], timeout=TIMEOUT)

    # -- states to begin in -----------------------------------------------------------------------

    def renew(self) -> None:
        """The same bytes in new files, put in place by rename: a first sight again."""
        fresh = tiny.write(self.base / "fresh", rank=RANK)
        for path in fresh.iterdir():
            os.replace(path, self.base / "a" / path.name)

    async def crowd(self) -> None:
        """Every slot is taken, by what may be evicted, and so is the pinned memory."""
        for other in "bc":
            (await self.loader.load(self.ids[other], timeout=TIMEOUT)).release()

    # -- at rest ----------------------------------------------------------------------------------

    async def settle(self) -> None:
        """Until nothing is under way: no task of ours, no copy, nothing that drains or goes."""
        for _ in range(5000):
            lives = self.lifecycle.lives.values()
            busy = any(
                life.copying or life.fetch_running or life.unloads or life.uses for life in lives
            )
            rests = all(life.at_rest or life.slot.value == "resident" for life in lives)
            if rests and not (busy or our_tasks() or self.driver.files._tasks):
                return
            await asyncio.sleep(0.001)
        raise AssertionError(f"it did not come to rest: {our_tasks()}")

    async def assert_clean(self) -> None:
        """Nobody waits or holds; once all is unloaded, every budget is whole again."""
        await self.settle()
        self._assert_quiet()
        for key in tuple(self.loader.residency()):
            await self.loader.unload(key, timeout=TIMEOUT)
        await self.settle()
        self._assert_quiet()
        self.assert_empty()
        self._assert_no_rows()
        assert open_files() <= self.files_before

    def _assert_quiet(self) -> None:
        driver = self.driver
        assert not driver.tenants._waiters
        assert not driver.tenants._unloads
        assert not driver.tenants.leases
        assert not driver.files.readers
        assert not driver.files._demands
        assert not driver.files._tasks
        for life in self.lifecycle.lives.values():
            assert (life.leases, life.uses, len(life.waiters), life.unloads) == (0, 0, 0, 0)
        self.assert_whole_ring()

    def assert_whole_ring(self) -> None:
        ring = self.driver._copies._transfer._staging
        assert ring.free == ring.buffers
        taken = ring.take(ring.buffers)
        assert len({buffer.tensor.data_ptr() for buffer in taken}) == ring.buffers
        for buffer in taken:
            ring.release(buffer)

    def assert_empty(self) -> None:
        budgets, tenants = self.lifecycle.budgets, self.driver.tenants
        assert budgets.device.slots_used == 0
        assert budgets.device.copies_free == 8 * self.loader.config.io_threads
        assert budgets.device.arena.free_bytes == budgets.device.arena.nbytes
        assert (budgets.host.free, budgets.host.held) == (budgets.host.nbytes, {})
        assert not budgets.host.leaving
        assert budgets.images.arena.free_bytes == budgets.images.arena.nbytes
        for each in (budgets.device, budgets.host, budgets.images):
            assert not tuple(each.policy.ranked())
        assert not tenants._tenancies
        assert not self.driver.interest._pins
        assert not self.driver.files.holds
        assert not mapped_files()

    def _assert_no_rows(self) -> None:
        self.device._copying.run(lambda: None).result(TIMEOUT)  # what was asked for has been done
        for module in range(len(LAYOUT.modules)):
            for slot in range(SLOTS):
                assert self.device.operands(module, slot) is None

    async def assert_works(self) -> None:
        """From nothing, from whatever a round of the others left, and beside them."""
        for name in "abca":
            handle = await self.loader.load(self.ids[name], timeout=TIMEOUT)
            async with handle:
                tiny.assert_equal_to_file(handle, self.base / name)


def our_tasks() -> list[str]:
    return [t.get_name() for t in asyncio.all_tasks() if t.get_name().startswith("lorax")]


def tier_device() -> SimulatedDevice:
    return SimulatedDevice(LAYOUT, dtype="BF16", nbytes=SLOTS * ONE, slots=SLOTS)


def tier_config(base: Path) -> LoaderConfig:
    """Pinned memory for two adapters, host memory for two and a half, four staging buffers."""
    return LoaderConfig(
        device_bytes=SLOTS * ONE,
        max_slots=SLOTS,
        pinned_bytes=2 * ONE,
        host_bytes=35_000,
        staging_bytes=16 << 10,
        io_threads=2,
        local_roots=(LocalRoot(base, immutable=True),),
    )


def written(base: Path) -> dict[str, Path]:
    return {name: tiny.write(base / name, seed, RANK) for seed, name in enumerate("abc")}


@asynccontextmanager
async def bench_over(
    base: Path, source: Source | None, ids: dict[str, Any], **settings: object
) -> AsyncIterator[TierBench]:
    device, config = tier_device(), replace(tier_config(base), **settings)  # type: ignore[arg-type]
    async with AdapterLoader(LAYOUT, config, source=source, device=device) as loader:
        yield TierBench(loader, device, ids, base)


@asynccontextmanager
async def local_tiers(base: Path, **settings: object) -> AsyncIterator[TierBench]:
    """Files below an immutable root."""
    async with bench_over(base, None, written(base), **settings) as bench:
        yield bench
    assert not mapped_files()
    assert not our_threads()


@asynccontextmanager
async def fake_tiers(base: Path) -> AsyncIterator[tuple[TierBench, FakeSource]]:
    """A source whose bytes stream in, and can be held."""
    source = FakeSource(holdable=True)
    for name, folder in written(base).items():
        source.put(name, *tiny.files(folder))
    async with bench_over(base, source, {name: name for name in "abc"}) as bench:
        yield bench, source
    assert (source.counts.open_readers, source.counts.open_holds) == (0, 0)
    assert not our_threads()
