"""Loads of adapters that lie elsewhere: first layer first, never half, never twice."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from fault_server import Asked, Client
from remote_world import RemoteWorld, over, stocked

import tiny
from common import until
from lorax_async import FetchError, IntegrityError, UsageError
from lorax_async.adapter import AdapterRef
from lorax_async.io.cache.upkeep import ls

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


def weights_asked(world: RemoteWorld) -> list[Asked]:
    return [asked for asked in world.server.asked if asked.target.endswith(".safetensors")]


async def test_an_adapter_comes_once(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        for _ in range(2):
            async with over(world) as loader, await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, folder)
        size = (folder / "adapter_model.safetensors").stat().st_size
        spans = sorted(asked.span for asked in weights_asked(world) if asked.span)
        assert sum(min(stop, size) - start for start, stop in spans) == size, "each byte once"
        (entry,) = ls(world.cache)
        assert not entry.is_partial


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


async def test_wrong_bytes_of_the_right_length_are_published_nowhere(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache", verify="before_use") as world:
        folder = stocked(world, tmp_path)

        def wrong(asked: Asked, client: Client) -> None:
            data, etag = world.content(asked.target)
            if asked.target.endswith(".safetensors"):
                data = data[:-1] + bytes([data[-1] ^ 1])
            world.answer(asked, client, data, etag)

        async with over(world, verify="before_use") as loader:
            world.server.behave = wrong
            with pytest.raises(IntegrityError, match="sha256 digest that was promised"):
                await loader.load(world.ref("one"))
            assert ls(world.cache) == []
            world.server.behave = world.serve
            async with await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, folder)


async def test_what_nobody_waits_for_ends_and_is_gone_on_with(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        size = (folder / "adapter_model.safetensors").stat().st_size

        def stuck(asked: Asked, client: Client) -> None:
            if asked.span and asked.span[0] > size // 2:
                client.stall()
            world.serve(asked, client)

        async with over(world) as loader:
            world.server.behave = stuck
            loading = asyncio.create_task(loader.load(world.ref("one")))
            await until(lambda: len(weights_asked(world)) > 3)
            await asyncio.sleep(0.1)
            loading.cancel()
            await asyncio.wait([loading])
            await until(lambda: all(entry.is_partial for entry in ls(world.cache)))
            begun = len(weights_asked(world))
            world.server.behave = world.serve
            async with await loader.load(world.ref("one")) as handle:
                tiny.assert_equal_to_file(handle, folder)
            again = weights_asked(world)[begun:]
            first, *later = [asked.span for asked in again if asked.span]
            assert first[0] == 0, "the header is asked for again"
            assert sum(min(stop, size) - start for start, stop in later) < size * 3 // 4


async def test_what_left_the_cache_is_fetched_again(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache", cache_bytes=1_800_000) as world:
        folders = [stocked(world, tmp_path, f"n{n}", n) for n in range(4)]
        async with over(world, device_bytes=1 << 20, max_slots=1) as loader:
            for _ in range(2):
                for n, folder in enumerate(folders):
                    async with await loader.load(world.ref(f"n{n}")) as handle:
                        tiny.assert_equal_to_file(handle, folder)
                    assert world.cache.used() <= world.cache_bytes


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


async def test_what_is_private_is_asked_for_by_everybody(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache", revalidate=60) as world:
        stocked(world, tmp_path)
        world.locator.there["one"].token = "mine"
        version = world.locator.there["one"].version
        ours = AdapterRef("one", "hub", version, "mine")
        async with over(world) as loader:
            (await loader.load(ours)).release()
            for token in (None, "other"):
                with pytest.raises(FetchError, match="token"):
                    await loader.load(AdapterRef("one", "hub", version, token))


async def test_the_cache_serves_what_is_pinned_while_the_source_is_down(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        pinned = AdapterRef("one", "hub", world.locator.there["one"].version)
        moving = world.ref("one")
        async with over(world) as loader:
            (await loader.load(moving)).release()
        world.locator.error = FetchError("it is down")
        async with over(world) as loader:
            async with await loader.load(pinned) as handle:
                tiny.assert_equal_to_file(handle, folder)
            with pytest.raises(FetchError, match="down"):
                await loader.load(moving)
            async with await loader.load("one", source="hub", allow_stale=True) as handle:
                tiny.assert_equal_to_file(handle, folder)
                assert handle.stale
            async with loader.stream("one", source="hub", allow_stale=True) as handle:
                assert handle.stale
            with pytest.raises(UsageError, match="allow_stale itself"):
                await loader.load(moving, allow_stale=True)


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


async def test_offline_nobody_is_asked(tmp_path: Path) -> None:
    with RemoteWorld(tmp_path / "cache") as world:
        folder = stocked(world, tmp_path)
        async with over(world) as loader:
            (await loader.load(world.ref("one"))).release()
    with RemoteWorld(tmp_path / "cache", offline=True) as away:

        async def offline() -> None:
            async with over(away) as loader:
                async with await loader.load(away.ref("one")) as handle:
                    tiny.assert_equal_to_file(handle, folder)
                with pytest.raises(FetchError, match="offline"):
                    await loader.load(away.ref("other"))

        await offline()
        assert not away.locator.located
