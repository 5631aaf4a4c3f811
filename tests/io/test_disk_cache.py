"""The disk cache keeps to the port, in a folder that is its owner's alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cache_conformance import CacheConformance
from cache_inputs import (
    KEY,
    NBYTES,
    begun,
    below,
    content_of,
    is_there,
    keep,
    key,
    put,
    stored,
    weights,
)
from cache_room_conformance import CacheRoomConformance, Room, Used
from cache_sharing_conformance import CacheSharingConformance
from disk_cache_world import DiskWorld, nothing_odd, open_below, opened

from lorax_async.core.cache_names import WEIGHTS_FILE, CacheKey
from lorax_async.core.policies import PolicyName, policy
from lorax_async.errors import ConfigError, FetchError, IntegrityError
from lorax_async.io.cache.entries import MAX_SCOPES
from lorax_async.io.cache.ports import Cache
from lorax_async.io.disk_cache import DiskCache


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DiskWorld]:
    (tmp_path / "beside").mkdir()
    with opened(tmp_path / "cache") as world:
        yield world
    nothing_odd(tmp_path / "cache")
    assert sorted(os.listdir(tmp_path)) == ["beside", "cache"]
    assert os.listdir(tmp_path / "beside") == []


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    caches = []

    def made(nbytes: int, name: PolicyName) -> Cache:
        caches.append(DiskCache(tmp_path / "cache", nbytes, policy(name)))
        return caches[-1]

    yield made
    for cache in caches:
        cache.close()
    nothing_odd(tmp_path / "cache")


@pytest.fixture
def used(tmp_path: Path) -> Used:
    def told(cache: Cache) -> int:
        told = cache.used()
        files = (tmp_path / "cache").rglob("adapter_*")
        assert told == sum(path.stat().st_size for path in files if path.suffix != ".chunks")
        return told

    return told


class TestConformance(CacheConformance):
    pass


class TestSharing(CacheSharingConformance):
    pass


class TestRoom(CacheRoomConformance):
    pass


HOSTILE = ["../../beside/x", "/etc/passwd", "", ".", "\0", "a" * 5_000, "\ud800", "x\n.json", "~"]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_keys_make_plain_names(world: DiskWorld, text: str) -> None:
    for of in (CacheKey(text, "v"), CacheKey("s", text), CacheKey(text, text)):
        entry = stored(world.cache, of, text.encode("utf-8", "replace"))
        entry.grant(text)
        entry.close()
        assert is_there(world.cache, of)
    assert all(
        set(name) <= set("0123456789abcdef") for name in os.listdir(world.folder / "entries")
    )


@pytest.mark.parametrize("mask", [0o000, 0o077])
def test_all_is_private_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with opened(tmp_path / "a" / "cache") as world:
            keep(world.cache, KEY, b"abc")
            download = begun(world.cache, key(1))
            put(download.file(WEIGHTS_FILE, 3), b"abc", [(0, 3)])
            download.close()
    finally:
        os.umask(before)
    nothing_odd(tmp_path / "a" / "cache")
    assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702, 0o1777])
@pytest.mark.parametrize("inside", ["", "entries", "partials", "locks", "trash", "answers"])
def test_a_folder_that_others_write_to_is_refused(tmp_path: Path, mode: int, inside: str) -> None:
    DiskCache(tmp_path / "cache", 1, policy("lru")).close()
    (tmp_path / "cache" / inside).chmod(mode)
    with pytest.raises(ConfigError, match="others may write.*chmod 700"):
        DiskCache(tmp_path / "cache", 1, policy("lru"))
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("inside", ["", "entries"])
def test_a_folder_of_somebody_else_is_refused(
    tmp_path: Path, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    DiskCache(tmp_path / "cache", 1, policy("lru")).close()
    if os.geteuid() == 0:
        os.chown(tmp_path / "cache" / inside, 12_345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12_345)
    with pytest.raises(ConfigError, match="another user"):
        DiskCache(tmp_path / "cache", 1, policy("lru"))
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "link", "nowhere"])
def test_a_folder_inside_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "beside").mkdir()
    inside = tmp_path / "cache" / "partials"
    if kind == "file":
        inside.touch()
    else:
        inside.symlink_to(tmp_path / ("beside" if kind == "link" else "nowhere"))
    with pytest.raises(ConfigError, match="'partials'"):
        DiskCache(tmp_path / "cache", 1, policy("lru"))
    assert os.listdir(tmp_path / "beside") == []


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be opened"):
            DiskCache(path, 1, policy("lru"))


@pytest.mark.parametrize("shape", ["link", "file", "empty", "fifo"])
def test_what_stands_in_an_entrys_place_goes_and_leads_nowhere(
    world: DiskWorld, tmp_path: Path, shape: str
) -> None:
    place = world.entry(KEY)
    (tmp_path / "beside" / "precious").write_bytes(b"abc")
    if shape == "link":
        place.symlink_to(tmp_path / "beside")
    elif shape == "file":
        place.write_bytes(b"abc")
    elif shape == "fifo":
        os.mkfifo(place)
    else:
        place.mkdir(0o700)
    keep(world.cache, KEY, b"right")
    assert is_there(world.cache, KEY)
    assert (tmp_path / "beside" / "precious").read_bytes() == b"abc"
    (tmp_path / "beside" / "precious").unlink()


@pytest.mark.parametrize("name", ["record.json", WEIGHTS_FILE.file_name])
@pytest.mark.parametrize("shape", ["gone", "link", "fifo", "folder", "empty"])
def test_an_entry_with_an_odd_file_is_dropped(world: DiskWorld, name: str, shape: str) -> None:
    keep(world.cache, KEY, b"abc")
    path = world.entry(KEY) / name
    other = path.with_name("other")
    path.rename(other)
    if shape == "link":
        path.symlink_to(other)
    elif shape == "fifo":
        os.mkfifo(path)
    elif shape == "folder":
        path.mkdir()
    elif shape == "empty":
        path.touch()
    assert world.cache.open(KEY) is None
    assert below(world.folder) == set()


def test_an_entry_under_another_ones_name_is_dropped(world: DiskWorld) -> None:
    keep(world.cache, KEY, b"abc")
    world.entry(KEY).rename(world.entry(key(1)))
    assert world.cache.open(key(1)) is None
    assert below(world.folder) == set()


def test_bytes_that_were_written_in_place_are_noticed_by_their_time(world: DiskWorld) -> None:
    keep(world.cache, KEY, b"abc")
    (world.entry(KEY) / WEIGHTS_FILE.file_name).write_bytes(b"abd")
    assert world.cache.open(KEY) is None
    keep(world.cache, KEY, b"abc")
    (world.entry(KEY) / WEIGHTS_FILE.file_name).write_bytes(b"abc")
    assert is_there(world.cache, KEY)


def test_a_held_entry_that_was_damaged_is_replaced(world: DiskWorld) -> None:
    held = stored(world.cache, KEY, b"abc")
    reader = held.reader(WEIGHTS_FILE)
    world.alter(KEY, WEIGHTS_FILE, b"longer")
    keep(world.cache, KEY, b"right")
    with pytest.raises(IntegrityError, match="again"):
        reader.read_into([memoryview(bytearray(3))], 0)
    reader.close()
    held.close()
    entry = world.cache.open(KEY)
    assert entry is not None
    assert content_of(entry) == b"right"
    entry.close()


def test_a_reader_of_what_was_evicted_says_so(world: DiskWorld) -> None:
    entry = stored(world.cache, KEY, b"abc")
    early, late = entry.reader(WEIGHTS_FILE), entry.reader(WEIGHTS_FILE)
    content = bytearray(3)
    early.read_into([memoryview(content)], 0)
    entry.close()
    assert world.cache.remove(KEY)
    assert content == b"abc"
    for reader in (early, late):
        with pytest.raises(IntegrityError, match="again"):
            reader.read_into([memoryview(content)], 0)
        reader.close()


def test_scopes_are_bounded(world: DiskWorld) -> None:
    entry = stored(world.cache, KEY, b"abc")
    for number in range(MAX_SCOPES + 1):
        entry.grant(str(number))
    assert entry.granted("0") is not None
    assert entry.granted(str(MAX_SCOPES)) is None  # it asks the source again
    entry.grant("0")
    entry.close()


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    """Of a download that was under way nothing is published, and it leaves nothing."""
    folder = tmp_path / "cache"
    with opened(folder) as world:
        keep(world.cache, KEY, b"abc")
        entry, download = world.cache.open(KEY), begun(world.cache, key(1))
        assert entry is not None
        put(download.file(WEIGHTS_FILE, 3), b"abc", [(0, 3)])
        shutil.rmtree(folder)
        assert world.cache.open(KEY) is None
        with pytest.raises(IntegrityError, match="load the adapter again"):
            content_of(entry)
        with pytest.raises(FetchError, match="load it again"):
            download.publish()
        entry.close()
        download.close()
        assert world.cache.used() == 0
        keep(world.cache, KEY, b"def")
        assert is_there(world.cache, KEY)
        assert folder.stat().st_mode & 0o777 == 0o700
        folder.rename(tmp_path / "moved")
        world.cache.note_version("question", "source", "version")
        assert world.cache.last_version("question") == ("source", "version")
        assert not is_there(world.cache, KEY)
    assert open_below(tmp_path) == []


def test_the_folder_behind_a_link_is_made_again(tmp_path: Path) -> None:
    folder, link = tmp_path / "disk", tmp_path / "cache"
    folder.mkdir(0o700)
    link.symlink_to(folder)
    with opened(link) as world:
        keep(world.cache, KEY, b"abc")
        shutil.rmtree(folder)
        keep(world.cache, KEY, b"def")
        assert is_there(world.cache, KEY)
    assert (folder / "entries").is_dir()


def test_after_close_everything_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as world:
        keep(world.cache, KEY, weights(1, NBYTES))
    calls: list[Callable[[CacheKey], object]] = [
        world.cache.open,
        world.cache.remove,
        lambda of: begun(world.cache, of),
    ]
    for call in calls:
        with pytest.raises(FetchError, match="closed"):
            call(KEY)
    world.cache.close()
