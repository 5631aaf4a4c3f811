"""Slots and bytes that more adapters want than there are."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterLoader,
    AdapterTimeoutError,
    CapacityError,
    LoaderClosedError,
    LoaderConfig,
)
from lorax_async.testing import FakeSource
from tiny_loaders import ONE, loader
from tiny_sources import state

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_the_least_recently_used_makes_room(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / str(n), seed=n) for n in range(3)]
    async with loader(device_bytes=2 * ONE, max_slots=8) as there:
        for folder in (folders[0], folders[1], folders[0], folders[2]):
            (await there.load(folder)).release()
        assert there.try_acquire(folders[1]) is None
        for folder in (folders[0], folders[2]):
            handle = there.try_acquire(folder)
            assert handle is not None
            tiny.assert_equal_to_file(handle, folder)
            handle.release()
        async with await there.load(folders[1]) as handle:
            tiny.assert_equal_to_file(handle, folders[1])


async def test_waiting_for_room_ends_with_the_lease(tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)
    async with loader(max_slots=1) as there:
        first = await there.load(a)
        with pytest.raises(AdapterTimeoutError) as caught:
            await there.load(b, timeout=0.05)
        assert caught.value.stage == "queue"
        assert caught.value.retryable
        waiting = asyncio.create_task(there.load(b))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        first.release()
        async with await waiting as second:
            tiny.assert_equal_to_file(second, b)


async def test_the_urgent_go_first(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / str(n), seed=n) for n in range(3)]
    async with loader(max_slots=1) as there:
        held = await there.load(folders[0])
        order: list[int] = []

        async def late(n: int, priority: int) -> None:
            async with await there.load(folders[n], priority=priority):
                order.append(n)

        slow = asyncio.create_task(late(1, 0))
        await asyncio.sleep(0.02)
        fast = asyncio.create_task(late(2, 5))
        await asyncio.sleep(0.02)
        held.release()
        await asyncio.gather(slow, fast)
        assert order == [2, 1]


async def test_a_starving_request_ends_new_leases(tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)
    async with loader(max_slots=1, starvation_age=0.05) as there:
        held = await there.load(a)
        waiting = asyncio.create_task(there.load(b))
        for _ in range(200):
            renewed = there.try_acquire(a)
            if renewed is None:
                break
            held.release()
            held = renewed
            await asyncio.sleep(0.005)
        else:
            pytest.fail("the adapter in use was leased for ever")
        held.release()
        (await waiting).release()


async def test_what_never_fits_fails_at_once(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader(device_bytes=ONE - 64) as there:
        with pytest.raises(CapacityError, match="raise device_bytes") as caught:
            await there.load(folder)
        assert not caught.value.retryable
        assert str(folder) in str(caught.value)


async def test_more_wait_than_are_remembered_and_all_hear_of_the_end(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    source = FakeSource()
    names = [str(n) for n in range(1100)]
    for name in names:
        source.put(name, *tiny.files(folder))
    config = LoaderConfig(device_bytes=1 << 20, max_slots=1)
    async with AdapterLoader(tiny.layout(), config, source=source) as there:
        held = await there.load(names[0])
        waiting = [asyncio.create_task(there.load(name)) for name in names[1:]]
        await until(lambda: source.counts.opens == len(names))
        closing = asyncio.create_task(there.close())
        done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
        assert {type(each) for each in done} == {LoaderClosedError}
        held.release()
        await closing


async def test_a_kernel_keeps_its_bytes_after_release(tmp_path: Path) -> None:
    a, b = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", seed=1)
    async with loader(max_slots=1) as there:
        handle = await there.load(a)
        with handle.use():
            handle.release()
            with pytest.raises(AdapterTimeoutError):
                await there.load(b, timeout=0.05)
        (await there.load(b)).release()


async def test_what_leaves_already_is_waited_for(tmp_path: Path) -> None:
    """And nobody else has to go: of two, the colder one, which a kernel still reads."""
    a, b, c = (tiny.write(tmp_path / name, seed) for seed, name in enumerate("abc"))
    async with loader(max_slots=2) as there:
        handle = await there.load(a)
        with handle.use():
            handle.release()
            (await there.load(b)).release()
            waiting = asyncio.create_task(there.load(c))
            await until(lambda: state(there, a) == "leaving")
            with pytest.raises(AdapterTimeoutError):
                await there.load(c, timeout=0.02)
            assert state(there, b) == "resident"
        (await waiting).release()
        assert state(there, b) == "resident"


async def test_one_of_two_is_told_to_leave(tmp_path: Path) -> None:
    """Though both are leased, and who starves wants room for one."""
    a, b, c = (tiny.write(tmp_path / name, seed) for seed, name in enumerate("abc"))
    async with loader(max_slots=2, starvation_age=0.01) as there:
        first, second = await there.load(a), await there.load(b)
        waiting = asyncio.create_task(there.load(c))
        await until(lambda: state(there, a) == "leaving")
        with pytest.raises(AdapterTimeoutError):
            await there.load(c, timeout=0.03)
        assert state(there, b) == "resident"
        first.release()
        (await waiting).release()
        second.release()
