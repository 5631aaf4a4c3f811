"""What ends a request: cancelled at any moment, failing adapters, deadlines, and close."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import Run, until
from lorax_async import (
    AdapterError,
    AdapterNotFoundError,
    AdapterRef,
    AdapterScheduler,
    AdapterTimeoutError,
    Batch,
    FetchError,
    HandleClosedError,
    IntegrityError,
    LoaderClosedError,
    Request,
    Ticket,
    TransferError,
    UsageError,
)
from lorax_async.adapter import AdapterKey
from scheduling.serving import MANY, opened, rows, step, warm
from sweeping import count_steps, stepwise
from tiny_sources import over, simulated, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


async def finish(scheduler: AdapterScheduler, *tickets: Ticket) -> None:
    while not all(ticket.done for ticket in tickets):
        await step(scheduler)


# -- cancelled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waiting", "streaming", "computing", "between"])
def test_a_cancelled_request_leaves_the_others_alone(run: Run, tmp_path: Path, when: str) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "a", "b")
        source.hold("a")
        async with opened(source) as (_, scheduler):
            ticket, other, base = (scheduler.submit(Request(id, 4, 3)) for id in ("a", "a", None))
            batch: Batch | None = None
            if when != "waiting":
                guest = scheduler._book.guest_of(ticket)
                await until(lambda: guest.handle is not None)
            if when in ("computing", "between"):
                source.allow("a")
                handle = guest.handle
                assert handle is not None
                await until(lambda: handle.resident)
                batch = await scheduler.next_batch(MANY, MANY)
                if when == "between":
                    scheduler.complete(batch)
            assert ticket.cancel()
            assert not ticket.cancel()
            if when == "computing":
                assert batch is not None
                scheduler.complete(batch)
            source.allow("a")
            await finish(scheduler, other, base)
            assert [await other, await base] == [3, 3]
            assert ticket.cancelled
            assert "cancelled" in repr(ticket)
            with pytest.raises(asyncio.CancelledError):
                await ticket

    run(body())


def test_the_last_request_takes_its_load_with_it(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "a")
        source.hold("a")
        async with opened(source) as (loader, scheduler):
            ticket = scheduler.submit(Request("a", 1, 1))
            guest = scheduler._book.guest_of(ticket)
            await until(lambda: guest.handle is not None)
            ticket.cancel()
            assert guest.handle is None
            await until(lambda: not loader._machinery.driver.tenants.leases)
            # And a new one is a new one.
            source.allow("a")
            again = scheduler.submit(Request("a", 1, 1))
            await finish(scheduler, again)
            assert await again == 1

    run(body())


def test_who_awaits_may_be_cancelled_without_the_request(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path)) as (_, scheduler):
            ticket = scheduler.submit(Request(None, 1, 1))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ticket._wait(), 0.001)
            assert not ticket.done
            await finish(scheduler, ticket)
            assert await ticket == 1

    run(body())


async def _serve(scheduler: AdapterScheduler, ticket: Ticket) -> None:
    """Until it is done; a batch that is not there by then is not waited for."""
    while not ticket.done:
        wanted = asyncio.ensure_future(scheduler.next_batch(MANY, MANY))
        either: set[asyncio.Future[Any]] = {wanted, ticket._future}
        await asyncio.wait(either, return_when="FIRST_COMPLETED")
        if wanted.done():
            await asyncio.sleep(0)  # it is computed
            scheduler.complete(wanted.result())
        else:
            wanted.cancel()
            await asyncio.wait([wanted])


def test_cancelled_at_every_await_of_who_serves(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        steps, number = 1, 0
        while number < steps:
            async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
                if number == 0:
                    ticket = scheduler.submit(Request("a", 4, 2))
                    steps = await count_steps(_serve(scheduler, ticket))
                    assert steps >= 4
                    await loader.unload("a")
                number += 1
                ticket = scheduler.submit(Request("a", 4, 2))

                def cancel(current: int, wanted: int = number, ticket: Ticket = ticket) -> None:
                    if current == wanted:
                        ticket.cancel()

                await asyncio.wait_for(stepwise(_serve(scheduler, ticket), cancel), 5)
                assert ticket.done
                assert not scheduler._book._guests
                assert scheduler._book.begun == 0
                await finish(scheduler, scheduler.submit(Request("a", 1, 1)))

    run(body())


def test_cancelled_after_any_turn_of_the_loop(run: Run, tmp_path: Path) -> None:
    """From before its load begins until after its last token."""

    async def body() -> None:
        turns, finished = 0, False
        while not finished:
            async with opened(stocked(tmp_path, "a")) as (_, scheduler):
                ticket = scheduler.submit(Request("a", 4, 2))
                serving = asyncio.create_task(_serve(scheduler, ticket))
                for _ in range(turns):
                    await asyncio.sleep(0)
                finished = not ticket.cancel()
                await asyncio.wait_for(serving, 5)
                assert not scheduler._book._guests
                assert scheduler._book.begun == 0
                await finish(scheduler, scheduler.submit(Request("a", 1, 1)))
            turns += 1 if turns < 40 else turns // 8
        assert turns > 5

    run(body())


def test_next_batch_cancelled_at_every_await_loses_nothing(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "a")) as (loader, scheduler):
            number, cancelled = 0, True
            while cancelled:
                number += 1
                ticket = scheduler.submit(Request("a", 1, 1))

                def cancel(current: int, wanted: int = number) -> None:
                    task = asyncio.current_task()
                    if current == wanted and task is not None:
                        task.cancel()

                async def wanting(cancel: Callable[[int], None] = cancel) -> Batch:
                    return await stepwise(scheduler.next_batch(MANY, MANY), cancel)  # type: ignore[no-any-return]

                task = asyncio.create_task(wanting())
                await asyncio.wait([task])
                cancelled = task.cancelled()
                batch = task.result() if not cancelled else await scheduler.next_batch(MANY, MANY)
                assert rows(batch) == [("a", 0, 1, True)]
                scheduler.complete(batch)
                assert await ticket == 1
                await loader.unload("a")
            assert number >= 2

    run(body())


# -- failing adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("step_", ["resolve", "open", "bring", "verify", "read"])
def test_a_failing_adapter_fails_its_requests_and_no_other(
    run: Run, tmp_path: Path, step_: Any
) -> None:
    async def body() -> None:
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

    run(body())


def test_an_adapter_that_is_nowhere(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path)) as (_, scheduler):
            with pytest.raises(AdapterNotFoundError):
                await asyncio.wait_for(scheduler.submit(Request("nowhere", 1, 1))._wait(), 5)

    run(body())


def test_a_load_that_fails_in_the_midst(run: Run, tmp_path: Path) -> None:
    """Of rows in a batch, and of those that wait."""

    async def body() -> None:
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

    run(body())


def test_bytes_that_turn_out_to_be_false(run: Run, tmp_path: Path) -> None:
    """All layers were there, and tokens had come out."""

    async def body() -> None:
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

    run(body())


def test_a_failing_copy(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
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

    run(body())


def test_the_engine_may_say_that_a_row_failed(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path, "a")) as (_, scheduler):
            bad, good = (scheduler.submit(Request("a", 1, 2)) for _ in range(2))
            await step(scheduler, failed={bad: AdapterError("not this one")})
            await finish(scheduler, good)
            assert await good == 2
            with pytest.raises(AdapterError, match="not this one") as raised:
                await bad
            assert raised.value.id == "a"

    run(body())


# -- deadlines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "id", "stage"),
    [("resolve", "a", "queue"), ("bytes", "a", "copy"), ("engine", None, "ready")],
)
def test_a_deadline_ends_the_waiting(
    run: Run, tmp_path: Path, held: str, id: str | None, stage: str
) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "a", "b")
        source.hold("a")
        async with opened(source, {"max_slots": 1}) as (loader, scheduler):
            blocker = await loader.load("b") if held == "resolve" else None
            late = scheduler.submit(Request(id, 1, 1, deadline=0.05))
            patient = scheduler.submit(Request(id, 1, 1))
            with pytest.raises(AdapterTimeoutError, match=r"within 0\.05 s") as raised:
                await asyncio.wait_for(late._wait(), 5)
            assert (raised.value.id, raised.value.stage) == (id, stage)
            if blocker is not None:
                blocker.release()
            source.allow("a")
            await finish(scheduler, patient)
            assert await patient == 1

    run(body())


def test_a_request_that_has_begun_is_not_late(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        async with opened(stocked(tmp_path)) as (_, scheduler):
            ticket = scheduler.submit(Request(None, 1, 2, deadline=0.02))
            batch = await scheduler.next_batch(MANY, MANY)
            await asyncio.sleep(0.04)
            scheduler.complete(batch)
            await finish(scheduler, ticket)
            assert await ticket == 2

    run(body())


def test_without_a_deadline_it_is_the_configs(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "a")
        source.hold("a")
        async with opened(source, {"timeout": 0.05}) as (_, scheduler):
            with pytest.raises(AdapterTimeoutError, match=r"within 0\.05 s"):
                await asyncio.wait_for(scheduler.submit(Request("a", 1, 1))._wait(), 5)

    run(body())


# -- close -----------------------------------------------------------------------------------------


def test_close_answers_everybody(run: Run, tmp_path: Path) -> None:
    """Who waits, who streams, who is computed, who wants a batch; and twice."""

    async def body() -> None:
        source = stocked(tmp_path, *"abcde", holdable=True)
        source.hold("a")
        source.hold("b")
        async with over(source, max_slots=3, host_bytes=1 << 20) as loader:
            scheduler = AdapterScheduler(loader, loads=2)
            await warm(loader, "c")
            tickets = [scheduler.submit(Request(id, 4, 2)) for id in (*"abcde", "c", None)]
            batch = await scheduler.next_batch(MANY, 1)
            other = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
            waits = asyncio.create_task(scheduler.next_batch(MANY, MANY))
            iterated = asyncio.create_task(_all(scheduler))
            await asyncio.sleep(0)
            await asyncio.gather(scheduler.close(), scheduler.close())
            for ticket in tickets:
                with pytest.raises(LoaderClosedError, match="scheduler was closed"):
                    await ticket
            with pytest.raises(LoaderClosedError):
                await waits
            assert len(await iterated) <= 1
            with pytest.raises(LoaderClosedError):
                scheduler.submit(Request(None, 1, 1))
            scheduler.complete(batch)
            scheduler.complete(other)
            with pytest.raises(HandleClosedError):
                other.check()
            assert not loader._machinery.driver.tenants.leases
            await scheduler.close()

    run(body())


async def _all(scheduler: AdapterScheduler) -> list[Batch]:
    return [batch async for batch in scheduler.batches(MANY, MANY)]


def test_cancelling_who_closes_does_not_stop_it(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "a")
        source.hold("a")
        async with over(source) as loader:
            scheduler = AdapterScheduler(loader)
            ticket = scheduler.submit(Request("a", 1, 1))
            await asyncio.sleep(0.005)
            closing = asyncio.create_task(scheduler.close())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(LoaderClosedError):
                await asyncio.wait_for(ticket._wait(), 5)
            await scheduler.close()
            assert not loader._machinery.driver.tenants.leases

    run(body())


def test_a_loader_that_is_closed_first_fails_the_requests(run: Run, tmp_path: Path) -> None:
    async def body() -> None:
        source = stocked(tmp_path, "a", "b")
        source.hold("b")
        async with over(source) as loader:
            scheduler = AdapterScheduler(loader)
            await warm(loader, "a")
            held, cold = scheduler.submit(Request("a", 1, 2)), scheduler.submit(Request("b", 1, 1))
            await step(scheduler)
            await loader.close(timeout=0.01)
            waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
            for ticket in (held, cold):
                with pytest.raises(LoaderClosedError):
                    await asyncio.wait_for(ticket._wait(), 5)
            with pytest.raises(LoaderClosedError):
                scheduler.submit(Request("a", 1, 1))
            await scheduler.close()
            with pytest.raises(LoaderClosedError):
                await waiting

    run(body())


def test_it_belongs_to_its_loop(tmp_path: Path) -> None:
    source = stocked(tmp_path)

    async def elsewhere(scheduler: AdapterScheduler) -> None:
        for call in (
            lambda: scheduler.submit(Request(None, 1, 1)),
            lambda: scheduler.complete(None),  # type: ignore[arg-type]
        ):
            with pytest.raises(UsageError, match="event loop"):
                call()
        for work in (scheduler.close, lambda: scheduler.next_batch(1, 1)):
            with pytest.raises(UsageError, match="event loop"):
                await work()

    async def body() -> None:
        async with over(source) as loader, AdapterScheduler(loader) as scheduler:
            await asyncio.to_thread(asyncio.run, elsewhere(scheduler))

    asyncio.run(body())


# -- what no event tells, or two events tell -------------------------------------------------------


@pytest.mark.parametrize("resident", [False, True])
def test_another_digest_fails_the_request(run: Run, tmp_path: Path, resident: bool) -> None:
    """Also when the engine did not ask; requests for the same adapter without one go on."""

    async def body() -> None:
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

    run(body())


def test_a_failure_in_a_batch_makes_room_for_no_more_than_its_own(run: Run, tmp_path: Path) -> None:
    """Its slot breaks, and leaves: both are told of the same requests."""

    async def body() -> None:
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

    run(body())


def test_a_second_load_that_gets_no_answer_does_not_hold_up_close(run: Run, tmp_path: Path) -> None:
    """A more urgent request asks once more, while the first load waits for a slot."""

    async def body() -> None:
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

    run(body())
