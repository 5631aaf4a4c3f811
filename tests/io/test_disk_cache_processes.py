"""Several processes on one disk cache: they respect each other, are killed at every call, anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_inputs import (
    CONFIG,
    KEY,
    NBYTES,
    SCOPE,
    begun,
    content_of,
    is_there,
    keep,
    key,
    put,
    stored,
    weights,
)
from counted_calls import Calls
from disk_cache_world import DiskWorld, nothing_odd, opened

from lorax_async.core.cache_names import WEIGHTS_FILE
from lorax_async.core.chunk_map import CHUNK_BYTES
from lorax_async.errors import CapacityError
from lorax_async.io import disk_cache
from lorax_async.io.cache import entries, locks

IO = Path(__file__).parent

PATHS = [str(IO), str(IO.parent), str(IO.parent.parent), str(IO.parent.parent / "kernels")]

BUDGET = 1_000_000

LARGEST = 560_000


def run_script(what: str, base: Path, locks: str = "flock") -> Any:
    done = subprocess.run(
        [sys.executable, IO / "cache_processes.py", what, base, locks],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


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


# -- two caches in this process are to each other as two processes' are ---------------------------


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


def test_what_is_published_just_before_one_may_begin_is_taken(two: Two) -> None:
    """And it is nobody's to download then."""
    one, other = two
    download, calls = begun(one.cache), Calls(("open",))
    put(download.file(WEIGHTS_FILE, 5), b"abcde", [(0, 5)])

    def publish(name: str) -> None:
        if name == "flock" and calls.made.count("flock") == 1:
            download.publish().close()

    calls.before = publish
    with calls.counted():
        entry = other.cache.try_begin(KEY, SCOPE)
    assert hasattr(entry, "record")
    entry.close()  # type: ignore[union-attr]
    assert one.cache.remove(KEY)
    begun(other.cache).close()


def test_of_two_that_begin_at_the_same_moment_one_downloads(two: Two) -> None:
    """Also where the one before ends between the other's opening a lock's file and locking it."""
    one, other = two
    first, calls = begun(one.cache), Calls(("open",))

    def end(name: str) -> None:
        if name == "flock":
            first.close()

    calls.before = end
    with calls.counted():
        second = other.cache.try_begin(KEY, SCOPE)
    assert not isinstance(second, int)
    assert isinstance(one.cache.try_begin(KEY, SCOPE), int), "it is downloaded now"
    second.close()


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


def test_a_process_that_hangs_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that hangs finds, when it is back, that the other was faster."""
    monkeypatch.setattr(disk_cache, "PATIENCE_SECONDS", 0.1)
    content = weights()
    with opened(tmp_path / "cache") as world, opened(tmp_path / "cache") as other:
        hanging = begun(world.cache)
        file = hanging.file(WEIGHTS_FILE, NBYTES)
        put(file, content, [(0, 1_000)])
        entry = stored(other.cache, KEY, content)
        put(file, content, [(1_000, NBYTES)])
        theirs = hanging.publish()
        assert theirs.record == entry.record
        assert content_of(theirs) == content
        theirs.close()
        entry.close()


# -- real processes -------------------------------------------------------------------------------


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
        return "0" * 32 if is_id else read_text(path, *given)

    if rebooted:
        monkeypatch.setattr(Path, "read_text", another_boot)
    with opened(tmp_path) as world:
        download = begun(world.cache)
        missing = download.file(WEIGHTS_FILE, NBYTES).missing()
        assert missing == ([(0, NBYTES)] if rebooted else [])
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
    assert outcome["used"] <= BUDGET
    if locks == "flock":
        assert told == {"had"}
        assert outcome["most"] <= BUDGET
    else:
        assert all("again" in text for text in told - {"had"})
        assert outcome["most"] <= BUDGET + 5 * LARGEST
