"""Partial downloads of other times and processes: which are gone on with, and which are not."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cache_inputs import KEY, NBYTES, SCOPE, begun, content_of, put, stored, weights
from counted_calls import Calls
from disk_cache_world import DiskWorld, nothing_odd, opened

from lorax_async.core.cache_names import WEIGHTS_FILE, partial_name
from lorax_async.errors import FetchError
from lorax_async.io import disk_cache
from lorax_async.io.cache.locks import attempt
from lorax_async.io.cache.processes import this_process
from lorax_async.io.ports import Demand

CONTENT = weights()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DiskWorld]:
    with opened(tmp_path / "cache") as world:
        yield world
    nothing_odd(tmp_path / "cache")


def left(world: DiskWorld) -> Path:
    """A partial that was left, with all bytes there."""
    download = begun(world.cache)
    put(download.file(WEIGHTS_FILE, NBYTES), CONTENT, [(0, NBYTES)])
    download.close()
    (path,) = (world.folder / "partials").iterdir()
    return path


def owned(path: Path, **changes: object) -> Path:
    """The same, as another process wrote to it."""
    name = partial_name(path.name)
    assert name is not None
    owner = replace(this_process(), **changes)  # type: ignore[arg-type]  # of its fields
    return path.rename(path.with_name(str(replace(name, owner=owner))))


@pytest.mark.parametrize(
    ("changes", "trusted"),
    [
        ({"boot": "0" * 32}, False),  # the machine may have crashed
        ({"pid": 2**22 + 1}, True),  # more than pids can be: it runs no more
        ({"started": 1}, True),  # another process has its number now
        ({"namespace": 1}, True),  # another container, and its lock is free
        ({}, False),  # another cache on the same folder in this process
    ],
)
def test_whose_bytes_are_trusted(
    world: DiskWorld, changes: dict[str, object], trusted: bool
) -> None:
    owned(left(world), **changes)
    download = begun(world.cache)
    missing = download.file(WEIGHTS_FILE, NBYTES).missing()
    assert missing == ([] if trusted else [(0, NBYTES)])
    download.close()
    for path in (world.folder / "partials").glob(f"{KEY.name}.*-*"):
        shutil.rmtree(path)


def test_of_two_that_were_left_the_newer_one_stays(world: DiskWorld) -> None:
    older = left(world)
    newer = older.with_name(older.name[:-1] + ("0" if older.name[-1] != "0" else "1"))
    subprocess.run(["cp", "-a", older, newer], check=True)
    os.utime(newer / WEIGHTS_FILE.file_name, (2e9, 2e9))
    (older / f"{WEIGHTS_FILE.file_name}.chunks").unlink()
    download = begun(world.cache)
    assert download.file(WEIGHTS_FILE, NBYTES).missing() == []
    download.close()
    assert len(list((world.folder / "partials").iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"LRXCHNK1", b"x" * 25])
def test_a_map_that_is_none_is_not_believed(world: DiskWorld, damage: bytes) -> None:
    (left(world) / f"{WEIGHTS_FILE.file_name}.chunks").write_bytes(damage)
    download = begun(world.cache)
    assert download.file(WEIGHTS_FILE, NBYTES).missing() == [(0, NBYTES)]
    download.close()


def test_a_process_that_hangs_is_not_waited_for(
    world: DiskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that hangs finds, when it is back, that the other was faster."""
    monkeypatch.setattr(disk_cache, "PATIENCE_SECONDS", 0.1)
    hanging = begun(world.cache)
    file = hanging.file(WEIGHTS_FILE, NBYTES)
    put(file, CONTENT, [(0, 1_000)])
    with opened(world.folder) as other:
        entry = stored(other.cache, KEY, CONTENT)
    put(file, CONTENT, [(1_000, NBYTES)])
    theirs = hanging.publish()
    assert theirs.record == entry.record
    assert content_of(theirs) == CONTENT
    theirs.close()
    entry.close()


def test_without_its_lock_a_download_is_not_taken_over(
    world: DiskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another container a process cannot be seen, but its lock can."""
    monkeypatch.setattr(disk_cache, "PATIENCE_SECONDS", 0.05)
    hanging = begun(world.cache)
    put(hanging.file(WEIGHTS_FILE, NBYTES), CONTENT, [(0, NBYTES)])
    (path,) = (world.folder / "partials").iterdir()
    path = owned(path, namespace=1)
    with opened(world.folder) as other:
        download = begun(other.cache)
        assert download.file(WEIGHTS_FILE, NBYTES).missing() == [(0, NBYTES)]
        download.close()
    assert (path / WEIGHTS_FILE.file_name).read_bytes() == CONTENT
    hanging.close()
    assert world.cache.remove(KEY)


def test_a_download_that_was_taken_away_says_so(world: DiskWorld) -> None:
    """As it may be where locks do nothing, between containers."""
    for end in ("publish", "close"):
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, NBYTES), CONTENT, [(0, NBYTES)])
        (path,) = (world.folder / "partials").iterdir()
        moved = path.rename(path.with_name(f"{KEY.name}.free.0"))
        if end == "publish":
            with pytest.raises(FetchError, match="another process took over.*again"):
                download.publish()
        download.close()
        assert (moved / WEIGHTS_FILE.file_name).read_bytes() == CONTENT
    found = world.cache.begin(KEY, SCOPE, Demand())
    assert found.file(WEIGHTS_FILE, NBYTES).missing() == []  # type: ignore[union-attr]
    found.close()


def test_what_somebody_is_about_to_take_over_stays(world: DiskWorld) -> None:
    path = left(world)
    lock = attempt(world.cache.shelves.place.locks, KEY.name)
    assert lock is not None
    assert not world.cache.remove(KEY)
    assert path.is_dir()
    lock.release()
    assert world.cache.remove(KEY)


def test_a_map_goes_before_the_bytes_that_it_tells_of(world: DiskWorld) -> None:
    left(world)
    download = begun(world.cache)
    calls = Calls(("unlink", "ftruncate"))
    with calls.counted():
        download.file(WEIGHTS_FILE, NBYTES - 1)
    assert calls.made[:2] == ["unlink", "ftruncate"]
    download.discard()
