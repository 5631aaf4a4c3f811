"""How requests end early: cancelled at any moment, failing adapters, deadlines, and close."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cancellation_sweep import stepwise
from event_loops import until
from scheduler_world import MANY, VirtualClock, finish, held, opened, rows, step, turns, warm
from tiny_loaders import fails
from tiny_sources import make_source, over

from lorax_async import AdapterLoader, AdapterRef, AdapterScheduler, Batch, Request, Ticket, errors

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_a_task_that_awaits_a_ticket_may_be_cancelled_without_it(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path)) as (_, scheduler):
        ticket = scheduler.submit(Request(None, 1, 1))
        await fails(asyncio.wait_for(ticket, 0.001), TimeoutError)
        assert not ticket.done
        await finish(scheduler, ticket)
        assert await ticket == 1


async def _serve(scheduler: AdapterScheduler, ticket: Ticket) -> None:
    """Until it is done; a batch that is not there by then is not waited for."""
    ended: asyncio.Future[int] = asyncio.ensure_future(ticket)
    while not ticket.done:
        wanted = asyncio.ensure_future(scheduler.next_batch(MANY, MANY))
        either: set[asyncio.Future[Any]] = {wanted, ended}
        await asyncio.wait(either, return_when="FIRST_COMPLETED")
        if wanted.done():
            await asyncio.sleep(0)  # it is computed
            scheduler.complete(wanted.result())
        else:
            wanted.cancel()
            await asyncio.wait([wanted])
    await asyncio.wait([ended])


async def test_a_load_ends_with_its_last_request(tmp_path: Path) -> None:
    async with (
        opened(make_source(tmp_path, "a", "b"), {"max_slots": 1}) as (loader, scheduler),
        await loader.load("b"),
    ):
        first, last = (scheduler.submit(Request("a", 1, 1)) for _ in range(2))
        await until(lambda: loader.placement().usage.waiting)
        first.cancel()
        await asyncio.sleep(0.01)
        assert loader.placement().usage.waiting
        last.cancel()
        await until(lambda: not loader.placement().usage.waiting)


@pytest.mark.each_loop
async def test_a_request_is_cancelled_after_any_turn_of_the_loop(tmp_path: Path) -> None:
    """From before its load begins until after its last token."""
    turns, finished = 0, False
    while not finished:
        async with opened(make_source(tmp_path, "a"), max_begun=1) as (_, scheduler):
            ticket = scheduler.submit(Request("a", 4, 2))
            serving = asyncio.create_task(_serve(scheduler, ticket))
            for _ in range(turns):
                await asyncio.sleep(0)
            finished = not ticket.cancel()
            await asyncio.wait_for(serving, 5)
            await finish(scheduler, scheduler.submit(Request("a", 1, 1)))
        turns += 1 if turns < 40 else turns // 8
    assert turns > 5


async def test_next_batch_cancelled_at_every_await_loses_nothing(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path, "a")) as (loader, scheduler):
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


@pytest.mark.parametrize("step_", ["resolve", "open", "fetch_groups", "verify", "read"])
async def test_a_failing_adapter_fails_its_requests_and_no_other(
    tmp_path: Path, step_: Any
) -> None:
    source = make_source(tmp_path, "bad", "good")
    at = 4096 if step_ == "read" else 0  # a byte behind the header, or a group
    source.fail(step_, errors.FetchError("as told"), id="bad", at=at)
    async with opened(source) as (_, scheduler):
        bad = [scheduler.submit(Request("bad", 3, 2)) for _ in range(2)]
        good = [scheduler.submit(Request(id, 3, 2)) for id in ("good", None)]
        await finish(scheduler, *good)
        assert [await each for each in good] == [2, 2]
        for ticket in bad:
            error = await fails(asyncio.wait_for(ticket, 5), errors.FetchError, "as told")
            assert error.id == "bad"
            assert isinstance(ticket.error, errors.FetchError)
        assert bad[0].error is not bad[1].error
        assert "failed" in repr(bad[0])
        again = scheduler.submit(Request("bad", 3, 2))  # it failed once
        await finish(scheduler, again)
        assert await again == 2


async def test_bytes_that_turn_out_to_be_false(tmp_path: Path) -> None:
    """All layers were there, and tokens had come out."""
    source = make_source(tmp_path, "a")
    source.hold_verification("a")
    source.fail("verify", errors.IntegrityError("others than promised"), id="a")
    async with opened(source) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 3, MANY))
        await step(scheduler)
        await step(scheduler)
        source.allow_verification("a")
        await fails(asyncio.wait_for(ticket, 5), errors.IntegrityError, "others than promised")
        assert ticket.generated == 2


async def test_the_engine_may_say_that_a_row_failed(tmp_path: Path) -> None:
    async with opened(make_source(tmp_path, "a")) as (_, scheduler):
        bad, good = (scheduler.submit(Request("a", 1, 2)) for _ in range(2))
        await step(scheduler, failed={bad: errors.AdapterError("not this one")})
        await finish(scheduler, good)
        assert await good == 2
        assert (await fails(bad, errors.AdapterError, "not this one")).id == "a"


@pytest.mark.parametrize("resident", [False, True])
async def test_another_digest_fails_the_request(tmp_path: Path, resident: bool) -> None:
    """Also when the engine did not ask; requests for the same adapter without one go on."""
    async with opened(make_source(tmp_path, "a")) as (loader, scheduler):
        if resident:
            await warm(loader, "a")
        false = scheduler.submit(Request(AdapterRef("a", digest="0" * 64), 1, MANY))
        other = scheduler.submit(Request("a", 1, 3))

        async def serve() -> None:
            async for batch in scheduler.batches(MANY, MANY):
                scheduler.complete(batch)
                await asyncio.sleep(0)

        serving = asyncio.create_task(serve())
        await fails(asyncio.wait_for(false, 5), errors.IntegrityError)
        assert await asyncio.wait_for(other, 5) == 3
        await scheduler.close()
        await serving


async def test_a_token_of_false_weights_does_not_count(tmp_path: Path) -> None:
    """The scheduler asks when a batch is completed."""
    source = make_source(tmp_path, "a")
    source.hold_verification("a")
    source.fail("verify", errors.IntegrityError("it has other bytes"), id="a", times=9)
    async with opened(source) as (_, scheduler):
        ticket = scheduler.submit(Request("a", 1, 1))
        batch = await scheduler.next_batch(MANY, MANY)
        assert batch.handles[0] is not None
        source.allow_verification("a")
        await fails(batch.handles[0].verified(), errors.IntegrityError)
        assert set(scheduler.complete(batch)) == {ticket}
        await fails(ticket, errors.IntegrityError)


async def test_a_token_of_a_request_that_was_cancelled_meanwhile_does_not_count(
    tmp_path: Path,
) -> None:
    async with opened(make_source(tmp_path, "a")) as (_, scheduler):
        ticket, other = (scheduler.submit(Request("a", 1, 1)) for _ in range(2))
        batch = await scheduler.next_batch(MANY, MANY)
        ticket.cancel()
        assert set(scheduler.complete(batch)) == {ticket}
        await other


PATIENT = {"timeout": 60.0, "starvation_age": 1000.0}


@pytest.mark.parametrize(
    ("held", "id", "stage"),
    [("resolve", "a", "queue"), ("bytes", "a", "copy"), ("engine", None, "ready")],
)
async def test_a_deadline_ends_the_waiting(
    tmp_path: Path, held: str, id: str | None, stage: str
) -> None:
    source = make_source(tmp_path, "a", "b")
    source.hold("a")
    async with opened(source, {"max_slots": 1}) as (loader, scheduler):
        blocker = await loader.load("b") if held == "resolve" else None
        late = scheduler.submit(Request(id, 1, 1, deadline=0.05))
        patient = scheduler.submit(Request(id, 1, 1))
        error = await fails(
            asyncio.wait_for(late, 5), errors.AdapterTimeoutError, r"within 0\.05 s"
        )
        assert (error.id, error.stage) == (id, stage)
        if blocker is not None:
            blocker.release()
        source.allow("a")
        await finish(scheduler, patient)
        assert await patient == 1


@pytest.mark.parametrize("has_begun", [False, True])
async def test_a_request_that_loses_its_slot_has_all_its_time_again_if_it_had_begun(
    tmp_path: Path, has_begun: bool
) -> None:
    clock = VirtualClock()
    async with opened(make_source(tmp_path, "a"), PATIENT, clock=clock) as (loader, scheduler):
        ticket = scheduler.submit(Request("a", 1, MANY, deadline=60.0))
        if has_begun:
            await step(scheduler)
        else:
            await held(loader, "a")
        for moment in (0.0, 40.0):
            clock.pass_until(moment)
            await loader.unload("a")
            await held(loader, "a")
        clock.pass_until(59.0)
        assert not ticket.done
        clock.pass_until(61.0)
        assert ticket.done != has_begun
        clock.pass_until(101.0)
        assert isinstance(ticket.error, errors.AdapterTimeoutError)


@pytest.mark.parametrize("deadline", [3.0, None])
async def test_a_request_that_has_begun_is_not_late(tmp_path: Path, deadline: float | None) -> None:
    """Without a deadline of its own a request has the config's timeout to begin in."""
    clock = VirtualClock()
    async with opened(make_source(tmp_path), PATIENT, clock=clock) as (_, scheduler):
        begun, late = (scheduler.submit(Request(None, 1, 2, deadline=deadline)) for _ in range(2))
        batch = await scheduler.next_batch(MANY, 1)
        clock.pass_until((deadline or 60.0) - 0.1)
        assert not late.done
        clock.pass_until(100.0)
        assert isinstance(late.error, errors.AdapterTimeoutError)
        scheduler.complete(batch)
        await finish(scheduler, begun)
        assert await begun == 2


async def test_close_answers_all_requests(tmp_path: Path) -> None:
    """Who waits, who streams, who is computed, who wants a batch; and twice."""
    source = make_source(tmp_path, *"abcde", holdable=True)
    source.hold("a")
    source.hold("b")

    async def all_batches() -> list[Batch]:
        return [batch async for batch in scheduler.batches(MANY, MANY)]

    async with over(source, max_slots=3, host_bytes=1 << 20) as loader:
        scheduler = AdapterScheduler(loader, loads=2)
        await warm(loader, "c")
        tickets = [scheduler.submit(Request(id, 4, 2)) for id in (*"abcde", "c", None)]
        batch = await scheduler.next_batch(MANY, 1)
        other = await asyncio.wait_for(scheduler.next_batch(MANY, MANY), 5)
        waits = asyncio.create_task(scheduler.next_batch(MANY, MANY))
        iterated = asyncio.create_task(all_batches())
        await asyncio.sleep(0)
        await asyncio.gather(scheduler.close(), scheduler.close())
        for ticket in tickets:
            await fails(ticket, errors.LoaderClosedError, "scheduler was closed")
        await fails(waits, errors.LoaderClosedError)
        assert len(await iterated) <= 1
        with pytest.raises(errors.LoaderClosedError):
            scheduler.submit(Request(None, 1, 1))
        scheduler.complete(batch)
        scheduler.complete(other)
        with pytest.raises(errors.HandleClosedError):
            other.check()
        assert not loader.placement().usage.leases
        await scheduler.close()


async def test_cancelling_close_does_not_stop_it(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    source.hold("a")
    async with over(source) as loader:
        scheduler = AdapterScheduler(loader)
        ticket = scheduler.submit(Request("a", 1, 1))
        await asyncio.sleep(0.005)
        closing = asyncio.create_task(scheduler.close())
        await asyncio.sleep(0)
        closing.cancel()
        await fails(asyncio.wait_for(ticket, 5), errors.LoaderClosedError)
        await scheduler.close()
        assert not loader.placement().usage.leases


async def test_a_loader_that_is_closed_first_fails_the_requests(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b")
    source.hold("b")
    async with over(source) as loader:
        scheduler = AdapterScheduler(loader)
        await warm(loader, "a")
        held, cold = scheduler.submit(Request("a", 1, 2)), scheduler.submit(Request("b", 1, 1))
        await step(scheduler)
        await loader.close(timeout=0.01)
        waiting = asyncio.create_task(scheduler.next_batch(MANY, MANY))
        for ticket in (held, cold):
            await fails(asyncio.wait_for(ticket, 5), errors.LoaderClosedError)
        with pytest.raises(errors.LoaderClosedError):
            scheduler.submit(Request("a", 1, 1))
        await scheduler.close()
        await fails(waiting, errors.LoaderClosedError)


async def test_close_waits_for_its_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them takes its time to end."""
    begun, ended = asyncio.Event(), list[bool]()

    @asynccontextmanager
    async def slow(*_: object, **__: object) -> AsyncIterator[None]:
        begun.set()
        try:
            await asyncio.Event().wait()
            yield
        finally:
            await turns()
            ended.append(True)

    async with over(make_source(tmp_path, "a")) as loader:
        monkeypatch.setattr(AdapterLoader, "stream", slow)
        scheduler = AdapterScheduler(loader)
        ticket = scheduler.submit(Request("a", 1, 1))
        await begun.wait()
        await scheduler.close()
        assert ended
        await fails(ticket, errors.LoaderClosedError)


async def test_no_alarm_and_no_subscription_outlives_the_scheduler(tmp_path: Path) -> None:
    """Some requests are cancelled, fail, or are finished before."""
    source, clock = make_source(tmp_path, "stalls", "b", "bad"), VirtualClock()
    source.hold("stalls")
    source.fail("resolve", errors.FetchError("as told"), id="bad")

    async def use(loader: AdapterLoader) -> weakref.ref[AdapterScheduler]:
        async with AdapterScheduler(loader, clock=clock) as scheduler:
            scheduler.submit(Request(None, 1, 2))
            await step(scheduler)
            assert clock.due is None, "it is in time"
            await step(scheduler)
            scheduler.submit(Request(None, 1, 1)).cancel()
            assert clock.due is None
            scheduler.submit(Request("stalls", 1, 1))
            await held(loader, "stalls")
            await fails(scheduler.submit(Request("bad", 1, 1)), errors.FetchError)
            others = [scheduler.submit(Request("b", 1, 1)) for _ in range(2)]
            others[0].cancel()
            await turns()
        return weakref.ref(scheduler)

    async with over(source, max_slots=1, timeout=10_000.0, starvation_age=1000.0) as loader:
        reference = await use(loader)
        assert clock.due is None
        await turns()
        gc.collect()
        assert reference() is None


async def test_it_belongs_to_its_loop(tmp_path: Path) -> None:
    async def elsewhere(scheduler: AdapterScheduler) -> None:
        with pytest.raises(errors.UsageError, match="event loop"):
            scheduler.submit(Request(None, 1, 1))
        with pytest.raises(errors.UsageError, match="event loop"):
            scheduler.complete(None)  # type: ignore[arg-type]
        for work in (scheduler.close(), scheduler.next_batch(1, 1)):
            await fails(work, errors.UsageError, "event loop")

    async with over(make_source(tmp_path)) as loader, AdapterScheduler(loader) as scheduler:
        await asyncio.to_thread(asyncio.run, elsewhere(scheduler))
