"""Cancel at every await, fail at every step, with every tier in play: nothing may be left."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import tiny
from common import mapped_files, open_files, our_threads, until
from lorax_async import (
    AdapterLoader,
    FetchError,
    IntegrityError,
    InternalError,
    LoaderClosedError,
    LoraxError,
    TransferError,
)
from lorax_async.io.sources.local_hold import LocalHold
from lorax_async.runtime.whereabouts import TierName
from lorax_async.testing import FakeHold, SimulatedDevice, Step
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
            await bench.assert_clean()
            await bench.assert_works()
            await bench.assert_clean()


@pytest.mark.parametrize("tier", TIERS)
async def test_a_prefetch_outlives_its_waiter(tmp_path: Path, tier: TierName) -> None:
    async with local_tiers(tmp_path) as bench:
        hint = bench.loader.prefetch(bench.ids["a"], tier=tier)

        async def wait() -> None:
            await hint

        assert await cancel_at(wait(), 1)
        await hint
        assert [each.tier for each in bench.loader.residency().values()] == [tier]
        await bench.assert_clean()


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
            await bench.assert_clean()
        await bench.assert_works()


async def test_a_load_and_a_prefetch_are_cancelled_after_every_copy(tmp_path: Path) -> None:
    """With the copies before it under way, none of which has run."""
    async with fake_tiers(tmp_path) as (bench, source):
        for copies in range(tiny.LAYERS + 1):
            source.put("a", *tiny.files(tmp_path / "a"))
            source.hold("a")
            source.allow("a", *range(copies)) if copies else None
            before, there = bench.device.copies, bench.device
            there.gate.clear()
            hint = bench.loader.prefetch("a")
            load = asyncio.create_task(bench.load())
            await until(lambda: there.copies == before + copies)
            hint.cancel()
            await asyncio.sleep(0)
            load.cancel()
            there.gate.set()
            await asyncio.wait([load])
            assert load.cancelled()
            source.allow("a")
            await bench.assert_clean()
            await bench.assert_works()


async def test_unload_is_cancelled_where_it_waits(tmp_path: Path) -> None:
    """For pages that are being let go, for a lease, for a copy; the next one succeeds."""
    async with local_tiers(tmp_path) as bench:
        await bench.load_from_host()
        assert await cancel_at(bench.unload(), 1)
        await bench.assert_clean()
        await bench.host()
        handle = await bench.loader.load(bench.ids["a"])
        assert await cancel_at(bench.unload(), 1)
        tiny.assert_equal_to_file(handle, tmp_path / "a")
        (await bench.loader.load(bench.ids["a"], timeout=1)).release()  # it stays
        handle.release()
        await bench.assert_clean()
        bench.device.gate.clear()
        copies = bench.device.copies
        load = asyncio.create_task(bench.load())
        await until(lambda: bench.device.copies > copies)
        assert await cancel_at(bench.unload(), 1)
        bench.device.gate.set()
        await load
        await bench.assert_clean()
        await bench.assert_works()


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
        assert all(each is None or isinstance(each, LoraxError) for each in outcomes), outcomes
        assert all(hint.done for hint in hints)
        assert not our_tasks()
        assert not our_threads()
        assert not mapped_files()
        assert open_files() <= files
        assert_empty(loader.last_numbers()[1])


async def test_close_waits_for_a_copy_under_way(tmp_path: Path) -> None:
    """Its memory cannot be taken back."""
    device, ids = tier_device(), written(tmp_path)
    loader = AdapterLoader(LAYOUT, tier_config(tmp_path), device=device)
    await loader.__aenter__()
    bench = TierBench(loader, device, ids, tmp_path)
    await bench.host()
    device.gate.clear()
    load = asyncio.create_task(bench.load())
    await until(lambda: device.copies)
    assert await cancel_at(loader.close(timeout=0), 1)
    with pytest.raises(LoaderClosedError):
        await load
    closing = asyncio.create_task(loader.close())
    done, _ = await asyncio.wait([closing], timeout=0.05)
    assert not done
    device.gate.set()
    await closing
    assert_empty(loader.last_numbers()[1])
    assert not our_tasks()


# -- every error at every step -----------------------------------------------------------------

ERRORS = [
    FetchError("ordered"),
    IntegrityError("ordered"),
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
        raise error.located() if isinstance(error, LoraxError) else error

    return fail


def assert_told(caught: LoraxError, error: Exception, id: object) -> None:
    """A typed error stays what it is; a foreign one is a fault of ours, and says which."""
    typed = isinstance(error, LoraxError)
    assert isinstance(caught, type(error) if typed else InternalError)
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
                with pytest.raises(LoraxError) as caught:
                    await bench.do(verb)
                assert_told(caught.value, error, "a")
                await bench.assert_clean()
                await bench.assert_works()
                await bench.assert_clean()


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
                with pytest.raises(LoraxError) as caught:
                    await bench.do(verb)
                await bench.settle()
            assert_told(caught.value, error, bench.ids["a"])
            await bench.assert_clean()
            await bench.assert_works()
            await bench.assert_clean()


@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("verb", DEVICE_VERBS)
async def test_every_copy_can_fail(tmp_path: Path, verb: str, kind: Kind) -> None:
    """Through images, and through the ring; the image of a copy that failed is not warm."""
    for number in range(tiny.LAYERS):
        for pinned_bytes in (0, 1 << 20):
            async with local_tiers(tmp_path, kind, pinned_bytes=pinned_bytes) as bench:
                bench.device.failing = {number}
                with pytest.raises(TransferError, match="told to fail"):
                    await bench.do(verb)
                bench.device.failing = set()
                async with await bench.loader.load(bench.ids["a"], timeout=20) as handle:
                    tiny.assert_equal_to_file(handle, tmp_path / "a")
                await bench.assert_clean()
                await bench.assert_works()


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
                with pytest.raises(TransferError) as caught:
                    await handle.layer_ready(tiny.LAYERS - 1)
                assert not caught.value.retryable
            else:
                assert handle.resident
                with handle.use():
                    pass
        for verb in DEVICE_VERBS:
            source.put("a", *tiny.files(tmp_path / "a"))
            with pytest.raises(TransferError, match="lost"):
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
        await bench.assert_clean()
        await bench.assert_works()


# -- errors while things end, or before they begin ---------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged here was ordered."""
    monkeypatch.setattr(logging.getLogger("lorax_async"), "propagate", False)


def fail_to_close(
    patch: pytest.MonkeyPatch, kind: type[LocalHold] | type[FakeHold], error: Exception
) -> None:
    close = kind.close

    def fail(hold: LocalHold | FakeHold) -> None:
        close(hold)  # type: ignore[arg-type]
        raising(error)()

    patch.setattr(kind, "close", fail)


@each_error
@pytest.mark.usefixtures("quiet")
async def test_a_hold_does_not_close(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It is gone for the loader, whose budget is whole; when the loader closes, too."""
    async with local_tiers(tmp_path) as bench:
        await bench.host()
        with monkeypatch.context() as patch:
            fail_to_close(patch, LocalHold, error)
            await bench.loader.unload(bench.ids["a"], timeout=2)
        await bench.assert_clean()
        await bench.host()
        await bench.assert_works()
        await bench.loader.prefetch([bench.ids["a"], bench.ids["b"]], tier="host")
        with monkeypatch.context() as patch:
            fail_to_close(patch, LocalHold, error)
            await bench.loader.close()
    async with fake_tiers(tmp_path) as (bench, source):  # what was only read ahead
        source.holdable = False
        await bench.host()
        with monkeypatch.context() as patch:
            fail_to_close(patch, FakeHold, error)
            await bench.loader.prefetch("a", tier="host", timeout=2)
        await bench.assert_clean()
        await bench.assert_works()


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
        assert open_files() <= bench.files_before
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
