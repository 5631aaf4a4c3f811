"""`loader.load` of folders on rclone's and Python's own servers, which know no ETags."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from user_loads import at, contents, has, loader, stored_in, written

import servers
from lorax_async.adapter import AdapterRef

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def pythons(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.pythons_own(shelf, tmp_path_factory.mktemp("python")) as url:
        yield url


@pytest.fixture(scope="module")
def rclones(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.rclone("http", shelf, tmp_path_factory.mktemp("rclone")) as url:
        yield url


@pytest.fixture(scope="module")
def webdav(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with servers.rclone("webdav", shelf, tmp_path_factory.mktemp("webdav")) as url:
        yield url


@pytest.mark.parametrize(
    ("server", "version"),
    [
        pytest.param("pythons", "weak-", id="python: 200 to ranges, no ETag"),
        pytest.param("rclones", "weak-", marks=pytest.mark.needs("rclone"), id="rclone http"),
        pytest.param("webdav", "", marks=pytest.mark.needs("rclone"), id="rclone webdav"),
    ],
)
async def test_a_folder_and_what_replaces_it(
    request: pytest.FixtureRequest, shelf: Path, server: str, version: str, tmp_path: Path
) -> None:
    """By its date, where nothing else tells that it is another one."""
    url: str = request.getfixturevalue(server)
    old, new = (written(tmp_path / name, n, rank=64) for n, name in enumerate(("old", "new")))
    folder = shelf / f"{server}-{tmp_path.name}"
    folder.mkdir()

    def put(adapter: Path, seconds: int) -> None:
        for name, data in contents(adapter).items():
            place = folder / f"{name}.new"
            place.write_bytes(data)
            os.utime(place, (seconds, seconds))
            place.rename(folder / name)

    allow = (at(url.removeprefix("http://").rstrip("/")),)
    async with loader(tmp_path, allow=allow, revalidate=0) as there:
        put(old, 1_000_000_000)
        id = f"{url}{folder.name}/"
        first = await has(there, id, old)
        assert first.startswith("weak-") is (version == "weak-")
        assert await has(there, id, old) == first
        put(new, 1_000_000_001)
        assert await has(there, id, new) != first
        await has(there, AdapterRef(id, revision=first), old)
    assert stored_in(tmp_path) == (2, 0)
