"""What every `Cache` keeps to where several share it, and where it is damaged.

A test class derives from `CacheSharingConformance`; see `cache_conformance`.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cache_conformance import World
from cache_inputs import (
    KEY,
    NBYTES,
    SCOPE,
    begun,
    content_of,
    is_there,
    keep,
    key,
    put,
    sha256,
    stored,
    weights,
)

from lorax_async.core.cache_names import WEIGHTS_FILE
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io.ports import Demand


class CacheSharingConformance:
    def test_others_wait_and_have_what_was_published(self, world: World) -> None:
        download = begun(world.cache)
        with ThreadPoolExecutor(3) as threads:
            others = [threads.submit(world.cache.begin, KEY, "other", Demand()) for _ in range(3)]
            put(download.file(WEIGHTS_FILE, 10), bytes(10), [(0, 10)])
            time.sleep(0.05)
            assert not any(other.done() for other in others)
            download.publish().close()
            for other in others:
                entry = other.result()
                assert entry.record.name == KEY.name  # type: ignore[union-attr]  # an entry
                entry.close()

    def test_whoever_waits_may_go_on_with_what_was_left(self, world: World) -> None:
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, 10), bytes(10), [(0, 10)])
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(begun, world.cache)
            download.close()
            download = other.result()
        assert download.file(WEIGHTS_FILE, 10).missing() == []
        download.publish().close()

    def test_waiting_can_be_cancelled(self, world: World) -> None:
        download, demand = begun(world.cache), Demand()
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(world.cache.begin, KEY, SCOPE, demand)
            time.sleep(0.03)
            assert not other.done()
            demand.end()
            with pytest.raises(FetchError, match="cancelled"):
                other.result()
        download.close()

    def test_keys_do_not_wait_for_each_other(self, world: World) -> None:
        downloads = [begun(world.cache, key(number)) for number in range(5)]
        for number, download in enumerate(downloads):
            put(download.file(WEIGHTS_FILE, 1), bytes([number]), [(0, 1)])
            download.publish().close()
        for number in range(5):
            entry = world.cache.open(key(number))
            assert entry is not None
            assert content_of(entry) == bytes([number])
            entry.close()

    def test_an_entry_knows_who_was_granted_it(self, world: World) -> None:
        entry = stored(world.cache, KEY, b"abc")
        assert entry.granted("other") is None
        entry.grant("other")
        for scope in (SCOPE, "other"):
            age = entry.granted(scope)
            assert age is not None
            assert 0 <= age < 60
        for scope in ("", "somebod", "../record.json"):
            assert entry.granted(scope) is None
        entry.close()

    @pytest.mark.parametrize("check", [False, True])
    @pytest.mark.parametrize("change", [1, -1])
    def test_an_entry_of_another_size_is_dropped(
        self, world: World, check: bool, change: int
    ) -> None:
        keep(world.cache, KEY, bytes(10))
        world.alter(KEY, WEIGHTS_FILE, bytes(10 + change))
        assert world.cache.open(KEY, check=check) is None
        keep(world.cache, KEY, b"x" * 10)
        assert is_there(world.cache, KEY)

    def test_altered_bytes_are_noticed_where_it_is_asked(self, world: World) -> None:
        keep(world.cache, KEY, bytes(NBYTES))
        entry = world.cache.open(KEY, check=True)
        assert entry is not None
        entry.close()
        world.alter(KEY, WEIGHTS_FILE, bytes(NBYTES - 1) + b"\1")
        assert world.cache.open(KEY, check=True) is None
        assert not is_there(world.cache, KEY)

    def test_an_entry_that_is_condemned_is_gone_at_once(self, world: World) -> None:
        entry = stored(world.cache, KEY, b"abc")
        world.cache.condemn(KEY)
        world.cache.condemn(KEY)
        assert not is_there(world.cache, KEY)
        entry.close()
        keep(world.cache, KEY, b"def")
        assert is_there(world.cache, KEY)

    @pytest.mark.parametrize("promised", [False, True])
    def test_two_downloads_of_one_version_must_have_the_same_bytes(
        self, world: World, promised: bool
    ) -> None:
        """The second one is refused, and so what it has read is never taken for the first's."""
        downloads = [begun(world.cache)]
        for _ in range(2):
            other = world.cache.try_begin(KEY, SCOPE, alone=True)
            assert not isinstance(other, int)
            downloads.append(other)  # type: ignore[arg-type]  # nothing is published yet
        for download, content in zip(downloads, (b"abc", b"abd", b"abc"), strict=True):
            expected = sha256(content) if promised else None
            put(download.file(WEIGHTS_FILE, 3, expected), content, [(0, 3)])
        downloads[0].publish().close()
        with pytest.raises(IntegrityError, match="other bytes of the same version"):
            downloads[1].publish()
        downloads[2].publish().close()
        for download in downloads:
            download.close()
        entry = world.cache.open(KEY)
        assert entry is not None
        assert content_of(entry) == b"abc"
        entry.close()

    def test_what_is_held_is_not_removed(self, world: World) -> None:
        first = stored(world.cache, KEY, b"abc")
        second = world.cache.open(KEY)
        assert second is not None
        first.close()
        assert not world.cache.remove(KEY)
        assert content_of(second) == b"abc"
        second.close()
        assert world.cache.remove(KEY)
        assert not is_there(world.cache, KEY)

    def test_what_is_downloaded_is_not_removed_but_what_was_left_is(self, world: World) -> None:
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, NBYTES), weights(), [(0, NBYTES)])
        assert not world.cache.remove(KEY)
        download.close()
        assert world.cache.remove(KEY)
        download = begun(world.cache)
        assert download.file(WEIGHTS_FILE, NBYTES).missing() == [(0, NBYTES)]
        download.close()
