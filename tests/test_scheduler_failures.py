"""Adapters that fail, and what no event tells of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async import (
    AdapterError,
    AdapterNotFoundError,
    AdapterRef,
    FetchError,
    IntegrityError,
    Request,
    TransferError,
)
from lorax_async.adapter import AdapterKey
from scheduling.serving import MANY, finish, opened, step, warm
from tiny_sources import simulated, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


# -- failing adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("step_", ["resolve", "open", "bring", "verify", "read"])
async def test_a_failing_adapter_fails_its_requests_and_no_other(
    tmp_path: Path, step_: Any
) -> None:
    source = stocked(tmp_path, "bad", "good")
    at = 4096 if step_ == "read" else 0  # a byte behind the header, or a group
    source.fail(step_, FetchError("as told"), id="bad", at=at)
    async with opened(source) as (_, scheduler):
        bad = [scheduler.submit(Request("bad", 3, 2)) for _ in range(2)]
        good = [scheduler.submit(Request(id, 3, 2)) for id in ("good", None)]
        await finish(scheduler, *good)
        assert [await each for each in good] == [2, 2]
        for ticket in bad:
            with pytest.raises(FetchError, match="as told") as raised:
                await asyncio.wait_for(ticket._wait(), 5)
            assert raised.value.id == "bad"
            assert isinstance(ticket.error, FetchError)
        assert bad[0].error is not bad[1].error
        assert "failed" in repr(bad[0])
        again = scheduler.submit(Request("bad", 3, 2))  # it failed once
        await finish(scheduler, again)
        assert await again == 2


async def test_an_adapter_that_is_nowhere(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path)) as (_, scheduler):
        with pytest.raises(AdapterNotFoundError):
            await asyncio.wait_for(scheduler.submit(Request("nowhere", 1, 1))._wait(), 5)


async def test_a_load_that_fails_in_the_midst(tmp_path: Path) -> None:
    """Of rows in a batch, and of those that wait."""
    source = stocked(tmp_path, "a")
    source.hold("a")
    source.allow("a", 0)
    source.fail("bring", FetchError("as told"), id="a", at=2)
    async with opened(source) as (_, scheduler):
        computed, waits = (scheduler.submit(Request("a", 3, 2)) for _ in range(2))
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, 1), 5)
        assert batch.rows[0].ticket is computed
        source.allow("a")
        for ticket in (computed, waits):
            with pytest.raises(FetchError, match="as told"):
                await asyncio.wait_for(ticket._wait(), 5)
        (handle,) = batch.streaming
        with pytest.raises(FetchError):
            handle.require_sound()
        scheduler.complete(batch)
        assert handle.released


async def test_bytes_that_turn_out_to_be_false(tmp_path: Path) -> None:
    """All layers were there, and tokens had come out."""
    source = stocked(tmp_path, "a")
    source.hold_verification("a")
    source.fail("verify", IntegrityError("others than promised"), id="a")
    async with opened(source) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 3, MANY))
        await step(scheduler)
        await step(scheduler)
        source.allow_verification("a")
        with pytest.raises(IntegrityError, match="others than promised"):
            await asyncio.wait_for(ticket._wait(), 5)
        assert ticket.generated == 2


async def test_a_failing_copy(tmp_path: Path) -> None:
    source = stocked(tmp_path, "a", "b")
    async with opened(source, {"device": "simulated"}) as (loader, scheduler):
        device = simulated(loader)
        device.failing.add(1)
        with pytest.raises(TransferError, match="told to fail"):
            ticket = scheduler.submit(Request("a", 1, 1))
            await asyncio.wait_for(ticket._wait(), 5)
        other = scheduler.submit(Request("b", 1, 1))
        await finish(scheduler, other)
        assert await other == 1


async def test_the_engine_may_say_that_a_row_failed(tmp_path: Path) -> None:
    async with opened(stocked(tmp_path, "a")) as (_, scheduler):
        bad, good = (scheduler.submit(Request("a", 1, 2)) for _ in range(2))
        await step(scheduler, failed={bad: AdapterError("not this one")})
        await finish(scheduler, good)
        assert await good == 2
        with pytest.raises(AdapterError, match="not this one") as raised:
            await bad
        assert raised.value.id == "a"


# -- what no event tells, or two events tell -------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
async def test_another_digest_fails_the_request(tmp_path: Path, resident: bool) -> None:
    """Also when the engine did not ask; requests for the same adapter without one go on."""
    async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
        if resident:
            await warm(loader, "a")
        false = scheduler.submit(Request(AdapterRef("a", digest="0" * 64), 1, MANY))
        other = scheduler.submit(Request("a", 1, 3))

        async def serve() -> None:
            async for batch in scheduler.batches(MANY, MANY):
                scheduler.complete(batch)
                await asyncio.sleep(0)

        serving = asyncio.create_task(serve())
        with pytest.raises(IntegrityError):
            await asyncio.wait_for(false._wait(), 5)
        assert await asyncio.wait_for(other._wait(), 5) == 3
        await scheduler.close()
        await serving


async def test_a_failure_in_a_batch_makes_room_for_no_more_than_its_own(tmp_path: Path) -> None:
    """Its slot breaks, and leaves: both are told of the same requests."""
    source = stocked(tmp_path, "a")
    source.hold_verification("a")
    source.fail("verify", IntegrityError("others than promised"), id="a")
    async with opened(source, max_begun=3) as (_, scheduler):
        bad = [scheduler.submit(Request("a", 1, MANY)) for _ in range(2)]
        while not bad[1].begun:
            await step(scheduler)
        good = [scheduler.submit(Request(None, 1, 2)) for _ in range(3)]
        await step(scheduler)
        assert [each.begun for each in (*bad, *good)] == [True] * 3 + [False] * 2
        batch = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        source.allow_verification("a")
        await until(lambda: bad[0].done)
        await asyncio.sleep(0.01)  # whatever else is told
        scheduler.complete(batch)
        assert good[0].done
        more = [scheduler.submit(Request(None, 1, 2)) for _ in range(3)]
        assert len((await step(scheduler)).rows) == 3
        await finish(scheduler, more[-1])


async def test_a_second_load_that_gets_no_answer_does_not_hold_up_close(tmp_path: Path) -> None:
    """A more urgent request asks once more, while the first load waits for a slot."""
    source = stocked(tmp_path, "a", "b")
    resolve, answer = source.resolve, asyncio.Event()

    async def silent(ref: AdapterRef) -> AdapterKey:
        await answer.wait()
        return await resolve(ref)

    async with opened(source, {"max_slots": 1}) as (loader, scheduler):
        async with await loader.load("b"):
            first = scheduler.submit(Request("a", 1, 1))
            lives = loader._machinery.driver.lifecycle.lives
            await until(lambda: any(life.waiters for life in lives.values()))
            source.resolve = silent  # type: ignore[method-assign]
            urgent = scheduler.submit(Request("a", 1, 1, priority=1))
            await asyncio.sleep(0.01)
        await step(scheduler)
        assert await first == await urgent == 1
        await asyncio.wait_for(scheduler.close(), 5)
        answer.set()
