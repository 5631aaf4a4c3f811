"""Thousands of hints at once: nobody waits behind them, and the most urgent come first."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common import until
from lorax_async import AdapterNotFoundError
from lorax_async.adapter import AdapterKey
from lorax_async.io.ports import AdapterFile, Demand
from lorax_async.runtime.turns import Turns
from tiny_sources import is_at, over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")

NAMES = tuple(f"hint-{n}" for n in range(60))


async def test_a_load_does_not_stand_behind_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stocked(tmp_path, *NAMES, "urgent")
    opened, plain_open = list[str](), source.open

    async def noted(key: AdapterKey, demand: Demand) -> AdapterFile:
        opened.append(key.location)
        return await plain_open(key, demand)

    monkeypatch.setattr(source, "open", noted)
    opened.clear()
    async with over(source) as there:
        hints = there.prefetch(NAMES, tier="disk")
        await until(lambda: opened)
        before = len(opened)
        (await there.load("urgent")).release()
        assert opened.index("memory:urgent") < before + 10
        await hints
        assert all(is_at(there, name, "disk") for name in NAMES)


async def test_two_files_are_opened_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = stocked(tmp_path, *NAMES)
    opening, at_once, plain_open = set[str](), list[int](), source.open

    async def slow(key: AdapterKey, demand: Demand) -> AdapterFile:
        opening.add(key.location)
        at_once.append(len(opening))
        await asyncio.sleep(0.001)
        opening.remove(key.location)
        return await plain_open(key, demand)

    monkeypatch.setattr(source, "open", slow)
    async with over(source) as there:
        await there.prefetch(NAMES, tier="disk")
        assert max(at_once) == 2


async def test_one_that_never_opens_holds_up_no_more_than_its_place(tmp_path: Path) -> None:
    """Its bytes may be long in coming: the next are opened meanwhile."""
    source = stocked(tmp_path, *NAMES)
    async with over(source) as there:
        for name in NAMES[:4]:
            source.hold(name)
        hints = there.prefetch(NAMES, tier="disk")
        await until(lambda: all(is_at(there, name, "disk") for name in NAMES[4:]))
        assert not hints.done
        source.allow(NAMES[0])
        hints.cancel()
        await hints
        assert hints.done


async def test_cancelled_before_they_began(tmp_path: Path) -> None:
    source = stocked(tmp_path, *NAMES)
    async with over(source) as there:
        hints = there.prefetch(NAMES, tier="disk")
        hints.cancel()
        await hints
        assert hints.done
        assert source.counts.resolves == 0


async def test_cancelled_while_they_begin(tmp_path: Path) -> None:
    """A few begin in each turn of the loop; others have theirs between."""
    source = stocked(tmp_path, *NAMES)
    async with over(source) as there:
        hints = there.prefetch(NAMES, tier="disk")
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) < len(NAMES) // 2
        hints.cancel()
        await hints
        assert source.counts.resolves < len(NAMES) // 2


async def test_those_that_are_left_at_the_end_are_told(tmp_path: Path) -> None:
    source = stocked(tmp_path, *NAMES)
    async with over(source) as there:
        hints = there.prefetch([*NAMES, "nobody"], tier="device")
        await until(lambda: source.counts.opens > 2)
    assert hints.done
    assert all(
        "closed" in str(error) or isinstance(error, AdapterNotFoundError)
        for error in hints.errors.values()
    )
    assert hints.errors


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
