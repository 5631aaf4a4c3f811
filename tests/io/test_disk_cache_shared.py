"""Two caches on one folder, as two processes have them: what one does, the other respects."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_inputs import CONFIG, KEY, begun, content_of, is_there, keep, key, put, stored
from counted_calls import CHANGES, Calls
from disk_cache_world import DiskWorld, nothing_odd, opened

from lorax_async.core.cache_names import BUDGET_LOCK, CONFIG_FILE, WEIGHTS_FILE
from lorax_async.errors import CapacityError, FetchError
from lorax_async.io.cache import entries, locks, partial_download
from lorax_async.io.cache.entries import DiskEntry
from lorax_async.io.disk_cache import Turn
from lorax_async.io.ports import Demand

SIZE = 1_000 + len(CONFIG)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[DiskWorld, DiskWorld]]:
    """With room for three adapters together."""
    with opened(tmp_path / "cache", 3 * SIZE) as one, opened(tmp_path / "cache", 3 * SIZE) as other:
        yield one, other
    nothing_odd(tmp_path / "cache")


Two = tuple[DiskWorld, DiskWorld]


def aged(world: DiskWorld, *numbers: int) -> None:
    """Used long ago, the first one longest."""
    for place, number in enumerate(numbers):
        at = time.time() - 1_000 + place
        os.utime(world.entry(key(number)), (at, at))


def there(world: DiskWorld, upto: int) -> list[int]:
    return [number for number in range(upto) if world.entry(key(number)).exists()]


def test_what_one_published_the_other_has(two: Two) -> None:
    one, other = two
    keep(one.cache, KEY, b"abc")
    entry = other.cache.open(KEY, check=True)
    assert entry is not None
    assert content_of(entry) == b"abc"
    entry.close()


def test_the_budget_is_that_of_the_folder(two: Two) -> None:
    one, other = two
    for number, world in enumerate((one, other, one, other, other, one)):
        keep(world.cache, key(number), bytes(1_000))
        aged(one, *there(one, 6))
        assert one.cache.used() == other.cache.used() == min(3, number + 1) * SIZE
    assert there(one, 6) == [3, 4, 5]


def test_a_use_by_one_is_seen_by_the_other(two: Two) -> None:
    one, other = two
    for number in range(3):
        keep(one.cache, key(number), bytes(1_000))
    aged(one, 0, 1, 2)
    assert other.cache.used() == 3 * SIZE
    assert is_there(one.cache, key(0))
    keep(other.cache, key(3), bytes(1_000))
    assert there(one, 4) == [0, 2, 3]


def test_what_one_holds_the_other_does_not_evict(two: Two) -> None:
    one, other = two
    held = [stored(one.cache, key(number), bytes(1_000)) for number in range(2)]
    keep(one.cache, key(2), bytes(1_000))
    aged(one, 0, 1, 2)
    keep(other.cache, key(3), bytes(1_000))
    assert there(one, 4) == [0, 1, 3]
    download = begun(other.cache, key(4))
    with pytest.raises(CapacityError, match="in use"):
        download.file(WEIGHTS_FILE, 2 * SIZE)
    download.close()
    assert not other.cache.remove(key(0))
    for entry in held:
        assert content_of(entry) == bytes(1_000)
        entry.close()
    assert other.cache.remove(key(0))


def test_what_one_downloads_the_other_does_not_drop(two: Two) -> None:
    one, other = two
    download = begun(one.cache, key(0))
    file = download.file(WEIGHTS_FILE, 2 * SIZE)
    late = begun(other.cache, key(1))
    with pytest.raises(CapacityError, match="in use"):
        late.file(WEIGHTS_FILE, SIZE + 1)
    put(late.file(WEIGHTS_FILE, SIZE), bytes(SIZE), [(0, SIZE)])
    late.publish().close()
    assert not other.cache.remove(key(0))
    put(file, bytes(2 * SIZE), [(0, 2 * SIZE)])
    download.publish().close()
    assert there(one, 2) == [0, 1]


def test_what_one_left_the_other_may_drop_or_go_on_with(two: Two) -> None:
    one, other = two
    for number in range(2):
        download = begun(one.cache, key(number))
        put(download.file(WEIGHTS_FILE, SIZE), bytes(SIZE), [(0, SIZE)])
        download.close()
    download = begun(other.cache, key(1))
    assert download.file(WEIGHTS_FILE, SIZE).missing() == []
    late = begun(other.cache, key(2))
    late.file(WEIGHTS_FILE, 2 * SIZE)
    assert other.cache.used() == 3 * SIZE
    late.close()
    download.publish().close()
    assert there(one, 3) == [1]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, 0])
def test_a_file_system_without_locks(two: Two, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Both download, and the first to end is what both have."""

    def none(fd: int, how: int) -> None:
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    downloads = [begun(world.cache) for world in two]
    for download in downloads:
        put(download.file(WEIGHTS_FILE, 10), b"0123456789", [(0, 10)])
    entries = [download.publish() for download in downloads]
    assert entries[0].record == entries[1].record
    for entry in entries:
        assert content_of(entry) == b"0123456789"
        entry.close()
    keep(two[0].cache, key(1), bytes(1_000))


def test_without_locks_a_process_still_knows_what_it_holds(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)
    cache = two[0].cache
    held = stored(cache, key(0), bytes(1_000))
    download = begun(cache, key(1))
    download.file(WEIGHTS_FILE, SIZE)
    for number in range(2, 4):
        keep(cache, key(number), bytes(1_000))
    assert there(two[0], 4) == [0, 3]
    assert not cache.remove(key(0))
    assert not cache.remove(key(1))
    assert content_of(held) == bytes(1_000)
    download.close()
    held.close()


def test_a_lock_that_fails_otherwise_is_an_error(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int, how: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(FetchError, match="EIO"):
        begun(two[0].cache)
    monkeypatch.undo()
    begun(two[0].cache).close()


def test_who_hangs_with_the_budgets_lock_is_not_waited_for(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "PATIENCE_SECONDS", 0.05)
    hanging = locks.attempt(two[0].cache.shelves.place.locks, BUDGET_LOCK)
    assert hanging is not None
    keep(two[1].cache, KEY, b"abc")
    hanging.release()


def test_a_lock_whose_file_was_removed_is_taken_anew(two: Two) -> None:
    """Between opening a lock's file and locking it, who had it may have removed it."""
    folder = two[0].cache.shelves.place.locks
    first = locks.attempt(folder, "a")
    assert first is not None
    assert locks.attempt(folder, "a") is None
    calls = Calls(("open",))
    removed: list[str] = []

    def release(name: str) -> None:
        if name == "open" and not removed:
            removed.append(name)
            first.release()

    calls.after = release
    with calls.counted():
        second = locks.attempt(folder, "a")
    assert second is not None
    assert calls.made == ["open", "flock", "open", "flock"]
    assert locks.attempt(folder, "a") is None
    second.release()


def test_all_is_on_the_disk_before_it_is_published(two: Two) -> None:
    """Bytes, record and names; then the rename, and that too. Maps go after it."""
    download = begun(two[0].cache)
    for role in (CONFIG_FILE, WEIGHTS_FILE):
        put(download.file(role, 5), b"abcde", [(0, 5)])
    calls = Calls(CHANGES)
    with calls.counted():
        entry = download.publish()
    made = [name for name in calls.made if name in {"fsync", "rename", "write"}]
    assert made == [*["fsync"] * 2, "write", *["fsync"] * 2, "rename", "fsync"]
    entry.close()


def test_what_is_left_is_on_the_disk_before_it_is_trusted(two: Two) -> None:
    download = begun(two[0].cache)
    put(download.file(WEIGHTS_FILE, 5), b"abcde", [(0, 5)])
    calls = Calls(CHANGES)
    with calls.counted():
        download.close()
    made = [name for name in calls.made if name in {"fsync", "rename"}]
    assert made == ["fsync", "fsync", "fsync", "rename"]


def test_what_one_has_opened_the_other_does_not_remove(two: Two) -> None:
    one, other = two
    keep(one.cache, KEY, b"abc")
    entry = one.cache.open(KEY)
    assert entry is not None
    assert not other.cache.remove(KEY)
    entry.close()
    assert other.cache.remove(KEY)


def test_who_waits_ends_with_the_demand() -> None:
    demand = Demand()
    turn = Turn(demand)
    turn.wait(1)
    demand.end()
    with pytest.raises(FetchError, match="cancelled"):
        turn.wait(2)


def test_what_is_published_just_before_one_may_begin_is_taken(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is nobody's to download then."""
    one, other = two
    download, attempt = begun(one.cache), locks.attempt
    put(download.file(WEIGHTS_FILE, 5), b"abcde", [(0, 5)])

    def late(*given: Any) -> Any:
        monkeypatch.undo()
        download.publish().close()
        return attempt(*given)

    monkeypatch.setattr(partial_download, "attempt", late)
    entry = other.cache.try_begin(KEY, "somebody")
    assert isinstance(entry, DiskEntry)
    entry.close()
    assert one.cache.remove(KEY)
    again = other.cache.try_begin(KEY, "somebody")
    assert not isinstance(again, int)
    again.close()


def test_what_is_replaced_just_before_one_holds_it_stays(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two
    keep(one.cache, KEY, b"abc")
    granted = locks.granted_shared

    def late(fd: int) -> bool:
        monkeypatch.undo()
        assert other.cache.remove(KEY)
        keep(other.cache, KEY, b"abc")
        return granted(fd)

    monkeypatch.setattr(entries, "granted_shared", late)
    assert one.cache.open(KEY) is None
    assert is_there(one.cache, KEY)
