"""One file of a download: bytes arrive in any order, from many threads. Blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from threading import Lock

from lorax_async.core.cache_names import MAP_SUFFIX, FileRole
from lorax_async.core.cache_record import FileRecord
from lorax_async.core.chunk_map import ChunkMap, encoded_size
from lorax_async.core.file_digest import Digest, FileHash
from lorax_async.core.spans import Span, SpanSet
from lorax_async.errors import IntegrityError, InternalError
from lorax_async.io.cache.descriptors import Descriptor, write_all
from lorax_async.io.cache.failures import of_the_system, translated_errors
from lorax_async.io.cache.folders import Folder
from lorax_async.io.cache.hashing import hash_on
from lorax_async.io.cache.ports import LeftoverError
from lorax_async.io.sources.checked_open import fill

Reserve = Callable[[int], AbstractContextManager[None]]
"""Makes room for so many more bytes, which are to be allocated before it is left."""

_GROW_BYTES = 8 << 20
_WRITING = "write a download"


class PartialFile:
    """The `CacheFile` of a file in the folder of a partial download.

    Its chunk map is a file beside it, of which a chunk's bit is written right after its bytes: so
    it is true whenever this process is killed, and nothing waits for a disk.
    """

    def __init__(
        self, folder: Folder, role: FileRole, expected: Digest | None, reserve: Reserve
    ) -> None:
        self.role = role
        self._name = role.file_name
        self._folder = folder
        self.expected = expected
        self._reserve = reserve
        self._lock = Lock()
        self._growing = Lock()
        self._hashing = Lock()
        self._here = SpanSet()
        self._nbytes: int | None = None
        self._room = 0
        self._resumed = False
        self._hash: FileHash | None = None
        self._map: ChunkMap | None = None
        self._map_file: Descriptor | None = None
        with translated_errors(_WRITING):
            self._file = Descriptor(folder.file(self._name, os.O_RDWR | os.O_CREAT), self._name)

    @property
    def nbytes(self) -> int | None:
        return self._nbytes

    @property
    def resumed(self) -> bool:
        return self._resumed

    def resume(self, nbytes: int | None) -> None:
        """Take over what an interrupted download left, if it is of this size; else begin anew."""
        with translated_errors("resume a download"), self._file.held() as fd:
            known = self._left_map(nbytes) if os.fstat(fd).st_size == nbytes else None
            if known is None:
                # The map first: it must not tell of bytes that are there no more.
                self._folder.unlink(self._map_name)
                os.ftruncate(fd, 0)
            else:
                self._room = known.nbytes
                self._here = known.spans()
                self._resumed = self._here.nbytes > 0
                self._know(known, os.O_WRONLY)
        if known is None and nbytes is not None:
            self.ends_at(nbytes)

    def ends_at(self, nbytes: int) -> None:
        with self._growing:
            if self._nbytes not in {None, nbytes} or self._here.end > nbytes:
                raise IntegrityError(
                    f"{self._name} is said to have {nbytes:,} bytes, but has others"
                )
            if self._nbytes is None:
                self._grow(nbytes)
                with translated_errors(_WRITING), self._file.held() as fd, self._lock:
                    os.ftruncate(fd, nbytes)
                    self._begin_map(nbytes)

    def missing(self, start: int = 0, stop: int | None = None) -> list[Span]:
        end = self._nbytes if stop is None else stop
        if end is None:
            raise InternalError(f"nobody knows yet where {self._name} ends")
        with self._lock:
            return self._here.missing(start, end)

    def write(self, buffers: Sequence[memoryview], offset: int) -> None:
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        if stop == offset:
            return
        self._make_room(stop)
        with translated_errors(_WRITING), self._file.held() as fd:
            if self._resumed:
                self._compare(fd, buffers, offset, stop)
            write_all(fd, buffers, offset)
            with self._lock:
                self._remember(offset, stop)

    def hash_along(self) -> int:
        with self._hashing:
            if self._hash is None:
                return 0
            with self._lock:
                stop = self._here.reach(self._hash.done)
            with translated_errors("read a download back"), self._file.held() as fd:
                hash_on(fd, self._hash, stop, self._name)
            return self._hash.done

    def reader(self) -> PartialReader:
        if self._nbytes is None:
            raise InternalError(f"nobody knows yet where {self._name} ends")
        with translated_errors("read a download back"), self._file.held() as fd:
            return PartialReader(self, Descriptor(os.dup(fd), self._name), self._nbytes)

    def covers(self, start: int, stop: int) -> bool:
        with self._lock:
            return start == stop or self._here.covers(start, stop)

    def checked_digest(self) -> Digest:
        """The digest of the whole; `IntegrityError` if it is not the expected one."""
        if self._nbytes is None or self.missing():
            raise InternalError(f"{self._name} was to be published before all of it was here")
        self.hash_along()
        assert self._hash is not None
        found = self._hash.digest()
        if self.expected not in {None, found}:
            raise IntegrityError(
                f"{self._name} has not the {found.kind} digest that was promised; load it again"
            )
        return found

    def settled(self, digest: Digest) -> FileRecord:
        """Bring it to the disk; its map is not needed any more. Raises `OSError`."""
        assert self._nbytes is not None
        with self._file.held() as fd:
            os.fsync(fd)
            return FileRecord(self.role, self._nbytes, os.fstat(fd).st_mtime_ns, digest)

    def sync(self) -> None:
        with self._file.held() as fd:
            os.fsync(fd)
        if self._map_file is not None:
            with self._map_file.held() as fd:
                os.fsync(fd)

    def is_worth_keeping(self) -> bool:
        """Is there something to go on from? Without a size nothing is, for there is no map."""
        return self._map is not None and self._here.nbytes > 0

    def remove(self) -> None:
        self._folder.unlink(self._map_name)
        self._folder.unlink(self._name)

    def remove_map(self) -> None:
        self._folder.unlink(self._map_name)

    def close(self) -> None:
        self._file.close()
        if self._map_file is not None:
            self._map_file.close()

    @property
    def _map_name(self) -> str:
        return self._name + MAP_SUFFIX

    def _left_map(self, nbytes: int) -> ChunkMap | None:
        if self._folder.status(self._map_name) is None:
            return None
        content = self._folder.read(self._map_name, encoded_size(nbytes))
        return ChunkMap.decoded(content, nbytes)

    def _begin_map(self, nbytes: int) -> None:
        found = ChunkMap(nbytes)
        for span in self._here:
            found.mark(span, span)
        self._know(found, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        assert self._map_file is not None
        with self._map_file.held() as fd:
            write_all(fd, [memoryview(found.encoded())], 0)

    def _know(self, found: ChunkMap, flags: int) -> None:
        self._map_file = Descriptor(self._folder.file(self._map_name, flags), self._map_name)
        self._map = found
        self._hash = FileHash(
            "transport" if self.expected is None else self.expected.kind, found.nbytes
        )
        self._nbytes = found.nbytes

    def _remember(self, start: int, stop: int) -> None:
        span = self._here.add(start, stop)
        if self._map is None or self._map_file is None:
            return
        changed = self._map.mark((start, stop), span)
        if changed is not None:
            with self._map_file.held() as fd:
                write_all(fd, [memoryview(changed[0])], changed[1])

    def _compare(self, fd: int, buffers: Sequence[memoryview], start: int, stop: int) -> None:
        """Raise `LeftoverError` if the download has other bytes of [start, stop) already."""
        with self._lock:
            gaps = self._here.missing(start, stop)
        here = SpanSet(gaps).missing(start, stop)
        if not here:
            return
        content = memoryview(b"".join(buffers))
        for first, last in here:
            left = bytearray(last - first)
            if (
                not fill(fd, [memoryview(left)], first)
                or left != content[first - start : last - start]
            ):
                raise LeftoverError(
                    f"what an interrupted download left of {self._name} is not what the source has"
                    " now; load it again"
                )

    def _make_room(self, stop: int) -> None:
        if self._nbytes is None:
            with self._growing:
                if self._nbytes is None and stop > self._room:
                    self._grow(max(stop, self._room + max(_GROW_BYTES, self._room // 4)))
        if self._nbytes is not None and stop > self._nbytes:
            raise IntegrityError(f"{self._name} goes on after its {self._nbytes:,} bytes")

    def _grow(self, to: int) -> None:
        """Have room for the first `to` bytes."""
        more = to - self._room
        if more <= 0:
            return
        with self._reserve(more), self._file.held() as fd:
            try:
                os.posix_fallocate(fd, self._room, more)
            except OSError as error:
                os.ftruncate(fd, self._room)
                raise of_the_system(error, "make room for a download") from error
        self._room = to


class PartialReader:
    """The `Reader` of a `PartialFile`."""

    def __init__(self, file: PartialFile, descriptor: Descriptor, nbytes: int) -> None:
        self.nbytes = nbytes
        self._file = file
        self._descriptor = descriptor

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        name = self._file.role.file_name
        if stop > self.nbytes:
            raise IntegrityError(f"{name} ends before byte {stop:,}")
        if not self._file.covers(offset, stop):
            raise InternalError(f"bytes {offset:,} to {stop:,} of {name} were read too early")
        with translated_errors("read a download back"), self._descriptor.held() as fd:
            if not fill(fd, buffers, offset):
                raise IntegrityError(f"{name} was cut while it was downloaded; load it again")

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        content = buffer.cast("B")
        size = content.nbytes // rows
        for n in range(rows):
            self.read_into([content[n * size : (n + 1) * size]], offset + n * pitch)

    def close(self) -> None:
        self._descriptor.close()
