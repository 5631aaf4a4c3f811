"""Downloads that are published, left or taken over while somebody else counts what is there."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
from cache_inputs import KEY, NBYTES, begun, key, put, weights
from disk_cache_world import DiskWorld, nothing_odd, opened

from lorax_async.core.cache_names import WEIGHTS_FILE, is_partial_name
from lorax_async.errors import CapacityError
from lorax_async.io.cache import sizes
from lorax_async.io.cache.folders import Folder
from lorax_async.io.cache.ports import CacheDownload

CONTENT = weights()
NBYTES_FOR_ONE = NBYTES * 3 // 2


def whole(world: DiskWorld) -> CacheDownload:
    """All bytes are here, and nothing else has happened."""
    download = begun(world.cache)
    put(download.file(WEIGHTS_FILE, NBYTES), CONTENT, [(0, NBYTES)])
    return download


def published(world: DiskWorld) -> Callable[[], None]:
    download = whole(world)
    return lambda: download.publish().close()


def left(world: DiskWorld) -> Callable[[], None]:
    return whole(world).close


def taken_over(world: DiskWorld) -> Callable[[], None]:
    whole(world).close()

    def take_over() -> None:
        download = begun(world.cache)
        with suppress(CapacityError):  # it may have made room meanwhile
            download.file(WEIGHTS_FILE, NBYTES)
        download.close()

    return take_over


def at_the_first_look(monkeypatch: pytest.MonkeyPatch, move: Callable[[], None]) -> list[Thread]:
    """`move` happens, as far as it can, when a partial was found and its size was not."""
    begun: list[Thread] = []

    def late(folder: Folder, name: str) -> int:
        if is_partial_name(name) and not begun:
            begun.append(Thread(target=move))
            begun[0].start()
            begun[0].join(0.5)
        return size_of(folder, name)

    size_of = sizes.size_of
    monkeypatch.setattr(sizes, "size_of", late)
    return begun


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("moved", [published, left, taken_over])
def test_no_room_is_found_where_somebody_is(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moved: Callable[[DiskWorld], Callable[[], None]],
    locks: bool,
) -> None:
    """In one process also where locks do nothing."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda fd, how: None)
    with opened(tmp_path / "cache", NBYTES_FOR_ONE) as world:
        download = begun(world.cache, key(2))
        threads = at_the_first_look(monkeypatch, moved(world))
        with suppress(CapacityError):
            download.file(WEIGHTS_FILE, NBYTES)
        (thread,) = threads
        thread.join()
        assert world.cache.used() <= NBYTES_FOR_ONE
        download.discard()
    nothing_odd(tmp_path / "cache")


def test_what_was_left_is_found_while_somebody_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both list the same folder at once, and both see all of it."""
    with opened(tmp_path / "cache") as world:
        whole(world).close()
        found: list[CacheDownload] = []
        threads = at_the_first_look(monkeypatch, lambda: found.append(begun(world.cache)))
        assert world.cache.used() == NBYTES
        (thread,) = threads
        thread.join()
        (download,) = found
        assert download.file(WEIGHTS_FILE, NBYTES).missing() == []
        download.discard()


def test_one_of_both_has_a_place(tmp_path: Path) -> None:
    """The budget is what the test above takes it for."""
    with opened(tmp_path / "cache", NBYTES_FOR_ONE) as world:
        download = whole(world)
        other = begun(world.cache, key(2))
        with pytest.raises(CapacityError):
            other.file(WEIGHTS_FILE, NBYTES)
        other.discard()
        download.publish().close()
        assert world.cache.used() == NBYTES
        assert world.entry(KEY).exists()
