"""Cancel at every await, fail at every step, with every tier in play: nothing may be left."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import tiny
from common import mapped_files, open_files, our_threads, until
from lorax_async import AdapterLoader, errors
from lorax_async.io.sources.checked_open import FileReader
from lorax_async.io.sources.local_hold import LocalHold
from lorax_async.runtime.whereabouts import TierName
from lorax_async.testing import SimulatedDevice, Step
from sweeping import cancel_at, count_steps, our_tasks
from sweeping_tiers import (
    DEVICE_VERBS,
    HOST_VERBS,
    LAYOUT,
    RANK,
    VERBS,
    Kind,
    TierBench,
    assert_empty,
    fake_tiers,
    local_tiers,
    tier_config,
    tier_device,
    tiers,
    written,
)
from tiny_sources import WEIGHTS

pytestmark = pytest.mark.usefixtures("nothing_left")

TURNS = 24
"""Of the loop, one after the other; a fake adapter has all its bytes before that many."""

TIERS: tuple[TierName, ...] = ("disk", "host", "device")

# -- cancelled at every await ------------------------------------------------------------------


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
    async with fake_tiers(tmp_path) as (bench, source):
        for turns in range(TURNS):
            source.put("a", *tiny.files(tmp_path / "a"))
            hint = bench.loader.prefetch("a", tier=tier)
            for _ in range(turns):
                await asyncio.sleep(0)
            hint.cancel()
            await hint
            assert hint.done
            assert not hint.errors
            await bench.assert_whole()


async def test_unload_is_cancelled_where_it_waits(tmp_path: Path) -> None:
    """For pages that are being let go, and for a copy; the next one succeeds."""
    async with local_tiers(tmp_path) as bench:
        await bench.load_from_host()
        assert await cancel_at(bench.unload(), 1)
        await bench.assert_clean()
        bench.device.gate.clear()
        copies = bench.device.copies
        load = asyncio.create_task(bench.load())
        await until(lambda: bench.device.copies > copies)
        assert await cancel_at(bench.unload(), 1)
        bench.device.gate.set()
        await load
        await bench.assert_whole()


@pytest.mark.each_loop
async def test_close_at_every_turn_of_everything(tmp_path: Path) -> None:
    """Begun at every turn, and cancelled at its await: it goes on, and nothing is left."""
    ids, files = written(tmp_path), open_files()
    for turns in range(TURNS):
        device = tier_device()
        loader = AdapterLoader(LAYOUT, tier_config(tmp_path), device=device)
        await loader.__aenter__()
        bench = TierBench(loader, device, ids, tmp_path)
        calls = [bench.load(), bench.stream(), bench.pin(), bench.host(), bench.unload()]
        tasks = [asyncio.create_task(call) for call in calls]
        hints = loader.prefetch(ids.values()), loader.prefetch(ids.values(), tier="host")
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await cancel_at(loader.close(), 1)
        await loader.close()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(each is None or isinstance(each, errors.LoraxError) for each in outcomes), (
            outcomes
        )
        assert all(hint.done for hint in hints)
        assert not our_tasks()
        assert not our_threads()
        assert not mapped_files()
        assert open_files() <= files
        assert_empty(loader.last_numbers()[1])


# -- every error at every step -----------------------------------------------------------------

ERRORS = [
    errors.FetchError("ordered"),
    errors.IntegrityError("ordered"),
    RuntimeError("a foreign fault"),
    MemoryError("none left"),
]
each_error = pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)

ONE_LAYER = 2 * RANK * 4 * (tiny.HIDDEN + 2 * tiny.HIDDEN)
"""Bytes of a layer in the file: two modules, F32, A [4, 32] and B [64, 4]."""

SOURCE_STEPS: dict[tuple[Step, int], tuple[str, ...]] = {
    ("resolve", 0): VERBS,
    ("open", 0): VERBS,
    ("bring", 0): VERBS,
    ("bring", 2): VERBS,
    ("verify", 0): VERBS,
    ("read", 0): DEVICE_VERBS,
    ("read", 2): DEVICE_VERBS,
    ("populate", 0): HOST_VERBS,
}
"""By step and group: the verbs that come to it."""

LATER_STEPS = {
    "config": ("lorax_async.runtime.planning.parse_config", VERBS),
    "header": ("lorax_async.runtime.planning.parse_header", VERBS),
    "plan": ("lorax_async.runtime.planning.plan_transfer", VERBS),
    "file opened": ("lorax_async.io.sources.local_weights.read_prefix", VERBS),
    "file read": ("lorax_async.io.transfer.read", DEVICE_VERBS),
    "staging taken": ("lorax_async.io.staging.StagingRing.take", DEVICE_VERBS),
    "staged": ("lorax_async.io.staging.Buffer.convert", DEVICE_VERBS),
    "copy asked for": ("lorax_async.io.devices.simulated.SimulatedDevice.copy", DEVICE_VERBS),
    "copy ran": ("lorax_async.io.devices.cpu.CpuDevice.copy", DEVICE_VERBS),
    "mapped": ("lorax_async.io.sources.local_hold.MappedFile", HOST_VERBS),
    "populated": ("lorax_async.io.sources.local_hold.LocalHold.populate", HOST_VERBS),
    "settled": ("lorax_async.io.sources.local_hold.LocalHold.settle", HOST_VERBS),
}


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise error.located() if isinstance(error, errors.LoraxError) else error

    return fail


def assert_told(caught: errors.LoraxError, error: Exception, id: object) -> None:
    """A typed error stays what it is; a foreign one is a fault of ours, and says which."""
    typed = isinstance(error, errors.LoraxError)
    assert isinstance(caught, type(error) if typed else errors.InternalError)
    assert typed or caught.__cause__ is error
    assert caught.id == str(id)


@pytest.mark.parametrize(("step", "group"), SOURCE_STEPS)
async def test_every_error_of_a_source(tmp_path: Path, step: Step, group: int) -> None:
    """All with one loader: a staging buffer that each of them kept would be missed at last."""
    async with fake_tiers(tmp_path) as (bench, source):
        _, weights = tiny.files(tmp_path / "a")
        first = 8 + int.from_bytes(weights[:8], "little")
        at = first + group * ONE_LAYER if step == "read" else group
        for error in ERRORS:
            for verb in SOURCE_STEPS[step, group]:
                source.put("a", *tiny.files(tmp_path / "a"))
                source.fail(step, error, id="a", at=at)
                with pytest.raises(errors.LoraxError) as caught:
                    await bench.do(verb)
                assert_told(caught.value, error, "a")
                await bench.assert_whole()


@pytest.mark.parametrize("step", LATER_STEPS)
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(each, marks=() if type(each) is RuntimeError else pytest.mark.slow)
        for each in ERRORS
    ],
    ids=lambda e: type(e).__name__,
)
async def test_every_error_of_every_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    target, verbs = LATER_STEPS[step]
    for verb in verbs:
        async with local_tiers(tmp_path) as bench:
            with monkeypatch.context() as patch:
                patch.setattr(target, raising(error))
                with pytest.raises(errors.LoraxError) as caught:
                    await bench.do(verb)
                await bench.settle()
            assert_told(caught.value, error, bench.ids["a"])
            await bench.assert_whole()


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("verb", DEVICE_VERBS)
async def test_every_copy_can_fail(tmp_path: Path, verb: str, kind: Kind) -> None:
    """Through images, and through the ring; the image of a copy that failed is not warm."""
    for number in range(tiny.LAYERS):
        for pinned_bytes in (0, 1 << 20):
            async with local_tiers(tmp_path, kind, pinned_bytes=pinned_bytes) as bench:
                bench.device.failing = {number}
                with pytest.raises(errors.TransferError, match="told to fail"):
                    await bench.do(verb)
                bench.device.failing = set()
                async with await bench.loader.load(bench.ids["a"], timeout=20) as handle:
                    tiny.assert_equal_to_file(handle, tmp_path / "a")
                await bench.assert_whole()


@pytest.mark.parametrize("at", range(tiny.LAYERS + 1))
async def test_the_device_is_lost(tmp_path: Path, at: int) -> None:
    """Before, between and after the copies: all is given back, and closing does not hang."""
    async with fake_tiers(tmp_path) as (bench, source):
        assert isinstance(bench.device, SimulatedDevice)
        source.hold("a")
        source.allow("a", *range(at)) if at else None
        async with bench.loader.stream("a", timeout=20) as handle:
            if at:
                await handle.layer_ready(at - 1)
            bench.device.lose()
            source.allow("a")
            if at < tiny.LAYERS:
                with pytest.raises(errors.TransferError) as caught:
                    await handle.layer_ready(tiny.LAYERS - 1)
                assert not caught.value.retryable
            else:
                assert handle.resident
                with handle.use():
                    pass
        for verb in DEVICE_VERBS:
            source.put("a", *tiny.files(tmp_path / "a"))
            with pytest.raises(errors.TransferError, match="lost"):
                await bench.do(verb)
        await bench.assert_clean()
    async with local_tiers(tmp_path) as fresh:
        await fresh.assert_works()


@each_error
@pytest.mark.parametrize("step", ["note_use", "wait_for"])
async def test_the_device_fails_a_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    """Whoever computes gets the device's error, and the lease ends as it would."""
    async with fake_tiers(tmp_path) as (bench, _):
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


# -- failures while things end, or before they begin ---------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged here was ordered."""
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)


@each_error
@pytest.mark.usefixtures("quiet")
async def test_a_hold_does_not_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is gone for the loader, whose budget is whole; when the loader closes, too."""
    close = LocalHold.close

    def fail(hold: LocalHold) -> None:
        close(hold)
        raising(error)()

    async with local_tiers(tmp_path) as bench:
        await bench.host()
        with monkeypatch.context() as patch:
            patch.setattr(LocalHold, "close", fail)
            await bench.loader.unload(bench.ids["a"], timeout=2)
        await bench.assert_clean()
        await bench.host()
        await bench.assert_works()
        await bench.loader.prefetch([bench.ids["a"], bench.ids["b"]], tier="host")
        monkeypatch.setattr(LocalHold, "close", fail)
        await bench.loader.close()


@each_error
@pytest.mark.usefixtures("quiet")
async def test_a_column_is_not_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Nothing of the adapter that left stays behind, its open file least of all."""
    async with local_tiers(tmp_path) as bench:
        await bench.load()
        with monkeypatch.context() as patch:
            patch.setattr(bench.device, "clear_column", raising(error))
            await bench.unload()
        await until(lambda: open_files() <= bench.files_before)
        await bench.assert_works()
        await bench.assert_clean()


@each_error
@pytest.mark.parametrize("call", ["open", "staging_memory", "staging_memory, for images"])
async def test_the_device_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    """There is memory for the ring, at times, but none for images."""
    device, files, calls = tier_device(), open_files(), list[object]()
    name, _, later = call.partition(", ")
    original, fail = getattr(device, name), raising(error)

    def called(*what: object) -> object:
        calls.append(what)
        return original(*what) if later and len(calls) == 1 else fail()

    monkeypatch.setattr(device, name, called)
    loader = AdapterLoader(LAYOUT, tier_config(tmp_path), device=device)
    with pytest.raises(type(error)):
        await loader.__aenter__()
    assert len(calls) == 1 + bool(later)
    assert not our_threads()
    assert open_files() <= files


# -- files that change under a load ----------------------------------------------------------------


def truncate(weights: Path) -> None:
    os.truncate(weights, weights.stat().st_size // 2)


def touch(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")


def replace(weights: Path) -> None:
    """A new file under the old name leaves the open one whole: its ctime tells."""
    fresh = tiny.write(weights.parent.with_name("fresh"), 9, RANK)
    os.replace(fresh / WEIGHTS, weights)


each_damage = pytest.mark.parametrize("damage", [truncate, touch, replace])


async def assert_recovers(bench: TierBench) -> None:
    await bench.settle()
    bench.renew()
    await bench.assert_works()
    await bench.assert_clean()


@each_damage
@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("verb", DEVICE_VERBS)
async def test_a_file_changes_under_the_copies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    kind: Kind,
    damage: Callable[[Path], None],
) -> None:
    """Between any two reads of the weights, with copies of what was read before on their way.

    What was saved anew is loaded once more, unless a caller has a handle; what was cut short is no
    adapter any more.
    """
    original = FileReader.read_into

    async def one(number: int) -> bool:
        reads = 0

        def read(reader: FileReader, buffers: list[memoryview], offset: int) -> None:
            nonlocal reads
            reads += bool(buffers)
            if reads == number and buffers:
                damage(tmp_path / "a" / WEIGHTS)
            original(reader, buffers, offset)

        async with local_tiers(tmp_path, kind, io_threads=1) as bench:
            await bench.disk()
            with monkeypatch.context() as patch:
                patch.setattr(FileReader, "read_into", read)
                refused = False
                try:
                    await bench.do(verb)
                except (errors.IntegrityError, errors.AdapterFormatError):
                    refused = True
            damaged = reads >= number
            assert refused == (damaged and (damage is truncate or verb == "stream"))
            await assert_recovers(bench)
        return damaged

    number = 1
    while await one(number):
        number += 5
    assert number > tiny.LAYERS


@each_damage
async def test_a_file_changes_while_it_is_held(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """The map is not touched by anybody, so that a file that was cut kills nobody."""
    async with local_tiers(tmp_path) as bench:
        await bench.host()
        key = next(iter(bench.loader.residency()))
        damage(tmp_path / "a" / WEIGHTS)
        with pytest.raises(errors.IntegrityError):
            await bench.loader.load(key)
        await bench.assert_clean()
        await assert_recovers(bench)
