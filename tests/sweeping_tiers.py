"""A loader with every tier in play, and what must be true of it at rest."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tiny
from common import mapped_files, open_files, our_threads, until
from lorax_async import AdapterLoader, LoaderConfig, LocalRoot, Usage
from lorax_async.io.devices.gated import GatedDevice
from lorax_async.testing import FakeSource, SimulatedDevice
from sweeping import settle

RANK = 4
"""Padded to 8 on the simulated device."""
ONE = tiny.LAYERS * len(tiny.TARGETS) * 8 * (tiny.HIDDEN + 2 * tiny.HIDDEN) * 2
"""Device bytes of a tiny adapter of rank 8: A [8, 32] and B [64, 8] in BF16."""
SLOTS = 2
LAYOUT = tiny.layout("BF16")
TIMEOUT = 20

DEVICE_VERBS = ("load", "stream", "to_device", "pin", "load_from_host")
"""Those in which bytes move to the device."""
HOST_VERBS = ("host", "load_from_host")
VERBS = ("disk", "host", *DEVICE_VERBS)

Kind = Literal["cpu", "simulated"]
AnyDevice = GatedDevice | SimulatedDevice


def tier_device(kind: Kind = "simulated") -> AnyDevice:
    made = SimulatedDevice if kind == "simulated" else GatedDevice
    return made(LAYOUT, dtype="BF16", nbytes=SLOTS * ONE, slots=SLOTS)


class TierBench:
    """`a` is what is swept; `b` and `c` are somebody else's. `base` has a folder of each."""

    def __init__(
        self,
        loader: AdapterLoader,
        device: AnyDevice,
        ids: dict[str, Any],
        base: Path,
        source: FakeSource | None = None,
    ) -> None:
        self.source = source
        self.loader = loader
        self.device = device
        self.ids = ids
        self.base = base
        self.files_before = open_files()

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
        await self.loader.prefetch(self.ids["a"], tier="disk", timeout=TIMEOUT)

    async def host(self) -> None:
        await self.loader.prefetch(self.ids["a"], tier="host", timeout=TIMEOUT)

    async def to_device(self) -> None:
        await self.loader.prefetch(self.ids["a"], tier="device", timeout=TIMEOUT)

    async def load_from_host(self) -> None:
        await self.host()
        await self.load()

    async def unload(self) -> None:
        await self.loader.unload(self.ids["a"], timeout=TIMEOUT)

    def renew(self) -> None:
        """The same bytes in new files, put in place by rename: a first sight again."""
        if self.source is not None:
            self.source.put("a", *tiny.files(self.base / "a"))
            return
        fresh = tiny.write(self.base / "fresh", rank=RANK)
        for path in fresh.iterdir():
            os.replace(path, self.base / "a" / path.name)

    async def crowd(self) -> None:
        """Every slot is taken, by what may be evicted, and so is the pinned memory."""
        for other in "bc":
            (await self.loader.load(self.ids[other], timeout=TIMEOUT)).release()

    async def settle(self) -> None:
        await settle(self.loader)

    async def assert_clean(self) -> None:
        """Nobody waits or holds; once all is unloaded, every budget is whole again."""
        await self.settle()
        usage = self.loader.usage()
        assert (usage.leases, usage.waiting) == (0, 0)
        for key in tuple(self.loader.residency()):
            await self.loader.unload(key, timeout=TIMEOUT)
        await self.settle()
        assert_empty(self.loader.usage())
        here = self.loader.residency().values()
        assert {(found.tier, found.pins) for found in here} <= {("disk", 0)}
        self._assert_no_rows()
        # A thread that began for a cancelled call closes its files when it ends.
        await until(lambda: not mapped_files() and open_files() <= self.files_before)
        if self.source is not None:
            counts = self.source.counts
            assert (counts.open_readers, counts.open_holds) == (0, 0)

    def _assert_no_rows(self) -> None:
        self.device.wipe([]).result(TIMEOUT)  # what was asked for before has been done
        for module in range(len(LAYOUT.modules)):
            for slot in range(SLOTS):
                assert self.device.operands(module, slot) is None

    async def assert_works(self) -> None:
        """From nothing, from whatever a round of the others left, and beside them."""
        for name in "abca":
            async with await self.loader.load(self.ids[name], timeout=TIMEOUT) as handle:
                tiny.assert_equal_to_file(handle, self.base / name)

    async def assert_whole(self) -> None:
        """It is clean, works, and is clean after that."""
        await self.assert_clean()
        await self.assert_works()
        await self.assert_clean()


def assert_empty(usage: Usage) -> None:
    taken = (usage.slots, usage.device_bytes, usage.host_bytes, usage.pinned_bytes)
    assert [budget.used for budget in taken] == [0, 0, 0, 0]
    assert (usage.leases, usage.waiting) == (0, 0)


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
async def _bench(
    base: Path, kind: Kind, source: FakeSource | None, ids: dict[str, Any], **settings: object
) -> AsyncIterator[TierBench]:
    device = tier_device(kind)
    config = replace(tier_config(base), **settings)  # type: ignore[arg-type]
    async with AdapterLoader(LAYOUT, config, source=source, device=device) as loader:
        yield TierBench(loader, device, ids, base, source)
    assert not mapped_files()
    assert not our_threads()


@asynccontextmanager
async def local_tiers(
    base: Path, kind: Kind = "simulated", **settings: object
) -> AsyncIterator[TierBench]:
    """Files below an immutable root."""
    async with _bench(base, kind, None, written(base), **settings) as bench:
        yield bench


@asynccontextmanager
async def fake_tiers(base: Path) -> AsyncIterator[tuple[TierBench, FakeSource]]:
    """A source whose bytes stream in, and can be held."""
    source = FakeSource(holdable=True)
    for name, folder in written(base).items():
        source.put(name, *tiny.files(folder))
    async with _bench(base, "simulated", source, {name: name for name in "abc"}) as bench:
        yield bench, source
    assert (source.counts.open_readers, source.counts.open_holds) == (0, 0)


@asynccontextmanager
async def tiers(base: Path, where: str) -> AsyncIterator[TierBench]:
    """Files for the "cpu" or the simulated device, or a source from which bytes are "arriving"."""
    if where == "arriving":
        async with fake_tiers(base) as (bench, _):
            yield bench
    else:
        async with local_tiers(base, "cpu" if where == "cpu" else "simulated") as bench:
            yield bench
