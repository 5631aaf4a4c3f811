"""`loader.load` of folders that nginx serves: by ranges and without, moved, private, replaced."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fault_server import until as wait_until
from slow_proxy import SlowProxy
from user_loads import (
    at,
    contents,
    has,
    loader,
    missing_of,
    secretless,
    size_of,
    stored_in,
    streams,
    until,
    version_of,
    written,
)

import servers
import tiny
from common import Run
from lorax_async import (
    AccessDeniedError,
    AdapterLoader,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
)
from lorax_async.adapter import AdapterRef
from lorax_async.core.chunk_map import CHUNK_BYTES
from servers import Nginx

pytestmark = [
    pytest.mark.needs("nginx"),
    pytest.mark.usefixtures("nothing_left", "no_socket_left"),
]

CONNECTIONS = 8


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with servers.nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that differ in every tensor."""
    return [written(tmp_path_factory.mktemp("saved") / str(n), n) for n in range(2)]


@pytest.fixture
def place(nginx: Nginx, adapters: list[Path], request: pytest.FixtureRequest) -> str:
    """Of this test alone: a folder of nginx with the first of them."""
    name = re.sub(r"\W+", "-", request.node.name)
    put(nginx, name, adapters[0])
    return name


def put(nginx: Nginx, name: str, adapter: Path) -> None:
    for file, data in contents(adapter).items():
        nginx.put(f"{name}/{file}", data)


def first(nginx: Nginx) -> str:
    return f"127.0.0.1:{nginx.first}"


def second(nginx: Nginx) -> str:
    return f"127.0.0.1:{nginx.second}"


def lines(nginx: Nginx, name: str) -> list[str]:
    """What was asked of one folder."""
    return [line for line in nginx.requests() if f"/{name}/" in line]


def of_weights(nginx: Nginx, name: str) -> list[int]:
    """How many bytes of the weights went out, by request."""
    asked = [line for line in lines(nginx, name) if ".safetensors" in line]
    return [int(line.rpartition(" ")[2]) for line in asked]


@pytest.mark.parametrize("way", ["", "moved/", "whole/", "untagged/"])
def test_a_folder(
    run: Run, nginx: Nginx, adapters: list[Path], place: str, way: str, tmp_path: Path
) -> None:
    """By ranges; moved to another port; where ranges are not served (200); without ETags.

    Gzip is on for all of them, and not asked for.
    """

    async def body() -> None:
        async with loader(tmp_path, allow=(at(first(nginx)), at(second(nginx)))) as there:
            version = await has(there, nginx.url(f"{way}{place}/"), adapters[0])
            assert version.startswith("weak-") is (way == "untagged/")

    run(body())
    size = size_of(adapters[0])
    wait_until(lambda: sum(of_weights(nginx, place)) >= size)
    if way == "whole/":
        assert not any(" 206 " in line for line in lines(nginx, place))
    else:
        served = [
            line for line in lines(nginx, place) if ".safetensors" in line and "302" not in line
        ]
        assert all(" 206 " in line for line in served)
        assert sum(int(line.rpartition(" ")[2]) for line in served) == size, "each byte once"


def test_the_first_layer_is_there_before_15_percent(
    run: Run, nginx: Nginx, adapters: list[Path], place: str, tmp_path: Path
) -> None:
    async def body(link: SlowProxy) -> None:
        async with loader(tmp_path, allow=(at(f"127.0.0.1:{link.port}"),)) as there:
            await streams(there, f"http://127.0.0.1:{link.port}/{place}/", adapters[0], link)

    with SlowProxy(nginx.first) as link:
        run(body(link))


@pytest.mark.parametrize("allowed", ["nowhere else", "another folder", "another port"])
def test_a_redirect_that_is_not_allowed(
    run: Run, nginx: Nginx, place: str, allowed: str, tmp_path: Path
) -> None:
    """Nothing is asked of where it leads, and nothing is kept."""
    more = {
        "nowhere else": (),
        "another folder": (at(second(nginx), "others/"),),
        "another port": (at(f"127.0.0.1:{servers.free_port()}"),),
    }

    async def body() -> None:
        async with loader(tmp_path, allow=(at(first(nginx)), *more[allowed])) as there:
            with pytest.raises(AccessDeniedError, match="allow it explicitly") as caught:
                await there.load(nginx.url(f"moved/{place}/"), token="s3cret-token")
            assert second(nginx) in secretless(caught.value, "s3cret-token")

    run(body())
    assert not any(f" {nginx.second} " in line for line in lines(nginx, place))


def test_a_folder_below_which_redirects_may_lead(
    run: Run, nginx: Nginx, adapters: list[Path], place: str, tmp_path: Path
) -> None:
    async def body() -> None:
        allow = (at(first(nginx), f"moved/{place}/"), at(second(nginx), f"{place}/"))
        async with loader(tmp_path, allow=allow) as there:
            await has(there, nginx.url(f"moved/{place}/"), adapters[0])

    run(body())


def test_a_token_opens_a_folder_and_goes_nowhere_else(
    run: Run, nginx: Nginx, adapters: list[Path], place: str, tmp_path: Path
) -> None:
    """What one token was let have is not served to others, though it is in the cache."""

    async def body() -> None:
        allow = (at(first(nginx)), at(second(nginx)))
        async with loader(tmp_path, allow=allow) as there:
            private = nginx.url(f"private/{place}/")
            for _ in range(2):
                for wrong in (None, "an0ther-token"):
                    with pytest.raises(AccessDeniedError, match="401") as caught:
                        await there.load(private, token=wrong)
                    secretless(caught.value, "an0ther-token", "the-token")
                await has(there, AdapterRef(private, token="the-token"), adapters[0])
            moved = AdapterRef(nginx.url(f"moved/{place}/"), token="the-token")
            await has(there, moved, adapters[0])

    run(body())
    wait_until(lambda: sum(" 302 " in line for line in lines(nginx, place)) >= 2)
    for line in lines(nginx, place):
        assert "the-token" not in line or f" {nginx.first} " in line


def test_nothing_there(run: Run, nginx: Nginx, tmp_path: Path) -> None:
    async def body() -> None:
        async with loader(tmp_path, allow=(at(first(nginx)),)) as there:
            with pytest.raises(AdapterNotFoundError, match="adapter_config"):
                await there.load(nginx.url("nothing/here/"))

    run(body())
    assert stored_in(tmp_path) == (0, 0)


def test_a_replaced_adapter_is_the_next_load_and_not_the_one_before(
    run: Run, nginx: Nginx, adapters: list[Path], place: str, tmp_path: Path
) -> None:
    async def body() -> None:
        settings: dict[str, object] = {"allow": (at(first(nginx)),), "revalidate": 0}
        async with loader(tmp_path, **settings) as there, await there.load(nginx.url(place)) as old:
            put(nginx, place, adapters[1])
            version = await has(there, nginx.url(place), adapters[1])
            assert version != version_of(old)
            tiny.assert_equal_to_file(old, adapters[0])
            # It cannot be had from the server any more, and is in the cache.
            await has(there, AdapterRef(nginx.url(place), revision=version_of(old)), adapters[0])
        async with loader(tmp_path / "elsewhere", **settings) as there:
            with pytest.raises(AdapterNotFoundError, match="is not what the URL leads to now"):
                await there.load(nginx.url(place), revision=version_of(old))

    run(body())


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
def test_replaced_on_the_way(
    run: Run, nginx: Nginx, adapters: list[Path], place: str, way: str, tmp_path: Path
) -> None:
    """By its ETag, or else by its date. Nothing of it is kept, and the next load is the new one."""

    async def body(link: SlowProxy) -> None:
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

    with SlowProxy(nginx.first) as link:
        run(body(link))


def connected(port: int) -> bool:
    """Whether a server has a connection that is open at its end: then requests may go unlogged."""
    ends = [line.split()[1:4] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(own.endswith(f":{port:04X}") and state in {"01", "08"} for own, _, state in ends)


@pytest.mark.parametrize("again", ["the same loader", "another loader"])
def test_what_was_cancelled_half_way_is_gone_on_with(
    run: Run, nginx: Nginx, adapters: list[Path], place: str, again: str, tmp_path: Path
) -> None:
    """What is missing comes, and one chunk more for each connection at most, counted by nginx."""
    size = size_of(adapters[0])

    async def cancelled(there: AdapterLoader, id: str, link: SlowProxy) -> None:
        link.stop_after(size // 2)
        loading = asyncio.create_task(there.load(id))
        await until(lambda: link.stopped)
        loading.cancel()
        await asyncio.wait([loading])
        assert loading.cancelled()
        await until(lambda: stored_in(tmp_path) == (0, 1))

    async def resumed(there: AdapterLoader, id: str, link: SlowProxy) -> tuple[int, int]:
        """How much was missing, and what has come then."""
        link.hang_up()
        await until(lambda: not connected(nginx.first))
        link.go_on()
        missing, begun = missing_of(tmp_path, size), len(of_weights(nginx, place))
        await has(there, id, adapters[0])
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
        missing, came = run(body(link))
    assert size // 2 <= missing <= size // 2 + 2 * CONNECTIONS * CHUNK_BYTES
    assert came <= missing + CONNECTIONS * CHUNK_BYTES
    assert stored_in(tmp_path) == (1, 0)
