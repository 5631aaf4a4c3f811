"""The disk cache: contents, its budget, several users, damage, privacy, and maintenance."""

from __future__ import annotations

import errno
import gc
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest
from counted_calls import failing
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
from source_inputs import read, read_rows, rows_of

from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, CacheKey
from lorax_async.core.chunk_map import CHUNK_BYTES
from lorax_async.core.file_digest import Digest
from lorax_async.core.policies import PolicyName, policy
from lorax_async.core.runs import Span
from lorax_async.errors import CapacityError, ConfigError, FetchError, IntegrityError, InternalError
from lorax_async.io.cache import maintenance
from lorax_async.io.cache.entries import MAX_SCOPES
from lorax_async.io.cache.maintenance import Freed
from lorax_async.io.cache.ports import Cache, LeftoverError
from lorax_async.io.disk_cache import DiskCache
from lorax_async.io.ports import Demand

SIZE = 10_000 + len(CONFIG)
"""Of an adapter in the tests of the budget."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DiskWorld]:
    (tmp_path / "beside").mkdir()
    with opened(tmp_path / "cache") as world:
        yield world
    nothing_odd(tmp_path / "cache")
    assert sorted(os.listdir(tmp_path)) == ["beside", "cache"]
    assert os.listdir(tmp_path / "beside") == []


class TestContents:
    def test_bytes_in_any_order_become_a_folder_of_plain_files(self, world: DiskWorld) -> None:
        content = weights()
        assert world.cache.open(KEY) is None
        assert world.cache.remove(KEY)
        download = begun(world.cache)
        config = download.file(CONFIG_FILE, len(CONFIG))
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(content))
        assert (file.nbytes, file.missing(), file.resumed) == (NBYTES, [(0, NBYTES)], False)
        put(file, content, [(CHUNK_BYTES, NBYTES - 7)])
        assert file.missing() == [(0, CHUNK_BYTES), (NBYTES - 7, NBYTES)]
        put(file, content, [(NBYTES - 7, NBYTES), (0, CHUNK_BYTES)])
        pieces = [memoryview(CONFIG)[at : at + 3] for at in range(0, len(CONFIG), 3)]
        config.write([memoryview(b""), *pieces], 0)
        assert world.cache.open(KEY) is None
        published = download.publish()
        opened = world.cache.open(KEY)
        assert opened is not None
        for entry in (published, opened):
            assert content_of(entry) == content
            assert content_of(entry, CONFIG_FILE) == CONFIG
            assert [file.role for file in entry.record.files] == [CONFIG_FILE, WEIGHTS_FILE]
            assert entry.record.files[1].digest == sha256(content)
            assert entry.record.files[0].digest == Digest("transport", sha256(CONFIG).value)
            assert entry.record.nbytes == NBYTES + len(CONFIG)
            assert (entry.record.source, entry.record.version) == (KEY.source, KEY.version)
            folder = Path(entry.folder)
            assert (folder / "adapter_config.json").read_bytes() == CONFIG
            assert (folder / "adapter_model.safetensors").read_bytes() == content
            entry.close()
            entry.close()

    def test_wrong_bytes_leave_nothing(self, world: DiskWorld) -> None:
        content = weights()
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(content))
        put(file, content[:-1] + bytes([content[-1] ^ 1]), [(0, NBYTES)])
        with pytest.raises(IntegrityError, match=r"model\.safetensors.*digest.*again"):
            download.publish()
        download.close()
        assert world.cache.open(KEY) is None
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(content))
        assert file.missing() == [(0, NBYTES)]
        put(file, content, [(0, NBYTES)])
        download.publish().close()

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
                file.write([memoryview(b"ab")], start)
        download.publish().close()
        for late in (download.publish, lambda: download.file(CONFIG_FILE, 1)):
            with pytest.raises(InternalError, match="ended"):
                late()
        download.discard()
        assert is_there(world.cache, KEY)

    def test_what_is_here_can_be_read_already_and_still(self, world: DiskWorld) -> None:
        content = weights(6)
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES)
        reader = file.reader()
        put(file, content, [(100, 200)])
        assert reader.nbytes == NBYTES
        assert read(reader, 110, 200) == content[110:200]
        apart = Span(110, 115, 7, 11)
        assert read_rows(reader, apart) == rows_of(content, apart)
        for start, stop in ((99, 101), (150, 201), (300, 301)):
            with pytest.raises(InternalError, match="too early"):
                read(reader, start, stop)
        with pytest.raises(IntegrityError, match="ends before byte"):
            read(reader, NBYTES - 1, NBYTES + 1)
        assert file.hash_along() == 0
        put(file, content, file.missing())
        assert file.hash_along() == NBYTES
        download.publish().close()
        assert read(reader, 0, NBYTES) == content
        reader.close()
        reader.close()
        with pytest.raises(FetchError, match="closed"):
            read(reader, 0, 1)

    def test_a_download_goes_on_where_it_was_left(self, world: DiskWorld) -> None:
        """Of each end of a span at most the rest of its chunk is lost."""
        content = weights(7)
        download = begun(world.cache)
        put(download.file(CONFIG_FILE, len(CONFIG)), CONFIG, [(0, len(CONFIG))])
        put(download.file(INDEX_FILE, 3), b"abc", [(0, 3)])
        spans = [(10, 2 * CHUNK_BYTES + 10), (3 * CHUNK_BYTES, NBYTES)]
        put(download.file(WEIGHTS_FILE, NBYTES), content, spans)
        download.close()
        download.close()
        assert world.cache.open(KEY) is None
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(content))
        assert (file.resumed, file.expected) == (True, sha256(content))
        missing = file.missing()
        assert CHUNK_BYTES <= sum(stop - start for start, stop in missing) <= 2 * CHUNK_BYTES
        assert all(stop <= 3 * CHUNK_BYTES for _, stop in missing)
        assert download.file(CONFIG_FILE, len(CONFIG)).missing() == []
        put(file, content, missing)
        entry = download.publish()
        assert content_of(entry) == content
        assert content_of(entry, CONFIG_FILE) == CONFIG
        assert [file.role for file in entry.record.files] == [CONFIG_FILE, WEIGHTS_FILE]
        with pytest.raises(InternalError, match=r"index\.json"):  # it was not asked for again
            entry.reader(INDEX_FILE)
        entry.close()

    def test_what_was_left_is_compared_with_what_comes_again(self, world: DiskWorld) -> None:
        content = weights(7)
        left(world.cache, KEY, content, [(0, 2 * CHUNK_BYTES)])
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES)
        assert file.resumed
        assert file.expected is None
        put(file, content, [(0, 10), (CHUNK_BYTES - 5, 2 * CHUNK_BYTES + 5)])
        other = bytearray(content)
        other[CHUNK_BYTES] ^= 1
        with pytest.raises(LeftoverError, match="not what the source has now"):
            put(file, bytes(other), [(CHUNK_BYTES - 5, CHUNK_BYTES + 5)])
        put(file, content, file.missing())
        download.publish().close()
        assert read_back(world.cache) == content


def full(cache: DiskCache, adapters: int) -> DiskCache:
    for number in range(adapters):
        keep(cache, key(number), bytes(10_000))
    return cache


def there(cache: Cache, upto: int) -> list[int]:
    """Return which are there. The looks are uses."""
    return [number for number in range(upto) if is_there(cache, key(number))]


class TestRoom:
    @pytest.fixture
    def cache(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DiskCache]:
        """With room for three adapters."""
        name: PolicyName = getattr(request, "param", "lru")
        with opened(tmp_path / "cache", 3 * SIZE, name) as world:
            yield world.cache
        nothing_odd(tmp_path / "cache")

    def test_the_least_recently_used_goes(self, cache: DiskCache) -> None:
        """Every file counts; as many go as must."""
        full(cache, 3)
        assert (cache.used(), cache.last_used) == (3 * SIZE, 3 * SIZE)
        assert is_there(cache, key(0))
        keep(cache, key(3), bytes(10_000))
        assert there(cache, 4) == [0, 2, 3]
        keep(cache, key(4), bytes(2 * SIZE - len(CONFIG)))
        assert there(cache, 5) == [3, 4]
        assert cache.used() == 3 * SIZE
        assert cache.remove(key(4))
        assert cache.used() == SIZE

    @pytest.mark.parametrize("cache", ["gdsf"], indirect=True)
    def test_gdsf_weighs_what_a_fetch_costs(self, cache: DiskCache) -> None:
        """Of equal use the large one goes: (32 MiB + n) / n falls with n. An empty one is one."""
        for number, nbytes in enumerate((0, 2 * SIZE - 3 * len(CONFIG), 5_000)):
            keep(cache, key(number), bytes(nbytes))
        keep(cache, key(3), bytes(10_000))
        assert there(cache, 4) == [0, 2, 3]

    def test_interrupted_downloads_go_first(self, cache: DiskCache) -> None:
        keep(cache, key(0), bytes(10_000))
        left(cache, key(1), bytes(10_000), [(0, 10_000)])
        assert cache.used() == SIZE + 10_000
        keep(cache, key(2), bytes(10_000))
        assert cache.used() == 2 * SIZE + 10_000
        keep(cache, key(3), bytes(10_000))
        assert there(cache, 4) == [0, 2, 3]
        assert cache.used() == 3 * SIZE

    def test_is_reserved_by_one_at_a_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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


class TestSharing:
    def test_others_wait_and_have_what_was_published(self, world: DiskWorld) -> None:
        download = begun(world.cache)
        with ThreadPoolExecutor(3) as threads:
            others = [threads.submit(world.cache.begin, KEY, "other", Demand()) for _ in range(3)]
            put(download.file(WEIGHTS_FILE, 10), bytes(10), [(0, 10)])
            assert not wait(others, timeout=0.05).done
            download.publish().close()
            for other in others:
                entry = other.result()
                assert entry.record.name == KEY.name  # type: ignore[union-attr]  # an entry
                entry.close()

    def test_whoever_waits_may_go_on_with_what_was_left(self, world: DiskWorld) -> None:
        """Or be cancelled; other keys are not waited for."""
        download, demand = begun(world.cache), Demand()
        put(download.file(WEIGHTS_FILE, 10), bytes(10), [(0, 10)])
        keep(world.cache, key(1), b"abc")
        with ThreadPoolExecutor(2) as threads:
            cancelled = threads.submit(world.cache.begin, KEY, SCOPE, demand)
            other = threads.submit(begun, world.cache)
            with pytest.raises(TimeoutError):
                cancelled.result(0.03)
            demand.end()
            with pytest.raises(FetchError, match="cancelled"):
                cancelled.result()
            assert not other.done()
            download.close()
            download = other.result()
        assert download.file(WEIGHTS_FILE, 10).missing() == []
        download.publish().close()

    def test_an_entry_knows_who_was_granted_it(self, world: DiskWorld) -> None:
        """Of many, the last ask the source again."""
        entry = stored(world.cache, KEY, b"abc")
        assert entry.granted("other") is None
        entry.grant("other")
        for scope in (SCOPE, "other"):
            age = entry.granted(scope)
            assert age is not None
            assert 0 <= age < 60
        for scope in ("", "somebod", "../record.json"):
            assert entry.granted(scope) is None
        for number in range(MAX_SCOPES):
            entry.grant(str(number))
        assert entry.granted("0") is not None
        assert entry.granted(str(MAX_SCOPES - 1)) is None
        entry.close()

    @pytest.mark.parametrize("promised", [False, True])
    def test_two_downloads_of_one_version_must_have_the_same_bytes(
        self, world: DiskWorld, promised: bool
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
        assert read_back(world.cache) == b"abc"


class TestDamage:
    @pytest.mark.parametrize("check", [False, True])
    @pytest.mark.parametrize("change", [1, -1])
    def test_an_entry_of_another_size_is_dropped(
        self, world: DiskWorld, check: bool, change: int
    ) -> None:
        keep(world.cache, KEY, bytes(10))
        world.alter(KEY, WEIGHTS_FILE, bytes(10 + change))
        assert world.cache.open(KEY, check=check) is None
        keep(world.cache, KEY, b"x" * 10)
        assert is_there(world.cache, KEY)

    def test_altered_bytes_are_noticed_by_their_time_or_where_it_is_asked(
        self, world: DiskWorld
    ) -> None:
        keep(world.cache, KEY, b"abc")
        assert read_back(world.cache, check=True) == b"abc"
        world.alter(KEY, WEIGHTS_FILE, b"abd")
        assert world.cache.open(KEY, check=True) is None
        assert not is_there(world.cache, KEY)
        for content, kept in ((b"abd", False), (b"abc", True)):
            keep(world.cache, KEY, b"abc")
            (world.entry(KEY) / WEIGHTS_FILE.file_name).write_bytes(content)
            assert is_there(world.cache, KEY) is kept
        world.entry(KEY).rename(world.entry(key(1)))
        assert world.cache.open(key(1)) is None, "it is another one's"

    def test_a_leased_entry_that_was_damaged_or_condemned_is_replaced(
        self, world: DiskWorld
    ) -> None:
        held = stored(world.cache, KEY, b"abc")
        reader = held.reader(WEIGHTS_FILE)
        world.alter(KEY, WEIGHTS_FILE, b"longer")
        for content in (b"right", b"newer"):
            keep(world.cache, KEY, content)
            with pytest.raises(IntegrityError, match="again"):
                reader.read_into([memoryview(bytearray(3))], 0)
            assert read_back(world.cache) == content
            for _ in range(2):
                world.cache.condemn(KEY)
            assert not is_there(world.cache, KEY)
        assert held.granted(SCOPE) is None
        reader.close()
        held.close()

    @pytest.mark.parametrize("end", ["publish", "close"])
    def test_a_download_whose_folder_was_removed_says_so(self, world: DiskWorld, end: str) -> None:
        """It leaves nothing, and the next one begins anew."""
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, 3), b"abc", [(0, 3)])
        for partial in (world.folder / "partials").iterdir():
            shutil.rmtree(partial)
        if end == "publish":
            with pytest.raises(FetchError, match="removed.*load it again"):
                download.publish()
        download.close()
        keep(world.cache, KEY, b"def")
        assert is_there(world.cache, KEY)

    @pytest.mark.parametrize("shape", ["gone", "link", "fifo", "folder", "empty"])
    def test_an_entry_with_an_odd_file_is_dropped(self, world: DiskWorld, shape: str) -> None:
        for name in ("record.json", WEIGHTS_FILE.file_name):
            keep(world.cache, KEY, b"abc")
            path = world.entry(KEY) / name
            other = path.rename(path.with_name("other"))
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

    @pytest.mark.parametrize("shape", ["link", "file", "empty", "fifo"])
    def test_what_stands_in_an_entrys_place_goes_and_leads_nowhere(
        self, world: DiskWorld, tmp_path: Path, shape: str
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


HOSTILE = ["../../beside/x", "/etc/passwd", "", ".", "\0", "a" * 5_000, "\ud800", "x\n.json", "~"]


class TestFolder:
    @pytest.mark.parametrize("text", HOSTILE)
    def test_hostile_keys_stay_in_the_folder(self, world: DiskWorld, text: str) -> None:
        for of in (CacheKey(text, "v"), CacheKey("s", text), CacheKey(text, text)):
            entry = stored(world.cache, of, text.encode("utf-8", "replace"))
            entry.grant(text)
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

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702, 0o1777])
    def test_one_that_others_write_to_is_refused(self, tmp_path: Path, mode: int) -> None:
        """It, or one inside it."""
        folder = tmp_path / "cache"
        DiskCache(folder, 1, policy("lru")).close()
        for each in (folder, *folder.iterdir()):
            each.chmod(mode)
            with pytest.raises(ConfigError, match="others may write.*chmod 700"):
                DiskCache(folder, 1, policy("lru"))
            each.chmod(0o700)
        assert open_below(tmp_path) == []

    @pytest.mark.parametrize("inside", [False, True])
    def test_one_of_another_user_is_refused(
        self, tmp_path: Path, inside: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "cache"
        DiskCache(folder, 1, policy("lru")).close()
        if os.geteuid() == 0:
            os.chown(next(folder.iterdir()) if inside else folder, 12_345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12_345)
        with pytest.raises(ConfigError, match="another user"):
            DiskCache(folder, 1, policy("lru"))
        assert open_below(tmp_path) == []

    def test_a_place_that_is_no_folder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ConfigError, match="cannot be opened"):
                DiskCache(path, 1, policy("lru"))
        DiskCache(tmp_path / "cache", 1, policy("lru")).close()
        (tmp_path / "beside").mkdir()
        for inside in (tmp_path / "cache").iterdir():
            for target in (tmp_path / "beside", tmp_path / "nowhere"):
                inside.rename(tmp_path / "kept")
                inside.symlink_to(target)
                with pytest.raises(ConfigError, match=f"'{inside.name}'"):
                    DiskCache(tmp_path / "cache", 1, policy("lru"))
                inside.unlink()
                (tmp_path / "kept").rename(inside)
        assert os.listdir(tmp_path / "beside") == []


def forget(make: Callable[[], object]) -> None:
    make()
    gc.collect()


@pytest.mark.parametrize("name", ["entry", "download"])
def test_what_is_forgotten_is_closed_with_a_warning(tmp_path: Path, name: str) -> None:
    with opened(tmp_path / "cache") as world:
        before = open_below(tmp_path)
        with pytest.warns(ResourceWarning, match=f"unclosed.*{name}"):
            forget(lambda: (begun if name == "download" else is_forgotten)(world.cache))
        assert open_below(tmp_path) == before
    with pytest.warns(ResourceWarning, match="unclosed disk cache"):
        forget(lambda: DiskCache(tmp_path / "other", 1, policy("lru")))
    assert open_below(tmp_path) == []


def is_forgotten(cache: Cache) -> object:
    return stored(cache, KEY, b"abc")


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
    with failing(("fsync",), 1, errno.EIO).counted(), pytest.raises(FetchError, match="EIO"):
        world.cache.note_version(asked, "org/name", "3")
    assert world.cache.last_version(asked) == ("org/elsewhere", "2" * 40)
    for content in (b"", b"{}", b"null", b"\xff", b'{"source": 1, "version": ""}'):
        path.write_bytes(content)
        assert world.cache.last_version(asked) is None


def test_cleaning_up_removes_what_serves_nobody(world: DiskWorld) -> None:
    """Damaged entries, partial downloads, answers about neither, and a former version's locks."""
    for number in range(2):
        keep(world.cache, key(number), b"abc")
    (world.entry(key(1)) / "record.json").unlink()
    left(world.cache, KEY, weights(), [(0, NBYTES)])
    (former := world.folder / "locks").mkdir()
    world.cache.note_version("here?", key(0).source, key(0).version)
    world.cache.note_version("gone?", "org/elsewhere", "2" * 40)
    assert maintenance.gc(world.cache, older_than=1_000) == Freed(1, 0, 3 + len(CONFIG))
    assert maintenance.gc(world.cache) == Freed(0, 1, NBYTES)
    assert is_there(world.cache, key(0))
    assert world.cache.last_version("here?") == (key(0).source, key(0).version)
    assert world.cache.last_version("gone?") is None
    assert not former.exists()
