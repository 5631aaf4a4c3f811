"""What a disk cache has open ends once, when its owner says so or has forgotten it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest
from cache_inputs import KEY, begun, key, put, stored
from disk_cache_world import open_below, opened

from lorax_async.core.cache_names import WEIGHTS_FILE
from lorax_async.core.policies import policy
from lorax_async.errors import CapacityError, FetchError
from lorax_async.io.cache.descriptors import Descriptor
from lorax_async.io.disk_cache import DiskCache


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_descriptor_is_closed_when_its_last_user_is_through(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    descriptor = Descriptor(fd, "a folder")
    with descriptor.held():
        with descriptor.held():
            descriptor.close()
        assert is_open(fd)
        descriptor.close()
        assert is_open(fd)
        with pytest.raises(FetchError, match="a folder was closed"), descriptor.held():
            pass
    assert not is_open(fd)
    other = os.open(tmp_path, os.O_RDONLY)  # of the same number
    descriptor.close()
    assert is_open(other)
    os.close(other)


def reader_of_a_download(cache: DiskCache) -> object:
    download = begun(cache)
    reader = download.file(WEIGHTS_FILE, 1).reader()
    download.close()
    return reader


def forget(make: Callable[[], object]) -> None:
    make()
    gc.collect()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda cache: stored(cache, KEY, b"abc"), "entry"),
        (begun, "download"),
        (reader_of_a_download, "safetensors"),
    ],
)
def test_what_is_forgotten_is_closed_with_a_warning(
    tmp_path: Path, make: Callable[[DiskCache], object], name: str
) -> None:
    with opened(tmp_path / "cache") as world:
        with pytest.warns(ResourceWarning, match=f"unclosed.*{name}"):
            forget(lambda: make(world.cache))
        assert len(open_below(tmp_path / "cache")) == 5


def test_a_cache_that_is_forgotten_is_closed_with_a_warning(tmp_path: Path) -> None:
    with pytest.warns(ResourceWarning, match="unclosed disk cache"):
        forget(lambda: DiskCache(tmp_path / "cache", 1, policy("lru")))
    assert open_below(tmp_path) == []


def test_room_is_claimed_by_one_process_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one looks at the folder when the first one's bytes are there."""
    real, entered, go = os.posix_fallocate, Event(), Event()

    def slow(fd: int, offset: int, nbytes: int) -> None:
        entered.set()
        assert go.wait(20)
        real(fd, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", slow)
    with (
        opened(tmp_path / "cache", 1_000) as one,
        opened(tmp_path / "cache", 1_000) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        downloads = [begun(one.cache, key(0)), begun(other.cache, key(1))]
        first = threads.submit(downloads[0].file, WEIGHTS_FILE, 600)
        assert entered.wait(20)
        second = threads.submit(downloads[1].file, WEIGHTS_FILE, 600)
        assert not wait([second], timeout=0.05).done
        go.set()
        put(first.result(), bytes(600), [(0, 600)])
        with pytest.raises(CapacityError):
            second.result()
        for download in downloads:
            download.close()
