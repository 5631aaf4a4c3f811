"""Every call that a disk cache makes of the system fails in turn; full disks, quotas, old boots."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import pytest
from cache_inputs import (
    CONFIG,
    KEY,
    NBYTES,
    SCOPE,
    begun,
    below,
    content_of,
    is_there,
    keep,
    key,
    put,
    sha256,
    stored,
    weights,
)
from counted_calls import CHANGES, LOOKS, Calls, failing
from disk_cache_world import DiskWorld, nothing_odd, open_below, opened

from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, PartialName, partial_name
from lorax_async.core.policies import policy
from lorax_async.errors import CapacityError, ConfigError, FetchError, LoraxError
from lorax_async.io import disk_cache
from lorax_async.io.cache.ports import Cache
from lorax_async.io.disk_cache import DiskCache

CONTENT = weights()
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DiskWorld]:
    with opened(tmp_path / "cache") as world:
        yield world
    nothing_odd(tmp_path / "cache")


def resumed_and_published(cache: Cache) -> None:
    """A download that was left is gone on with, published, opened, checked, and removed."""
    download = begun(cache)
    try:
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        put(file, CONTENT, [(5, 400_000)])
    finally:
        download.close()
    download = begun(cache)
    try:
        config = download.file(CONFIG_FILE, None)
        put(config, CONFIG, [(0, len(CONFIG))])
        config.ends_at(len(CONFIG))
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        reader = file.reader()
        reader.close()
        put(file, CONTENT, file.missing())
        download.publish().close()
    finally:
        download.close()
    entry = cache.open(KEY, check=True)
    assert entry is not None
    try:
        entry.grant("other")
        assert content_of(entry) == CONTENT
    finally:
        entry.close()
    assert cache.remove(KEY)


def calls_of_a_fetch(folder: Path) -> list[str]:
    calls = Calls(CHANGES + LOOKS)
    with opened(folder) as world, calls.counted():
        resumed_and_published(world.cache)
    return calls.made


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EMFILE])
def test_whatever_call_fails_the_next_fetch_is_right(tmp_path: Path, code: int) -> None:
    made = calls_of_a_fetch(tmp_path / "first")
    assert len(made) > 100
    failed = 0
    for at in range(1, len(made) + 1):
        with opened(tmp_path / "cache") as world:
            with failing(CHANGES + LOOKS, at, code).counted():
                try:
                    resumed_and_published(world.cache)
                except LoraxError as error:
                    failed += 1
                    full = code in FULL and isinstance(error, CapacityError)
                    assert full or type(error) is FetchError, (at, made[at - 1], error)
                    assert error.retryable
            assert len(open_below(tmp_path / "cache")) == 4, (at, made[at - 1])  # the folders
            resumed_and_published(world.cache)
            assert below(tmp_path / "cache") - {"locks/budget"} == set(), (at, made[at - 1])
    nothing_odd(tmp_path / "cache")
    assert failed > len(made) // 2


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_cache_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path, code: int) -> None:
    folder = tmp_path / "cache"
    at = 0
    while True:
        at += 1
        with failing(CHANGES + LOOKS, at, code).counted():
            try:
                DiskCache(folder, 1, policy("lru")).close()
            except (ConfigError, FetchError):
                pass
            else:
                break
        assert open_below(tmp_path) == []
    assert at > 10


# -- full disks -----------------------------------------------------------------------------------


@contextmanager
def file_limit(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("nbytes", [NBYTES, None])
def test_a_file_over_the_process_limit(world: DiskWorld, nbytes: int | None) -> None:
    download = begun(world.cache)
    with file_limit(1 << 20), pytest.raises(CapacityError, match="EFBIG.*RLIMIT_FSIZE") as raised:
        put(download.file(WEIGHTS_FILE, nbytes), CONTENT, [(0, NBYTES)])
    assert raised.value.retryable
    assert raised.value.stage == "fetch"
    download.close()
    assert below(world.folder) == set()
    keep(world.cache, KEY, CONTENT)


def test_a_quota_that_is_used_up(world: DiskWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EDQUOT, "quota")

    download = begun(world.cache)
    monkeypatch.setattr(os, "posix_fallocate", refused)
    with pytest.raises(CapacityError, match="EDQUOT.*quota is used up"):
        download.file(WEIGHTS_FILE, NBYTES)
    download.close()
    assert below(world.folder) == set()


def test_room_that_was_allocated_in_part_is_given_back(
    world: DiskWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As file systems without a call for it do: glibc writes block after block."""
    real = os.posix_fallocate

    def in_part(fd: int, offset: int, nbytes: int) -> None:
        real(fd, offset, nbytes // 2)
        raise OSError(errno.ENOSPC, "full")

    download = begun(world.cache)
    file = download.file(WEIGHTS_FILE, None)
    put(file, CONTENT, [(0, 1_000)])
    grown = world.cache.shelves.room.used()
    monkeypatch.setattr(os, "posix_fallocate", in_part)
    with pytest.raises(CapacityError, match="ENOSPC"):
        put(file, CONTENT * 8, [(1_000, 8 * NBYTES)])
    assert world.cache.shelves.room.used() == grown
    file.ends_at(1_000)
    download.publish().close()
    assert is_there(world.cache, KEY)


SMALL_DISK = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_disk_cache_failures import on_a_small_disk
on_a_small_disk(Path(sys.argv[1]))
"""


def on_a_small_disk(folder: Path) -> None:
    """Of 2 MiB. What was written stays, and is gone on with when there is room again."""
    with opened(folder / "cache") as world:
        keep(world.cache, key(0), bytes(500_000))
        download = begun(world.cache)
        with pytest.raises(CapacityError, match=r"ENOSPC.*disk is full"):
            download.file(WEIGHTS_FILE, 1_700_000)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        put(file, CONTENT, [(0, NBYTES)])
        with (folder / "other").open("wb", buffering=0) as other, suppress(OSError):
            while True:
                other.write(bytes(4096))
        with pytest.raises(CapacityError, match=r"publish.*ENOSPC"):
            download.publish()
        download.close()
        (folder / "other").unlink()
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        assert file.missing() == []
        entry = download.publish()
        assert content_of(entry) == CONTENT
        entry.close()
        assert is_there(world.cache, key(0))
    nothing_odd(folder / "cache")


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    tests = Path(__file__).parent
    mount = f"mount -t tmpfs -o size=2m,mode=700 tmpfs {tmp_path}"
    apart = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*apart, mount], capture_output=True, check=False).returncode:
        pytest.skip("a disk of 2 MiB, which this test fills, cannot be mounted here")
    paths = [tests, tests.parent, tests.parent.parent, tests.parent.parent / "kernels"]
    command = [*apart, f'{mount} && exec "$@"', "sh", sys.executable, "-c", SMALL_DISK, tmp_path]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- what is left of other times ------------------------------------------------------------------


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
    here = disk_cache_owner()
    from dataclasses import replace

    other = path.with_name(str(PartialName(name.entry, replace(here, **changes), name.serial)))
    path.rename(other)
    return other


def disk_cache_owner():  # type: ignore[no-untyped-def]
    from lorax_async.io.cache.processes import this_process

    return this_process()


@pytest.mark.parametrize(
    ("changes", "trusted"),
    [
        ({"boot": "0" * 32}, False),  # the machine may have crashed
        ({"pid": 2**22 + 1}, True),  # more than pids can be: it runs no more
        ({"started": 1}, True),  # another process has its number now
        ({"namespace": 1}, True),  # another container, and its lock is free
        ({}, False),  # ourselves, who do not know of it
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
    assert is_there(world.cache, KEY) is False


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
    found = world.cache.begin(KEY, SCOPE, Event())
    assert found.file(WEIGHTS_FILE, NBYTES).missing() == []  # type: ignore[union-attr]
    found.close()
