"""Loads of adapters that lie elsewhere: first layer first, never half, never twice, for whom it is."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fault_server import Asked, Client
from hub_stand_in import HubStandIn
from remote_world import RANK, RemoteWorld, over, stocked
from safetensors.torch import load, save
from user_loads import at, contents

import tiny
from common import until
from lorax_async.cache.maintenance import ls, rm
from lorax_async.config import Limits, LoaderConfig
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    IntegrityError,
    LoaderClosedError,
    UsageError,
)
from lorax_async.handle import AdapterHandle
from lorax_async.ids.allow import Allow
from lorax_async.loader import AdapterLoader
from lorax_async.remote.base import AnotherVersionError
from lorax_async.remote.metadata import FIRST_BYTES
from lorax_async.types import AdapterId, AdapterRef, Merge
from merges import assert_halves

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left", "hub_client")


def weights_asked(world: RemoteWorld) -> list[Asked]:
    return [asked for asked in world.server.asked if asked.target.endswith(".safetensors")]


async def test_the_first_layer_does_not_wait_for_the_last(tmp_path: Path) -> None:
    go_on = threading.Event()
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        size = (folder / "adapter_model.safetensors").stat().st_size

        def late(asked: Asked, client: Client) -> None:
            if asked.span and asked.span[0] > size // 2:
                assert go_on.wait(20)
            world.serve(asked, client)

        world.server.behave = late
        async with over(world) as loader, loader.stream(world.ref("one")) as handle:
            await handle.layer_ready(0)
            assert not handle.is_ready(3)
            go_on.set()
            await handle.layer_ready(3)
            tiny.assert_equal_to_file(handle, folder)


async def test_two_processes_download_once(tmp_path: Path) -> None:
    """Two sources over one folder, as two processes have them."""
    with RemoteWorld(tmp_path / "cache") as one, RemoteWorld(tmp_path / "cache") as two:
        folder = stocked(one, tmp_path)
        two.locator.there = one.locator.there

        async def loaded(world: RemoteWorld) -> None:
            async with over(world) as loader, await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, folder)

        await asyncio.gather(loaded(one), loaded(two))
        assert not (weights_asked(one) and weights_asked(two))


async def test_an_answer_counts_for_a_while(tmp_path: Path) -> None:
    now = [0.0]
    with RemoteWorld(tmp_path / "cache", revalidate=60, clock=lambda: now[0]) as world:
        stocked(world, tmp_path)
        async with over(world) as loader:
            for _ in range(3):
                (await loader.load(world.ref("one"))).release()
            assert world.locator.located == 1
            now[0] = 61.0
            stocked(world, tmp_path, seed=7)
            async with await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, tmp_path / "one")
            assert world.locator.located == 2


async def acquired_at_once(loader: AdapterLoader, adapter: AdapterId) -> bool:
    """After a load."""
    async with await loader.load(adapter):
        lease = loader.try_acquire(adapter)
    if lease is not None:
        lease.release()
    return lease is not None


async def test_a_digest_is_its_callers_own(tmp_path: Path) -> None:
    """Whoever gave a false one is refused; who asked before him, and is known still, is not."""
    with RemoteWorld(tmp_path / "cache", revalidate=60) as world:
        folder = stocked(world, tmp_path)
        world.locator.promises = False
        plain = world.ref("one")
        async with over(world) as loader:
            await world.source.resolve(plain)
            with pytest.raises(IntegrityError, match="sha256 digest that was promised"):
                await loader.load(replace(plain, digest="0" * 64))
            async with await loader.load(plain) as handle:
                assert (await handle.verified()).kind == "transport"
                tiny.assert_equal_to_file(handle, folder)


async def test_a_public_adapter_is_for_every_token(world: RemoteWorld, tmp_path: Path) -> None:
    folder = stocked(world, tmp_path)
    pinned = replace(world.ref("one"), revision=world.locator.there["one"].version)
    async with over(world) as loader:
        (await loader.load(pinned)).release()
    world.locator.error = FetchError("it is down")
    theirs = replace(pinned, token="mine")
    async with over(world) as loader, await loader.load(theirs) as handle:
        tiny.assert_equal_to_file(handle, folder)


async def test_a_lease_at_once_needs_a_recent_answer(world: RemoteWorld, tmp_path: Path) -> None:
    """A lease without asking is for as long as a load asks nobody; then the source judges."""
    stocked(world, tmp_path)
    stored = world.locator.there["one"]
    stored.token = "mine"
    mine = replace(world.ref("one"), token="mine")
    stocked(world, tmp_path, "two", 1)
    doubled = Limits(max_rank=2 * RANK)
    merge = Merge("linear", [mine, world.ref("two")], [1, 1])
    async with over(world, revalidate=60, limits=doubled) as loader:
        kept = await loader.load(mine)
        at_once = loader.try_acquire(mine)
        assert at_once is not None
        at_once.release()
        assert loader.try_acquire(replace(mine, token="other")) is None
        by_key = loader.try_acquire(kept.key)
        assert by_key is not None
        by_key.release()
        kept.release()
        assert await acquired_at_once(loader, merge)
    async with over(world, revalidate=0, limits=doubled) as loader:
        kept = await loader.load(mine)
        assert loader.try_acquire(mine) is None
        assert not await acquired_at_once(loader, merge)
        stored.token = "another"
        with pytest.raises(AccessDeniedError):
            await loader.load(mine)
        kept.release()


async def test_a_response_without_length(world: RemoteWorld, tmp_path: Path) -> None:
    """All in one response, without ranges: the size is the locator's word, or nobody's."""
    folder = stocked(world, tmp_path)
    stocked(world, tmp_path, "two")

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


async def test_a_pinned_version_that_was_replaced(world: RemoteWorld, tmp_path: Path) -> None:
    """Who was let have it, and may still ask, has it from the cache; nobody else has."""
    folder = stocked(world, tmp_path)
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


def one_slot(world: RemoteWorld, device: str) -> AdapterLoader:
    config = LoaderConfig(
        device=device, device_bytes=1 << 20, max_slots=1, io_threads=2, timeout=20
    )
    return AdapterLoader(tiny.layout(), config, source=world.source)


async def leave(world: RemoteWorld, loader: AdapterLoader, name: str) -> None:
    """It is loaded, and then neither on the device nor on the disk; the loader knows it still."""
    (await loader.load(world.ref(name))).release()
    (await loader.load(world.ref("another"))).release()
    await until(lambda: all(rm(world.cache, entry.name) for entry in ls(world.cache)))


def two_stocked(world: RemoteWorld, folder: Path) -> Path:
    for seed, name in enumerate(("one", "another")):
        world.put(name, *tiny.files(tiny.write(folder / name, seed)))
    return folder / "one"


async def all_of(handle: AdapterHandle) -> None:
    for layer in range(tiny.LAYERS):
        await handle.layer_ready(layer)


@pytest.mark.slow
async def test_parts_of_a_merge_are_fetched_again(tmp_path: Path) -> None:
    """All of them, for no tensor comes with the first bytes."""
    note = {"note": "long" * FIRST_BYTES}
    with RemoteWorld(tmp_path / "cache") as world:
        for seed, name in enumerate("abc"):
            config, content = tiny.files(tiny.write(tmp_path / name, seed))
            world.put(name, config, save(load(content), note))
        refs = [world.ref(name) for name in "ab"]
        merge = Merge("linear", refs, [0.5, -2])
        async with one_slot(world, "cpu") as loader:
            (await loader.load(merge)).release()
            (await loader.load(world.ref("c"))).release()
            await until(lambda: all(rm(world.cache, entry.name) for entry in ls(world.cache)))
            async with await loader.load(merge) as handle:
                assert_halves(handle, tmp_path)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[RemoteWorld]:
    with RemoteWorld(tmp_path / "cache") as world:
        yield world


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    """It has org/one, of which `main` and `tag` are the same."""
    folder = tiny.write(tmp_path / "one")
    with HubStandIn() as hub:
        commit = hub.put("org/one", contents(folder))
        hub.repos["org/one"].refs["tag"] = commit
        yield hub


def from_hub(hub: HubStandIn, tmp_path: Path, **settings: Any) -> AdapterLoader:
    allow = (Allow("hub"), at(hub.store_netloc))
    config = LoaderConfig(
        device_bytes=1 << 20,
        io_threads=2,
        timeout=20,
        allow=allow,
        cache_dir=tmp_path / "cache",
        hub_cache_dir=tmp_path / "hub",
        hub_endpoint=hub.endpoint,
        **settings,
    )
    return AdapterLoader(tiny.layout(), config)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_what_was_evicted_is_fetched_again(
    world: RemoteWorld, tmp_path: Path, device: str
) -> None:
    """Nobody is told; and also for a caller who streams it."""
    folder = two_stocked(world, tmp_path)
    async with one_slot(world, device) as loader:
        await leave(world, loader, "one")
        async with await loader.load(world.ref("one")) as handle:
            tiny.assert_equal_to_file(handle, folder)
        for _ in range(5):
            await leave(world, loader, "one")
            async with loader.stream(world.ref("one")) as handle:
                await all_of(handle)
                tiny.assert_equal_to_file(handle, folder)
            async with loader.stream(world.ref("one")) as handle:
                assert handle.resident


async def test_first_loads_at_once_share_one_cache_and_its_connections(tmp_path: Path) -> None:
    """What all adapters from elsewhere share is made by whichever comes first, and once."""
    with HubStandIn() as hub:
        for n in range(8):
            hub.put(f"org/{n}", contents(tiny.write(tmp_path / str(n), seed=n)))

        async def loads(loader: AdapterLoader, n: int) -> None:
            async with await loader.load(f"org/{n}") as handle:
                tiny.assert_equal_to_file(handle, tmp_path / str(n))

        for _ in range(3):
            async with from_hub(hub, tmp_path, max_slots=8) as loader:
                await asyncio.gather(*(loads(loader, n) for n in range(8)))
            with pytest.raises(LoaderClosedError):
                await loader.load("org/0")


async def test_stale_adapters_while_the_source_is_down(world: RemoteWorld, tmp_path: Path) -> None:
    """Loaded or streamed, and by the ref or by the call, not by both."""
    folder = stocked(world, tmp_path)
    async with over(world) as loader:
        (await loader.load(world.ref("one"))).release()
    world.locator.error = FetchError("it is down")
    async with over(world) as loader:
        async with await loader.load("one", source="hub", allow_stale=True) as handle:
            tiny.assert_equal_to_file(handle, folder)
            assert handle.stale
        async with loader.stream("one", source="hub", allow_stale=True) as handle:
            assert handle.stale
        with pytest.raises(FetchError, match="down"):
            await loader.load(world.ref("one"))
        with pytest.raises(UsageError, match="allow_stale itself"):
            await loader.load(world.ref("one"), allow_stale=True)


async def test_a_replaced_cache_folder_must_be_private(hub: HubStandIn, tmp_path: Path) -> None:
    hub.put("org/two", contents(tiny.write(tmp_path / "two", seed=2)))
    async with from_hub(hub, tmp_path) as loader:
        async with await loader.load("org/one") as handle:
            await handle.verified()
        shutil.rmtree(tmp_path / "cache")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(0o777)
        with pytest.raises(ConfigError, match="others may write"):
            await loader.load("org/two")
