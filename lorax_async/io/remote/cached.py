"""Reading and holding adapters that are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from threading import Lock

from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, CacheKey
from lorax_async.core.cache_record import Record
from lorax_async.errors import EvictedError, InternalError
from lorax_async.io.cache.ports import CacheEntry
from lorax_async.io.ports import Reader
from lorax_async.io.remote.fetch import Fetch
from lorax_async.io.sources.checked_open import FileReader
from lorax_async.io.sources.local_hold import LocalHold
from lorax_async.verification import Verification


class EntryReader:
    """The `Reader` of an entry's weights, which keeps it in the cache until it is closed."""

    def __init__(self, entry: CacheEntry, key: CacheKey) -> None:
        self.entry = entry
        self.key = key
        self._reader = entry.reader(WEIGHTS_FILE)
        self.nbytes = self._reader.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        self._reader.read_into(buffers, offset)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        self._reader.read_rows(buffer, offset, rows, pitch)

    def close(self) -> None:
        self._reader.close()
        self.entry.close()


class ReopenedReader:
    """The `Reader` of a key, whose entry is opened by the first read."""

    def __init__(self, open: Callable[[], CacheEntry | None], key: CacheKey) -> None:
        self._open = open
        self._key = key
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
        with self._lock:
            self._closed = True
            if self._opened is not None:
                self._opened.close()

    def _reader(self) -> EntryReader:
        with self._lock:
            if self._opened is None and not self._closed:
                entry = self._open()
                if entry is not None:
                    self._opened = EntryReader(entry, self._key)
            if self._opened is None:
                raise gone()
            return self._opened


class FetchReader:
    """The `Reader` of what is on its way; from its end on it keeps the entry in the cache.

    `taken` is called once, when somebody brings it, or nobody will.
    """

    def __init__(self, reader: Reader, fetch: Fetch, taken: Callable[[], None]) -> None:
        self.nbytes = reader.nbytes
        self._reader = reader
        self._fetch: Fetch | None = fetch
        self._taken = taken
        self._entry: CacheEntry | None = None
        self._closed = False

    def taken(self) -> Fetch:
        """The fetch, which the caller has to end; once."""
        fetch, self._fetch = self._fetch, None
        if fetch is None:
            raise InternalError("one fetch was to be brought twice")
        self._taken()
        return fetch

    def adopt(self, entry: CacheEntry) -> None:
        """All of it is here."""
        self._entry = entry
        if self._closed:
            entry.close()

    @property
    def entry(self) -> CacheEntry:
        assert self._entry is not None
        return self._entry

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
            self.taken().leave()
        if self._entry is not None:
            self._entry.close()


class EntryHold:
    """The `Hold` of an entry's weights. It does not keep the entry: disk is shared with others.

    Whoever makes it calls each of `pieces`, in order, and closes it if one fails.
    """

    def __init__(self, entry: CacheEntry) -> None:
        self._maps: list[LocalHold] = []
        self.pieces: list[Callable[[], None]] = []
        for file in entry.record.files:
            reader = entry.reader(file.role) if file.role.kind == "weights" else None
            if isinstance(reader, FileReader):
                self._add(reader, mappable=entry.mappable)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self._maps)

    @property
    def locked(self) -> bool:
        return bool(self._maps) and all(each.locked for each in self._maps)

    def close(self) -> None:
        for each in self._maps:
            each.close()

    def _add(self, reader: FileReader, *, mappable: bool) -> None:
        if not mappable:
            self.pieces += [reader.read_ahead, reader.close]
            return
        hold = LocalHold(reader)
        self._maps.append(hold)
        self.pieces += [*(partial(hold.populate, start) for start in hold.starts), hold.settle]


def held(entry: CacheEntry) -> EntryHold:
    """Blocks. The entry is closed."""
    try:
        return EntryHold(entry)
    finally:
        entry.close()


def config_of(entry: CacheEntry) -> bytes:
    """Blocks."""
    reader = entry.reader(CONFIG_FILE)
    try:
        content = bytearray(reader.nbytes)
        reader.read_into([memoryview(content)], 0)
    finally:
        reader.close()
    return bytes(content)


def verification_of(record: Record) -> Verification:
    """What publishing, or the check after it, has found of the weights."""
    weights = sorted(file.role for file in record.files if file.role.kind == "weights")
    digests = {file.role: file.digest for file in record.files}
    kinds = {digests[role].kind for role in weights}
    kind = next(each for each in ("transport", "git-sha1", "sha256") if each in kinds)
    if len(weights) == 1:
        return Verification(kind, digests[weights[0]].value)
    lines = "".join(f"{digests[role].value}  {role.file_name}\n" for role in weights)
    return Verification(kind, sha256(lines.encode()).hexdigest())


def gone() -> EvictedError:
    return EvictedError("it has left the disk cache; load it again")
