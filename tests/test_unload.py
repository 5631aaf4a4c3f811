"""Unloading: what it waits for, what it gives back, and who waits for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from common import until
from given import file_bytes, give
from lorax_async import (
    AdapterInUseError,
    AdapterTimeoutError,
    Event,
    Leaving,
    LoaderClosedError,
    Resident,
    UsageError,
)
from tiny_loaders import ONE, gated, loader
from tiny_sources import over, state, stocked, where

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


async def test_what_is_idle_goes_at_once(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader(timeout=20) as there:
        (await there.load(folder)).release()
        assert where(there, folder).device_bytes == ONE
        await there.unload(folder)
        found = where(there, folder)
        assert (found.tier, found.state, found.slot) == ("disk", "present", None)
        assert (found.device_bytes, found.host_bytes) == (0, 0)
        assert there.try_acquire(folder) is None
        assert isinstance(there.story(folder)[-1], Leaving)
        await there.unload(folder)
        assert there.statistics().departures == 1
        async with await there.load(folder) as handle:
            tiny.assert_equal_to_file(handle, folder)
        assert there.statistics().fetches == 1


async def test_what_nobody_knows_is_not_looked_for(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as other:
        (await other.load("a")).release()
        (key,) = other.residency()
    async with over(source) as there:
        resolves = source.counts.resolves
        await there.unload("a", timeout=0)
        await there.unload(key, timeout=0)
        assert not there.residency()
        assert source.counts.resolves == resolves
        with pytest.raises(UsageError, match="a timeout is from 0"):
            await there.unload("a", timeout=-1)


async def test_what_is_leased_stays_and_its_holders_are_named(tmp_path: Path) -> None:
    """Without time it does not wait, but for leases that have just ended."""
    folder = tiny.write(tmp_path / "a")
    async with loader(timeout=20) as there:
        heard: list[Event] = []
        tasks = [asyncio.create_task(there.load(folder), name=f"batch {n}") for n in range(2)]
        handles = [await task for task in tasks]
        there.subscribe(heard.append)
        with pytest.raises(AdapterInUseError) as caught:
            await there.unload(folder, timeout=0.02)
        assert "leases still held after 0.02 s: 2, by batch 0, batch 1;" in str(caught.value)
        assert (caught.value.id, caught.value.key) == (str(folder), handles[0].key)
        assert caught.value.retryable
        assert [type(event) for event in heard] == [Leaving, Resident]
        assert {event.slot for event in heard} == {handles[0].slot}
        async with await there.load(folder) as another:
            assert another.slot == handles[0].slot
        handles[1].release()
        with pytest.raises(AdapterInUseError, match="after 0 s: 1, by "):
            await there.unload(folder, timeout=0)
        tiny.assert_equal_to_file(handles[0], folder)
        asyncio.get_running_loop().call_soon(handles[0].release)
        await there.unload(folder, timeout=0)
        assert where(there, folder).tier == "disk"


async def test_who_streams_is_waited_for(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        async with there.stream(folder) as handle:
            with pytest.raises(AdapterInUseError):
                await there.unload(folder, timeout=0)
            device.gate.set()
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, folder)
        await there.unload(folder)
        device.gate.clear()
        async with there.stream(folder):
            unloading = asyncio.create_task(there.unload(folder))
            await until(lambda: device.copies == 6)
        assert state(there, folder) == "leaving"
        assert not unloading.done(), "two copies still write to the slot"
        device.gate.set()
        await unloading
        assert where(there, folder).tier == "disk"
        assert there.statistics().loads == 1


async def test_who_waits_for_a_load_waits_on_and_gets_it_anew(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    there, device = gated()
    async with there:
        device.gate.clear()
        loading = asyncio.create_task(there.load(folder))
        await until(lambda: device.copies == 2)
        slot = where(there, folder).slot
        unloading = asyncio.create_task(there.unload(folder))
        await until(lambda: state(there, folder) == "leaving")
        assert {loading.done(), unloading.done()} == {False}
        device.gate.set()
        await unloading
        async with await loading as handle:
            assert handle.slot != slot
            tiny.assert_equal_to_file(handle, folder)
        told = there.statistics()
        assert (told.departures, told.loads, told.fetches) == (1, 1, 1)


async def test_loads_that_come_meanwhile_wait(tmp_path: Path) -> None:
    """For the adapter to be loaded anew, or until the only caller of unload was cancelled."""
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        lease = await there.load("a")
        unloading = asyncio.create_task(there.unload("a"))
        await until(lambda: state(there, "a") == "leaving")
        assert there.try_acquire("a") is None
        loading = asyncio.create_task(there.load("a"))
        with pytest.raises(AdapterTimeoutError):
            await there.load("a", timeout=0.02)
        assert not loading.done()
        unloading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unloading
        async with await loading as handle:
            assert handle.slot == lease.slot
        assert state(there, "a") == "resident"
        unloading = asyncio.create_task(there.unload("a"))
        await until(lambda: state(there, "a") == "leaving")
        loading = asyncio.create_task(there.load("a"))
        old = lease.slot
        lease.release()
        await unloading
        async with await loading as handle:
            assert handle.slot.generation > old.generation
            tiny.assert_equal_to_file(handle, tmp_path / "a")


async def test_one_of_several_callers_gives_up(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        lease = await there.load("a")
        heard: list[Event] = []
        there.subscribe(heard.append)
        callers = [asyncio.create_task(there.unload("a")) for _ in range(3)]
        await until(lambda: heard)
        callers[0].cancel()
        with pytest.raises(AdapterInUseError):
            await there.unload("a", timeout=0)
        with pytest.raises(asyncio.CancelledError):
            await callers[0]
        assert state(there, "a") == "leaving"
        lease.release()
        await asyncio.gather(*callers[1:])
        assert where(there, "a").tier == "disk"
        assert [type(event) for event in heard] == [Leaving]


async def test_an_unload_that_waits_does_not_hold_up_others(tmp_path: Path) -> None:
    """Its slot may never come; another's is free to be taken."""
    source = stocked(tmp_path, "leased", "idle", "late")
    async with over(source, max_slots=2, starvation_age=1e6) as there:
        lease = await there.load("leased")
        (await there.load("idle")).release()
        unloading = asyncio.create_task(there.unload("leased"))
        await until(lambda: state(there, "leased") == "leaving")
        (await there.load("late", timeout=5)).release()
        lease.release()
        await unloading


async def test_hundreds_of_names_that_leave_at_once_do_so_one_by_one() -> None:
    """Each would take some calls on the stack, which has room for a thousand."""
    async with loader(max_slots=1) as there:
        names = [str(n) for n in range(250)]
        for seed, name in enumerate(names):
            (await give(there, seed, name)).release()
        held = await give(there, len(names), "held")
        loading = [asyncio.create_task(there.load(name)) for name in names]
        await asyncio.sleep(0)
        await asyncio.gather(*(there.unload(name) for name in names))
        assert there.usage().memory_bytes.used > 250 * file_bytes(), "they may still be had"
        await there.close(timeout=0)
        assert there.last_numbers()[1].memory_bytes.used == 0
        for load in loading:
            with pytest.raises(LoaderClosedError):
                await load
        held.release()


async def test_a_kernel_is_waited_for(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        handle = await there.load("a")
        with handle.use():
            handle.release()
            with pytest.raises(
                AdapterTimeoutError, match="copied, computed with or held"
            ) as caught:
                await there.unload("a", timeout=0.02)
            assert (caught.value.id, caught.value.stage) == ("a", "ready")
            assert state(there, "a") == "leaving"
        await there.unload("a", timeout=0)
        assert where(there, "a").tier == "disk"
