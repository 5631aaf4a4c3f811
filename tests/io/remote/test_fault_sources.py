"""Sources that cannot be asked: what is pinned, what moves, and what may be old."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fault_world import FaultyWorld, assert_at_rest, at, loads_right, over
from faults import silent, status
from fetching import engine
from remote_world import PATIENT

import tiny
from common import until
from lorax_async import AccessDeniedError, AdapterHandle, AdapterLoader, FetchError
from lorax_async.adapter import AdapterRef
from lorax_async.io.cache.upkeep import ls

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

DOWN = FetchError("it is down", retry_after=7.0)


async def of_ref(loader: AdapterLoader, ref: AdapterRef, folder: Path) -> AdapterHandle:
    async with await loader.load(ref) as handle:
        tiny.assert_equal_to_file(handle, folder)
    return handle


@pytest.mark.parametrize("again", [False, True], ids=["same loader", "another loader"])
async def test_while_the_origin_is_down(tmp_path: Path, again: bool) -> None:
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad, good = world.stock("bad"), world.stock("good", 1)
        version = world.locator.there["bad"].version
        moving = AdapterRef("bad", source="hub")
        pinned = AdapterRef("bad", source="hub", revision=version)
        stale = AdapterRef("bad", source="hub", allow_stale=True)

        async def down(loader: AdapterLoader) -> None:
            asked = len(world.server.asked)
            world.locator.error = DOWN
            assert (await of_ref(loader, stale, bad)).stale
            assert not (await of_ref(loader, pinned, bad)).stale
            for ref in (moving, AdapterRef("never seen", source="hub", allow_stale=True)):
                with pytest.raises(FetchError, match="it is down") as caught:
                    await loader.load(ref)
                assert (caught.value.stage, caught.value.retryable) == ("resolve", True)
                assert caught.value.retry_after == 7.0
            await assert_at_rest(loader, world)
            assert len(world.server.asked) == asked
            world.locator.error = None
            for ref in (moving, stale):
                assert not (await of_ref(loader, ref, bad)).stale

        async def body() -> None:
            async with over(world) as loader:
                await loads_right(loader, world, bad)
                await loads_right(loader, world, good)
                await assert_at_rest(loader, world)  # both are published by then
                if not again:
                    await down(loader)
            if again:
                async with over(world) as other:
                    await down(other)

        await body()


async def test_who_is_refused_is_given_nothing_old(tmp_path: Path) -> None:
    """A source that answers is not down."""
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad = world.stock("bad")
        world.locator.error = None
        mine = AdapterRef("bad", source="hub", token="mine", allow_stale=True)
        world.locator.there["bad"].token = "mine"

        async def body() -> None:
            async with over(world) as loader:
                await of_ref(loader, mine, bad)
                await assert_at_rest(loader, world)
                world.locator.there["bad"].token = "another"
                with pytest.raises(AccessDeniedError):
                    await loader.load(mine)
                world.locator.error = DOWN
                nobody = AdapterRef("bad", source="hub", allow_stale=True)
                with pytest.raises(FetchError, match="down"):
                    await loader.load(nobody)
                await assert_at_rest(loader, world)

        await body()


async def test_half_of_it_is_not_served(tmp_path: Path) -> None:
    """The origin goes down in the midst of a download: a partial is no version to fall back to."""
    with FaultyWorld(tmp_path / "cache", tmp_path) as world:
        bad = world.stock("bad")
        world.faults["bad"] = at("body", status("503 No"))
        version = world.locator.there["bad"].version
        old = AdapterRef("bad", source="hub", allow_stale=True)
        pinned = AdapterRef("bad", source="hub", revision=version, allow_stale=True)

        async def body() -> None:
            async with over(world) as loader:
                with pytest.raises(FetchError, match="503"):
                    await loader.load(world.ref("bad"))
                assert [listed.is_partial for listed in ls(world.cache)] == [True]
                world.locator.error = DOWN
                for ref in (old, pinned):
                    with pytest.raises(FetchError, match="down"):
                        await loader.load(ref)
                world.locator.error = None
                world.faults.clear()
                await of_ref(loader, pinned, bad)
                await assert_at_rest(loader, world)

        await body()


async def test_a_source_that_nobody_listens_at(tmp_path: Path) -> None:
    """The connection is refused, or nothing at all comes of it: others load meanwhile."""
    http = engine(4, timeouts=PATIENT)
    with FaultyWorld(tmp_path / "cache", tmp_path, http=http) as world:
        good = world.stock("good", 1)
        for name in ("refused", "silent"):
            world.stock(name)
        world.locator.elsewhere["refused"] = "http://127.0.0.1:1"
        world.faults["silent"] = silent

        async def body() -> None:
            async with over(world) as loader:
                quiet = asyncio.create_task(loader.load(world.ref("silent")))
                await until(lambda: world.asked_of("silent"))
                with pytest.raises(FetchError, match="ECONNREFUSED") as caught:
                    await loader.load(world.ref("refused"))
                assert (caught.value.stage, caught.value.retryable) == ("fetch", True)
                await loads_right(loader, world, good)
                quiet.cancel()
                await asyncio.wait([quiet])
                await assert_at_rest(loader, world)
                assert len(ls(world.cache)) == 1

        await body()
