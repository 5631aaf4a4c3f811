"""What goes wrong for a disk cache: calls fail, disks are full, other processes come or are killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from counted_calls import CHANGES, LOOKS, Calls, failing
from disk_cache_world import (
    CONFIG,
    KEY,
    NBYTES,
    SCOPE,
    DiskWorld,
    begun,
    below,
    content_of,
    is_there,
    keep,
    key,
    left,
    nothing_odd,
    open_below,
    opened,
    put,
    read_back,
    sha256,
    stored,
    weights,
)

from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.core.chunk_map import CHUNK_BYTES
from lorax_async.core.policies import policy
from lorax_async.errors import CapacityError, ConfigError, FetchError, LoraxError
from lorax_async.io import disk_cache
from lorax_async.io.cache.ports import Cache
from lorax_async.io.disk_cache import DiskCache
from tools import on_a_small_disk

CONTENT = weights()
SIZE = 1_000 + len(CONFIG)
ALL = [(0, NBYTES)]
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DiskWorld]:
    with opened(tmp_path / "cache") as world:
        yield world
    nothing_odd(tmp_path / "cache")


Two = tuple[DiskWorld, DiskWorld]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    """Two caches in this process, which are to each other as two processes' are.

    There is room for three adapters.
    """
    with opened(tmp_path / "cache", 3 * SIZE) as one, opened(tmp_path / "cache", 3 * SIZE) as other:
        yield one, other
    nothing_odd(tmp_path / "cache")


# -- calls that fail ------------------------------------------------------------------------------


def resumed_and_published(cache: Cache) -> None:
    """Leave a download, go on with it, publish, open, check, and remove it."""
    download = begun(cache)
    try:
        put(download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT)), CONTENT, [(5, 400_000)])
    finally:
        download.close()
    download = begun(cache)
    try:
        put(download.file(CONFIG_FILE, len(CONFIG)), CONFIG, [(0, len(CONFIG))])
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        file.reader().close()
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


@pytest.mark.parametrize(
    ("code", "names"),
    [
        pytest.param(errno.EIO, CHANGES + LOOKS, marks=pytest.mark.slow),
        (errno.ENOSPC, ("mkdir", "pwritev", "write", "posix_fallocate", "fsync", "rename")),
        pytest.param(errno.EMFILE, ("open", "dup", "listdir", "scandir"), marks=pytest.mark.slow),
    ],
    ids=["EIO", "ENOSPC", "EMFILE"],
)
def test_whatever_call_fails_the_next_fetch_is_right(
    tmp_path: Path, code: int, names: tuple[str, ...]
) -> None:
    calls = Calls(names)
    with opened(tmp_path / "first") as world, calls.counted():
        resumed_and_published(world.cache)
    assert {*names, "flock"} == set(calls.made)
    failed, folder = 0, tmp_path / "cache"
    for at, call in enumerate(calls.made, 1):
        with opened(folder) as world:
            unused = open_below(folder)
            with failing(names, at, code).counted():
                try:
                    resumed_and_published(world.cache)
                except LoraxError as error:
                    failed += 1
                    full = code in FULL and isinstance(error, CapacityError)
                    assert full or type(error) is FetchError, (at, call, error)
                    assert error.retryable
            assert open_below(folder) == unused, (at, call)
            assert world.cache.remove(KEY), (at, call)
            resumed_and_published(world.cache)
            assert below(folder) == set(), (at, call)
    nothing_odd(folder)
    assert failed > len(calls.made) // 2


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_cache_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path, code: int) -> None:
    calls = Calls(CHANGES + LOOKS)
    with calls.counted():
        DiskCache(tmp_path / "first", 1, policy("lru")).close()
    failed = 0
    for at in range(1, len(calls.made) + 1):
        with failing(CHANGES + LOOKS, at, code).counted():
            try:
                DiskCache(tmp_path / str(at), 1, policy("lru")).close()
            except (ConfigError, FetchError):
                failed += 1
        assert open_below(tmp_path) == []
    assert failed > len(calls.made) // 2


def test_what_is_on_a_read_only_file_system_is_served(world: DiskWorld) -> None:
    keep(world.cache, KEY, b"abc")
    calls = Calls(CHANGES)

    def refuse(name: str) -> None:
        if name in {"mkdir", "utime", "rename", "unlink", "write"}:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    calls.before = refuse
    with calls.counted():
        assert read_back(world.cache) == b"abc"
        with pytest.raises(FetchError, match="EROFS.*another cache_dir"):
            begun(world.cache, key(1))


def test_bytes_that_could_not_be_written_are_missing(world: DiskWorld) -> None:
    download = begun(world.cache)
    file = download.file(WEIGHTS_FILE, 10)
    with failing(("pwritev",), 1, errno.EIO).counted(), pytest.raises(FetchError, match="EIO"):
        put(file, bytes(10), [(0, 10)])
    assert file.missing() == [(0, 10)]
    download.discard()


# -- what is on the disk before what --------------------------------------------------------------


def made(calls: Calls, *names: str) -> list[str]:
    return [name for name in calls.made if name in names]


def test_all_is_on_the_disk_before_it_is_published(world: DiskWorld) -> None:
    """Bytes, record and names; then the rename, and that too."""
    download = begun(world.cache)
    for role in (CONFIG_FILE, WEIGHTS_FILE):
        put(download.file(role, 5), b"abcde", [(0, 5)])
    calls = Calls(CHANGES)
    with calls.counted():
        entry = download.publish()
    assert made(calls, "fsync", "rename", "write") == [
        *("fsync", "fsync", "write", "fsync", "fsync", "rename", "fsync")
    ]
    entry.close()


def test_what_is_left_is_on_the_disk_before_it_is_trusted(world: DiskWorld) -> None:
    """Bytes, then the map that says so, then names. Who goes on revokes that at once."""
    download = begun(world.cache)
    put(download.file(WEIGHTS_FILE, 5), b"abcde", [(0, 5)])
    calls = Calls(CHANGES)
    with calls.counted():
        download.close()
    assert made(calls, "fsync", "pwritev") == ["fsync", "pwritev", "fsync", "fsync"]
    download, calls = begun(world.cache), Calls(CHANGES)
    with calls.counted():
        assert download.file(WEIGHTS_FILE, 5).resumed
    assert made(calls, "fsync", "pwritev") == ["pwritev", "fsync"]
    download.discard()


def test_a_map_goes_before_the_bytes_that_it_tells_of(world: DiskWorld) -> None:
    left(world.cache, KEY, CONTENT, ALL)
    download = begun(world.cache)
    calls = Calls(("unlink", "ftruncate"))
    with calls.counted():
        download.file(WEIGHTS_FILE, NBYTES - 1)
    assert made(calls, "unlink", "ftruncate")[:2] == ["unlink", "ftruncate"]
    download.discard()


@pytest.mark.parametrize("damage", [b"", b"LRXCHNK2", b"x" * 41])
def test_what_was_left_and_damaged_never_becomes_an_entry(world: DiskWorld, damage: bytes) -> None:
    """Whichever of its files it is: what is not believed is fetched again."""
    for number in range(2):
        left(world.cache, KEY, CONTENT, ALL)
        (folder,) = (world.folder / "partials").iterdir()
        sorted(folder.glob("adapter*"))[number].write_bytes(damage)
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        put(file, CONTENT, file.missing())
        download.publish().close()
        assert read_back(world.cache, check=True) == CONTENT
        assert world.cache.remove(KEY)


# -- full disks -----------------------------------------------------------------------------------


def test_a_file_over_the_process_limit(world: DiskWorld) -> None:
    download, before = begun(world.cache), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(CapacityError, match="EFBIG.*RLIMIT_FSIZE") as raised:
            download.file(WEIGHTS_FILE, NBYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (raised.value.retryable, raised.value.stage) == (True, "fetch")
    download.close()
    assert below(world.folder) == set()
    keep(world.cache, KEY, CONTENT)


SMALL_DISK = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_disk_cache_failures import it_goes_on_once_there_is_room
it_goes_on_once_there_is_room(Path(sys.argv[1]))
"""


def it_goes_on_once_there_is_room(folder: Path) -> None:
    """Of 2 MiB. What was written stays, and is gone on with when there is room again."""
    with opened(folder / "cache") as world:
        keep(world.cache, key(0), bytes(500_000))
        download = begun(world.cache)
        with pytest.raises(CapacityError, match=r"ENOSPC.*disk is full"):
            download.file(WEIGHTS_FILE, 1_700_000)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        put(file, CONTENT, ALL)
        with (folder / "other").open("wb", buffering=0) as other, suppress(OSError):
            while True:
                other.write(bytes(4096))
        with pytest.raises(CapacityError, match=r"publish.*ENOSPC"):
            download.publish()
        download.close()
        (folder / "other").unlink()
        download = begun(world.cache)
        assert download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT)).missing() == []
        download.publish().close()
        assert read_back(world.cache) == CONTENT
        assert is_there(world.cache, key(0))
    nothing_odd(folder / "cache")


IO = Path(__file__).parent
PATHS = [str(IO), str(IO.parent), str(IO.parent.parent), str(IO.parent.parent / "kernels")]


@pytest.mark.slow
@pytest.mark.needs("unshare")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    script = [sys.executable, "-c", SMALL_DISK, str(tmp_path), *PATHS]
    command = [*on_a_small_disk(tmp_path), *script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- file systems without locks -------------------------------------------------------------------


def without_locks(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def unsupported(fd: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", unsupported)


def there(world: DiskWorld, upto: int) -> list[int]:
    return [number for number in range(upto) if world.entry(key(number)).exists()]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_without_locks_each_downloads_into_a_folder_of_its_own(
    two: Two, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """The first to end is what both have."""
    without_locks(monkeypatch, code)
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
    without_locks(monkeypatch, errno.ENOLCK)
    cache = two[0].cache
    held = stored(cache, key(0), bytes(1_000))
    download = begun(cache, key(1))
    download.file(WEIGHTS_FILE, SIZE)
    assert isinstance(cache.try_begin(key(1), SCOPE), int)
    for number in range(2, 4):
        keep(cache, key(number), bytes(1_000))
    assert there(two[0], 4) == [0, 3]
    assert not cache.remove(key(0))
    assert not cache.remove(key(1))
    assert content_of(held) == bytes(1_000)
    download.close()
    held.close()


# -- several processes ----------------------------------------------------------------------------


def aged(world: DiskWorld, *numbers: int) -> None:
    """Used long ago, the first one longest."""
    for place, number in enumerate(numbers):
        at = time.time() - 1_000 + place
        os.utime(world.entry(key(number)), (at, at))


def test_the_budget_is_that_of_the_folder(two: Two) -> None:
    one, other = two
    for number, world in enumerate((one, other, one, other, other, one)):
        keep(world.cache, key(number), bytes(1_000))
        aged(one, *there(one, 6))
        assert one.cache.used() == other.cache.used() == min(3, number + 1) * SIZE
    assert there(one, 6) == [3, 4, 5]


def test_what_one_holds_the_other_does_not_evict(two: Two) -> None:
    one, other = two
    held = [stored(one.cache, key(number), bytes(1_000)) for number in range(2)]
    keep(one.cache, key(2), bytes(1_000))
    aged(one, 0, 1, 2)
    keep(other.cache, key(3), bytes(1_000))
    assert there(one, 4) == [0, 1, 3]
    for nbytes, words in ((2 * SIZE, "in use"), (3 * SIZE + 1, "budget")):
        download = begun(other.cache, key(4))
        with pytest.raises(CapacityError, match=words) as raised:
            download.file(WEIGHTS_FILE, nbytes)
        assert raised.value.retryable is (words == "in use")
        assert raised.value.stage == "fetch"
        download.close()
    assert not other.cache.remove(key(0))
    for entry in held:
        assert content_of(entry) == bytes(1_000)
        entry.close()
    assert other.cache.remove(key(0))


def test_what_one_downloads_the_other_does_not_drop(two: Two) -> None:
    """What it left the other may drop, or go on with."""
    one, other = two
    download = begun(one.cache, key(0))
    file = download.file(WEIGHTS_FILE, 2 * SIZE)
    late = begun(other.cache, key(1))
    with pytest.raises(CapacityError, match="in use"):
        late.file(WEIGHTS_FILE, SIZE + 1)
    put(late.file(WEIGHTS_FILE, SIZE), bytes(SIZE), [(0, SIZE)])
    late.close()
    assert not other.cache.remove(key(0))
    put(file, bytes(2 * SIZE), [(0, 2 * SIZE)])
    download.close()
    download = begun(other.cache, key(0))
    assert download.file(WEIGHTS_FILE, 2 * SIZE).missing() == []
    late = begun(one.cache, key(2))
    late.file(WEIGHTS_FILE, SIZE)
    assert one.cache.used() == 3 * SIZE
    late.close()
    download.publish().close()
    assert there(one, 3) == [0]


def test_what_one_has_opened_the_other_does_not_remove(two: Two) -> None:
    one, other = two
    keep(one.cache, KEY, b"abc")
    entry = other.cache.open(KEY, check=True)
    assert entry is not None
    assert content_of(entry) == b"abc"
    assert not one.cache.remove(KEY)
    entry.close()
    assert one.cache.remove(KEY)


def at_first_lock(act: Any) -> Calls:
    """Calls, before whose first `flock` another process acts."""
    calls = Calls(("open",))

    def before(name: str) -> None:
        if name == "flock":
            calls.before = lambda name: None
            act()

    calls.before = before
    return calls


def test_what_is_published_just_before_one_may_begin_is_taken(two: Two) -> None:
    """And it is nobody's to download then."""
    one, other = two
    download = begun(one.cache)
    put(download.file(WEIGHTS_FILE, 5), b"abcde", [(0, 5)])
    with at_first_lock(lambda: download.publish().close()).counted():
        entry = other.cache.try_begin(KEY, SCOPE)
    assert hasattr(entry, "record")
    entry.close()  # type: ignore[union-attr]
    assert one.cache.remove(KEY)
    begun(other.cache).close()


def test_of_two_that_begin_at_the_same_moment_one_downloads(two: Two) -> None:
    """Also where the one before ends just before the other looks."""
    one, other = two
    with at_first_lock(begun(one.cache).close).counted():
        second = other.cache.try_begin(KEY, SCOPE)
    assert not isinstance(second, int)
    assert isinstance(one.cache.try_begin(KEY, SCOPE), int), "it is downloaded now"
    second.close()


def test_what_is_replaced_just_before_one_leases_it_stays(two: Two) -> None:
    one, other = two
    keep(one.cache, KEY, b"abc")

    def replace() -> None:
        assert other.cache.remove(KEY)
        keep(other.cache, KEY, b"abc")

    with at_first_lock(replace).counted():
        assert one.cache.open(KEY) is None
    assert is_there(one.cache, KEY)


def test_a_process_that_hangs_is_not_waited_for(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that hangs finds, when it is back, that the other was faster."""
    monkeypatch.setattr(disk_cache, "PATIENCE_SECONDS", 0.1)
    one, other = two
    hanging = begun(one.cache)
    file = hanging.file(WEIGHTS_FILE, 1_000)
    put(file, CONTENT, [(0, 10)])
    entry = stored(other.cache, KEY, CONTENT[:1_000])
    put(file, CONTENT, [(10, 1_000)])
    theirs = hanging.publish()
    assert {file.digest for file in theirs.record.files} <= {
        file.digest for file in entry.record.files
    }
    assert content_of(theirs) == CONTENT[:1_000]
    theirs.close()
    entry.close()


# -- processes that are killed --------------------------------------------------------------------


def run_script(what: str, base: Path, locks: str = "flock") -> Any:
    done = subprocess.run(
        [sys.executable, IO / "cache_processes.py", what, base, locks],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def chunks_in(spans: list[list[int]]) -> set[int]:
    """The chunks that these spans have written as a whole, by hand."""
    written = bytearray(NBYTES)
    for start, stop in spans:
        written[start:stop] = b"\1" * (stop - start)
    cut = [written[at : at + CHUNK_BYTES] for at in range(0, NBYTES, CHUNK_BYTES)]
    return {number for number, chunk in enumerate(cut) if all(chunk)}


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["flock", "none"])
def test_killed_after_any_call_a_second_process_goes_on(tmp_path: Path, locks: str) -> None:
    """Without locks it begins anew, and what was left stays until it is cleaned up."""
    outcomes = run_script("kills", tmp_path, locks)
    assert {"open", "mkdir", "pwritev", "posix_fallocate", "fsync", "rename", "unlink"} <= {
        outcome["call"] for outcome in outcomes
    }
    for outcome in outcomes:
        assert outcome["second"] == 0, outcome
        assert outcome["left"] == outcomes[0]["left"], outcome
        fetched = {
            number
            for start, stop in outcome["fetched"]
            for number in range(start // CHUNK_BYTES, -(-stop // CHUNK_BYTES))
        }
        if locks == "flock":
            assert not fetched & chunks_in(outcome["written"]), outcome
    assert [] in [outcome["fetched"] for outcome in outcomes]  # all was here, or published


@pytest.mark.slow
@pytest.mark.parametrize("rebooted", [False, True])
def test_bytes_of_a_killed_process_are_trusted_unless_the_machine_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rebooted: bool
) -> None:
    """They were never brought to the disk: after another boot, they need not be there."""
    run_script("left", tmp_path)
    read_text = Path.read_text

    def another_boot(path: Path, *given: Any) -> str:
        is_id = str(path) == "/proc/sys/kernel/random/boot_id"
        return "0a" * 16 if is_id else read_text(path, *given)

    if rebooted:
        monkeypatch.setattr(Path, "read_text", another_boot)
    with opened(tmp_path) as world:
        download = begun(world.cache)
        assert download.file(WEIGHTS_FILE, NBYTES).missing() == (ALL if rebooted else [])
        download.discard()


@pytest.mark.slow
@pytest.mark.parametrize("locks", ["flock", "none"])
def test_anything_at_any_time(tmp_path: Path, locks: str) -> None:
    """Fetches, evictions, kills and giving up, in six processes at a time on a small budget."""
    outcome = run_script("adventures", tmp_path, locks)
    assert set(outcome["codes"]) <= {0, -9}, outcome
    assert {0, -9} <= set(outcome["codes"])
    told = {text for text in outcome["told"] if "do not fit" not in text}
    assert "had" in told
    assert outcome["problems"] == []
    assert outcome["partials"] == 0
    budget, largest = 1_000_000, 560_000
    assert outcome["used"] <= budget
    if locks == "flock":
        assert told == {"had"}
        assert outcome["most"] <= budget
    else:
        assert all("again" in text for text in told - {"had"})
        assert outcome["most"] <= budget + 5 * largest
