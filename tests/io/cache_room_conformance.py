"""How every `Cache` keeps its budget. A test class derives from `CacheRoomConformance`.

Its module has a fixture `room`, a function that makes a cache of so many bytes and that policy, and
one `used`, which tells how many bytes a cache holds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cache_inputs import CONFIG, begun, content_of, is_there, keep, key, put, stored

from lorax_async.core.cache_names import WEIGHTS_FILE, CacheKey
from lorax_async.core.policies import PolicyName
from lorax_async.errors import CapacityError
from lorax_async.io.cache.ports import Cache

Room = Callable[[int, PolicyName], Cache]
Used = Callable[[Cache], int]

SIZE = 10_000 + len(CONFIG)
"""Of an adapter here."""


def full(room: Room, adapters: int, policy: PolicyName = "lru") -> Cache:
    """A cache of that many adapters, all there: their keys count from 0."""
    cache = room(adapters * SIZE, policy)
    for number in range(adapters):
        keep(cache, key(number), bytes(10_000))
    return cache


def there(cache: Cache, upto: int) -> list[int]:
    """Which are there. The looks are uses."""
    return [number for number in range(upto) if is_there(cache, key(number))]


def use(cache: Cache, *keys: CacheKey) -> None:
    for each in keys:
        assert is_there(cache, each)


class CacheRoomConformance:
    def test_the_budget_counts_every_file(self, room: Room, used: Used) -> None:
        cache = full(room, 2)
        assert used(cache) == 2 * SIZE
        assert cache.remove(key(0))
        assert used(cache) == SIZE

    def test_the_least_recently_used_goes(self, room: Room, used: Used) -> None:
        cache = full(room, 3)
        use(cache, key(0))
        keep(cache, key(3), bytes(10_000))
        assert used(cache) == 3 * SIZE
        assert there(cache, 4) == [0, 2, 3]

    def test_the_policy_is_the_one_that_was_given(self, room: Room) -> None:
        cache = full(room, 3, "lfu")
        use(cache, key(0), key(0), key(1), key(2))
        keep(cache, key(3), bytes(10_000))
        assert there(cache, 4) == [0, 2, 3]

    def test_as_many_go_as_must(self, room: Room, used: Used) -> None:
        cache = full(room, 4)
        keep(cache, key(4), bytes(2 * SIZE - len(CONFIG)))
        assert there(cache, 5) == [2, 3, 4]
        assert used(cache) == 4 * SIZE

    def test_what_is_held_stays(self, room: Room) -> None:
        cache = full(room, 3)
        held = cache.open(key(0))
        assert held is not None
        use(cache, key(1), key(2))
        keep(cache, key(3), bytes(10_000))
        assert content_of(held) == bytes(10_000)
        held.close()
        assert there(cache, 4) == [0, 2, 3]

    def test_what_was_just_published_is_held(self, room: Room) -> None:
        cache = room(SIZE, "lru")
        entry = stored(cache, key(0), bytes(10_000))
        download = begun(cache, key(1))
        with pytest.raises(CapacityError, match=f"10,000 bytes.*{SIZE:,} beside"):
            download.file(WEIGHTS_FILE, 10_000)
        download.close()
        entry.close()
        keep(cache, key(1), bytes(10_000))
        assert there(cache, 2) == [1]

    def test_nothing_goes_for_what_cannot_fit(self, room: Room, used: Used) -> None:
        cache = full(room, 3)
        download = begun(cache, key(3))
        with pytest.raises(CapacityError, match="budget") as raised:
            download.file(WEIGHTS_FILE, 3 * SIZE + 1)
        assert not raised.value.retryable
        assert raised.value.stage == "fetch"
        download.close()
        assert there(cache, 4) == [0, 1, 2]
        assert used(cache) == 3 * SIZE

    def test_beside_what_is_held_it_may_fit_later(self, room: Room) -> None:
        cache = full(room, 3)
        held = [cache.open(key(number)) for number in range(2)]
        download = begun(cache, key(3))
        with pytest.raises(CapacityError, match="in use") as raised:
            download.file(WEIGHTS_FILE, SIZE + 1)
        assert raised.value.retryable
        download.file(WEIGHTS_FILE, SIZE)
        download.close()
        for entry in held:
            assert entry is not None
            entry.close()
        assert there(cache, 4) == [0, 1]

    def test_room_is_there_before_the_bytes(self, room: Room, used: Used) -> None:
        cache = room(SIZE, "lru")
        download = begun(cache, key(0))
        download.file(WEIGHTS_FILE, 10_000)
        assert used(cache) == 10_000
        other = begun(cache, key(1))
        with pytest.raises(CapacityError):
            other.file(WEIGHTS_FILE, 10_000)
        other.close()
        download.close()
        assert used(cache) == 0

    def test_partials_that_nobody_writes_to_go_first(self, room: Room, used: Used) -> None:
        cache = room(3 * SIZE, "lru")
        keep(cache, key(0), bytes(10_000))
        download = begun(cache, key(1))
        put(download.file(WEIGHTS_FILE, 10_000), bytes(10_000), [(0, 10_000)])
        download.close()
        assert used(cache) == SIZE + 10_000
        keep(cache, key(2), bytes(10_000))
        assert used(cache) == 2 * SIZE + 10_000
        keep(cache, key(3), bytes(10_000))
        assert there(cache, 4) == [0, 2, 3]
        assert used(cache) == 3 * SIZE

    def test_a_file_of_unknown_size_takes_room_as_it_grows(self, room: Room, used: Used) -> None:
        """At the end it takes no more than its size; what it needs meanwhile may be more."""
        step = 8 << 20
        cache = room(2 * step, "lru")
        keep(cache, key(0), bytes(10_000))
        download = begun(cache, key(1))
        file = download.file(WEIGHTS_FILE, None)
        put(file, bytes(1_000), [(0, 1_000)])
        assert used(cache) <= 2 * step
        file.ends_at(1_000)
        assert used(cache) == SIZE + 1_000
        download.publish().close()
        assert used(cache) == SIZE + 1_000

    def test_a_file_that_grows_too_large_fails_alone(self, room: Room, used: Used) -> None:
        cache = room(SIZE, "lru")
        download = begun(cache, key(0))
        file = download.file(WEIGHTS_FILE, None)
        with pytest.raises(CapacityError):
            file.write([memoryview(bytes(SIZE + 1))], 0)
        download.close()
        assert used(cache) == 0
        keep(cache, key(1), bytes(10_000))
        assert there(cache, 2) == [1]
