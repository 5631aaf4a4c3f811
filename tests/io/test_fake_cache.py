"""The cache in memory keeps to the port, and does as it is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cache_conformance import CacheConformance
from cache_inputs import KEY, begun, content_of, put
from cache_room_conformance import CacheRoomConformance, Room, Used
from cache_sharing_conformance import CacheSharingConformance

from lorax_async.core.cache_names import WEIGHTS_FILE, CacheKey, FileRole
from lorax_async.core.policies import PolicyName, policy
from lorax_async.errors import FetchError
from lorax_async.io.cache.ports import Cache
from lorax_async.io.fake_cache import FakeCache


class FakeWorld:
    def __init__(self) -> None:
        self.cache = FakeCache(1 << 30, policy("lru"))

    def alter(self, key: CacheKey, role: FileRole, content: bytes) -> None:
        self.cache.alter(key, role, content)


@pytest.fixture
def world() -> Iterator[FakeWorld]:
    world = FakeWorld()
    yield world
    assert world.cache.open_readers == 0
    assert not world.cache.held.total()


@pytest.fixture
def room() -> Room:
    def made(nbytes: int, name: PolicyName) -> Cache:
        return FakeCache(nbytes, policy(name))

    return made


@pytest.fixture
def used() -> Used:
    def told(cache: Cache) -> int:
        return cache.used()

    return told


class TestConformance(CacheConformance):
    pass


class TestSharing(CacheSharingConformance):
    pass


class TestRoom(CacheRoomConformance):
    pass


def test_writes_fail_to_order(world: FakeWorld) -> None:
    world.cache.fail(FetchError("no"), times=2)
    download = begun(world.cache)
    file = download.file(WEIGHTS_FILE, 3)
    for _ in range(2):
        with pytest.raises(FetchError, match="no"):
            put(file, b"abc", [(0, 3)])
    assert file.missing() == [(0, 3)]
    put(file, b"abc", [(0, 3)])
    entry = download.publish()
    assert content_of(entry) == b"abc"
    entry.close()
    assert world.cache.remove(KEY)
