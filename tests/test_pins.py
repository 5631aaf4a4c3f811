"""Pins: what they keep, what they leave no room for, and all the ways in which they end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterLoader,
    AdapterRef,
    AdapterTimeoutError,
    CapacityError,
    Event,
    FetchError,
    IntegrityError,
    LoaderClosedError,
    Resident,
)
from lorax_async.adapter import AdapterId
from lorax_async.testing import FakeSource
from lorax_async.verification import Verification
from tiny_loaders import ONE, loader
from tiny_sources import is_at, over, state, stocked, where

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


async def press(loader: AdapterLoader, *names: str) -> None:
    """Load one after the other, each wanting the room of those before it."""
    for name in names:
        (await loader.load(name, timeout=20)).release()


def pins(loader: AdapterLoader, id: AdapterId) -> int:
    return 0 if state(loader, id) == "nowhere" else where(loader, id).pins


async def test_a_pin_outlives_pressure_until_it_is_unpinned(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b", "c", "d")
    async with over(source, max_slots=2) as there:
        await there.pin("a")
        assert (pins(there, "a"), where(there, "a").leases) == (1, 0)
        slot = where(there, "a").slot
        await press(there, "b", "c", "d")
        await there.prefetch(["b", "c"])
        async with await there.load("a") as handle:
            assert handle.slot == slot
            tiny.assert_equal_to_file(handle, tmp_path / "a")
        assert there.unpin("a")
        assert not there.unpin("a")
        await press(there, "b", "c")
        assert not is_at(there, "a", "device")


async def test_what_cannot_fit_beside_a_pin_fails_at_once(tmp_path: Path) -> None:
    """By slots, and by bytes; also who waits already when it is pinned."""
    source = stocked(tmp_path, "a", "b")
    source.put("large", *tiny.files(tiny.write(tmp_path / "large", rank=8)))

    async def body(settings: dict[str, object], name: str) -> None:
        async with over(source, **settings) as there:
            lease = await there.load("a")
            waiting = asyncio.create_task(there.load(name))
            hint = there.prefetch(name)
            await until(lambda: state(there, name) == "present")
            assert not waiting.done()
            await there.pin("a")
            lease.release()
            for late in (waiting, there.load(name), there.prefetch(name), hint):
                with pytest.raises(
                    CapacityError, match="beside 1 pinned adapters; unpin"
                ) as caught:
                    await asyncio.wait_for(late, 20)
                assert (caught.value.retryable, caught.value.id) == (True, name)
            there.unpin("a")
            await press(there, name)
            assert is_at(there, name, "device")

    await body({"max_slots": 1}, "b")
    await body({"device_bytes": 2 * ONE}, "large")


async def test_unload_ends_pins_and_a_stale_unpin_is_harmless(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source, max_slots=2) as there:
        await there.pin("a")
        key = there.story("a")[0].key
        await there.pin(key)
        assert pins(there, "a") == 2
        await there.unload("a")
        assert not is_at(there, "a", "device")
        await there.pin(key)
        assert not there.unpin("a")
        assert pins(there, "a") == 1
        await there.pin("a")
        await there.pin("a")
        assert pins(there, "a") == 2


async def test_a_pin_of_what_was_saved_again_moves(tmp_path: Path) -> None:
    folder, others = tmp_path / "a", [tiny.write(tmp_path / n, seed=9) for n in "bc"]
    async with loader(max_slots=2) as there:
        tiny.write(folder)
        await there.pin(folder)
        (old,) = there.residency()
        tiny.write(folder, seed=1)
        await there.pin(folder)
        assert there.residency()[old].pins == 0
        assert pins(there, folder) == 1
        for other in others:
            (await there.load(other)).release()
        assert there.residency()[old].tier == "disk"
        handle = there.try_acquire(folder)
        assert handle is not None
        async with handle:
            tiny.assert_equal_to_file(handle, folder)


async def test_each_id_has_its_own_pin(tmp_path: Path) -> None:
    folder, others = tiny.write(tmp_path / "a"), [tiny.write(tmp_path / n, seed=9) for n in "bc"]
    async with loader(max_slots=1, local_roots=(tmp_path,)) as there:
        await there.pin(folder)
        await there.pin(AdapterRef(folder))  # says the same
        assert pins(there, folder) == 1
        (key,) = there.residency()
        for other in (key, str(folder)):
            await there.pin(other)
        assert pins(there, folder) == 3
        for id in (folder, str(folder)):
            assert there.unpin(id)
            with pytest.raises(CapacityError):
                await there.load(others[0])
        assert there.unpin(key)
        assert pins(there, folder) == 0
        (await there.load(others[1])).release()


async def test_a_pin_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source, max_slots=1) as there:
        source.hold("a")
        with pytest.raises(AdapterTimeoutError) as caught:
            await there.pin("a", timeout=0.02)
        assert caught.value.id == "a"
        pinning = asyncio.create_task(there.pin("a"))
        await until(lambda: source.counts.brings == 2)
        pinning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pinning
        await until(lambda: state(there, "a") == "nowhere")
        source.allow("a")
        source.fail("bring", FetchError("the wire broke"), id="a", at=1)
        with pytest.raises(FetchError, match="wire"):
            await there.pin("a")
        assert not there.unpin("a")
        await press(there, "a", "b")


async def test_a_pin_waits_while_its_adapter_is_unloaded(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        lease = await there.load("a")
        unloading = asyncio.create_task(there.unload("a"))
        await asyncio.sleep(0)
        pinning = asyncio.create_task(there.pin("a"))
        await until(lambda: source.counts.resolves == 2)
        assert {unloading.done(), pinning.done()} == {False}
        assert pins(there, "a") == 0
        old = lease.slot
        lease.release()
        await unloading
        await pinning
        found = where(there, "a")
        assert found.pins == 1
        assert found.slot is not None
        assert found.slot.generation > old.generation


async def test_an_unload_comes_just_before_the_pin(tmp_path: Path) -> None:
    """The adapter is here, and leaves before it could be pinned: it is loaded once more."""
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        unloads: list[asyncio.Task[None]] = []

        def unload_once(event: Event) -> None:
            if isinstance(event, Resident) and not unloads:
                unloads.append(asyncio.create_task(there.unload("a")))

        there.subscribe(unload_once)
        await there.pin("a", timeout=20)
        await unloads[0]
        assert pins(there, "a") == 1
        assert there.statistics().loads == 2


@pytest.mark.parametrize("by", ["id", "key"])
async def test_the_loader_closes_just_before_the_pin(tmp_path: Path, by: str) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:

        def close_in_this_turn(event: Event) -> None:
            if isinstance(event, Resident):
                closing = there.close()
                closing.send(None)
                closing.close()

        await there.prefetch("a", tier="disk")
        (key,) = there.residency()
        there.subscribe(close_in_this_turn)
        with pytest.raises(LoaderClosedError):
            await asyncio.wait_for(there.pin(key if by == "key" else "a"), 5)
        await there.close()


async def test_pins_do_not_hold_up_close(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source) as there:
        await there.pin("a")
        source.hold("b")
        pinning = asyncio.create_task(there.pin("b"))
        await until(lambda: source.counts.brings == 2)
        await asyncio.wait_for(there.close(), 20)
        with pytest.raises(LoaderClosedError):
            await pinning
        with pytest.raises(LoaderClosedError):
            there.unpin("a")


class DoubtedSource(FakeSource):
    """All bytes arrive, and when `doubted` is set they are found to be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.doubted = asyncio.Event()

    async def bring(self, *what: Any) -> Verification:
        await super().bring(*what)
        await self.doubted.wait()
        raise IntegrityError("these are other bytes than were promised")


async def test_an_adapter_turns_out_false_as_it_becomes_resident(tmp_path: Path) -> None:
    source = DoubtedSource()
    source.put("a", *tiny.files(tiny.write(tmp_path / "a")))
    async with over(source) as there:
        there.subscribe(lambda event: source.doubted.set() if isinstance(event, Resident) else None)
        with pytest.raises(IntegrityError, match="promised") as caught:
            await there.pin("a")
        assert (caught.value.id, caught.value.stage) == ("a", "fetch")
        assert not there.unpin("a")
