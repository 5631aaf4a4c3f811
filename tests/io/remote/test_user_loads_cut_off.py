"""Loads from nginx that are cut off: by a server that goes, by who replaces files, by who cancels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from nginx_folders import folder_of, of_weights, put
from slow_proxy import SlowProxy
from user_loads import CONNECTIONS, at, has, loader, missing_of, size_of, stored_in, until, written

import servers
from lorax_async import AdapterLoader, FetchError, IntegrityError
from lorax_async.adapter import AdapterRef
from lorax_async.core.chunk_map import CHUNK_BYTES
from servers import Nginx

pytestmark = [
    pytest.mark.needs("nginx"),
    pytest.mark.usefixtures("nothing_left", "no_socket_left"),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with servers.nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that differ in every tensor."""
    return [written(tmp_path_factory.mktemp("saved") / str(n), n, rank=64) for n in range(2)]


@pytest.fixture
def place(nginx: Nginx, adapters: list[Path], request: pytest.FixtureRequest) -> str:
    """Of this test alone: a folder of nginx with the first of them."""
    name = folder_of(request.node.name)
    put(nginx, name, adapters[0])
    return name


def test_while_the_server_is_down(
    nginx: Nginx, adapters: list[Path], place: str, tmp_path: Path
) -> None:
    """What is pinned comes from the cache, and only for who was let have it."""

    async def body(link: SlowProxy) -> None:
        folder = f"http://127.0.0.1:{link.port}"
        refs = [
            AdapterRef(f"{folder}/{place}/"),
            AdapterRef(f"{folder}/untagged/{place}/"),
            AdapterRef(f"{folder}/private/{place}/", token="the-token"),
        ]
        allow = (at(f"127.0.0.1:{link.port}"),)
        async with loader(tmp_path, allow=allow) as there:
            versions = [await has(there, ref, adapters[0]) for ref in refs]
        link.close()
        async with loader(tmp_path, allow=allow) as there:
            pinned = [replace(ref, revision=v) for ref, v in zip(refs, versions, strict=True)]
            for ref in pinned:
                await has(there, ref, adapters[0])
            for other in (refs[0], replace(pinned[2], token=None)):
                with pytest.raises(FetchError, match="ECONNREFUSED") as caught:
                    await there.load(other)
                assert caught.value.retryable

    with SlowProxy(nginx.first) as link:
        asyncio.run(body(link))


@pytest.mark.parametrize("way", ["", "untagged/"])
async def test_replaced_on_the_way(
    nginx: Nginx, adapters: list[Path], place: str, way: str, tmp_path: Path
) -> None:
    """By its ETag, or else by its date. Nothing of it is kept, and the next load is the new one."""
    with SlowProxy(nginx.first) as link:
        id = f"http://127.0.0.1:{link.port}/{way}{place}/"
        async with loader(tmp_path, allow=(at(f"127.0.0.1:{link.port}"),), revalidate=0) as there:
            link.stop_after(100_000)  # of the first answer; what comes next is asked for later
            loading = asyncio.create_task(there.load(id))
            await until(lambda: link.stopped)
            put(nginx, place, adapters[1])
            link.go_on()
            with pytest.raises(IntegrityError, match="changed while it was read"):
                await loading
            await until(lambda: stored_in(tmp_path) == (0, 0))
            await has(there, id, adapters[1])


@pytest.mark.parametrize("again", ["the same loader", "another loader"])
async def test_what_was_cancelled_half_way_is_gone_on_with(
    nginx: Nginx, place: str, again: str, tmp_path: Path
) -> None:
    """What is missing comes, and one chunk more for each connection at most, counted by nginx."""
    large = written(tmp_path / "large")
    put(nginx, place, large)
    size = size_of(large)

    async def cancelled(there: AdapterLoader, id: str, link: SlowProxy) -> None:
        link.stop_after(size // 2)
        loading = asyncio.create_task(there.load(id))
        await until(lambda: link.stopped and missing_of(tmp_path, size) < size)
        loading.cancel()
        await asyncio.wait([loading])
        assert loading.cancelled()
        await until(lambda: stored_in(tmp_path) == (0, 1))

    async def resumed(there: AdapterLoader, id: str, link: SlowProxy) -> tuple[int, int]:
        """How much was missing, and what has come then."""
        link.hang_up()
        await until(lambda: not nginx.connections())
        link.go_on()
        missing, begun = missing_of(tmp_path, size), len(of_weights(nginx, place))
        await has(there, id, large)
        return missing, sum(of_weights(nginx, place)[begun:])

    async def body(link: SlowProxy) -> tuple[int, int]:
        id = f"http://127.0.0.1:{link.port}/{place}/"
        allow = (at(f"127.0.0.1:{link.port}"),)
        async with loader(tmp_path, allow=allow, connections=CONNECTIONS) as there:
            await cancelled(there, id, link)
            if again == "the same loader":
                return await resumed(there, id, link)
        async with loader(tmp_path, allow=allow, connections=CONNECTIONS) as there:
            return await resumed(there, id, link)

    with SlowProxy(nginx.first) as link:
        missing, came = await body(link)
    assert missing >= size // 2
    assert came <= missing + CONNECTIONS * CHUNK_BYTES
    assert stored_in(tmp_path) == (1, 0)
