"""Adapters that were given as tensors, as entries of the disk cache. Blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock

from lorax_async.adapter import TensorsKey
from lorax_async.config import Limits
from lorax_async.core.cache_names import CONFIG_FILE, WEIGHTS_FILE, CacheKey, FileRole
from lorax_async.core.file_digest import Digest
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io.cache.ports import Cache, CacheDownload, CacheEntry, LeftoverError
from lorax_async.io.host_copies import Users
from lorax_async.io.ports import Demand
from lorax_async.io.snapshot import TensorsFile
from lorax_async.io.sources.checked_open import FileReader
from lorax_async.io.sources.local_weights import read_prefix
from lorax_async.io.staging import Buffer

PIECE_BYTES = 8 << 20
"""Hashed or written in one go: whoever wants it to end waits for so much."""

SOURCE = "tensors"
"""Of the entries' keys; no id of a source is one word."""

Contents = Mapping[FileRole, memoryview]


def entry_key(key: TensorsKey) -> CacheKey:
    return CacheKey(SOURCE, key.digest)


def written(cache: Cache, file: TensorsFile, demand: Demand) -> CacheEntry:
    """The entry of a file in memory, whoever wrote it, with exactly its bytes; to be closed.

    Raises `FetchError` when `demand` ends, `CapacityError` if there is no room, and what caches
    do; then nothing is left.
    """
    content = Buffer.of(file.content).memory
    files = {CONFIG_FILE: memoryview(file.config), WEIGHTS_FILE: content}
    digests = {role: _digest(each, demand) for role, each in files.items()}
    key = entry_key(file.key)
    # One that a killed process left, or another loader wrote: no other copy will be left.
    found = cache.open(key, check=True) or cache.begin(key, SOURCE, demand)
    if isinstance(found, CacheDownload):
        try:
            found = _downloaded(found, files, digests, demand)
        except LeftoverError:  # of a killed process; it is discarded
            found = cache.begin(key, SOURCE, demand)
            if isinstance(found, CacheDownload):
                found = _downloaded(found, files, digests, demand)
    if any(_recorded(found, role) != digest.value for role, digest in digests.items()):
        found.close()
        cache.remove(key)
        raise IntegrityError("the disk cache has other bytes under the name of these tensors")
    return found


def _downloaded(
    download: CacheDownload, files: Contents, digests: Mapping[FileRole, Digest], demand: Demand
) -> CacheEntry:
    """All of it is written anew, whatever a killed process has left; publishing reads it back."""
    try:
        for role, content in files.items():
            file = download.file(role, content.nbytes, digests[role])
            for start in range(0, content.nbytes, PIECE_BYTES):
                _require(demand)
                file.write([content[start : start + PIECE_BYTES]], start)
        return download.publish()
    except BaseException:
        download.discard()
        raise


def _digest(content: memoryview, demand: Demand) -> Digest:
    found = hashlib.sha256()
    for start in range(0, content.nbytes, PIECE_BYTES):
        _require(demand)
        found.update(content[start : start + PIECE_BYTES])
    return Digest("sha256", found.hexdigest())


def _recorded(entry: CacheEntry, role: FileRole) -> str | None:
    """What the entry says its file comes to."""
    file = entry.record.file(role)
    return None if file is None else file.digest.value


def _require(demand: Demand) -> None:
    if demand.ended:
        raise FetchError("nobody wants it on disk any more")


class Spilled:
    """The `Home` of a file that is in the disk cache, and stays there until nobody uses it.

    It owns the entry; `ended` is called once that is closed.
    """

    def __init__(self, entry: CacheEntry, ended: Callable[[], None]) -> None:
        self._entry = entry
        self._ended = ended
        self._users = Users(self._end)

    def open(self) -> SpilledReader:
        self._users.join()
        return SpilledReader(self._entry, self.leave)

    def leave(self) -> None:
        self._users.leave()

    def _end(self) -> None:
        self._entry.close()
        self._ended()


class SpilledReader:
    """The `Reader` of a file in the disk cache; opened by the first read."""

    def __init__(self, entry: CacheEntry, closed: Callable[[], None]) -> None:
        self._entry = entry
        self._file = entry.reader(WEIGHTS_FILE)
        self.nbytes = self._file.nbytes
        self._closed = closed
        self._open = True
        self._lock = Lock()

    def head(self, limits: Limits) -> tuple[bytes, bytes]:
        """The config, and the beginning of the weights with the whole header."""
        with _as_given():
            file = self._entry.reader(CONFIG_FILE)
            try:
                config = bytearray(file.nbytes)
                file.read_into([memoryview(config)], 0)
            finally:
                file.close()
            return bytes(config), read_prefix(self._file, limits)

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        with _as_given():
            self._file.read_into(buffers, offset)

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        with _as_given():
            self._file.read_rows(buffer, offset, rows, pitch)

    def read_ahead(self) -> None:
        """Ask the kernel for all of it, where it is a file; waits for no byte."""
        if isinstance(self._file, FileReader):
            with _as_given():
                self._file.read_ahead()

    def close(self) -> None:
        with self._lock:
            was_open, self._open = self._open, False
        if was_open:
            self._file.close()
            self._closed()


@contextmanager
def _as_given() -> Iterator[None]:
    """No source can be asked again for what somebody has damaged."""
    try:
        yield
    except IntegrityError as error:
        problem = (
            "its copy in the disk cache, which took it where memory had no room, was changed or"
            " removed by somebody; give its tensors again"
        )
        raise IntegrityError(problem, retryable=False) from error
