"""`loader.load` of folders that nginx serves: by ranges and without, moved, private, replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_server import until as wait_until
from nginx_folders import first, folder_of, lines, of_weights, put, second
from slow_proxy import SlowProxy
from user_loads import (
    CONNECTIONS,
    at,
    has,
    loader,
    secretless,
    size_of,
    stored_in,
    streams,
    version_of,
    written,
)

import servers
import tiny
from lorax_async import (
    AccessDeniedError,
    AdapterNotFoundError,
)
from lorax_async.adapter import AdapterRef
from lorax_async.io.remote.beginning import FIRST_BYTES
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


@pytest.mark.parametrize("way", ["", "moved/", "whole/", "untagged/"])
async def test_a_folder(
    nginx: Nginx, adapters: list[Path], place: str, way: str, tmp_path: Path
) -> None:
    """By ranges; moved to another port; where ranges are not served (200); without ETags.

    Gzip is on for all of them, and not asked for.
    """
    async with loader(tmp_path, allow=(at(first(nginx)), at(second(nginx)))) as there:
        version = await has(there, nginx.url(f"{way}{place}/"), adapters[0])
        assert version.startswith("weak-") is (way == "untagged/")
    size = size_of(adapters[0])
    wait_until(lambda: sum(of_weights(nginx, place)) >= size)
    if way == "whole/":
        assert not any(" 206 " in line for line in lines(nginx, place))
    else:
        served = [
            line for line in lines(nginx, place) if ".safetensors" in line and "302" not in line
        ]
        assert all(" 206 " in line for line in served)
        # Each byte once; but for those that came slowly behind the header, on a busy machine.
        sent = sum(int(line.rpartition(" ")[2]) for line in served)
        assert size <= sent <= size + (0 if way == "untagged/" else FIRST_BYTES)


async def test_the_first_layer_is_there_before_15_percent(
    nginx: Nginx, place: str, tmp_path: Path
) -> None:
    large = written(tmp_path / "large")
    put(nginx, place, large)
    with SlowProxy(nginx.first) as link:
        allow = (at(f"127.0.0.1:{link.port}"),)
        async with loader(tmp_path, allow=allow, connections=CONNECTIONS) as there:
            await streams(there, f"http://127.0.0.1:{link.port}/{place}/", large, link)


@pytest.mark.parametrize("allowed", ["nowhere else", "another folder", "another port"])
async def test_a_redirect_that_is_not_allowed(
    nginx: Nginx, place: str, allowed: str, tmp_path: Path
) -> None:
    """Nothing is asked of where it leads, and nothing is kept."""
    more = {
        "nowhere else": (),
        "another folder": (at(second(nginx), "others/"),),
        "another port": (at(f"127.0.0.1:{servers.free_port()}"),),
    }
    async with loader(tmp_path, allow=(at(first(nginx)), *more[allowed])) as there:
        with pytest.raises(AccessDeniedError, match="allow it explicitly") as caught:
            await there.load(nginx.url(f"moved/{place}/"), token="s3cret-token")
        assert second(nginx) in secretless(caught.value, "s3cret-token")
    assert not any(f" {nginx.second} " in line for line in lines(nginx, place))


async def test_a_folder_below_which_redirects_may_lead(
    nginx: Nginx, adapters: list[Path], place: str, tmp_path: Path
) -> None:
    allow = (at(first(nginx), f"moved/{place}/"), at(second(nginx), f"{place}/"))
    async with loader(tmp_path, allow=allow) as there:
        await has(there, nginx.url(f"moved/{place}/"), adapters[0])


async def test_a_token_opens_a_folder_and_goes_nowhere_else(
    nginx: Nginx, adapters: list[Path], place: str, tmp_path: Path
) -> None:
    """What one token was let have is not served to others, though it is in the cache."""
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
    wait_until(lambda: sum(" 302 " in line for line in lines(nginx, place)) >= 2)
    for line in lines(nginx, place):
        assert "the-token" not in line or f" {nginx.first} " in line


async def test_nothing_there(nginx: Nginx, tmp_path: Path) -> None:
    async with loader(tmp_path, allow=(at(first(nginx)),)) as there:
        with pytest.raises(AdapterNotFoundError, match="adapter_config"):
            await there.load(nginx.url("nothing/here/"))
    assert stored_in(tmp_path) == (0, 0)


async def test_a_replaced_adapter_is_the_next_load_and_not_the_one_before(
    nginx: Nginx, adapters: list[Path], place: str, tmp_path: Path
) -> None:
    allow = (at(first(nginx)),)
    async with (
        loader(tmp_path, allow=allow, revalidate=0) as there,
        await there.load(nginx.url(place)) as old,
    ):
        await old.verified()  # from then on it is in the cache
        put(nginx, place, adapters[1])
        version = await has(there, nginx.url(place), adapters[1])
        assert version != version_of(old)
        tiny.assert_equal_to_file(old, adapters[0])
        # It cannot be had from the server any more, and is in the cache.
        await has(there, AdapterRef(nginx.url(place), revision=version_of(old)), adapters[0])
    async with loader(tmp_path / "elsewhere", allow=allow) as there:
        with pytest.raises(AdapterNotFoundError, match="is not what the URL leads to now"):
            await there.load(nginx.url(place), revision=version_of(old))
