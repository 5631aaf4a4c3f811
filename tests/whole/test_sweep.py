"""Cancel at every await, fail at every step, with every tier in play: nothing may be left."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
from cancellation_sweep import cancel_at, count_steps, our_tasks, raising, settle
from event_loops import until
from gated_device import GatedDevice
from leaks import mapped_files, open_files, our_threads
from tiny_loaders import fails
from tiny_sources import WEIGHTS

from lorax_async import AdapterLoader, LoaderConfig, LocalRoot, Usage, errors
from lorax_async.devices.simulated import SimulatedDevice
from lorax_async.files import FileReader
from lorax_async.runtime.host_tier import MappedFile
from lorax_async.runtime.placement import TierName
from lorax_async.testing import FakeSource, Step

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.usefixtures("nothing_left")

TURNS = 24
"""Of the loop, one after the other; a fake adapter has all its bytes before that many."""
RANK = 4  # Padded to 8 on the simulated device
ONE = tiny.LAYERS * len(tiny.TARGETS) * 8 * (tiny.HIDDEN + 2 * tiny.HIDDEN) * 2
"""Device bytes of a tiny adapter of rank 8: A [8, 32] and B [64, 8] in BF16."""
ONE_LAYER = 2 * RANK * 4 * (tiny.HIDDEN + 2 * tiny.HIDDEN)
"""Bytes of a layer in the file: two modules, F32, A [4, 32] and B [64, 4]."""
SLOTS, TIMEOUT = 2, 20
LAYOUT = tiny.layout("BF16")
TIERS: tuple[TierName, ...] = get_args(TierName)
DEVICE_VERBS = ("load", "stream", "device", "pin", "load_from_host")
HOST_VERBS = ("host", "load_from_host")
VERBS = ("disk", "host", *DEVICE_VERBS)


def new_device(kind: str = "simulated") -> GatedDevice | SimulatedDevice:
    made = GatedDevice if kind == "cpu" else SimulatedDevice
    return made(LAYOUT, dtype="BF16", nbytes=SLOTS * ONE, slots=SLOTS)


def config_for(base: Path) -> LoaderConfig:
    """Pinned memory for two adapters, host memory for two and a half, four staging buffers."""
    sizes: dict[str, Any] = {"device_bytes": SLOTS * ONE, "max_slots": SLOTS, "host_bytes": 35_000}
    sizes |= {"pinned_bytes": 2 * ONE, "staging_bytes": 16 << 10, "io_threads": 2}
    return LoaderConfig(**sizes, local_roots=(LocalRoot(base, immutable=True),))


def written(base: Path) -> dict[str, Path]:
    return {name: tiny.write(base / name, seed, RANK) for seed, name in enumerate("abc")}


def assert_empty(usage: Usage) -> None:
    taken = (usage.slots, usage.device_bytes, usage.host_bytes, usage.pinned_bytes)
    assert [budget.used for budget in taken] == [0, 0, 0, 0]
    assert (usage.leases, usage.waiting) == (0, 0)


class Bench:
    """`a` is what is swept; `b` and `c` are others. `base` has a folder of each."""

    def __init__(self, loader: AdapterLoader, ids: dict[str, Any], base: Path) -> None:
        self.loader = loader
        self.device: Any = loader.device
        self.ids = ids
        self.base = base
        self.source = FakeSource(holdable=True)
        self.files_before = open_files()

    async def do(self, verb: str) -> None:
        id, there = self.ids["a"], self.loader
        if verb in TIERS:
            await there.prefetch(id, tier=verb, timeout=TIMEOUT)
        elif verb == "stream":
            async with there.stream(id, timeout=TIMEOUT) as handle:
                for layer in range(tiny.LAYERS):
                    await handle.layer_ready(layer)
                    with handle.use():
                        pass
        elif verb in {"pin", "unload"}:
            await getattr(there, verb)(id, timeout=TIMEOUT)
        else:
            if verb == "load_from_host":
                await there.prefetch(id, tier="host", timeout=TIMEOUT)
            (await there.load(id, timeout=TIMEOUT)).release()

    def renew(self) -> None:
        """The same bytes in new files, put in place by rename: a first sight again."""
        self.source.put("a", *tiny.files(self.base / "a"))
        for path in tiny.write(self.base / "fresh", rank=RANK).iterdir():
            os.replace(path, self.base / "a" / path.name)

    async def crowd(self) -> None:
        """Every slot is taken, by what may be evicted, and so is the pinned memory."""
        for other in "bc":
            (await self.loader.load(self.ids[other], timeout=TIMEOUT)).release()

    async def assert_clean(self) -> None:
        """Nobody waits or holds; once all is unloaded, every budget is whole again."""
        await settle(self.loader)
        usage = self.loader.placement().usage
        assert (usage.leases, usage.waiting) == (0, 0)
        for key in tuple(self.loader.placement().adapters):
            await self.loader.unload(key, timeout=TIMEOUT)
        await settle(self.loader)
        assert_empty(self.loader.placement().usage)
        here = self.loader.placement().adapters.values()
        assert {(found.tier, found.pins) for found in here} <= {("disk", 0)}
        self.device.wipe([]).result(TIMEOUT)  # what was asked for before has been done
        for module in range(len(LAYOUT.modules)):
            for slot in range(SLOTS):
                assert self.device.operands(module, slot) is None
        # A thread that began for a cancelled call closes its files when it ends.
        await until(lambda: not mapped_files() and open_files() <= self.files_before)
        counts = self.source.counts
        assert counts.open_readers == 0

    async def assert_works(self) -> None:
        """From nothing, from whatever a round of the others left, and beside them."""
        for name in "abca":
            async with await self.loader.load(self.ids[name], timeout=TIMEOUT) as handle:
                tiny.assert_equal_to_file(handle, self.base / name)

    async def assert_whole(self) -> None:
        await self.assert_clean()
        await self.assert_works()
        await self.assert_clean()

    async def assert_recovers(self) -> None:
        await settle(self.loader)
        self.renew()
        await self.assert_works()
        await self.assert_clean()


@asynccontextmanager
async def tiers(base: Path, where: str = "local", **settings: Any) -> AsyncIterator[Bench]:
    """Files for the "cpu" or the simulated device, or a source from which bytes are "arriving"."""
    ids, device, source = written(base), new_device(where), FakeSource(holdable=True)
    for name, folder in ids.items():
        source.put(name, *tiny.files(folder))
    config = replace(config_for(base), **settings)
    arriving = where == "arriving"
    there = AdapterLoader(LAYOUT, config, source=source if arriving else None, device=device)
    async with there:
        bench = Bench(there, {name: name for name in ids} if arriving else ids, base)
        bench.source = source
        yield bench
    assert not mapped_files()
    assert not our_threads()
    assert source.counts.open_readers == 0


@pytest.mark.each_loop
@pytest.mark.parametrize("where", ["empty", "crowded", "cpu", "arriving"])
@pytest.mark.parametrize("verb", VERBS)
async def test_cancelled_at_every_await(tmp_path: Path, verb: str, where: str) -> None:
    async with tiers(tmp_path, where) as bench:
        steps = await count_steps(bench.do(verb))
        await bench.assert_clean()
        assert steps >= 1
        for step in range(1, steps + 1):
            bench.renew()
            if where == "crowded":
                await bench.crowd()
            await cancel_at(bench.do(verb), step)
            await bench.assert_whole()


@pytest.mark.each_loop
@pytest.mark.parametrize("tier", TIERS)
async def test_a_prefetch_is_cancelled_at_every_turn(tmp_path: Path, tier: TierName) -> None:
    async with tiers(tmp_path, "arriving") as bench:
        for turns in range(TURNS):
            bench.source.put("a", *tiny.files(tmp_path / "a"))
            hint = bench.loader.prefetch("a", tier=tier)
            for _ in range(turns):
                await asyncio.sleep(0)
            hint.cancel()
            await hint
            assert hint.done
            assert not hint.errors
            await bench.assert_whole()


async def test_unload_is_cancelled_where_it_waits(tmp_path: Path) -> None:
    async with tiers(tmp_path) as bench:
        await bench.do("load_from_host")
        assert await cancel_at(bench.do("unload"), 1)
        await bench.assert_clean()
        bench.device.gate.clear()
        copies = bench.device.copies
        load = asyncio.create_task(bench.do("load"))
        await until(lambda: bench.device.copies > copies)
        assert await cancel_at(bench.do("unload"), 1)
        bench.device.gate.set()
        await load
        await bench.assert_whole()


@pytest.mark.each_loop
async def test_close_at_every_turn_of_everything(tmp_path: Path) -> None:
    ids, files = written(tmp_path), open_files()
    for turns in range(TURNS):
        loader = AdapterLoader(LAYOUT, config_for(tmp_path), device=new_device())
        await loader.__aenter__()
        bench = Bench(loader, ids, tmp_path)
        verbs = ("load", "stream", "pin", "host", "unload")
        tasks = [asyncio.create_task(bench.do(verb)) for verb in verbs]
        hints = loader.prefetch(ids.values()), loader.prefetch(ids.values(), tier="host")
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await cancel_at(loader.close(), 1)
        await loader.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(each is None or isinstance(each, errors.LoraxError) for each in outcomes)
        assert all(hint.done for hint in hints)
        assert not our_tasks()
        assert not our_threads()
        assert not mapped_files()
        assert open_files() <= files
        assert_empty(loader.placement().usage)


ERRORS = [
    errors.FetchError("ordered"),
    errors.IntegrityError("ordered"),
    RuntimeError("a foreign fault"),
    MemoryError("none left"),
]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)

SOURCE_STEPS: dict[tuple[Step, int], tuple[str, ...]] = {
    **dict.fromkeys(
        (("resolve", 0), ("open", 0), ("fetch_groups", 0), ("fetch_groups", 2), ("verify", 0)),
        VERBS,
    ),
    **dict.fromkeys((("read", 0), ("read", 2)), DEVICE_VERBS),
}
"""By step and group: the verbs that come to it."""

LATER_STEPS = {
    "config": ("lorax_async.runtime.fetches.parse_config", VERBS),
    "header": ("lorax_async.runtime.fetches.parse_header", VERBS),
    "plan": ("lorax_async.runtime.fetches.TransferPlanner.plan", VERBS),
    "file opened": ("lorax_async.sources.local.read_prefix", VERBS),
    "file read": ("lorax_async.devices.transfer.read", DEVICE_VERBS),
    "staging taken": ("lorax_async.devices.staging.StagingRing.take", DEVICE_VERBS),
    "staged": ("lorax_async.devices.staging.StagingBuffer.convert", DEVICE_VERBS),
    "copy asked for": ("lorax_async.devices.simulated.SimulatedDevice.copy", DEVICE_VERBS),
    "copy ran": ("lorax_async.devices.cpu.CpuDevice.copy", DEVICE_VERBS),
    "opened to be mapped": ("lorax_async.runtime.host_tier._open_pages", HOST_VERBS),
    "mapped": ("lorax_async.runtime.host_tier.MappedFile", HOST_VERBS),
    "populated": ("lorax_async.runtime.host_tier.MappedFile.populate", HOST_VERBS),
    "settled": ("lorax_async.runtime.host_tier._require_unchanged", HOST_VERBS),
}


def assert_told(caught: errors.LoraxError, error: Exception, id: object) -> None:
    """A typed error stays; a foreign one is a lack of memory, or a fault of ours, and says which."""
    typed = isinstance(error, errors.LoraxError)
    foreign = errors.CapacityError if isinstance(error, MemoryError) else errors.InternalError
    assert isinstance(caught, type(error) if typed else foreign)
    assert typed or caught.__cause__ is error
    assert caught.id == str(id)


@pytest.mark.parametrize(("step", "group"), SOURCE_STEPS)
async def test_every_error_of_a_source(tmp_path: Path, step: Step, group: int) -> None:
    """All with one loader: a staging buffer that each of them kept would be missed at last."""
    async with tiers(tmp_path, "arriving") as bench:
        _, weights = tiny.files(tmp_path / "a")
        first = 8 + int.from_bytes(weights[:8], "little")
        at = first + group * ONE_LAYER if step == "read" else group
        for error in ERRORS:
            for verb in SOURCE_STEPS[step, group]:
                bench.source.put("a", *tiny.files(tmp_path / "a"))
                bench.source.fail(step, error, id="a", at=at)
                caught = await fails(bench.do(verb), errors.LoraxError)
                assert_told(caught, error, "a")
                await bench.assert_whole()


RARELY = [
    pytest.param(e, marks=() if type(e) is RuntimeError else pytest.mark.slow) for e in ERRORS
]


@pytest.mark.parametrize("step", LATER_STEPS)
@pytest.mark.parametrize("error", RARELY, ids=lambda e: type(e).__name__)
async def test_every_error_of_every_later_step(
    tmp_path: Path, monkeypatch: Patch, step: str, error: Exception
) -> None:
    target, verbs = LATER_STEPS[step]
    for verb in verbs:
        async with tiers(tmp_path) as bench:
            with monkeypatch.context() as patch:
                patch.setattr(target, raising(error))
                caught = await fails(bench.do(verb), errors.LoraxError)
                await settle(bench.loader)
            assert_told(caught, error, bench.ids["a"])
            await bench.assert_whole()


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("verb", DEVICE_VERBS)
async def test_every_copy_can_fail(tmp_path: Path, verb: str, kind: str) -> None:
    """Through images, and through the ring; the image of a copy that failed is not warm."""
    for number in range(tiny.LAYERS):
        for pinned_bytes in (0, 1 << 20):
            async with tiers(tmp_path, kind, pinned_bytes=pinned_bytes) as bench:
                bench.device.failing = {number}
                await fails(bench.do(verb), errors.TransferError, "told to fail")
                bench.device.failing = set()
                async with await bench.loader.load(bench.ids["a"], timeout=20) as handle:
                    tiny.assert_equal_to_file(handle, tmp_path / "a")
                await bench.assert_whole()


@pytest.mark.parametrize("at", range(tiny.LAYERS + 1))
async def test_the_device_is_lost(tmp_path: Path, at: int) -> None:
    async with tiers(tmp_path, "arriving") as bench:
        bench.source.hold("a")
        bench.source.allow("a", *range(at)) if at else None
        async with bench.loader.stream("a", timeout=20) as handle:
            if at:
                await handle.layer_ready(at - 1)
            bench.device.lose()
            bench.source.allow("a")
            if at < tiny.LAYERS:
                caught = await fails(handle.layer_ready(tiny.LAYERS - 1), errors.TransferError)
                assert not caught.retryable
            else:
                assert handle.resident
                with handle.use():
                    pass
        for verb in DEVICE_VERBS:
            bench.source.put("a", *tiny.files(tmp_path / "a"))
            await fails(bench.do(verb), errors.TransferError, "lost")
        await bench.assert_clean()
    async with tiers(tmp_path) as fresh:
        await fresh.assert_works()


@each_error
@pytest.mark.parametrize("step", ["note_use", "wait_for"])
async def test_the_device_fails_a_user(
    tmp_path: Path, monkeypatch: Patch, step: str, error: Exception
) -> None:
    async with tiers(tmp_path, "arriving") as bench:
        bench.device.gate.clear()
        async with bench.loader.stream("a", timeout=20) as handle:
            await until(partial(handle.queue_behind, 0))
            with monkeypatch.context() as patch:
                patch.setattr(bench.device, step, raising(error))
                with pytest.raises(type(error)):
                    handle.queue_behind(0)
                    with handle.use():
                        pass
            bench.device.gate.set()
        await bench.assert_whole()


@pytest.fixture
def quiet(monkeypatch: Patch) -> None:
    """What is logged here was ordered."""
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)


@each_error
@pytest.mark.usefixtures("quiet")
async def test_a_hold_does_not_close(tmp_path: Path, monkeypatch: Patch, error: Exception) -> None:
    close = MappedFile.close

    def fail(pages: MappedFile) -> None:
        close(pages)
        raising(error)()

    async with tiers(tmp_path) as bench:
        await bench.do("host")
        with monkeypatch.context() as patch:
            patch.setattr(MappedFile, "close", fail)
            await bench.loader.unload(bench.ids["a"], timeout=2)
        await bench.assert_clean()
        await bench.do("host")
        await bench.assert_works()
        await bench.loader.prefetch([bench.ids["a"], bench.ids["b"]], tier="host")
        monkeypatch.setattr(MappedFile, "close", fail)
        await bench.loader.close()


@each_error
@pytest.mark.usefixtures("quiet")
async def test_a_column_cannot_clear(tmp_path: Path, monkeypatch: Patch, error: Exception) -> None:
    async with tiers(tmp_path) as bench:
        await bench.do("load")
        with monkeypatch.context() as patch:
            patch.setattr(bench.device, "clear_column", raising(error))
            await bench.do("unload")
        await until(lambda: open_files() <= bench.files_before)
        await bench.assert_works()
        await bench.assert_clean()


@each_error
@pytest.mark.parametrize("call", ["open", "staging_memory", "staging_memory, for images"])
async def test_the_device_does_not_open(
    tmp_path: Path, monkeypatch: Patch, call: str, error: Exception
) -> None:
    device, files, calls = new_device(), open_files(), list[object]()
    name, _, later = call.partition(", ")
    original, fail = getattr(device, name), raising(error)

    def called(*what: object) -> object:
        calls.append(what)
        return original(*what) if later and len(calls) == 1 else fail()

    monkeypatch.setattr(device, name, called)
    loader = AdapterLoader(LAYOUT, config_for(tmp_path), device=device)
    short = isinstance(error, MemoryError)
    await fails(loader.__aenter__(), errors.CapacityError if short else type(error))
    assert len(calls) == 1 + bool(later)
    assert not our_threads()
    assert open_files() <= files


def truncate(weights: Path) -> None:
    os.truncate(weights, weights.stat().st_size // 2)


def touch(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")


def rename(weights: Path) -> None:
    """A new file under the old name leaves the open one whole: its ctime tells."""
    os.replace(tiny.write(weights.parent.with_name("fresh"), 9, RANK) / WEIGHTS, weights)


each_damage = pytest.mark.parametrize("damage", [truncate, touch, rename])


@each_damage
@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("verb", DEVICE_VERBS)
async def test_a_file_changes_under_the_copies(
    tmp_path: Path, monkeypatch: Patch, verb: str, kind: str, damage: Callable[[Path], None]
) -> None:
    """Between any two reads of the weights, with copies of what was read before on their way.

    What was saved anew is loaded once more, unless a caller has a handle; what was cut short is no
    adapter any more.
    """
    original = FileReader.read_into

    async def one(number: int) -> bool:
        reads = 0

        def read(reader: FileReader, buffers: list[memoryview], offset: int, *rows: int) -> None:
            nonlocal reads
            reads += bool(buffers)
            if reads == number and buffers:
                damage(tmp_path / "a" / WEIGHTS)
            original(reader, buffers, offset, *rows)

        async with tiers(tmp_path, kind, io_threads=1) as bench:
            await bench.do("disk")
            with monkeypatch.context() as patch:
                patch.setattr(FileReader, "read_into", read)
                refused = True
                with suppress(errors.IntegrityError, errors.AdapterFormatError):
                    await bench.do(verb)
                    refused = False
            damaged = reads >= number
            assert refused == (damaged and (damage is truncate or verb == "stream"))
            await bench.assert_recovers()
        return damaged

    number = 1
    while await one(number):
        number += 5
    assert number > tiny.LAYERS


@each_damage
async def test_a_held_file_changes(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """The map is not touched by anybody, so that a file that was cut kills nobody."""
    async with tiers(tmp_path) as bench:
        await bench.do("host")
        key = next(iter(bench.loader.placement().adapters))
        damage(tmp_path / "a" / WEIGHTS)
        await fails(bench.loader.load(key), errors.IntegrityError)
        await bench.assert_clean()
        await bench.assert_recovers()
