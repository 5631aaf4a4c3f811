"""Each request is answered by what its id means when it begins, however many overlap."""

import asyncio
import shutil
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import tiny
from event_loops import until
from scheduler_world import MANY, finish, held, opened, rows, step, turns
from tiny_loaders import fails
from tiny_loaders import loader as tiny_loader
from tiny_sources import make_source, over

from lorax_async import AdapterKey, AdapterRef, AdapterStore, Batch, Request, StoreConfig, Ticket
from lorax_async.errors import AccessDeniedError, AdapterNotFoundError, FetchError, IntegrityError
from lorax_async.testing import FakeSource
from lorax_async.types import RemoteKey

pytestmark = pytest.mark.usefixtures("nothing_left")

ALWAYS: dict[str, Any] = {"revalidate_files": 0, "starvation_age": 1000.0}
"""Each request looks at the files."""

ENDLESS = 1_000_000
"""Tokens of a request that is cancelled when the test has seen it."""


def put_again(source: FakeSource, base: Path, id: str, seed: int) -> AdapterKey:
    """Replace an adapter by one with other bytes; return the new version."""
    return source.put(id, *tiny.files(tiny.write(base / f"{id}-{seed}", seed, rank=4)))


def versions(batch: Batch) -> dict[Ticket, AdapterKey]:
    return {row.ticket: row.handle.key for row in batch.rows if row.handle is not None}


async def next_with(scheduler: Any, *tickets: Ticket) -> Batch:
    """Compute batches until one has all of these; return it, completed."""
    async with asyncio.timeout(10):
        while True:
            batch = await step(scheduler)
            if set(tickets) <= {row.ticket for row in batch.rows}:
                return batch
            await asyncio.sleep(0.001)  # the answers come from threads


async def test_a_replaced_adapter_serves_only_requests_that_began_before(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with opened(source, ALWAYS, ready="a") as (loader, scheduler):
        before = scheduler.submit(Request("a", 1, ENDLESS))
        old = versions(await next_with(scheduler, before))[before]
        new = put_again(source, tmp_path, "a", 7)
        after = [scheduler.submit(Request("a", 1, ENDLESS)) for _ in range(3)]
        batch = await next_with(scheduler, before, *after)
        assert versions(batch) == {before: old} | dict.fromkeys(after, new)
        assert old != new
        last = scheduler.submit(Request("a", 1, 1))
        assert versions(await next_with(scheduler, last))[last] == new
        for ticket in (before, *after):
            ticket.cancel()
        await loader.unload("a")


async def test_requests_for_an_unchanged_adapter_share_its_rows_again(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with opened(source, ALWAYS) as (loader, scheduler):
        tickets = [scheduler.submit(Request("a", 1, ENDLESS))]
        await next_with(scheduler, *tickets)
        for _ in range(5):
            tickets.append(scheduler.submit(Request("a", 1, ENDLESS)))
            batch = await next_with(scheduler, *tickets)
            assert len(batch.plan.segments.slots) == 1, "one segment: one adapter"
        assert loader.statistics().loads == 1
        for ticket in tickets:
            ticket.cancel()


@pytest.mark.parametrize("error", [AdapterNotFoundError("gone"), AccessDeniedError("no")])
async def test_requests_end_with_the_answer_that_their_source_gives_now(
    tmp_path: Path, error: Exception
) -> None:
    source = make_source(tmp_path, "a")
    async with opened(source, ALWAYS) as (_, scheduler):
        before = scheduler.submit(Request("a", 1, 5))
        await next_with(scheduler, before)
        source.fail("resolve", error, id="a", times=2)
        after = [scheduler.submit(Request("a", 1, 5)) for _ in range(2)]
        assert not any(ticket.done for ticket in after)
        for ticket in after:
            await fails(ticket, type(error))
        again = scheduler.submit(Request("a", 1, 1))
        await fails(again, type(error))
        served = scheduler.submit(Request("a", 1, 1))
        await finish(scheduler, before, served)
        assert (await before, await served) == (5, 1)


async def test_a_request_that_asks_leaves_no_trace_when_it_is_cancelled(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with opened(source, ALWAYS) as (_, scheduler):
        before = scheduler.submit(Request("a", 1, 3))
        await next_with(scheduler, before)
        asking = scheduler.submit(Request("a", 1, 3))
        asking.cancel()
        later = scheduler.submit(Request("a", 1, 3))
        await finish(scheduler, before, later)
        closing = scheduler.submit(Request("a", 1, 3))
        del closing  # the scheduler is closed while it asks


async def test_a_resident_adapter_does_not_queue_behind_loads(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b")
    source.hold("b")
    async with opened(source, ALWAYS, ready="a", loads=1) as (loader, scheduler):
        stuck = scheduler.submit(Request("b", 1, 1))
        await held(loader, "b")
        ticket = scheduler.submit(Request("a", 1, 1))
        await finish(scheduler, ticket)
        assert not stuck.done
        source.allow("b")
        await finish(scheduler, stuck)


async def test_a_load_that_waited_for_its_slot_is_of_the_version_meant_last(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a", "b")
    async with opened(source, ALWAYS | {"max_slots": 1}) as (loader, scheduler):
        first = scheduler.submit(Request("b", 1, 2))
        await step(scheduler)
        early = scheduler.submit(Request("a", 1, 1))
        await until(lambda: loader.placement().usage.waiting)
        new = put_again(source, tmp_path, "a", 7)
        late = scheduler.submit(Request("a", 1, 1))
        await finish(scheduler, first)
        batch = await next_with(scheduler, late)
        assert versions(batch)[late] == new
        await finish(scheduler, early)


async def test_a_request_that_lost_its_slot_goes_on_with_its_version(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with opened(source, ALWAYS) as (loader, scheduler):
        begun = scheduler.submit(Request("a", 1, 4))
        old = versions(await next_with(scheduler, begun))[begun]
        source.fail("resolve", AccessDeniedError("no"), id="a", times=MANY)
        await asyncio.wait_for(loader.unload(old), 5)
        batch = await next_with(scheduler, begun)
        assert rows(batch)[0][1] == 1, "it goes on after its first token"
        assert versions(batch)[begun] == old
        await finish(scheduler, begun)
        assert await begun == 4


async def test_a_version_that_is_gone_fails_only_requests_with_tokens_of_it(tmp_path: Path) -> None:
    source = make_source(tmp_path, "a")
    async with opened(source, {"revalidate_files": 1000}) as (loader, scheduler):
        begun = scheduler.submit(Request("a", 1, 4))
        old = versions(await next_with(scheduler, begun))[begun]
        fresh = scheduler.submit(Request("a", 1, 4))
        new = put_again(source, tmp_path, "a", 7)  # the old one cannot be read again
        await asyncio.wait_for(loader.unload(old), 5)
        await fails(begun, IntegrityError, "changed")
        assert versions(await next_with(scheduler, fresh))[fresh] == new
        await finish(scheduler, fresh)
        assert await fresh == 4


def answer_late(source: FakeSource) -> asyncio.Event:
    """Let the source choose its answers at once, and give them when the event is set."""
    resolve, may_answer = source.resolve, asyncio.Event()

    async def late(ref: AdapterRef) -> AdapterKey:
        key = await resolve(ref)
        await may_answer.wait()
        return key

    source.resolve = late  # type: ignore[method-assign]
    return may_answer


@pytest.mark.parametrize("ready", ["a", ""], ids=["resident", "first load"])
async def test_a_request_does_not_get_an_answer_that_was_asked_for_before_it_began(
    tmp_path: Path, ready: str
) -> None:
    """Whether its adapter is resident, or gets its slot while the source is slow to answer."""
    source = make_source(tmp_path, "a")
    async with opened(source, ALWAYS, ready=ready) as (loader, scheduler):
        before = scheduler.submit(Request("a", 1, 1))
        if not ready:
            await until(lambda: loader.placement().usage.leases)
        may_answer = answer_late(source)
        await turns()
        new = put_again(source, tmp_path, "a", 7)
        after = scheduler.submit(Request("a", 1, 1))
        await turns()
        may_answer.set()
        batch = await next_with(scheduler, after)
        assert versions(batch)[after] == new
        before.cancel()


# -- the loader -----------------------------------------------------------------------------------


async def test_a_look_counts_for_the_seconds_set(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1, rank=4)
    async with tiny_loader(revalidate_files=1000) as loader:
        (await loader.load(folder)).release()
        handle = loader.try_acquire(folder)
        assert handle is not None
        handle.release()
        assert loader.current_key(folder) == handle.key
    async with tiny_loader(revalidate_files=0) as loader:
        (await loader.load(folder)).release()
        assert loader.try_acquire(folder) is None
        handle = loader.try_acquire(await loader.resolve(folder))
        assert handle is not None, "a key is a version: there is nothing to look at"
        handle.release()


async def test_a_call_does_not_get_an_answer_that_was_asked_for_before_it_began(
    tmp_path: Path,
) -> None:
    source = make_source(tmp_path, "a")
    async with over(source, revalidate_files=0) as loader:
        may_answer = answer_late(source)
        before = asyncio.create_task(loader.resolve("a"))
        await turns()
        new = put_again(source, tmp_path, "a", 7)
        after = asyncio.create_task(loader.resolve("a"))
        await turns()
        may_answer.set()
        assert new.files == (await after).files != (await before).files


async def test_a_stale_answer_counts_for_callers_that_take_one(tmp_path: Path) -> None:
    """Also where they ask for the same adapter as others, whose source is down."""
    source, since = make_source(tmp_path), monotonic()

    async def resolve(ref: AdapterRef) -> AdapterKey:
        if not ref.allow_stale:
            raise FetchError("down")
        return RemoteKey("a", (), "1", stale=True, answered_at=since)

    source.resolve = resolve  # type: ignore[method-assign]
    async with over(source) as loader:
        lenient = AdapterRef("a", allow_stale=True)
        key = await loader.resolve(lenient)
        assert loader.current_key(lenient) == key
        assert loader.current_key("a") is None
        await fails(loader.resolve("a"), FetchError, "down")


@pytest.mark.parametrize("of", ["store", "loader"])
async def test_an_id_has_the_version_of_its_last_look_as_long_as_that_counts(
    tmp_path: Path, of: str
) -> None:
    folder = tiny.write(tmp_path / "a", 1, rank=4)
    config = StoreConfig(revalidate_files=1000, cache_dir=tmp_path / "cache")
    async with (
        tiny_loader(revalidate_files=1000) if of == "loader" else AdapterStore(config)
    ) as adapters:
        assert adapters.current_key(folder) is None
        key = await adapters.resolve(folder)
        assert adapters.current_key(folder) == key
        assert adapters.current_key(key) == key == await adapters.resolve(key)
        shutil.rmtree(folder)
        assert adapters.current_key(folder) == key, "it looks at no file"
        await fails(adapters.resolve(folder), AdapterNotFoundError)
        assert adapters.current_key(folder) is None
