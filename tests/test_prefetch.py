"""Prefetches: each tier, their place behind everybody else, thousands at once, and their end."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

import tiny
from common import until
from lorax_async import (
    AdapterKey,
    AdapterNotFoundError,
    AdapterRef,
    AdapterTimeoutError,
    Event,
    FetchError,
    IntegrityError,
    InvalidAdapterIdError,
    LoaderClosedError,
    Prefetch,
    UsageError,
)
from lorax_async.io.ports import AdapterFile, Demand
from lorax_async.runtime import acquiring
from lorax_async.runtime.turns import Turns
from lorax_async.runtime.whereabouts import TierName
from tiny_loaders import ONE, loader
from tiny_sources import granted, is_at, is_resident, over, state, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("ids", ["one", ("one", "two")], ids=["one", "several"])
@pytest.mark.parametrize("tier", ["disk", "host", "device"])
async def test_each_tier(tmp_path: Path, tier: TierName, ids: str | tuple[str, ...]) -> None:
    source = stocked(tmp_path, "one", "two", "three", holdable=True)
    wanted = (ids,) if isinstance(ids, str) else ids
    async with over(source) as there:
        await there.prefetch(ids, tier=tier)
        found = list(there.residency().values())
        assert [(each.tier, each.leases) for each in found] == [(tier, 0)] * len(wanted)
        assert all(is_at(there, name, tier) for name in wanted)
        moved = len(wanted) if tier == "device" else 0
        held = len(wanted) if tier == "host" else 0
        assert there.statistics().bytes_moved == moved * ONE
        assert (source.counts.populates, source.counts.opens) == (held, len(wanted))
        async with await there.load("one") as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "one")
        assert source.counts.opens == len(wanted)
    assert (source.counts.open_readers, source.counts.open_holds) == (0, 0)


async def test_a_prefetch_begins_without_being_awaited(tmp_path: Path) -> None:
    folders = [tiny.write(tmp_path / str(n), seed=n) for n in range(3)]
    async with loader(local_roots=(tmp_path,)) as there:
        ids = (id for id in (folders[0], AdapterRef(folders[1]), str(folders[2])))
        there.prefetch(ids)
        await until(lambda: all(is_resident(there, folder) for folder in folders[:2]))
        await until(lambda: is_resident(there, str(folders[2])))
        handle = there.try_acquire(folders[0])
        assert handle is not None
        async with handle:
            await there.prefetch(handle.key, tier="disk")
        nothing = there.prefetch([])
        assert nothing.done
        await nothing


async def test_wrong_arguments_are_told_by_the_call(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        with pytest.raises(UsageError, match="one of disk, host, device, not 'gpu'"):
            there.prefetch("a", tier="gpu")  # type: ignore[arg-type]
        with pytest.raises(InvalidAdapterIdError, match="not int"):
            there.prefetch(["a", 3])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="a timeout is from 0"):
            there.prefetch("a", timeout=-1)
        for odd in (None, "high", 0.5, True, 10**400):
            with pytest.raises(UsageError, match="a priority is a whole number"):
                there.prefetch("a", priority=odd)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="a priority is a whole number"):
                await there.load("a", priority=odd)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        assert source.counts.resolves == 0


async def test_a_prefetch_takes_nothing_from_leases_and_pins(tmp_path: Path) -> None:
    """However long it waits: it is no reason to end new leases."""
    source = stocked(tmp_path, "leased", "pinned", "late")
    async with over(source, max_slots=2, starvation_age=0.01) as there:
        await there.pin("pinned")
        lease = await there.load("leased")
        late = there.prefetch("late", timeout=0.1)
        with pytest.raises(AdapterTimeoutError) as caught:
            await late
        assert caught.value.stage == "queue"
        another = there.try_acquire("leased")
        assert another is not None
        for handle in (lease, another):
            handle.release()
        await there.prefetch("late")
        assert [is_at(there, n, "device") for n in ("leased", "pinned", "late")] == [0, 1, 1]


async def test_every_load_goes_before_a_prefetch(tmp_path: Path) -> None:
    """Also one that comes later and is of low priority."""
    names = ("held", "hint", "urgent hint", "late", "later")
    source = stocked(tmp_path, *names)
    async with over(source, max_slots=1, starvation_age=60) as there:
        heard: list[Event] = []
        there.subscribe(heard.append)
        held = await there.load("held")
        hints = [there.prefetch("hint"), there.prefetch("urgent hint", priority=9)]
        await until(lambda: all(state(there, name) == "present" for name in names[1:3]))
        loads = [asyncio.create_task(there.load(n, priority=-9)) for n in names[3:]]
        await until(lambda: all(state(there, name) == "present" for name in names[3:]))
        held.release()
        for load in loads:
            (await load).release()
        for hint in hints:
            await hint
        assert granted(heard) == ["held", "late", "later", "urgent hint", "hint"]


async def test_nobody_waits_for_the_network_of_a_prefetch(tmp_path: Path) -> None:
    """A slot is not claimed for what is still on its way; one who joins it in haste has it."""
    source = stocked(tmp_path, "slow", "here")
    async with over(source, max_slots=1, io_threads=1) as there:
        source.hold("slow")
        source.allow("slow", 0)
        hint = there.prefetch("slow")
        await until(lambda: source.counts.brings == 1)
        (await there.load("here", timeout=20)).release()
        assert not hint.done
        async with there.stream("slow", timeout=20) as handle:
            await handle.layer_ready(0)
            assert not handle.is_ready(1)
            source.allow("slow")
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, tmp_path / "slow")
        await hint
        assert source.counts.brings == 2


async def test_its_errors_are_in_the_order_of_the_ids(tmp_path: Path) -> None:
    source = stocked(tmp_path, "good", "late")
    async with over(source) as there:
        source.hold("late")
        source.fail("bring", FetchError("the wire broke"), id="late", at=3)
        hint = there.prefetch(["good", "late", "missing"])
        await until(lambda: hint.errors)
        assert list(hint.errors) == ["missing"]
        assert not hint.done
        source.allow("late")
        with pytest.raises(FetchError, match="the wire broke") as caught:
            await hint
        assert caught.value.id == "late"
        assert {id: type(error) for id, error in hint.errors.items()} == {
            "late": FetchError,
            "missing": AdapterNotFoundError,
        }
        assert is_at(there, "good", "device")


@pytest.mark.parametrize("tier", ["disk", "host", "device"])
async def test_a_failure_that_nobody_asks_for_is_quiet(tmp_path: Path, tier: TierName) -> None:
    source = stocked(tmp_path, "a")
    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: heard.append(what))
    async with over(source) as there:
        source.fail("open", IntegrityError("torn"))
        hints = [there.prefetch(["a", "missing"], tier=tier)]
        await until(lambda: hints[0].done)
        assert len(hints.pop().errors) == 2
        gc.collect()
        assert not heard
        await there.prefetch("a", tier=tier)


async def test_cancelling_a_prefetch_ends_nothing_of_others(tmp_path: Path) -> None:
    source = stocked(tmp_path, "shared", "alone", "arrived")
    async with over(source) as there:
        for name in ("shared", "alone"):
            source.hold(name)
        hint = there.prefetch(["shared", "alone", "arrived"])
        load = asyncio.create_task(there.load("shared"))
        await until(lambda: is_resident(there, "arrived") and source.counts.brings == 3)
        hint.cancel()
        await until(lambda: state(there, "alone") == "nowhere")
        await hint
        assert not hint.errors
        assert is_resident(there, "arrived")
        assert not load.done()
        source.allow("shared")
        async with await load as handle:
            tiny.assert_equal_to_file(handle, tmp_path / "shared")
        assert source.counts.brings == 3
        hint.cancel()  # what is over stays as it is
        await hint


async def test_its_deadline_and_its_waiters_end_by_themselves(tmp_path: Path) -> None:
    """A waiter that is cancelled ends nothing; a deadline does, for this time."""
    source = stocked(tmp_path, "a")

    async def wait_for(hint: Prefetch) -> None:
        await hint

    async with over(source) as there:
        source.hold("a")
        with pytest.raises(AdapterTimeoutError) as caught:
            await there.prefetch("a", timeout=0.02)
        assert caught.value.id == "a"
        await until(lambda: state(there, "a") == "nowhere")
        hint = there.prefetch("a", timeout=20)
        waiting = [asyncio.create_task(wait_for(hint)) for _ in range(2)]
        await until(lambda: source.counts.brings == 2)
        waiting[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert not hint.done
        source.allow("a")
        await waiting[1]
        assert is_at(there, "a", "device")


async def test_close_ends_a_prefetch_wherever_it_is(tmp_path: Path) -> None:
    source = stocked(tmp_path, "leased", "on the wire", "in the queue", "just begun")
    async with over(source, max_slots=1) as there:
        lease = await there.load("leased")
        source.hold("on the wire")
        hints = [there.prefetch(["on the wire", "in the queue"])]
        await until(lambda: state(there, "in the queue") == "present" and source.counts.brings == 3)
        hints += [there.prefetch(["just begun", lease.key, "leased"])]
        await asyncio.wait_for(there.close(timeout=0), 20)
        errors = [*hints[0].errors.items(), *hints[1].errors.items()]
        assert dict(errors).keys() >= {"on the wire", "in the queue", "just begun"}
        assert {type(error) for _, error in errors} == {LoaderClosedError}
        for hint in hints:
            assert hint.done
            with pytest.raises(LoaderClosedError):
                await hint
        with pytest.raises(LoaderClosedError):
            there.prefetch("leased")


# -- many at once ---------------------------------------------------------------------------------

NAMES = tuple(f"hint-{n}" for n in range(60))


async def test_two_files_are_opened_at_a_time_and_a_load_does_not_stand_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that are hinted; their bytes, which may be long in coming, hold up no opening."""
    source = stocked(tmp_path, *NAMES, "urgent")
    opened, opening, at_once = list[str](), set[str](), list[int]()
    plain_open = source.open

    async def slow(key: AdapterKey, demand: Demand) -> AdapterFile:
        name = key.location.removeprefix("memory:")
        opened.append(name)
        if name == "urgent":
            return await plain_open(key, demand)
        opening.add(name)
        at_once.append(len(opening))
        await asyncio.sleep(0.001)
        opening.remove(name)
        return await plain_open(key, demand)

    monkeypatch.setattr(source, "open", slow)
    monkeypatch.setattr(acquiring, "BACKGROUND_SECONDS", 1e6)  # so that no turn is lent
    async with over(source) as there:
        for name in NAMES[:4]:
            source.hold(name)
        hints = there.prefetch(NAMES, tier="disk")
        await until(lambda: opened)
        before = len(opened)
        (await there.load("urgent")).release()
        assert opened.index("urgent") < before + 10
        await until(lambda: all(is_at(there, name, "disk") for name in NAMES[4:]))
        assert max(at_once) == 2
        assert not hints.done
        source.allow(NAMES[0])
        hints.cancel()
        await hints


@pytest.mark.parametrize("turns", [0, 1])
async def test_many_are_cancelled_before_they_began(tmp_path: Path, turns: int) -> None:
    """A few begin in each turn of the loop; others have theirs between."""
    source = stocked(tmp_path, *NAMES)
    async with over(source) as there:
        hints = there.prefetch(NAMES, tier="disk")
        for _ in range(turns):
            await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) < len(NAMES) // 2
        hints.cancel()
        await hints
        assert hints.done
        assert source.counts.resolves < len(NAMES) // 2 * turns + 1


async def test_a_turn_that_takes_long_keeps_no_other_origin_waiting() -> None:
    """Two at a time, two of each origin, and those that take long beside them."""
    order: list[str] = []
    end = asyncio.Event()

    async def one(turns: Turns, origin: str, *, hangs: bool) -> None:
        async with turns.turn(0, origin):
            order.append(origin)
            if hangs:
                await end.wait()

    turns = Turns(2, 0.02)
    hanging = [asyncio.create_task(one(turns, "a", hangs=True)) for _ in range(5)]
    await asyncio.sleep(0)
    await asyncio.wait([asyncio.create_task(one(turns, "b", hangs=False)) for _ in range(9)])
    assert order == ["a"] * 2 + ["b"] * 9
    hanging[4].cancel()
    more = [asyncio.create_task(one(turns, "c", hangs=True)) for _ in range(3)]
    await until(lambda: order.count("c") == 2)
    await asyncio.sleep(0.05)
    assert (order.count("a"), order.count("c")) == (2, 2)
    end.set()
    await asyncio.wait([*hanging, *more])
    assert (order.count("a"), order.count("c")) == (4, 3)


async def test_turns_go_by_priority_and_pass_over_who_left() -> None:
    order: list[str] = []

    async def one(turns: Turns, name: str, priority: int) -> None:
        async with turns.turn(priority):
            order.append(name)
            await asyncio.sleep(0.001)

    turns = Turns(1)
    calls = (("first", 0), ("low", -1), ("high", 5), ("gone", 9), ("also high", 5))
    tasks = {name: asyncio.create_task(one(turns, name, rank)) for name, rank in calls}
    await asyncio.sleep(0)
    tasks["gone"].cancel()
    await asyncio.wait(tasks.values())
    await one(turns, "last", 0)
    assert order == ["first", "high", "also high", "low", "last"]


async def test_a_turn_that_comes_to_one_who_is_just_leaving_is_passed_on() -> None:
    order: list[str] = []

    async def one(turns: Turns, name: str, leaves: list[asyncio.Task[None]]) -> None:
        async with turns.turn(0):
            order.append(name)
            await asyncio.sleep(0.01)  # the others wait by then
        for task in leaves:  # which has just been given its turn
            task.cancel()

    turns, leaves = Turns(1), list[asyncio.Task[None]]()
    first = asyncio.create_task(one(turns, "first", leaves))
    await asyncio.sleep(0)
    leaves.append(asyncio.create_task(one(turns, "leaving", [])))
    last = asyncio.create_task(one(turns, "last", []))
    await asyncio.wait([first, *leaves, last])
    assert leaves[0].cancelled()
    assert order == ["first", "last"]
