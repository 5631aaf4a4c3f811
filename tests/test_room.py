"""Slots and bytes that more adapters want than there are: who waits, how long, and who goes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterTimeoutError,
    CapacityError,
    Event,
    Leaving,
    LoaderClosedError,
    Resident,
)
from lorax_async.config import Eviction
from tiny_loaders import ONE, loader
from tiny_sources import granted, is_resident, over, state, stocked

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

EVER = 1e6
"""Seconds: longer than any test."""


async def test_room_is_made_by_the_coldest_and_waited_for(tmp_path: Path) -> None:
    """By bytes; each has its own file's after that."""
    source = stocked(tmp_path, "a", "b", "c")
    async with over(source, device_bytes=2 * ONE, max_slots=8) as there:
        for name in "abac":
            (await there.load(name)).release()
        assert there.try_acquire("b") is None
        held = []
        for name in "ac":
            handle = there.try_acquire(name)
            assert handle is not None
            tiny.assert_equal_to_file(handle, tmp_path / name)
            held.append(handle)
        with pytest.raises(AdapterTimeoutError) as caught:
            await there.load("b", timeout=0.02)
        assert (caught.value.stage, caught.value.retryable) == ("queue", True)
        waiting = asyncio.create_task(there.load("b"))
        await until(lambda: there.usage().waiting == 1)
        held[0].release()
        async with await waiting as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "b")
        held[1].release()


async def test_what_never_fits_fails_at_once(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a")
    async with loader(device_bytes=ONE - 64) as there:
        with pytest.raises(CapacityError, match="raise device_bytes") as caught:
            await there.load(folder)
        assert not caught.value.retryable
        assert str(folder) in str(caught.value)


async def test_a_starving_request_ends_new_leases(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source, max_slots=1, starvation_age=0.05) as there:
        held = await there.load("a")
        waiting = asyncio.create_task(there.load("b"))
        for _ in range(200):
            renewed = there.try_acquire("a")
            if renewed is None:
                break
            held.release()
            held = renewed
            await asyncio.sleep(0.005)
        else:
            pytest.fail("the adapter in use was leased for ever")
        held.release()
        (await waiting).release()


async def test_a_thousand_that_wait_all_hear_of_the_end(tmp_path: Path) -> None:
    source, folder = stocked(tmp_path), tiny.write(tmp_path / "a")
    names = [str(n) for n in range(1100)]
    for name in names:
        source.put(name, *tiny.files(folder))
    async with over(source, max_slots=1) as there:
        held = await there.load(names[0])
        waiting = [asyncio.create_task(there.load(name)) for name in names[1:]]
        await until(lambda: source.counts.opens == len(names))
        closing = asyncio.create_task(there.close())
        done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
        assert {type(each) for each in done} == {LoaderClosedError}
        held.release()
        await closing


async def test_no_more_are_told_to_leave_than_have_to(tmp_path: Path) -> None:
    """One of two that are leased, if somebody starves; none if one leaves already."""
    source = stocked(tmp_path, "a", "b", "c")
    async with over(source, max_slots=2, starvation_age=0.01) as there:
        first, second = await there.load("a"), await there.load("b")
        waiting = asyncio.create_task(there.load("c"))
        await until(lambda: state(there, "a") == "leaving")
        with pytest.raises(AdapterTimeoutError):
            await there.load("c", timeout=0.03)
        assert state(there, "b") == "resident"
        first.release()
        (await waiting).release()
        second.release()
    async with over(source, max_slots=2) as there:
        handle = await there.load("a")
        with handle.use():
            handle.release()
            (await there.load("b")).release()
            waiting = asyncio.create_task(there.load("c"))
            await until(lambda: state(there, "a") == "leaving")
            with pytest.raises(AdapterTimeoutError):
                await there.load("c", timeout=0.02)
        (await waiting).release()
        assert state(there, "b") == "resident"


@pytest.mark.parametrize(
    ("age", "order"), [(0.02, ["held", "patient", "urgent"]), (EVER, ["held", "urgent", "patient"])]
)
async def test_a_level_of_priority_is_worth_a_time_of_waiting(
    tmp_path: Path, age: float, order: list[str]
) -> None:
    source = stocked(tmp_path, "held", "patient", "urgent")
    async with over(source, max_slots=1, starvation_age=age) as there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        loop = asyncio.get_running_loop()
        held = await there.load("held")
        patient = asyncio.create_task(there.load("patient"))
        await until(lambda: state(there, "patient") == "present")
        late = loop.time() + min(3 * age + 0.01, 0.1)  # three levels, and what a clock counts
        await until(lambda: loop.time() > late)
        urgent = asyncio.create_task(there.load("urgent", priority=3))
        await until(lambda: state(there, "urgent") == "present")
        held.release()
        for task in (patient, urgent):
            task.add_done_callback(lambda done: done.result().release())
        await asyncio.gather(patient, urgent)
        assert granted(heard) == order


async def test_a_resident_adapter_has_its_time_and_goes_when_it_is_over(tmp_path: Path) -> None:
    """For whoever waits already, with nothing happening meanwhile; a prefetch too."""
    source = stocked(tmp_path, "a", "b", "c")
    async with over(source, max_slots=1, min_residency=EVER, starvation_age=EVER) as there:
        (await there.load("a")).release()
        with pytest.raises(AdapterTimeoutError) as caught:
            await there.load("b", timeout=0.1)
        assert caught.value.stage == "queue"
        assert is_resident(there, "a")
        await there.unload("a")  # its own people may send it away
        (await there.load("b")).release()
    async with over(source, max_slots=1, min_residency=0.1, starvation_age=EVER) as there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        (await there.load("a")).release()
        (await there.load("b", timeout=20)).release()
        await there.prefetch("c", timeout=20)
        times = [event.time for event in heard if isinstance(event, Resident | Leaving)]
        came, went = times[::2], times[1::2]
        assert len(went) == 2
        # The loop's clock may count whole milliseconds.
        assert all(after - before > 0.098 for before, after in zip(came, went, strict=False))


async def test_a_starving_request_ends_a_minimum_residency(tmp_path: Path) -> None:
    """A prefetch never starves."""
    source = stocked(tmp_path, "a", "b", "c")
    async with over(source, max_slots=1, min_residency=EVER, starvation_age=0.05) as there:
        (await there.load("a")).release()
        with pytest.raises(AdapterTimeoutError):
            await there.prefetch("b", timeout=0.15)
        assert is_resident(there, "a")
        (await there.load("c", timeout=20)).release()
        assert is_resident(there, "c")


async def test_a_prefetch_lends_its_age_to_nobody(tmp_path: Path) -> None:
    """Who loads what was prefetched stands where one stands who loads anything else."""
    source = stocked(tmp_path, "held", "hinted", "plain")
    async with over(source, max_slots=1, starvation_age=EVER) as there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        held = await there.load("held")
        hint = there.prefetch("hinted")
        await until(lambda: state(there, "hinted") == "present")
        plain = asyncio.create_task(there.load("plain"))
        await until(lambda: state(there, "plain") == "present")
        since = asyncio.get_running_loop().time()
        await until(lambda: asyncio.get_running_loop().time() > since)
        hinted = asyncio.create_task(there.load("hinted"))
        await until(lambda: there.usage().waiting == 3)
        for task in (plain, hinted):
            task.add_done_callback(lambda done: done.result().release())
        held.release()
        await asyncio.gather(plain, hinted, hint)
        assert granted(heard) == ["held", "plain", "hinted"]


EQUAL = (4, 4, 4)
UNEQUAL = (4, 64, 4)
"""Ranks of a, b and c: b takes 16 times the room, and all but its bytes costs the same."""


@pytest.mark.parametrize(
    ("eviction", "equal", "unequal"),
    [
        ("lru", "b", "a"),  # b was not used for longer; a was not used for longer
        ("lfu", "a", "a"),  # a once, b twice
        ("gdsf", "a", "b"),  # as many bytes, a once; b's two uses are worth an eighth of a's one
    ],
)
async def test_the_policy_is_the_one_that_was_named(
    tmp_path: Path, eviction: Eviction, equal: str, unequal: str
) -> None:
    """Two slots; who goes for c after b, b, a, and after a, b, b."""

    async def victim(ranks: tuple[int, ...], requests: str) -> str:
        source = stocked(tmp_path)
        for seed, (name, rank) in enumerate(zip("abc", ranks, strict=True)):
            folder = tiny.write(tmp_path / f"{name} {rank}", seed, rank)
            source.put(name, *tiny.files(folder))
        async with over(source, max_slots=2, eviction=eviction) as there:
            for name in requests:
                (await there.load(name)).release()
            (gone,) = [name for name in "abc" if not is_resident(there, name)]
            return gone

    assert await victim(EQUAL, "bbac") == equal
    assert await victim(UNEQUAL, "abbc") == unequal


async def test_one_told_to_leave_stays_if_nobody_waits_any_more(tmp_path: Path) -> None:
    source, told = stocked(tmp_path, "held", "late"), list[Event]()
    async with over(source, max_slots=1, starvation_age=0.01) as there:
        first = await there.load("held")
        there.subscribe(told.append)
        with pytest.raises(AdapterTimeoutError):
            await there.load("late", timeout=0.1)
        assert [type(event) for event in told] == [Leaving, Resident]
        second = there.try_acquire("held")
        assert second is not None
        first.release()
        second.release()
        (await there.load("late")).release()
