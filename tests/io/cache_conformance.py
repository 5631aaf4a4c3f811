"""What every `Cache` keeps to. A test class derives from `CacheConformance`.

Its module has a fixture `world`, which afterwards asserts that nothing stayed open.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Protocol

import pytest
from cache_inputs import (
    CONFIG,
    KEY,
    NBYTES,
    begun,
    content_of,
    is_there,
    put,
    sha256,
    weights,
)
from rows_conformance import read_rows, rows_of
from source_inputs import read

from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, CacheKey, FileRole
from lorax_async.core.chunk_map import CHUNK_BYTES
from lorax_async.core.file_digest import Digest
from lorax_async.core.runs import Span
from lorax_async.errors import FetchError, IntegrityError, InternalError
from lorax_async.io.cache.ports import Cache, LeftoverError

GIT = [(b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391")]
GIT += [(b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a")]  # git hash-object


class World(Protocol):
    cache: Cache

    def alter(self, key: CacheKey, role: FileRole, content: bytes) -> None:
        """Change a file of an entry in place."""


class CacheConformance:
    def test_what_is_not_there_is_none(self, world: World) -> None:
        assert world.cache.open(KEY) is None
        assert world.cache.remove(KEY)

    def test_bytes_in_any_order_become_an_entry(self, world: World) -> None:
        content = weights()
        download = begun(world.cache)
        config = download.file(CONFIG_FILE, len(CONFIG))
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(content))
        assert (file.nbytes, file.missing()) == (NBYTES, [(0, NBYTES)])
        put(file, content, [(CHUNK_BYTES, NBYTES - 7)])
        assert file.missing() == [(0, CHUNK_BYTES), (NBYTES - 7, NBYTES)]
        assert file.missing(5, CHUNK_BYTES + 1) == [(5, CHUNK_BYTES)]
        put(file, content, [(NBYTES - 7, NBYTES), (0, CHUNK_BYTES)])
        put(config, CONFIG, [(0, len(CONFIG))])
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
            entry.close()
            entry.close()

    def test_one_write_may_have_many_buffers(self, world: World) -> None:
        content = weights(2, 9_000)
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, len(content))
        pieces = [memoryview(content)[at : at + 3] for at in range(0, len(content), 3)]
        file.write([memoryview(b""), *pieces], 0)
        entry = download.publish()
        assert content_of(entry) == content
        entry.close()

    def test_many_threads_write_one_file_while_one_hashes(self, world: World) -> None:
        content = weights(3)
        spans = [(at, min(NBYTES, at + 9_999)) for at in range(0, NBYTES, 9_999)]
        Random(3).shuffle(spans)
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(content))
        with ThreadPoolExecutor(9) as threads:
            writes = [threads.submit(put, file, content, [span]) for span in spans]
            done = [threads.submit(file.hash_along).result() for _ in range(20)]
            assert [write.result() for write in writes] == [None] * len(spans)
        assert done == sorted(done)
        assert file.hash_along() == NBYTES
        entry = download.publish()
        assert content_of(entry) == content
        entry.close()

    def test_only_the_prefix_is_hashed(self, world: World) -> None:
        content = weights(4, 3_000)
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, 3_000)
        put(file, content, [(1_000, 2_000)])
        assert file.hash_along() == 0
        put(file, content, [(0, 500)])
        assert file.hash_along() == 500
        put(file, content, [(500, 1_000)])
        assert file.hash_along() == 2_000
        download.discard()

    @pytest.mark.parametrize(("content", "value"), GIT)
    def test_gits_digest(self, world: World, content: bytes, value: str) -> None:
        download = begun(world.cache)
        file = download.file(CONFIG_FILE, len(content), Digest("git-sha1", value))
        put(file, content, file.missing())
        entry = download.publish()
        assert entry.record.files[0].digest == Digest("git-sha1", value)
        entry.close()

    def test_wrong_bytes_leave_nothing(self, world: World) -> None:
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

    def test_what_is_not_whole_is_not_published(self, world: World) -> None:
        download = begun(world.cache)
        with pytest.raises(InternalError, match="without files"):
            download.publish()
        file = download.file(WEIGHTS_FILE, 10)
        put(file, bytes(10), [(0, 9)])
        with pytest.raises(InternalError, match="before all of it"):
            download.publish()
        put(file, bytes(10), [(9, 10)])
        download.publish().close()
        for late in (download.publish, lambda: download.file(CONFIG_FILE, 1)):
            with pytest.raises(InternalError, match="ended"):
                late()
        download.discard()
        assert is_there(world.cache, KEY)

    def test_a_file_is_added_once(self, world: World) -> None:
        download = begun(world.cache)
        download.file(WEIGHTS_FILE, 1)
        with pytest.raises(InternalError, match="twice"):
            download.file(WEIGHTS_FILE, 1)
        download.close()

    def test_bytes_after_the_end_are_refused(self, world: World) -> None:
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, 10)
        put(file, bytes(10), [(0, 10)])
        for start in (10, 9):
            with pytest.raises(IntegrityError, match="after its 10 bytes"):
                file.write([memoryview(b"ab")], start)
        with pytest.raises(IntegrityError, match="11 bytes"):
            file.ends_at(11)
        file.ends_at(10)
        entry = download.publish()
        assert content_of(entry) == bytes(10)
        entry.close()

    def test_a_size_that_is_learned_late(self, world: World) -> None:
        content = weights(5)
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, None, sha256(content))
        put(file, content, [(0, 1_000), (2_000, 3_000)])
        assert file.nbytes is None
        assert file.missing(0, 4_000) == [(1_000, 2_000), (3_000, 4_000)]
        assert file.hash_along() == 0
        for early in (file.missing, file.reader):
            with pytest.raises(InternalError, match="ends"):
                early()
        with pytest.raises(InternalError, match="before all of it"):
            download.publish()
        with pytest.raises(IntegrityError, match="2,999"):
            file.ends_at(2_999)
        file.ends_at(NBYTES)
        assert file.hash_along() == 1_000
        put(file, content, file.missing())
        entry = download.publish()
        assert content_of(entry) == content
        entry.close()

    def test_what_is_here_can_be_read_already_and_still(self, world: World) -> None:
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
        put(file, content, file.missing())
        download.publish().close()
        assert read(reader, 0, NBYTES) == content
        reader.close()
        reader.close()
        with pytest.raises(FetchError, match="closed"):
            read(reader, 0, 1)

    def test_a_download_goes_on_where_it_was_left(self, world: World) -> None:
        """Of each end of a span at most the rest of its chunk is lost."""
        content = weights(7)
        download = begun(world.cache)
        put(download.file(CONFIG_FILE, len(CONFIG)), CONFIG, [(0, len(CONFIG))])
        spans = [(10, 2 * CHUNK_BYTES + 10), (3 * CHUNK_BYTES, NBYTES)]
        put(download.file(WEIGHTS_FILE, NBYTES), content, spans)
        download.close()
        download.close()
        assert world.cache.open(KEY) is None
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(content))
        missing = file.missing()
        lost = sum(stop - start for start, stop in missing)
        assert CHUNK_BYTES <= lost <= 2 * CHUNK_BYTES
        assert all(stop <= 3 * CHUNK_BYTES for _, stop in missing)
        config = download.file(CONFIG_FILE, len(CONFIG))
        assert config.missing() == []
        put(file, content, missing)
        entry = download.publish()
        assert content_of(entry) == content
        assert content_of(entry, CONFIG_FILE) == CONFIG
        entry.close()

    @pytest.mark.parametrize("nbytes", [NBYTES - 1, NBYTES + 1, None])
    def test_a_file_of_another_size_begins_anew(self, world: World, nbytes: int | None) -> None:
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, NBYTES), weights(8), [(0, NBYTES)])
        download.close()
        content = weights(9, nbytes or 5_000)
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, nbytes)
        assert file.missing(0, len(content)) == [(0, len(content))]
        put(file, content, [(0, len(content))])
        file.ends_at(len(content))
        entry = download.publish()
        assert content_of(entry) == content
        entry.close()

    def test_what_was_left_is_compared_with_what_comes_again(self, world: World) -> None:
        content = weights(7)
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, NBYTES), content, [(0, 2 * CHUNK_BYTES)])
        download.close()
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
        entry = download.publish()
        assert content_of(entry) == content
        entry.close()

    def test_a_file_knows_whether_bytes_of_it_were_left(self, world: World) -> None:
        content = weights(7)
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES)
        assert not file.resumed
        put(file, content, [(0, 2 * CHUNK_BYTES)])
        assert not file.resumed
        download.close()
        download = begun(world.cache)
        file = download.file(WEIGHTS_FILE, NBYTES, sha256(content))
        assert file.resumed
        assert file.expected == sha256(content)
        download.discard()

    def test_a_file_that_is_not_added_again_is_not_published(self, world: World) -> None:
        download = begun(world.cache)
        put(download.file(INDEX_FILE, 3), b"abc", [(0, 3)])
        download.close()
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, 3), b"def", [(0, 3)])
        entry = download.publish()
        assert [file.role for file in entry.record.files] == [WEIGHTS_FILE]
        with pytest.raises(InternalError, match=r"index\.json"):
            entry.reader(INDEX_FILE)
        entry.close()

    def test_nothing_is_left_of_what_was_discarded(self, world: World) -> None:
        download = begun(world.cache)
        put(download.file(WEIGHTS_FILE, NBYTES), weights(), [(0, NBYTES)])
        download.discard()
        download.discard()
        download.close()
        download = begun(world.cache)
        assert download.file(WEIGHTS_FILE, NBYTES).missing() == [(0, NBYTES)]
        download.close()
