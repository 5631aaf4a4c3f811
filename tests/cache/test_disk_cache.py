"""The disk cache: contents, budget, users, damage, privacy; failing calls, full disks, kills."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from threading import Event
from time import sleep
from typing import Any

import pytest
from counted_calls import CHANGES, LOOKS, Calls, failing
from disk_cache_world import (
    CONFIG,
    KEY,
    NBYTES,
    SCOPE,
    DiskWorld,
    begin,
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
    removed,
    sha256,
    stored,
    weights,
)
from source_inputs import read, read_rows, rows_of
from tools import on_a_small_disk

from lorax_async.cache import disk_cache
from lorax_async.cache.base import CacheEntry, CacheKey, LeftoverError
from lorax_async.cache.directory import Folder
from lorax_async.cache.disk_cache import DiskCache, DiskDownload
from lorax_async.cache.entries import MAX_SCOPES, DiskEntry
from lorax_async.cache.partials import CHUNK_BYTES
from lorax_async.errors import CapacityError, ConfigError, FetchError, IntegrityError, InternalError
from lorax_async.formats.digests import Digest
from lorax_async.formats.peft_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from lorax_async.formats.spans import ByteSpan
from lorax_async.lifecycle.policies import policy

Patch = pytest.MonkeyPatch

CONTENT = weights()
SIZE = 1_000 + len(CONFIG)
ALL = [(0, NBYTES)]
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DiskWorld]:
    (tmp_path / "beside").mkdir()
    with opened(tmp_path / "cache") as world:
        yield world
    nothing_odd(tmp_path / "cache")
    assert sorted(os.listdir(tmp_path)) == ["beside", "cache"]
    assert os.listdir(tmp_path / "beside") == []


Two = tuple[DiskWorld, DiskWorld]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    """Two caches in this process, which are to each other as two processes' are.

    There is room for three adapters.
    """
    with opened(tmp_path / "cache", 3 * SIZE) as one, opened(tmp_path / "cache", 3 * SIZE) as other:
        yield one, other
    nothing_odd(tmp_path / "cache")


class TestContents:
    def test_bytes_in_any_order_become_a_folder_of_plain_files(self, world: DiskWorld) -> None:
        assert world.cache.open(KEY) is None
        assert removed(world.cache, KEY)
        download = begun(world.cache)
        config = download.file(CONFIG_FILE, len(CONFIG))
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        assert (file.nbytes, file.missing(), file.resumed) == (NBYTES, ALL, False)
        put(file, CONTENT, [(CHUNK_BYTES, NBYTES - 7)])
        assert file.missing() == [(0, CHUNK_BYTES), (NBYTES - 7, NBYTES)]
        put(file, CONTENT, file.missing()[::-1])
        config.write(0, memoryview(b""))
        put(config, CONFIG, config.missing())
        assert world.cache.open(KEY) is None
        published = download.publish()
        opened = world.cache.open(KEY)
        assert opened is not None
        for entry in (published, opened):
            record, digests = entry.record, [Digest("transport", sha256(CONFIG).value)]
            assert (content_of(entry, CONFIG_FILE), content_of(entry)) == (CONFIG, CONTENT)
            assert [file.name for file in record.files] == [CONFIG_FILE, WEIGHTS_FILE]
            assert [file.digest for file in record.files] == [*digests, sha256(CONTENT)]
            assert record.nbytes == NBYTES + len(CONFIG)
            assert (record.source, record.version) == (KEY.source, KEY.version)
            folder = Path(entry.folder)
            assert (folder / "adapter_config.json").read_bytes() == CONFIG
            assert (folder / "adapter_model.safetensors").read_bytes() == CONTENT
            entry.close()
            entry.close()

    def test_wrong_bytes_leave_nothing(self, world: DiskWorld) -> None:
        with closing(begun(world.cache)) as download:
            file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
            put(file, CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), ALL)
            with pytest.raises(IntegrityError, match=r"model\.safetensors.*digest.*again"):
                download.publish()
        assert world.cache.open(KEY) is None
        download = begun(world.cache)
        assert download.file(WEIGHTS_FILE, NBYTES).missing() == ALL
        download.discard()

    def test_what_is_not_whole_is_not_published(self, world: DiskWorld) -> None:
        download = begun(world.cache)
        with pytest.raises(InternalError, match="without files"):
            download.publish()
        file = download.file(WEIGHTS_FILE, 10)
        with pytest.raises(InternalError, match="twice"):
            download.file(WEIGHTS_FILE, 10)
        put(file, bytes(10), [(0, 9)])
        with pytest.raises(InternalError, match="before all of it"):
            download.publish()
        put(file, bytes(10), [(9, 10)])
        for start in (10, 9):
            with pytest.raises(IntegrityError, match="after its 10 bytes"):
                file.write(start, memoryview(b"ab"))
        download.publish().close()
        for late in (download.publish, lambda: download.file(CONFIG_FILE, 1)):
            with pytest.raises(InternalError, match="ended"):
                late()
        download.discard()
        assert is_there(world.cache, KEY)

    def test_what_is_here_can_be_read_already_and_still(self, world: DiskWorld) -> None:
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES)
        reader = file.reader()
        put(file, CONTENT, [(100, 200)])
        assert reader.nbytes == NBYTES
        assert read(reader, 110, 200) == CONTENT[110:200]
        apart = ByteSpan(110, 115, 7, 11)
        assert read_rows(reader, apart) == rows_of(CONTENT, apart)
        for start, stop in ((99, 101), (150, 201), (300, 301)):
            with pytest.raises(InternalError, match="too early"):
                read(reader, start, stop)
        with pytest.raises(IntegrityError, match="ends before byte"):
            read(reader, NBYTES - 1, NBYTES + 1)
        assert file.hash_along() == 0
        put(file, CONTENT, file.missing())
        assert file.hash_along() == NBYTES
        download.publish().close()
        assert read(reader, 0, NBYTES) == CONTENT
        os.truncate(world.entry(KEY) / WEIGHTS_FILE, 150)
        with pytest.raises(IntegrityError, match=r"was cut.*again"):
            read(reader, 110, 200)
        reader.close()
        reader.close()
        with pytest.raises(FetchError, match="closed"):
            read(reader, 0, 1)

    def test_a_download_goes_on_where_it_was_left(self, world: DiskWorld) -> None:
        """Of each end of a span at most the rest of its chunk is lost."""
        with closing(begun(world.cache)) as download:
            put(download.file(CONFIG_FILE, len(CONFIG)), CONFIG, [(0, len(CONFIG))])
            put(download.file(INDEX_FILE, 3), b"abc", [(0, 3)])
            spans = [(10, 2 * CHUNK_BYTES + 10), (3 * CHUNK_BYTES, NBYTES)]
            put(download.file(WEIGHTS_FILE, NBYTES), CONTENT, spans)
            download.close()
        assert world.cache.open(KEY) is None
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        assert (file.resumed, file.expected) == (True, sha256(CONTENT))
        missing = file.missing()
        assert CHUNK_BYTES <= sum(stop - start for start, stop in missing) <= 2 * CHUNK_BYTES
        assert all(stop <= 3 * CHUNK_BYTES for _, stop in missing)
        assert download.file(CONFIG_FILE, len(CONFIG)).missing() == []
        put(file, CONTENT, missing)
        with closing(download.publish()) as entry:
            assert (content_of(entry, CONFIG_FILE), content_of(entry)) == (CONFIG, CONTENT)
            assert [file.name for file in entry.record.files] == [CONFIG_FILE, WEIGHTS_FILE]
            with pytest.raises(InternalError, match=r"index\.json"):  # it was not asked for again
                entry.reader(INDEX_FILE)

    def test_what_was_left_is_compared_with_what_comes_again(self, world: DiskWorld) -> None:
        left(world.cache, KEY, CONTENT, [(0, 2 * CHUNK_BYTES)])
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES)
        assert (file.resumed, file.expected) == (True, None)
        put(file, CONTENT, [(0, 10), (CHUNK_BYTES - 5, 2 * CHUNK_BYTES + 5)])
        other = bytearray(CONTENT)
        other[CHUNK_BYTES] ^= 1
        with pytest.raises(LeftoverError, match="not what the source has now"):
            put(file, bytes(other), [(CHUNK_BYTES - 5, CHUNK_BYTES + 5)])
        put(file, CONTENT, file.missing())
        download.publish().close()
        assert read_back(world.cache) == CONTENT


def present(world: DiskWorld, upto: int) -> list[int]:
    return [number for number in range(upto) if world.entry(key(number)).exists()]


class TestRoom:
    def test_the_least_recently_used_goes(self, two: Two) -> None:
        """Every file counts; as many go as must. The budget is that of the folder."""
        one, other = two[0].cache, two[1].cache
        for number, cache in enumerate((one, other, one)):
            keep(cache, key(number), bytes(1_000))
            assert (
                one.budget.used()
                == other.budget.used()
                == one.budget.last_used
                == (number + 1) * SIZE
            )
        assert is_there(other, key(0))
        keep(other, key(3), bytes(1_000))
        assert present(two[0], 4) == [0, 2, 3]
        keep(one, key(4), bytes(2 * SIZE - len(CONFIG)))
        assert present(two[1], 5) == [3, 4]
        assert one.budget.used() == other.budget.used() == 3 * SIZE
        assert removed(one, key(4))
        assert other.budget.used() == SIZE

    def test_gdsf_weighs_what_a_fetch_costs(self, tmp_path: Path) -> None:
        """Of equal use the large one goes: (32 MiB + n) / n falls with n. An empty one is one."""
        with opened(tmp_path / "cache", 3 * SIZE, "gdsf") as world:
            for number, nbytes in enumerate((0, 2 * SIZE - 3 * len(CONFIG), 500)):
                keep(world.cache, key(number), bytes(nbytes))
            assert is_there(world.cache, key(0))
            keep(world.cache, key(3), bytes(1_000))
            assert present(world, 4) == [0, 2, 3]

    def test_is_reserved_by_one_only(self, tmp_path: Path, monkeypatch: Patch) -> None:
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


class TestSharing:
    def test_others_wait_and_have_what_was_published(self, world: DiskWorld) -> None:
        download = begun(world.cache)
        with ThreadPoolExecutor(3) as threads:
            others = [threads.submit(begin, world.cache, KEY, "other") for _ in range(3)]
            put(download.file(WEIGHTS_FILE, 10), bytes(10), [(0, 10)])
            assert not wait(others, timeout=0.05).done
            download.publish().close()
            for other in others:
                entry = other.result()
                assert entry.record.name == KEY.name  # type: ignore[union-attr]  # an entry
                entry.close()

    def test_whoever_waits_may_go_on_with_what_was_left(self, world: DiskWorld) -> None:
        """Other keys are not waited for."""
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, 10), bytes(10), [(0, 10)])
        keep(world.cache, key(1), b"abc")
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(begun, world.cache)
            with pytest.raises(TimeoutError):
                other.result(0.03)
            download.close()
            download = other.result()
        assert download.file(WEIGHTS_FILE, 10).missing() == []
        download.publish().close()

    def test_an_entry_knows_who_was_granted_it(self, world: DiskWorld) -> None:
        """Of many, the last ask the source again."""
        entry = stored(world.cache, KEY, b"abc")
        assert entry.last_access("other") is None
        entry.record_access("other")
        ages = [entry.last_access(scope) for scope in (SCOPE, "other")]
        assert all(age is not None and 0 <= age < 60 for age in ages)
        assert {entry.last_access(scope) for scope in ("", "somebod", "../record.json")} == {None}
        for number in range(MAX_SCOPES):
            entry.record_access(str(number))
        assert entry.last_access("0") is not None
        assert entry.last_access(str(MAX_SCOPES - 1)) is None
        entry.close()

    @pytest.mark.parametrize("promised", [False, True])
    def test_downloads_of_one_version_must_be_equal(self, world: DiskWorld, promised: bool) -> None:
        """The second one is refused, and so what it has read is never taken for the first's."""
        downloads: list[Any] = [begun(world.cache)]
        downloads += [world.cache.try_begin(KEY, SCOPE, alone=True) for _ in range(2)]
        for download, content in zip(downloads, (b"abc", b"abd", b"abc"), strict=True):
            expected = sha256(content) if promised else None
            put(download.file(WEIGHTS_FILE, 3, expected), content, [(0, 3)])
        downloads[0].publish().close()
        with pytest.raises(IntegrityError, match="other bytes of the same version"):
            downloads[1].publish()
        downloads[2].publish().close()
        for download in downloads:
            download.close()
        assert read_back(world.cache) == b"abc"


def reboot(monkeypatch: Patch) -> None:
    read_text = Path.read_text

    def another_boot(path: Path, *given: Any) -> str:
        is_id = str(path) == "/proc/sys/kernel/random/boot_id"
        return "0a" * 16 if is_id else read_text(path, *given)

    monkeypatch.setattr(Path, "read_text", another_boot)


class TestDamage:
    def test_altered_bytes_are_noticed(self, world: DiskWorld) -> None:
        for content, check in ((b"abcd", False), (b"ab", False), (b"abcd", True), (b"abd", True)):
            keep(world.cache, KEY, b"abc")
            assert read_back(world.cache, check=True) == b"abc"
            world.alter(KEY, WEIGHTS_FILE, content)
            assert world.cache.open(KEY, check=check) is None
            assert not is_there(world.cache, KEY)
        for content, kept in ((b"abd", False), (b"abc", True)):
            keep(world.cache, KEY, b"abc")
            (world.entry(KEY) / WEIGHTS_FILE).write_bytes(content)
            assert is_there(world.cache, KEY) is kept
        world.entry(KEY).rename(world.entry(key(1)))
        assert world.cache.open(key(1)) is None, "it is another one's"

    def test_what_was_hashed_is_verified_until_it_is_touched_or_the_machine_restarts(
        self, world: DiskWorld, monkeypatch: Patch
    ) -> None:
        def verified(*, check: bool = False) -> bool:
            with opened(world.folder) as other:
                entry = other.cache.open(KEY, check=check)
                assert entry is not None
                entry.close()
                return entry.is_verified

        keep(world.cache, KEY, b"abc")
        assert verified()
        world.alter(KEY, WEIGHTS_FILE, b"abc")
        assert not verified()
        assert not verified(check=True), "it may be written to again within the same tick"
        sleep(0.03)
        assert verified(check=True)
        assert verified()
        for half in (b"", b"0" * 64):
            (world.entry(KEY) / "verified").write_bytes(half)
            assert not verified()
        assert verified(check=True)
        reboot(monkeypatch)
        assert not verified()

    def test_a_leased_entry_that_was_damaged_is_replaced(self, world: DiskWorld) -> None:
        held = stored(world.cache, KEY, b"abc")
        reader = held.reader(WEIGHTS_FILE)
        world.alter(KEY, WEIGHTS_FILE, b"longer")
        for content in (b"right", b"newer"):
            keep(world.cache, KEY, content)
            with pytest.raises(IntegrityError, match="again"):
                reader.read_into([memoryview(bytearray(3))], 0)
            assert read_back(world.cache) == content
            for _ in range(2):
                world.cache.invalidate(KEY)
            assert not is_there(world.cache, KEY)
        assert held.last_access(SCOPE) is None
        reader.close()
        held.close()

    @pytest.mark.parametrize("removed", ["partials/*", "*/", "."])
    @pytest.mark.parametrize("end", ["publish", "discard", "close"])
    def test_a_removed_download_says_so(self, world: DiskWorld, end: str, removed: str) -> None:
        """It leaves nothing, and the next one begins anew."""
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, 3), b"abc", [(0, 3)])
        for folder in world.folder.glob(removed) if removed != "." else [world.folder]:
            shutil.rmtree(folder)
        if end == "discard":
            download.discard()
        if end == "publish":
            with pytest.raises(FetchError, match="removed.*load it again"):
                download.publish()
        download.close()
        keep(world.cache, KEY, b"def")
        assert is_there(world.cache, KEY)

    @pytest.mark.parametrize("moved", [False, True], ids=["removed", "moved away"])
    def test_a_removed_folder_is_made_again(
        self, world: DiskWorld, tmp_path: Path, moved: bool
    ) -> None:
        """All threads use the new one, and nothing is written to one that was moved away."""
        held, of = stored(world.cache, key(9), b"abc"), range(8)
        opened_before, unopened = held.reader(WEIGHTS_FILE), held.reader(WEIGHTS_FILE)
        assert read(opened_before, 0, 3) == b"abc"
        download = begun(world.cache, key(0))
        put(download.file(WEIGHTS_FILE, 3), b"abc", [(0, 3)])
        beside = tmp_path / "beside" / "moved"
        world.folder.rename(beside)

        def times() -> dict[Path, int]:
            return {path: path.lstat().st_mtime_ns for path in (beside / "entries").rglob("*")}

        before = times()
        if not moved:
            shutil.rmtree(beside)
        with ThreadPoolExecutor(len(of)) as threads:
            list(threads.map(lambda n: keep(world.cache, key(n), b"%d" % n), of))
            contents = list(threads.map(lambda n: read_back(world.cache, key(n)), of))
        assert contents == [b"%d" % n for n in of]
        assert present(world, 10) == list(of)
        if moved:
            assert read(opened_before, 0, 3) == b"abc"
        for gone in (unopened,) if moved else (unopened, opened_before):
            with pytest.raises(IntegrityError, match="again"):
                read(gone, 0, 3)
        with pytest.raises(FetchError, match="removed.*load it again"):
            download.publish()
        for each in (opened_before, unopened, download, held):
            each.close()
        assert open_below(tmp_path) == []
        assert times() == (before if moved else {})
        shutil.rmtree(beside, ignore_errors=True)

    @pytest.mark.slow  # it waits for a lock
    def test_an_entry_that_goes_while_it_is_opened_is_fetched_anew(
        self, world: DiskWorld, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        keep(world.cache, KEY, b"abc")
        with opened(world.folder) as other, monkeypatch.context() as patch:

            def is_named(self: Folder, name: str, within: Folder) -> bool:
                named = is_named_still(self, name, within)
                if name == KEY.name:
                    other.cache.invalidate(KEY)
                return named

            is_named_still = Folder.is_named
            patch.setattr(Folder, "is_named", is_named)
            assert world.cache.open(KEY) is None
        keep(world.cache, KEY, b"def")

    @pytest.mark.parametrize("shape", ["gone", "link", "fifo", "folder", "file"])
    def test_odd_things_are_dropped(self, world: DiskWorld, tmp_path: Path, shape: str) -> None:
        """In the place of an entry, or of a file in it."""
        beside = tmp_path / "beside"
        for name in ("", "record.json", WEIGHTS_FILE):
            keep(world.cache, KEY, b"abc")
            path = world.entry(KEY) / name
            path.rename(beside / "other")
            if shape == "link":
                path.symlink_to(beside / "other")
            elif shape == "fifo":
                os.mkfifo(path)
            elif shape == "folder":
                path.mkdir(0o700)
            elif shape == "file":
                path.touch()
            assert world.cache.open(KEY) is None
            assert below(world.folder) == set()
            assert os.listdir(beside) == ["other"]
            (shutil.rmtree if name == "" else os.unlink)(beside / "other")

    def test_weights_in_several_files_of_version_0_2_are_dropped(self, world: DiskWorld) -> None:
        """They count, so that they make room too, until they are met."""
        shards = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        for of in (key(1), key(2)):
            keep(world.cache, of, b"abc")
            folder = world.entry(of)
            record = json.loads((folder / "record.json").read_text())
            config, weights = record["files"]
            (folder / WEIGHTS_FILE).rename(folder / shards[0])
            (folder / shards[1]).write_bytes(b"abc")
            (folder / INDEX_FILE).write_bytes(b"abc")
            others = [weights | {"file": name} for name in (INDEX_FILE, *shards)]
            record["files"] = [config, *others]
            (folder / "record.json").write_text(json.dumps(record))
        listed = [(each.record, each.nbytes) for each in disk_cache.ls(world.cache)]
        assert listed == [(None, len(CONFIG) + 9)] * 2
        assert world.cache.open(key(1)) is None
        assert below(world.folder) == {f"entries/{key(2).name}"} | {
            f"entries/{key(2).name}/{path.name}" for path in world.entry(key(2)).iterdir()
        }
        disk_cache.gc(world.cache)
        assert below(world.folder) == set()


HOSTILE = ["../../beside/x", "/etc/passwd", "", ".", "\0", "a" * 5_000, "\ud800", "x\n.json", "~"]
HOSTILE += ["0" * 64, "record.json", "file:///etc/passwd"]


def use_all_folders(cache: DiskCache) -> None:
    cache.last_version("question")
    cache.open(KEY)
    cache.budget.used()


class TestFolder:
    @pytest.mark.parametrize("text", HOSTILE)
    def test_hostile_keys_stay_in_the_folder(self, world: DiskWorld, text: str) -> None:
        for of in (CacheKey(text, "v"), CacheKey("s", text), CacheKey(text, text)):
            entry = stored(world.cache, of, text.encode("utf-8", "replace"))
            entry.record_access(text)
            entry.close()
            assert is_there(world.cache, of)

    @pytest.mark.parametrize("mask", [0o000, 0o077])
    def test_all_is_private_whatever_the_umask(self, tmp_path: Path, mask: int) -> None:
        before = os.umask(mask)
        try:
            with opened(tmp_path / "a" / "cache") as world:
                keep(world.cache, KEY, b"abc")
                left(world.cache, key(1), b"abc", [(0, 3)])
        finally:
            os.umask(before)
        nothing_odd(tmp_path / "a" / "cache")
        assert (tmp_path / "a" / "cache").stat().st_mode & 0o777 == 0o700

    def test_must_be_this_users_alone(self, tmp_path: Path, monkeypatch: Patch) -> None:
        """It, or one inside it."""
        folder = tmp_path / "cache"
        cache = DiskCache(folder, 1, policy("lru"))
        use_all_folders(cache)
        for each in (folder, *folder.glob("*/")):
            for mode in (0o770, 0o707, 0o720, 0o702, 0o1777):
                each.chmod(mode)
                with pytest.raises(ConfigError, match="others may write.*chmod 700"):
                    use_all_folders(cache)
            each.chmod(0o700)
        if os.geteuid() == 0:
            os.chown(folder / "entries", 12_345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12_345)
        with pytest.raises(ConfigError, match="another user"):
            cache.open(KEY)
        assert open_below(tmp_path) == []

    def test_a_place_that_is_no_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ConfigError, match="cannot be opened"):
                use_all_folders(DiskCache(path, 1, policy("lru")))
        cache = DiskCache(tmp_path / "cache", 1, policy("lru"))
        use_all_folders(cache)
        (tmp_path / "beside").mkdir()
        for inside in (tmp_path / "cache").glob("*/"):
            for target in (tmp_path / "beside", tmp_path / "nowhere"):
                inside.rename(tmp_path / "kept")
                inside.symlink_to(target)
                with pytest.raises(ConfigError, match=f"'{inside.name}'"):
                    use_all_folders(cache)
                inside.unlink()
                (tmp_path / "kept").rename(inside)
        assert os.listdir(tmp_path / "beside") == []


def test_what_is_forgotten_is_closed_with_a_warning(tmp_path: Path) -> None:
    with opened(tmp_path / "cache") as world:
        makes: dict[str, Callable[[], object]] = {
            "download": lambda: begun(world.cache),
            "entry": lambda: stored(world.cache, KEY, b"abc"),
        }
        before = open_below(tmp_path)
        for name, make in makes.items():
            with pytest.warns(ResourceWarning, match=f"unclosed.*{name}"):
                make()
            assert open_below(tmp_path) == before
    assert open_below(tmp_path) == []


def test_last_versions_are_remembered_and_none_says_who_asked(world: DiskWorld) -> None:
    """For when sources cannot be asked."""
    asked = "a secret \ud800 question"
    assert world.cache.last_version(asked) is None
    world.cache.note_version(asked, "org/name", "1" * 40)
    world.cache.note_version(asked, "org/elsewhere", "2" * 40)
    with opened(world.folder) as another:
        assert another.cache.last_version(asked) == ("org/elsewhere", "2" * 40)
    (path,) = (path for path in world.folder.rglob("*") if path.is_file())
    assert "secret" not in path.name
    with failing(("rename",), 1, errno.EIO).counted(), pytest.raises(FetchError, match="EIO"):
        world.cache.note_version(asked, "org/name", "3")
    before = path.stat().st_ino
    world.cache.note_version(asked, "org/elsewhere", "2" * 40)
    assert path.stat().st_ino == before, "what is on the disk is not put at risk"
    assert world.cache.last_version(asked) == ("org/elsewhere", "2" * 40)
    for content in (b"", b"{}", b"null", b"\xff", b'{"source": 1, "version": ""}'):
        path.write_bytes(content)
        assert world.cache.last_version(asked) is None


def test_cleaning_up_removes_what_serves_nobody(world: DiskWorld) -> None:
    """Damaged entries, partial downloads, and answers about neither."""
    for number in range(2):
        keep(world.cache, key(number), b"abc")
    (world.entry(key(1)) / "record.json").unlink()
    left(world.cache, KEY, weights(), [(0, NBYTES)])
    world.cache.note_version("here?", key(0).source, key(0).version)
    world.cache.note_version("gone?", "org/elsewhere", "2" * 40)
    with closing(begun(world.cache, key(2))) as download:
        download.file(WEIGHTS_FILE, 10)
        gone = {
            each.name[:64]: (each.is_partial, each.nbytes) for each in disk_cache.gc(world.cache)
        }
        assert gone == {key(1).name: (False, 3 + len(CONFIG)), KEY.name: (True, NBYTES)}
    assert disk_cache.gc(world.cache) == []
    assert is_there(world.cache, key(0))
    assert world.cache.last_version("here?") == (key(0).source, key(0).version)
    assert world.cache.last_version("gone?") is None


def resumed_and_published(cache: DiskCache) -> None:
    """Leave a download, go on with it, publish, open, check, and remove it."""
    with closing(begun(cache)) as download:
        put(download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT)), CONTENT, [(5, 400_000)])
    with closing(begun(cache)) as download:
        put(download.file(CONFIG_FILE, len(CONFIG)), CONFIG, [(0, len(CONFIG))])
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(CONTENT))
        file.reader().close()
        put(file, CONTENT, file.missing())
        download.publish().close()
    entry = cache.open(KEY, check=True)
    assert entry is not None
    with closing(entry):
        entry.record_access("other")
        assert content_of(entry) == CONTENT
    assert removed(cache, KEY)


@pytest.mark.parametrize(
    ("code", "names"),
    [
        pytest.param(errno.EIO, CHANGES + LOOKS, marks=pytest.mark.slow),
        (errno.ENOSPC, ("mkdir", "pwritev", "write", "posix_fallocate", "fsync", "rename")),
        pytest.param(errno.EMFILE, ("open", "dup", "listdir", "scandir"), marks=pytest.mark.slow),
    ],
    ids=["EIO", "ENOSPC", "EMFILE"],
)
def test_any_call_fails_and_the_next_is_right(
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
                except (CapacityError, FetchError) as error:
                    failed += 1
                    full = code in FULL and isinstance(error, CapacityError)
                    assert full or type(error) is FetchError, (at, call, error)
                    assert error.retryable
            assert open_below(folder) == unused, (at, call)
            assert removed(world.cache, KEY), (at, call)
            resumed_and_published(world.cache)
            assert below(folder) == set(), (at, call)
    nothing_odd(folder)
    assert failed > len(calls.made) // 2


@pytest.mark.parametrize("code", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_cache_that_cannot_be_opened_leaves_nothing_open(tmp_path: Path, code: int) -> None:
    calls = Calls(CHANGES + LOOKS)
    with calls.counted():
        use_all_folders(DiskCache(tmp_path / "first", 1, policy("lru")))
    failed = 0
    for at in range(1, len(calls.made) + 1):
        with failing(CHANGES + LOOKS, at, code).counted():
            try:
                use_all_folders(DiskCache(tmp_path / str(at), 1, policy("lru")))
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


def made(names: str, act: Callable[[], object]) -> str:
    """Those of its calls that have one of the names, in order."""
    calls = Calls(CHANGES)
    with calls.counted():
        act()
    return " ".join(name for name in calls.made if name in names.split())


def test_bytes_are_on_the_disk_before_they_are_published(world: DiskWorld) -> None:
    """Whose loss would not be seen; without a record or a name, an entry is fetched again."""
    download = begun(world.cache)
    for role in (CONFIG_FILE, WEIGHTS_FILE):
        put(download.file(role, 5), b"abcde", [(0, 5)])
    assert made("fsync rename", lambda: download.publish().close()) == "fsync fsync rename"


def test_who_adds_no_file_leaves_what_was_left(world: DiskWorld) -> None:
    left(world.cache, KEY, CONTENT, ALL)
    begun(world.cache).close()
    download = begun(world.cache)
    assert download.file(WEIGHTS_FILE, NBYTES).resumed
    download.discard()


def test_a_map_goes_before_the_bytes_that_it_tells_of(world: DiskWorld) -> None:
    left(world.cache, KEY, CONTENT, ALL)
    download = begun(world.cache)
    calls = made("unlink ftruncate", lambda: download.file(WEIGHTS_FILE, NBYTES - 1))
    assert calls.startswith("unlink ftruncate")
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
        assert removed(world.cache, KEY)


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


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_file_system_without_locks_is_refused(
    world: DiskWorld, monkeypatch: Patch, code: int
) -> None:
    """An entry that is there is not served either: another process might remove it."""

    def unsupported(fd: int, how: int) -> None:
        raise OSError(code, os.strerror(code))

    keep(world.cache, KEY, b"abc")
    before = below(world.folder)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    uses: list[Callable[[], object]] = [
        lambda: world.cache.open(KEY),
        lambda: world.cache.try_begin(key(1), SCOPE),
        world.cache.budget.used,
        lambda: disk_cache.rm(world.cache, KEY.name),
        lambda: disk_cache.ls(world.cache),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match="no locks.*set cache_dir"):
            use()
    assert below(world.folder) == before


def test_nothing_is_evicted_in_vain(two: Two) -> None:
    """If files in use leave too little room, the others stay; a smaller file still fits."""
    one, other = two
    held = stored(one.cache, key(0), bytes(1_000))
    left(one.cache, key(1), bytes(1_000), [(0, 1_000)])
    keep(one.cache, key(2), bytes(1_000))
    for cache in (one.cache, other.cache):
        with (
            closing(begun(cache, key(3))) as download,
            pytest.raises(CapacityError, match="in use"),
        ):
            download.file(WEIGHTS_FILE, 2 * SIZE + 1)
        assert cache.budget.used() == 2 * SIZE + 1_000
    keep(other.cache, key(3), bytes(1_000))
    assert present(one, 4) == [0, 2, 3]
    held.close()


def test_what_one_holds_the_other_does_not_evict(two: Two) -> None:
    one, other = two
    held = [stored(one.cache, key(0), bytes(1_000))]
    for number in (1, 2):
        keep(one.cache, key(number), bytes(1_000))
    reopened = one.cache.open(key(1), check=True)
    assert reopened is not None
    held.append(reopened)
    keep(other.cache, key(3), bytes(1_000))
    assert present(one, 4) == [0, 1, 3]
    for nbytes, words in ((2 * SIZE, "in use"), (3 * SIZE + 1, "budget")):
        download = begun(other.cache, key(4))
        with pytest.raises(CapacityError, match=words) as raised:
            download.file(WEIGHTS_FILE, nbytes)
        assert raised.value.retryable is (words == "in use")
        assert raised.value.stage == "fetch"
        download.close()
    assert not removed(other.cache, key(0))
    for entry in held:
        assert content_of(entry) == bytes(1_000)
        entry.close()
    assert removed(other.cache, key(0))


def test_what_one_downloads_the_other_does_not_drop(two: Two) -> None:
    """What it left the other may drop, or go on with."""
    one, other = two
    with closing(begun(one.cache, key(0))) as download, closing(begun(other.cache, key(1))) as late:
        file = download.file(WEIGHTS_FILE, 2 * SIZE)
        with pytest.raises(CapacityError, match="in use"):
            late.file(WEIGHTS_FILE, SIZE + 1)
        put(late.file(WEIGHTS_FILE, SIZE), bytes(SIZE), [(0, SIZE)])
        late.close()
        assert not removed(other.cache, key(0))
        put(file, bytes(2 * SIZE), [(0, 2 * SIZE)])
    download = begun(other.cache, key(0))
    assert download.file(WEIGHTS_FILE, 2 * SIZE).missing() == []
    late = begun(one.cache, key(2))
    late.file(WEIGHTS_FILE, SIZE)
    assert one.cache.budget.used() == 3 * SIZE
    late.close()
    download.publish().close()
    assert present(one, 3) == [0]


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
    assert removed(one.cache, KEY)
    begun(other.cache).close()


def downloaded_again(cache: DiskCache, content: bytes, wanted: str) -> CacheEntry:
    """Download the adapter for a caller whose digest the entry does not have, and publish it."""
    download = cache.try_begin(KEY, SCOPE, sha256=wanted)
    assert isinstance(download, DiskDownload)
    with closing(download):
        for name, data in ((CONFIG_FILE, CONFIG), (WEIGHTS_FILE, content)):
            file = download.file(name, len(data))
            put(file, data, file.missing())
        assert is_there(cache, KEY), "the entry stays until the new bytes are compared"
        return download.publish()


@pytest.mark.parametrize("is_changed", [False, True])
def test_an_entry_that_a_digest_refutes_is_replaced_by_other_bytes_only(
    world: DiskWorld, is_changed: bool
) -> None:
    keep(world.cache, KEY, b"abc")
    before = world.entry(KEY).stat().st_ino
    wanted = sha256(b"abd").value
    with closing(downloaded_again(world.cache, b"abd" if is_changed else b"abc", wanted)) as entry:
        assert content_of(entry) == (b"abd" if is_changed else b"abc")
    assert (world.entry(KEY).stat().st_ino != before) is is_changed
    listed = disk_cache.ls(world.cache)
    assert [(each.name, each.is_partial) for each in listed] == [(KEY.name, False)]


def test_a_used_entry_that_a_digest_refutes_stays(world: DiskWorld) -> None:
    with closing(stored(world.cache, KEY, b"abc")) as lease:
        entry = world.cache.try_begin(KEY, SCOPE, sha256=sha256(b"abd").value)
        assert isinstance(entry, CacheEntry)
        entry.close()
        assert content_of(lease) == b"abc"


def test_deleting_what_was_removed_holds_no_lock(two: Two, monkeypatch: Patch) -> None:
    """A large adapter takes long to delete: others begin downloads meanwhile."""
    one, other = two
    remove_tree, downloads = Folder.remove_tree, list[DiskDownload]()

    def slow(folder: Folder, name: str) -> None:
        if not downloads:
            with ThreadPoolExecutor(1) as thread:
                downloads.append(thread.submit(begun, other.cache, key(9)).result(2.0))
        remove_tree(folder, name)

    for number in range(3):
        keep(one.cache, key(number), bytes(1_000))
    monkeypatch.setattr(Folder, "remove_tree", slow)
    monkeypatch.setattr("lorax_async.cache.directory.LOCK_SECONDS", 60.0)
    with closing(begun(one.cache, key(3))) as download:
        put(download.file(WEIGHTS_FILE, 1_000), bytes(1_000), [(0, 1_000)])
    assert len(downloads) == 1
    downloads[0].close()


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
        assert removed(other.cache, KEY)
        keep(other.cache, KEY, b"abc")

    with at_first_lock(replace).counted():
        assert one.cache.open(KEY) is None
    assert is_there(one.cache, KEY)


def run_script(what: str, base: Path, before: Sequence[str] = ()) -> Any:
    root = Path(__file__).parents[2]
    here = root / "tests" / "worlds"
    paths = [here, root, root / "kernels"]
    done = subprocess.run(
        [*before, sys.executable, here / "cache_processes.py", what, base],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.needs("unshare")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    run_script("full", tmp_path, before=on_a_small_disk(tmp_path))


def chunks_in(spans: list[list[int]]) -> set[int]:
    """The chunks that these spans have written as a whole, by hand."""
    written = bytearray(NBYTES)
    for start, stop in spans:
        written[start:stop] = b"\1" * (stop - start)
    cut = [written[at : at + CHUNK_BYTES] for at in range(0, NBYTES, CHUNK_BYTES)]
    return {number for number, chunk in enumerate(cut) if all(chunk)}


@pytest.mark.slow
def test_killed_after_any_call_a_second_process_goes_on(tmp_path: Path) -> None:
    outcomes = run_script("kills", tmp_path)
    calls = {outcome["call"] for outcome in outcomes}
    assert calls >= {"open", "mkdir", "pwritev", "posix_fallocate", "fsync", "rename", "unlink"}
    for outcome in outcomes:
        assert outcome["second"] == 0, outcome
        assert outcome["left"] == outcomes[0]["left"], outcome
        spans = [(a // CHUNK_BYTES, -(-b // CHUNK_BYTES)) for a, b in outcome["fetched"]]
        fetched = {number for span in spans for number in range(*span)}
        assert not fetched & chunks_in(outcome["written"]), outcome
    assert [] in [outcome["fetched"] for outcome in outcomes]  # all was here, or published


@pytest.mark.slow
def test_killed_at_any_time_on_a_small_budget(tmp_path: Path) -> None:
    assert set(run_script("contended", tmp_path)) == {0, -signal.SIGKILL}


@pytest.mark.slow
@pytest.mark.parametrize("rebooted", [False, True])
def test_a_crash_of_the_machine(tmp_path: Path, monkeypatch: Patch, rebooted: bool) -> None:
    """They were never brought to the disk: after another boot, they need not be there."""
    run_script("left", tmp_path)
    if rebooted:
        reboot(monkeypatch)
    with opened(tmp_path) as world:
        download = begun(world.cache)
        assert download.file(WEIGHTS_FILE, NBYTES).missing() == (ALL if rebooted else [])
        download.discard()
        assert below(tmp_path) == set()


@pytest.mark.slow
def test_anything_at_any_time(tmp_path: Path) -> None:
    """Fetches, evictions and giving up, of six users at a time on a small budget."""
    contents = [weights(number, 200_000 + 90_000 * number) for number in range(5)]
    budget = 1_000_000

    def fetch(cache: DiskCache, number: int, gives_up: bool) -> bool:
        content, found = contents[number], begin(cache, key(number))
        with closing(found):
            if isinstance(found, DiskDownload):
                file = found.file(WEIGHTS_FILE, len(content), sha256(content))
                for start, stop in file.missing():
                    put(file, content, [((start + stop) // 2, stop)])
                    if gives_up:
                        return False
                    put(file, content, [(start, (start + stop) // 2)])
            entry = found.publish() if isinstance(found, DiskDownload) else found
            with closing(entry):
                assert content_of(entry) == content
                assert cache.budget.used() <= budget
        return True

    def play(seed: int) -> int:
        """How many it had."""
        draw, had = Random(seed), 0
        with opened(tmp_path, budget) as world:
            for number in draw.choices(range(5), k=30):
                with suppress(CapacityError):  # the others have all of the room
                    had += fetch(world.cache, number, gives_up=draw.random() < 0.2)
        return had

    with ThreadPoolExecutor(6) as threads:
        assert sum(threads.map(play, range(6))) >= 20, "most were refused"
    with opened(tmp_path, budget) as world:
        assert [each.problem for each in disk_cache.verify(world.cache) if each.problem] == []
        disk_cache.gc(world.cache)
        assert not any(listed.is_partial for listed in disk_cache.ls(world.cache))
    nothing_odd(tmp_path)


# -- tokenizers ------------------------------------------------------------------------------------

TOKENIZER = {"tokenizer.json": b"{}" * 400, "tokenizer_config.json": b"{}", "merges.txt": b""}
TOKENIZER_BYTES = 802


def entry_of(found: CacheEntry | None) -> DiskEntry:
    assert isinstance(found, DiskEntry)
    return found


def test_a_tokenizer_is_part_of_its_entry(world: DiskWorld) -> None:
    """Every process counts its bytes, also of an entry that it has measured before."""
    others = [DiskCache(world.folder, 1 << 30, policy("lru")) for _ in range(2)]
    with closing(entry_of(stored(world.cache, KEY, CONTENT))) as entry:
        before = NBYTES + len(CONFIG)
        assert [cache.budget.used() for cache in (world.cache, *others)] == [before] * 3
        assert entry.tokenizer_bytes() is None, "nobody has looked for one"
        world.cache.add_tokenizer(entry, TOKENIZER)
        assert entry.tokenizer_bytes() == TOKENIZER_BYTES
        world.cache.add_tokenizer(entry, {"tokenizer.json": b"later"})
        assert {name: (Path(entry.folder) / name).read_bytes() for name in TOKENIZER} == TOKENIZER
        for cache in (world.cache, *others):
            assert cache.budget.used() == before + TOKENIZER_BYTES
            with closing(entry_of(cache.open(KEY))) as opened_there:
                assert opened_there.tokenizer_bytes() == TOKENIZER_BYTES
                assert opened_there.nbytes == before + TOKENIZER_BYTES
            assert cache.budget.last_used == before + TOKENIZER_BYTES
        nothing = entry_of(stored(world.cache, key(1), CONTENT))
        with closing(nothing):
            world.cache.add_tokenizer(nothing, {})
            assert nothing.tokenizer_bytes() == 0, "it has none, and nobody asks again"
    assert removed(world.cache, KEY)
    assert not world.entry(KEY).exists()
    nothing_odd(world.folder)


def test_a_tokenizer_without_room_is_not_added(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "cache", NBYTES + SIZE) as world,
        closing(entry_of(stored(world.cache, KEY, CONTENT))) as entry,
    ):
        with pytest.raises(CapacityError, match="do not fit"):
            world.cache.add_tokenizer(entry, {"vocab.txt": bytes(SIZE)})
        assert entry.tokenizer_bytes() is None
        assert not (world.entry(KEY) / "vocab.txt").exists()


@pytest.mark.parametrize("number", range(len(TOKENIZER) + 1))
def test_a_tokenizer_that_is_written_in_part_is_none(
    world: DiskWorld, monkeypatch: Patch, number: int
) -> None:
    written, write = list[str](), Folder.write

    def fail(folder: Folder, name: str, content: bytes) -> None:
        if len(written) == number:
            raise OSError(errno.ENOSPC, "full")
        written.append(name)
        write(folder, name, content)

    with closing(entry_of(stored(world.cache, KEY, CONTENT))) as entry:
        with monkeypatch.context() as patch, pytest.raises(CapacityError, match="disk is full"):
            patch.setattr(Folder, "write", fail)
            world.cache.add_tokenizer(entry, TOKENIZER)
        assert entry.tokenizer_bytes() is None
        world.cache.add_tokenizer(entry, TOKENIZER)
        assert entry.tokenizer_bytes() == TOKENIZER_BYTES
        world.alter(KEY, "tokenizer.json", b"[]" * 400)
        assert entry.tokenizer_bytes() is None, "damaged"
        world.cache.add_tokenizer(entry, TOKENIZER)
        assert entry.tokenizer_bytes() == TOKENIZER_BYTES


def test_an_entry_that_took_the_place_of_a_leased_one_gets_no_tokenizer_of_that(
    world: DiskWorld,
) -> None:
    with closing(entry_of(stored(world.cache, KEY, CONTENT))) as entry:
        world.cache.invalidate(KEY)
        with closing(entry_of(stored(world.cache, KEY, weights(2)))):
            with pytest.raises(FetchError, match="load it again"):
                world.cache.add_tokenizer(entry, TOKENIZER)
            assert not (world.entry(KEY) / "tokenizer.json").exists()
