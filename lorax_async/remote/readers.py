"""Readers of adapters in the cache, and of those that are being downloaded into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from threading import Lock

from lorax_async.cache.base import CacheEntry
from lorax_async.cache.records import CacheKey, EntryRecord
from lorax_async.concurrency import close_all
from lorax_async.config import Limits
from lorax_async.errors import EvictedError, InternalError
from lorax_async.files import FileReader, Reader, sha256_of
from lorax_async.formats.split_weights import (
    CONFIG_FILE,
    INDEX_FILE,
    FileHead,
    FileRole,
    joined_digest,
    parse_index,
    plan_split,
)
from lorax_async.remote.fetching import AdapterFetch
from lorax_async.sources.base import AdapterFile, StoredFolder
from lorax_async.sources.local_weights import (
    LocalPages,
    ReadAhead,
    SplitFiles,
    SplitReader,
    read_prefix,
)
from lorax_async.types import AdapterKey, RemoteKey, Verification


class EntryReader:
    """The `Reader` of an entry's weights. Leases the entry until it is closed.

    `key` is the entry's. Making it blocks; on an error the entry is closed.
    """

    def __init__(self, entry: CacheEntry, key: CacheKey, limits: Limits) -> None:
        self.entry = entry
        self.key = key
        try:
            self._reader = _weights(entry, limits)
        except BaseException:
            entry.close()
            raise
        self.nbytes = self._reader.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._reader.read_into(buffers, offset)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        self._reader.read_rows(buffer, offset, rows, pitch)

    def close(self) -> None:
        self._reader.close()
        self.entry.close()


class ReopenedReader:
    """The `Reader` of a key, whose entry is opened by the first read.

    If the entry is gone then, every later read fails too, even if the cache has it again.
    """

    def __init__(self, open: Callable[[], EntryReader]) -> None:
        self._open = open
        self._opening = Lock()
        self._lock = Lock()
        self._opened: EntryReader | None = None
        self._closed = False

    @property
    def nbytes(self) -> int:
        return self._reader().nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._reader().read_into(buffers, offset)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        self._reader().read_rows(buffer, offset, rows, pitch)

    def close(self) -> None:
        """Close the entry. Quick: a thread that is just opening it closes it itself."""
        with self._lock:
            self._closed = True
            opened = self._opened
        if opened is not None:
            opened.close()

    def _reader(self) -> EntryReader:
        with self._opening:
            with self._lock:
                if self._closed:
                    raise entry_gone()
                if self._opened is not None:
                    return self._opened
            try:
                opened = self._open()
            except EvictedError:
                self._closed = True
                raise
            if not self._keep(opened):
                opened.close()
                raise entry_gone()
            return opened

    def _keep(self, opened: EntryReader) -> bool:
        """Keep an opened reader, unless this was closed meanwhile; return whether it is kept."""
        with self._lock:
            if not self._closed:
                self._opened = opened
            return not self._closed


class FetchReader:
    """The `Reader` of a download; once that is published, it leases the entry.

    `on_take` is called once, when the fetch is taken or the reader is closed. `landed` is that of
    `AdapterFetch`; `entry` is None until publication.
    """

    def __init__(
        self, key: RemoteKey, reader: Reader, fetch: AdapterFetch, on_take: Callable[[], None]
    ) -> None:
        self.key = key
        self.nbytes = reader.nbytes
        self._reader = reader
        self._fetch: AdapterFetch | None = fetch
        self._on_take = on_take
        self.landed = fetch.landed
        self.entry: CacheEntry | None = None
        self._closed = False

    def take_fetch(self) -> AdapterFetch:
        """Return the fetch, which the caller has to end. Call once."""
        fetch, self._fetch = self._fetch, None
        if fetch is None:
            raise InternalError("one fetch was to be brought twice")
        self._on_take()
        return fetch

    def adopt(self, entry: CacheEntry) -> None:
        """Own the published entry; close it if the reader is closed."""
        self.entry = entry
        if self._closed:
            entry.close()

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._reader.read_into(buffers, offset)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        self._reader.read_rows(buffer, offset, rows, pitch)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._reader.close()
        if self._fetch is not None:
            self.take_fetch().leave()
        if self.entry is not None:
            self.entry.close()


def open_entry(entry: CacheEntry, key: CacheKey, limits: Limits) -> AdapterFile:
    """Return config, header and reader of an entry. Blocks. On an error the entry is closed."""
    reader = EntryReader(entry, key, limits)
    try:
        config = read_first(entry, CONFIG_FILE)
        return AdapterFile(config, read_prefix(reader, limits), reader, entry.mappable)
    except BaseException:
        reader.close()
        raise


def stored_folder(key: AdapterKey, reader: Reader) -> StoredFolder:
    """Return the folder of the entry that a reader of `key` keeps in its cache."""
    entry = reader.entry if isinstance(reader, EntryReader | FetchReader) else None
    if entry is None:
        raise InternalError(f"the files of {key} are not in a cache")
    return StoredFolder(entry.folder, entry.record.nbytes)


def hold_entry(entry: CacheEntry) -> LocalPages | ReadAhead:
    """Map the weights if the cache owns its files, else ask the kernel to read ahead. Blocks.

    The entry may be closed and evicted once the pages are settled.
    """
    readers = [
        reader
        for role in _weight_roles(entry.record)
        if isinstance(reader := entry.reader(role), FileReader)
    ]
    if entry.mappable:
        return LocalPages(readers)
    try:
        for reader in readers:
            reader.read_ahead()
    finally:
        close_all(readers)
    return ReadAhead()


def verification_of(record: EntryRecord) -> Verification:
    """Return the digest of the weights, and who vouched for it, as publication recorded it."""
    digests = {file.role: file.digest for file in record.files}
    weights = _weight_roles(record)
    kinds = {digests[role].kind for role in weights}
    # The weakest of the files' kinds counts for all.
    kind = next(kind for kind in ("transport", "git-sha1", "sha256") if kind in kinds)
    return Verification(kind, joined_digest([digests[role].value for role in weights]))


async def sha256_of_entry(entry: CacheEntry, threads: Executor) -> str:
    """Return the weights' sha256: the recorded one, or else hash the files now."""
    digests = []
    for role in _weight_roles(entry.record):
        file = entry.record.file(role)
        if file is not None and file.digest.kind != "git-sha1":
            digests.append(file.digest.value)
            continue
        reader = entry.reader(role)
        try:
            digests.append(await sha256_of(reader, threads))
        finally:
            reader.close()
    return joined_digest(digests)


def entry_gone() -> EvictedError:
    return EvictedError("it has left the disk cache; load it again")


def _weight_roles(record: EntryRecord) -> list[FileRole]:
    return sorted(file.role for file in record.files if file.role.kind == "weights")


def read_first(entry: CacheEntry, role: FileRole, nbytes: int | None = None) -> bytes:
    """Return the first bytes of a file; all of them by default. Blocks."""
    reader = entry.reader(role)
    try:
        content = bytearray(reader.nbytes if nbytes is None else nbytes)
        reader.read_into([memoryview(content)], 0)
    finally:
        reader.close()
    return bytes(content)


def _weights(entry: CacheEntry, limits: Limits) -> Reader:
    readers = [entry.reader(role) for role in _weight_roles(entry.record)]
    if entry.record.file(INDEX_FILE) is None:
        return readers[0]
    try:
        index = parse_index(read_first(entry, INDEX_FILE), limits)
        heads = (FileHead(read_prefix(reader, limits), reader.nbytes) for reader in readers)
        return SplitReader(SplitFiles(plan_split(index, heads, limits), tuple(readers)))
    except BaseException:
        close_all(readers)
        raise
