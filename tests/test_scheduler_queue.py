"""The scheduler's queue of adapters: who is loaded, hinted and given up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async import (
    AdapterLoader,
    AdapterRef,
    Request,
)
from scheduling.serving import opened, rows, silence, step, turns, warm
from tiny_sources import is_resident, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_the_next_one_is_brought_nearer_when_a_slot_is_given_back(tmp_path: Path) -> None:
    """The one before it has no answer."""
    source = stocked(tmp_path, "a", "silent", "next")
    silence(source, "silent")
    settings = {"max_slots": 2, "starvation_age": 1000.0}
    async with opened(source, settings, loads=1, look_ahead=0) as (loader, scheduler):
        await warm(loader, "a")
        ids = ("a", "silent", "next")
        first, *others = (scheduler.submit(Request(id, 1, 1)) for id in ids)
        await turns()
        await step(scheduler)
        assert await first == 1
        await until(lambda: is_resident(loader, "next"))
        for ticket in others:
            ticket.cancel()


async def _first_of_two(source: Any, urgent: Any, *, later: bool = False, loads: int = 1) -> str:
    """Which of a and b comes first, which wait for c's slot; then `urgent` says something of b.

    `later`, loads have begun: a's, and b's if there are two.
    """
    settings = {"max_slots": 1, "starvation_age": 100.0, "timeout": 1000.0}
    async with opened(source, settings, loads=loads, look_ahead=0) as (loader, scheduler):
        async with await loader.load("c"):
            tickets = [scheduler.submit(Request(id, 1, 1)) for id in "ab"]
            if later:
                await turns()
            urgent(scheduler)
            await turns()
        first = rows(await step(scheduler))[0][0]
        while not all(ticket.done for ticket in tickets):
            await step(scheduler)
        return str(first)


async def test_an_adapter_of_which_somebody_urgent_wants_something_comes_first(
    tmp_path: Path,
) -> None:
    source = stocked(tmp_path, "a", "b", "c")
    assert await _first_of_two(source, lambda scheduler: None) == "a"
    urgent = Request("b", 1, 1, priority=3)
    assert await _first_of_two(source, lambda scheduler: scheduler.submit(urgent)) == "b"
    given_up = await _first_of_two(source, lambda scheduler: scheduler.submit(urgent).cancel())
    assert given_up == "a"
    for loads in (1, 2):
        later = await _first_of_two(
            source, lambda scheduler: scheduler.submit(urgent), later=True, loads=loads
        )
        assert later == "b"


async def test_who_may_not_begin_takes_no_row_from_who_has_begun(tmp_path: Path) -> None:
    """Though it is the more urgent one."""
    async with opened(stocked(tmp_path), max_begun=1) as (_, scheduler):
        begun = scheduler.submit(Request(None, 1, 2))
        await step(scheduler)
        urgent = scheduler.submit(Request(None, 1, 1, priority=5))
        for ticket in (begun, urgent):
            assert (await step(scheduler, sequences=1)).rows[0].ticket is ticket


async def test_another_is_loaded_for_who_was_cancelled(tmp_path: Path) -> None:
    source = stocked(tmp_path, "silent", "b")
    silence(source, "silent")
    settings = {"max_slots": 1, "starvation_age": 1000.0, "timeout": 1000.0}
    async with opened(source, settings, loads=1, look_ahead=0) as (_, scheduler):
        tickets = [scheduler.submit(Request(id, 1, 1)) for id in ("silent", "b")]
        await turns()
        tickets[0].cancel()
        assert rows(await step(scheduler)) == [("b", 0, 1, True)]


async def test_nothing_is_loaded_when_its_hint_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, loaded = AdapterLoader.stream, list[object]()

    def noted(loader: AdapterLoader, ref: AdapterRef, **more: Any) -> Any:
        loaded.append(ref.text)
        return stream(loader, ref, **more)

    monkeypatch.setattr(AdapterLoader, "stream", noted)
    loaded.clear()
    source = stocked(tmp_path, "silent", "b")
    silence(source, "silent")
    source.hold("b")
    settings = {"max_slots": 2, "starvation_age": 1000.0, "timeout": 1000.0}
    async with opened(source, settings, loads=1, look_ahead=0) as (loader, scheduler):
        tickets = [scheduler.submit(Request(id, 1, 1)) for id in ("silent", "b")]
        waiters = loader._machinery.driver.tenants._waiters
        await until(lambda: waiters)
        tickets[1].cancel()
        await turns()
        assert not waiters
        assert loaded == ["silent"]
        tickets[0].cancel()
