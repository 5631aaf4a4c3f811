"""Loads of adapters that lie elsewhere: first layer first, never half, never twice, for whom it is."""

import asyncio
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import remote_world
import tiny
from event_loops import until
from fault_server import Asked, Client
from leaks import open_files
from remote_world import RemoteWorld, is_weights, over
from tiny_loaders import fails

from lorax_async import AdapterLoader
from lorax_async.cache.disk_cache import ls, rm
from lorax_async.concurrency import FetchControl
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
)
from lorax_async.remote.base import AnotherVersionError
from lorax_async.remote.readers import FetchReader
from lorax_async.runtime.fetches import FetchTasks
from lorax_async.types import AdapterId, AdapterKey, AdapterRef, RemoteKey

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")
settings, world = remote_world.settings, remote_world.world


async def test_two_processes_download_once(tmp_path: Path) -> None:
    """Two sources over one folder, as two processes have them."""
    with RemoteWorld(tmp_path) as one, RemoteWorld(tmp_path) as two:
        folder = one.stock()
        two.locator.there = one.locator.there

        async def loaded(world: RemoteWorld) -> None:
            async with over(world) as loader, await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, folder)

        await asyncio.gather(loaded(one), loaded(two))
        asked = [any(map(is_weights, world.asked_of("one"))) for world in (one, two)]
        assert sorted(asked) == [False, True]


async def test_an_answer_counts_for_a_while(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path, revalidate=60) as world:
        world.stock()
        async with over(world, revalidate=0) as loader:
            for _ in range(3):
                (await loader.load(world.ref("one"))).release()
            assert world.locator.located == 1
            world.later = 61.0
            world.stock(seed=7)
            async with await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, world.adapters / "one")
            assert world.locator.located == 2


async def test_an_answer_counts_from_the_time_at_which_the_source_gave_it(tmp_path: Path) -> None:
    """Also if a later request gets it from memory, or by a grant that the cache recorded."""
    old, window = 1000.0, 3600.0
    with RemoteWorld(tmp_path, revalidate=window) as world:
        world.stock()
        stored = world.locator.there["one"]
        stored.token = "mine"
        pinned = replace(world.ref("one"), token="mine", revision=stored.version)
        async with over(world, revalidate=window) as loader:
            (await loader.load(pinned)).release()
    grants = [path for path in world.folder.rglob("scope.*") if path.is_file()]
    for path in grants:
        os.utime(path, (time.time() - old,) * 2)
    assert grants
    with RemoteWorld(tmp_path, revalidate=window) as world:
        for _ in range(2):
            key = await world.source.resolve(pinned)
            assert isinstance(key, RemoteKey)
            assert key.answered_at is not None
            assert abs(time.monotonic() - old - key.answered_at) < 100
        async with over(world, revalidate=old / 2) as loader:
            (await loader.load(pinned)).release()
            assert loader.try_acquire(pinned) is None, "its permission was given too long ago"
        assert not world.locator.located


async def test_a_digest_is_its_callers_own(tmp_path: Path) -> None:
    """Others are served. It refutes what is stored, also if the source is not asked for it."""
    with RemoteWorld(tmp_path, revalidate=60) as world:
        folder = world.stock()
        world.locator.promises = False
        plain = world.ref("one")
        async with over(world, revalidate=0) as loader:
            for _ in range(2):
                await fails(loader.load(replace(plain, digest="0" * 64)), IntegrityError, "not 00")
                async with await loader.load(plain) as handle:
                    assert (await handle.verified()).kind == "transport"
                    tiny.assert_equal_to_file(handle, folder)
            requested = nbytes_requested(world)
        async with over(world) as loader:
            await fails(loader.load(replace(plain, digest="0" * 64)), IntegrityError, "not 00")
        assert (world.locator.located, nbytes_requested(world)) == (2, 2 * requested)


def nbytes_requested(world: RemoteWorld) -> int:
    size = len(world.locator.there["one"].weights)
    return sum(min(stop, size) - start for start, stop in world.spans_of("one"))


async def test_a_digest_takes_nothing_from_others_while_it_is_compared(world: RemoteWorld) -> None:
    """A pinned caller is served from the cache, also if the source is down by then."""
    folder = world.stock()
    world.locator.promises = False
    async with over(world) as loader:
        (await loader.load(world.ref("one"))).release()
    wrong = await world.source.resolve(replace(world.ref("one"), digest="0" * 64))
    download = await world.source.open(wrong, FetchControl())
    assert isinstance(download.reader, FetchReader), "it was fetched again"
    world.locator.error = FetchError("it is down")
    pinned = replace(world.ref("one"), revision=world.locator.there["one"].version)
    async with over(world) as loader, await loader.load(pinned) as handle:
        tiny.assert_equal_to_file(handle, folder)
    download.reader.close()


async def test_a_public_adapter_is_for_every_token(world: RemoteWorld) -> None:
    folder = world.stock()
    pinned = replace(world.ref("one"), revision=world.locator.there["one"].version)
    async with over(world) as loader:
        (await loader.load(pinned)).release()
    world.locator.error = FetchError("it is down")
    theirs = replace(pinned, token="mine")
    async with over(world) as loader, await loader.load(theirs) as handle:
        tiny.assert_equal_to_file(handle, folder)


async def test_a_lease_at_once_needs_a_recent_answer(world: RemoteWorld) -> None:
    """A lease without asking is for as long as a load asks nobody; then the source judges."""
    world.stock()
    stored = world.locator.there["one"]
    stored.token = "mine"
    mine = replace(world.ref("one"), token="mine")
    async with over(world, revalidate=60) as loader:
        kept = await loader.load(mine)
        at_once = loader.try_acquire(mine)
        assert at_once is not None
        at_once.release()
        assert loader.try_acquire(replace(mine, token="other")) is None
        by_key = loader.try_acquire(kept.key)
        assert by_key is not None
        by_key.release()
        kept.release()
    async with over(world, revalidate=0) as loader:
        kept = await loader.load(mine)
        assert loader.try_acquire(mine) is None
        stored.token = "another"
        with pytest.raises(AccessDeniedError):
            await loader.load(mine)
        kept.release()


async def test_a_response_without_length(world: RemoteWorld) -> None:
    """All in one response, without ranges: the size is the locator's word, or nobody's."""
    folder = world.stock()
    world.stock("two")

    def streamed(asked: Asked, client: Client) -> None:
        data, etag = world.content(asked.target)
        client.head("200 OK", f"ETag: {etag}", "Transfer-Encoding: chunked")
        client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))

    world.server.behave = streamed
    async with over(world) as loader:
        async with await loader.load(world.ref("one")) as handle:
            tiny.assert_equal_to_file(handle, folder)
        world.locator.promises = False
        with pytest.raises(FetchError, match="does not say how large"):
            await loader.load(world.ref("two"))


async def test_a_pinned_version_that_was_replaced(world: RemoteWorld) -> None:
    """Who was let have it, and may still ask, has it from the cache; nobody else has."""
    folder = world.stock()
    world.locator.there["one"].token = "mine"
    pinned = AdapterRef("one", "hub", world.locator.there["one"].version, "mine")
    async with over(world) as loader:
        (await loader.load(pinned)).release()
    world.locator.error = AnotherVersionError("it has another one by now")
    async with over(world) as loader:
        async with await loader.load(pinned) as handle:
            tiny.assert_equal_to_file(handle, folder)
        for other in (replace(pinned, token="x"), replace(pinned, revision=None)):
            for stale in (False, True):
                with pytest.raises(AdapterNotFoundError, match="another one"):
                    await loader.load(replace(other, allow_stale=stale))


async def test_loads_succeed_after_the_cache_folder_is_removed(world: RemoteWorld) -> None:
    """Downloads in progress fail with a retryable error."""
    folders = {name: world.stock(name, seed) for seed, name in enumerate("abcdef")}
    async with over(world, revalidate=0) as loader:

        async def loads(name: str) -> None:
            async with await loader.load(world.ref(name)) as handle:
                tiny.assert_equal_to_file(handle, folders[name])
            await loader.unload(world.ref(name))

        await asyncio.gather(*map(loads, folders))
        await until(lambda: not any(listed.in_use for listed in ls(world.cache)))
        files = open_files()
        for moment in range(4):
            loading = asyncio.gather(*map(loads, folders), return_exceptions=True)
            await asyncio.sleep(moment / 40)
            shutil.rmtree(world.folder, ignore_errors=True)
            for error in await loading:
                assert error is None or (isinstance(error, AdapterError) and error.retryable)
            await until(lambda: open_files() <= files)  # of what was in progress
            await asyncio.gather(*map(loads, folders))
        await until(lambda: open_files() <= files)


def one_slot(world: RemoteWorld, device: str) -> AdapterLoader:
    return over(world, device=device, device_bytes=1 << 20, max_slots=1)


async def leave(world: RemoteWorld, loader: AdapterLoader, id: AdapterId, other: str) -> None:
    """It is loaded, and then neither on the device nor on the disk; the loader knows it still."""
    for each in (id, world.ref(other)):
        (await loader.load(each)).release()
    await until(lambda: all(rm(world.cache, entry.name) for entry in ls(world.cache)))


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_what_was_evicted_is_fetched_again(world: RemoteWorld, device: str) -> None:
    folder = world.stock(rank=4)
    world.stock("another", 1, rank=4)
    async with one_slot(world, device) as loader:
        await leave(world, loader, world.ref("one"), "another")
        async with await loader.load(world.ref("one")) as handle:
            tiny.assert_equal_to_file(handle, folder)
        for _ in range(5):
            await leave(world, loader, world.ref("one"), "another")
            async with loader.stream(world.ref("one")) as handle:
                for layer in range(tiny.LAYERS):
                    await handle.layer_ready(layer)
                tiny.assert_equal_to_file(handle, folder)
            async with loader.stream(world.ref("one")) as handle:
                assert handle.resident


async def test_a_file_that_is_fetched_again_before_a_stream_looks_for_it(
    world: RemoteWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream's slot has failed by then: only the next one gets the new bytes."""
    require = FetchTasks.require_readable

    async def require_late(files: FetchTasks, key: AdapterKey) -> None:
        await asyncio.sleep(0.1)
        await require(files, key)

    folder = world.stock(rank=4)
    world.stock("another", 1, rank=4)
    async with one_slot(world, "cpu") as loader:
        await leave(world, loader, world.ref("one"), "another")
        monkeypatch.setattr(FetchTasks, "require_readable", require_late)

        async def load() -> None:
            await asyncio.sleep(0.02)
            (await loader.load(world.ref("one"))).release()

        other = asyncio.create_task(load())
        async with loader.stream(world.ref("one")) as handle:
            for layer in range(tiny.LAYERS):
                await handle.layer_ready(layer)
            tiny.assert_equal_to_file(handle, folder)
        await other
