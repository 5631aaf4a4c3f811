"""Partial downloads of a disk cache: their files, and adopting what was left. Blocks.

A download holds a `flock` on a file in its folder, which the kernel drops when the process dies;
then another download adopts the folder. Where there are no locks, each begins in a folder of its
own, and one that nothing was written to for a while counts as abandoned.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from lorax_async.cache.base import (
    MAP_SUFFIX,
    PARTIAL_LOCK,
    FileRecord,
    LeftoverError,
    is_partial_name,
)
from lorax_async.cache.directory import (
    CacheDirectory,
    Folder,
    close_lock,
    suppress_read_only,
    translate,
    translate_errors,
    try_lock,
    unique,
)
from lorax_async.concurrency import SharedResource
from lorax_async.errors import IntegrityError, InternalError
from lorax_async.files import fill, hash_on, start_writeback
from lorax_async.formats.digests import Digest, FileHash
from lorax_async.formats.spans import ByteRange, SpanSet

CHUNK_BYTES = 256 << 10
"""What an interruption costs each connection; the map of 4 GiB is 2 KiB."""

MAX_UNSAVED_CHUNKS = 32
"""What a kill costs the file besides, or a sixteenth of it: each write of the map takes the GIL."""

SYNCED = bytes(16)
"""Stands for any boot in a map: the bytes are on the disk."""

PATIENCE_SECONDS = 10.0
"""A download that no byte was written to for this long is not waited for."""

Reserve = Callable[[int], AbstractContextManager[None]]
"""Make room for this many more bytes, to be allocated before the context is left."""

_MAGIC = b"LRXCHNK2"
_HEADER = struct.Struct("<8s16sQQ")
_WRITING, _READING = "write a download", "read a download back"


class ChunkMap:
    """The chunk map of a file of `nbytes`: one bit per chunk."""

    __slots__ = ("bits", "chunks", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.chunks = -(-nbytes // CHUNK_BYTES)
        self.bits = bytearray(-(-self.chunks // 8))

    def mark(self, written: ByteRange, here: ByteRange) -> int:
        """Set the bits of the chunks that `written`, a part of `here`, completes; count them."""
        start, stop = here
        first = max(-(-start // CHUNK_BYTES), written[0] // CHUNK_BYTES)
        # The last chunk may be a short one.
        whole = self.chunks if stop >= self.nbytes else stop // CHUNK_BYTES
        end = min(whole, -(-written[1] // CHUNK_BYTES))
        for chunk in range(first, end):
            self.bits[chunk // 8] |= 1 << chunk % 8
        return max(0, end - first)

    def spans(self) -> SpanSet:
        """Return the bytes of the chunks that are here."""
        return SpanSet(
            (chunk * CHUNK_BYTES, min(self.nbytes, (chunk + 1) * CHUNK_BYTES))
            for chunk in range(self.chunks)
            if self.bits[chunk // 8] >> chunk % 8 & 1
        )

    def encoded(self, boot: bytes) -> bytes:
        """Return the map's file: good for this boot, or for ever (`SYNCED`)."""
        return _HEADER.pack(_MAGIC, boot, self.nbytes, CHUNK_BYTES) + self.bits

    @classmethod
    def decoded(cls, content: bytes, nbytes: int, boot: bytes) -> ChunkMap | None:
        """Decode the map of a file of `nbytes`; None if it is none, or not good for this boot."""
        if len(content) < _HEADER.size:
            return None
        magic, good_for, size, chunk_bytes = _HEADER.unpack_from(content)
        if (magic, size, chunk_bytes) != (_MAGIC, nbytes, CHUNK_BYTES):
            return None
        chunk_map = cls(nbytes)
        bits = content[_HEADER.size :]
        beyond = chunk_map.chunks % 8 and bits and bits[-1] >> chunk_map.chunks % 8
        if good_for not in {SYNCED, boot} or len(bits) != len(chunk_map.bits) or beyond:
            return None
        chunk_map.bits[:] = bits
        return chunk_map


def encoded_size(nbytes: int) -> int:
    return _HEADER.size + -(-nbytes // (8 * CHUNK_BYTES))


class PartialFile:
    """One file of a download, written by many threads, with its chunk map beside it.

    A chunk's bit is written after its bytes: the map is true whenever this process is killed, and
    no byte waits for the disk.

    `expected` is the digest that judges it at the end, if one was promised; `resumed`, whether an
    interrupted download left bytes of it.
    """

    def __init__(
        self, folder: Folder, name: str, nbytes: int, expected: Digest | None, reserve: Reserve
    ) -> None:
        self.name = name
        self.nbytes = nbytes
        self.expected = expected
        self.resumed = False
        self._map_name = name + MAP_SUFFIX
        self._folder = folder
        self._lock = Lock()
        self._hashing = Lock()
        self._here = SpanSet()
        self._unsaved = 0
        self._hash = FileHash("transport" if expected is None else expected.kind, nbytes)
        self._map_file: SharedResource[int] | None = None
        with translate_errors(_WRITING):
            fd = folder.file(self.name, os.O_RDWR | os.O_CREAT)
        self._file = SharedResource(self.name, os.close, opened=fd)
        try:
            self._map = self._resume() or self._begin(reserve)
        except BaseException:
            self.close()
            with translate_errors("give room back"):
                self.remove()
            raise

    def missing(self) -> list[ByteRange]:
        """Return the ranges not written yet, ascending. Quick."""
        with self._lock:
            return self._here.missing(0, self.nbytes)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`, after comparing it with the bytes of a partial download.

        Raise `LeftoverError` if they differ, `IntegrityError` beyond the file's end,
        `CapacityError` if the disk is full (or the file may not be so large, or its owner may have
        no more), `FetchError` if it fails.
        """
        stop = offset + data.nbytes
        if stop == offset:
            return
        if stop > self.nbytes:
            raise IntegrityError(f"{self.name} goes on after its {self.nbytes:,} bytes")
        try:
            with self._file as fd:
                if self.resumed:
                    self._compare(fd, data.cast("B"), offset)
                _write_all(fd, data, offset)
                with self._lock:
                    self._unsaved += self._map.mark((offset, stop), self._here.add(offset, stop))
                    most = min(MAX_UNSAVED_CHUNKS, self._map.chunks // 16)
                    if self._unsaved > most:
                        self._unsaved = 0
                        self._write_map(self._map.bits, _HEADER.size)
        except OSError as error:
            raise translate(error, _WRITING) from error

    def hash_along(self) -> int:
        """Continue hashing, up to the first missing byte; return how many bytes are hashed.

        For one thread beside those that write; publication hashes the rest. The disk writes
        meanwhile what publication waits for.
        """
        with self._hashing:
            with self._lock:
                stop = self._here.reach(self._hash.done)
            with translate_errors(_READING), self._file as fd:
                start_writeback(fd)
                hash_on(fd, self._hash, stop, self.name)
            return self._hash.done

    def reader(self) -> PartialReader:
        """Return a reader of the bytes written. It stays good after publication."""
        with translate_errors(_READING), self._file as fd:
            return PartialReader(self, os.dup(fd))

    def covers(self, start: int, stop: int) -> bool:
        with self._lock:
            return start == stop or self._here.covers(start, stop)

    def checked_digest(self) -> Digest:
        """Return the digest of the whole; raise `IntegrityError` if it is not the expected one."""
        if self.missing():
            raise InternalError(f"{self.name} was to be published before all of it was here")
        self.hash_along()
        digest = self._hash.digest()
        if self.expected not in {None, digest}:
            raise IntegrityError(
                f"{self.name} has not the {digest.kind} digest that was promised; load it again"
            )
        return digest

    def synced_record(self, digest: Digest) -> FileRecord:
        """Bring the bytes to the disk; the map is not needed any more. Raise `OSError`."""
        with self._file as fd:
            os.fsync(fd)
            return FileRecord(self.name, self.nbytes, os.fstat(fd).st_mtime_ns, digest)

    def keep(self) -> bool:
        """Bring bytes and map to the disk; remove both if nothing is here. Raise `OSError`."""
        if not self._here.nbytes:
            self.remove()
            return False
        with self._file as fd:
            os.fsync(fd)
        self._write_map(self._map.encoded(SYNCED), 0, sync=True)
        return True

    def remove(self) -> None:
        self._folder.unlink(self._map_name)
        self._folder.unlink(self.name)

    def close(self) -> None:
        self._file.close()
        if self._map_file is not None:
            self._map_file.close()

    def _resume(self) -> ChunkMap | None:
        """Adopt the file of a partial download, if its size matches and its map is good."""
        with translate_errors("resume a download"), self._file as fd:
            chunk_map = None
            if os.fstat(fd).st_size == self.nbytes and self._folder.status(self._map_name):
                content = self._folder.read(self._map_name, encoded_size(self.nbytes))
                chunk_map = ChunkMap.decoded(content, self.nbytes, this_boot())
            if chunk_map is None:
                # The map first: it must not outlive the bytes that it tells of.
                self._folder.unlink(self._map_name)
                os.ftruncate(fd, 0)
                return None
            self._here = chunk_map.spans()
            self.resumed = self._here.nbytes > 0
            # Before any new bit, the map on the disk must be good for this boot only.
            self._open_map(chunk_map, os.O_WRONLY, sync=True)
            return chunk_map

    def _begin(self, reserve: Reserve) -> ChunkMap:
        with reserve(self.nbytes), self._file as fd:
            try:
                if self.nbytes:
                    os.posix_fallocate(fd, 0, self.nbytes)
            except OSError as error:
                os.ftruncate(fd, 0)
                raise translate(error, "make room for a download") from error
        chunk_map = ChunkMap(self.nbytes)
        with translate_errors(_WRITING):
            self._open_map(chunk_map, os.O_WRONLY | os.O_CREAT | os.O_EXCL, sync=False)
        return chunk_map

    def _open_map(self, chunk_map: ChunkMap, flags: int, *, sync: bool) -> None:
        fd = self._folder.file(self._map_name, flags)
        self._map_file = SharedResource(self._map_name, os.close, opened=fd)
        self._write_map(chunk_map.encoded(this_boot()), 0, sync=sync)

    def _write_map(self, content: bytes | bytearray, offset: int, *, sync: bool = False) -> None:
        assert self._map_file is not None
        with self._map_file as fd:
            _write_all(fd, memoryview(content), offset)
            if sync:
                os.fsync(fd)

    def _compare(self, fd: int, data: memoryview, offset: int) -> None:
        """Raise `LeftoverError` if other bytes are here already."""
        stop = offset + data.nbytes
        with self._lock:
            gaps = self._here.missing(offset, stop)
        for first, last in SpanSet(gaps).missing(offset, stop):
            left = bytearray(last - first)
            same = fill(fd, [memoryview(left)], first)
            if not same or left != data[first - offset : last - offset]:
                raise LeftoverError(
                    f"what an interrupted download left of {self.name} is not what the source has"
                    " now; load it again"
                )


class PartialReader:
    """The `Reader` of a `PartialFile`; bytes that have not arrived raise `InternalError`."""

    def __init__(self, file: PartialFile, fd: int) -> None:
        self.nbytes = file.nbytes
        self._file = file
        self._descriptor = SharedResource(file.name, os.close, opened=fd, warns=True)

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        if rows > 1:
            content = buffers[0].cast("B")
            size = content.nbytes // rows
            for n in range(rows):
                self.read_into([content[n * size : (n + 1) * size]], offset + n * pitch)
            return
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        if stop > self.nbytes:
            raise IntegrityError(f"{self._file.name} ends before byte {stop:,}")
        if not self._file.covers(offset, stop):
            raise InternalError(
                f"bytes {offset:,} to {stop:,} of {self._file.name} were read too early"
            )
        with translate_errors(_READING), self._descriptor as fd:
            if not fill(fd, buffers, offset):
                raise IntegrityError(
                    f"{self._file.name} was cut while it was downloaded; load it again"
                )

    def close(self) -> None:
        self._descriptor.close()


def this_boot() -> bytes:
    """Identify what runs the page cache: bytes that were not synced are lost with it."""
    return bytes.fromhex(Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", ""))


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    left = data.cast("B")
    while left:
        count = os.pwritev(fd, [left], offset)
        left, offset = left[count:], offset + count


class OpenPartial(NamedTuple):
    """The folder of a download of this process, and the file whose lock says so."""

    name: str
    folder: Folder
    lock: int

    def close(self) -> None:
        os.close(self.lock)
        self.folder.close()


class Partials:
    """All partial downloads, in folders named by the entry, a dot and anything. Raise `OSError`.

    `claim`, `drop` and `is_busy` are called with the directory locked.
    """

    def __init__(self, directory: CacheDirectory) -> None:
        self._directory = directory
        self._parent = directory.partials

    def of(self, entry: str) -> list[str]:
        return [
            name for name in self._parent.names() if is_partial_name(name) and name[:64] == entry
        ]

    def claim(self, entry: str, *, alone: bool) -> OpenPartial | int:
        """Adopt what an interrupted download of the entry left, or begin a new one.

        While another one is under way, return its progress, a number that changes with each write;
        begin beside it if `alone`. Of several that were left the newest is adopted; others go. The
        caller owns the folder, and releases its name.
        """
        left = sorted(self.of(entry), key=self.changed_ns, reverse=True)
        busy = [name for name in left if self.is_busy(name)]
        has_locks = self._directory.has_locks
        if busy and not alone and (has_locks or self._directory.held() & set(busy)):
            return self.changed_ns(busy[0])
        adopted = None
        for name in left if has_locks and not busy else []:
            if adopted is None:
                with suppress(FileNotFoundError):
                    adopted = self._open_folder(entry, left=name)
            else:
                self._directory.remove(self._parent, name)
        return adopted or self._open_folder(entry)

    def drop(self, name: str) -> bool:
        """Remove one; False if it is being written to, or not there."""
        return not self.is_busy(name) and self._directory.remove(self._parent, name)

    def is_busy(self, name: str) -> bool:
        """Return whether any process is writing to it."""
        if name in self._directory.held():
            return True
        if not self._directory.has_locks:
            return time.time_ns() - self.changed_ns(name) < PATIENCE_SECONDS * 1e9
        with suppress(FileNotFoundError, NotADirectoryError), suppress_read_only():
            with self._parent.subfolder(name) as folder:
                fd = folder.file(PARTIAL_LOCK, os.O_RDWR)
            try:
                return try_lock(fd) is False
            finally:
                close_lock(fd)
        return False

    def changed_ns(self, name: str) -> int:
        """Return when it was written to last, in nanoseconds since the epoch; 0 if never."""
        try:
            with self._parent.subfolder(name) as folder:
                statuses = [folder.status(file) for file in (".", *folder.names())]
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return max((status.st_mtime_ns for status in statuses if status is not None), default=0)

    def _open_folder(self, entry: str, left: str | None = None) -> OpenPartial:
        """Make a folder, or take over the one that was `left`: only one process can rename it."""
        name = f"{entry}.{unique()}"
        with ExitStack() as undone:
            self._directory.hold(name)
            undone.callback(self._directory.release, name)
            if left is None:
                os.mkdir(name, 0o700, dir_fd=self._parent.fd)
            else:
                os.rename(left, name, src_dir_fd=self._parent.fd, dst_dir_fd=self._parent.fd)
            folder = undone.enter_context(self._parent.subfolder(name))
            lock = folder.file(PARTIAL_LOCK, os.O_RDWR | os.O_CREAT)
            undone.callback(os.close, lock)
            if try_lock(lock) is False:  # another process has just adopted it
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            undone.pop_all()
            return OpenPartial(name, folder, lock)
