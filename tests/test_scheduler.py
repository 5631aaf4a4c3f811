"""Requests become batches: what joins when, in which order, and what is brought nearer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorax_async import (
    AdapterScheduler,
    ConfigError,
    InvalidAdapterIdError,
    Request,
    UsageError,
)
from scheduling.serving import MANY, opened, rows, step, warm
from tiny_sources import stocked

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

# -- one request -----------------------------------------------------------------------------------


async def test_a_request_is_computed_a_token_at_a_time(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a")) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 10, 3))
        assert "'a' waiting" in repr(ticket)
        seen = [rows(await step(scheduler)) for _ in range(3)]
        assert seen == [
            [("a", 0, 10, True)],
            [("a", 10, 1, True)],
            [("a", 11, 1, True)],
        ]
        assert await ticket == 3
        assert (ticket.done, ticket.cancelled, ticket.error) == (True, False, None)
        assert "finished after 3 tokens" in repr(ticket)
        assert not ticket.cancel()


async def test_the_engine_may_say_that_it_is_finished(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a")) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 10, MANY))
        await step(scheduler)
        await step(scheduler, finished=[ticket])
        assert await ticket == 2


async def test_a_long_prompt_comes_in_parts(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        scheduler.submit(Request(None, 10, 2))
        seen = [rows(await step(scheduler, tokens=4)) for _ in range(4)]
        assert seen == [
            [(None, 0, 4, False)],
            [(None, 4, 4, False)],
            [(None, 8, 2, True)],
            [(None, 10, 1, True)],
        ]


async def test_rows_of_one_adapter_are_neighbours(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a", "b")) as (loader, scheduler):
        await warm(loader, "a", "b")
        for id in ("b", None, "a", "b", "a"):
            scheduler.submit(Request(id, 2, 1))
        batch = await step(scheduler)
        assert [row[0] for row in rows(batch)] == [None, "a", "a", "b", "b"]
        assert batch.plan.segments.bounds == (0, 2, 6, 10)
        assert batch.plan.segments.slots == (
            -1,
            *sorted({row.place.slot for row in batch.rows[1:]}),
        )
        assert batch.plan.groups == ((0, 0, 1), (4, 1, 3))
        assert batch.plan.order == (0, 1, 2, 3, 4)
        assert [handle and handle.id for handle in batch.handles] == [None, "a", "a", "b", "b"]
        assert batch.streaming == ()


# -- order and shares ------------------------------------------------------------------------------


async def test_a_hot_adapter_does_not_own_the_batch(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "hot", "b")) as (loader, scheduler):
        await warm(loader, "hot", "b")
        for _ in range(20):
            scheduler.submit(Request("hot", 1, 5))
        scheduler.submit(Request("b", 1, 5))
        batch = await step(scheduler, sequences=4)
        assert sorted(str(row[0]) for row in rows(batch)) == ["b", "hot", "hot", "hot"]


async def test_the_more_urgent_come_first(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        plain = scheduler.submit(Request(None, 1, 1))
        soon = scheduler.submit(Request(None, 1, 1, deadline=3.0))
        high = scheduler.submit(Request(None, 1, 1, priority=1))
        seen = [(await step(scheduler, sequences=1)).rows[0].ticket for _ in range(3)]
        assert seen == [high, soon, plain]


async def test_no_more_begin_than_the_engine_has_room_for(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path), max_begun=2) as (_, scheduler):
        first, second, third = (scheduler.submit(Request(None, 1, n)) for n in (2, 1, 1))
        assert {row.ticket for row in (await step(scheduler)).rows} == {first, second}
        assert {row.ticket for row in (await step(scheduler)).rows} == {first, third}


async def test_several_batches_may_be_under_way(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
        await warm(loader, "a")
        tickets = [scheduler.submit(Request("a", 1, 1)) for _ in range(2)]
        batches = [await scheduler.next_batch(MANY, 1) for _ in range(2)]
        assert [batch.rows[0].ticket for batch in batches] == tickets
        scheduler.complete(batches[1])
        batches[0].check()
        scheduler.complete(batches[0])
        assert [await each for each in tickets] == [1, 1]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (("a", 0, 1), ConfigError),
        (("a", 1, 0), ConfigError),
        (("a", 1, 1, 0.5), UsageError),
        (("a", 1, 1, 0, 0.0), ConfigError),
        ((5, 1, 1), InvalidAdapterIdError),
    ],
)
def test_requests_that_are_none(given: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        Request(*given)


async def test_settings_and_batches_that_are_none(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (loader, scheduler):
        wrong: list[dict[str, Any]] = [{"loads": 0}, {"look_ahead": -1}, {"max_begun": 0}]
        wrong += [{"max_share": share} for share in (0, -0.5, 1.5, True, "1")]
        for given in wrong:
            with pytest.raises(ConfigError):
                AdapterScheduler(loader, **given)
        for sizes in ((0, 1), (1, 0)):
            with pytest.raises(ConfigError):
                await scheduler.next_batch(*sizes)


async def test_a_batch_is_completed_once_and_with_its_own_tickets(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        ticket, other = (scheduler.submit(Request(None, 1, 1)) for _ in range(2))
        batch = await scheduler.next_batch(MANY, 1)
        with pytest.raises(UsageError, match="no row"):
            scheduler.complete(batch, finished=[other])
        assert not batch.completed
        scheduler.complete(batch, finished=[ticket])
        with pytest.raises(UsageError, match="once"):
            scheduler.complete(batch)
