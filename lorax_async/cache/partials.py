"""Partial downloads of a disk cache: their files, and adopting what was left. Blocks.

A download holds a `flock` on a file in its folder, which the kernel drops when the process dies;
then another download adopts the folder. Its bytes are not synced to the disk, so the folder's name
contains the boot's id: after a restart of the machine it is not adopted.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
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

Reserve = Callable[[int], AbstractContextManager[None]]
"""Make room for this many more bytes, to be allocated before the context is left."""

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

    def encoded(self) -> bytes:
        """Return the map's file."""
        return b"LRXCHNK3" + struct.pack("<QQ", self.nbytes, CHUNK_BYTES) + self.bits

    @classmethod
    def decoded(cls, content: bytes, nbytes: int) -> ChunkMap | None:
        """Decode the map of a file of `nbytes`; None if it is not one."""
        chunk_map = cls(nbytes)
        empty, start = chunk_map.encoded(), len(content) - len(chunk_map.bits)
        if len(content) != len(empty) or content[:start] != empty[:start]:
            return None
        chunk_map.bits[:] = content[start:]
        beyond = chunk_map.chunks % 8 and chunk_map.bits[-1] >> chunk_map.chunks % 8
        return None if beyond else chunk_map


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
        self._file = self._create(name, os.O_RDWR)
        self._map_file = self._create(self._map_name, os.O_WRONLY)
        try:
            self._map = self._resume() or self._begin(reserve)
            with translate_errors(_WRITING):
                self._write_map()
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
                        self._write_map()
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

    @property
    def descriptor(self) -> SharedResource[int]:
        """The open file, for others to read."""
        return self._file

    def covers(self, start: int, stop: int) -> bool:
        with self._lock:
            return start == stop or self._here.covers(start, stop)

    def complete(self) -> FileRecord:
        """Sync all bytes to the disk, and return the record; the map is no longer needed.

        Raise `IntegrityError` if the digest is not the expected one, or `OSError`.
        """
        if self.missing():
            raise InternalError(f"{self.name} was to be published before all of it was here")
        self.hash_along()
        digest = self._hash.digest()
        if self.expected not in {None, digest}:
            raise IntegrityError(
                f"{self.name} does not have the promised {digest.kind} digest; load it again"
            )
        with self._file as fd:
            os.fsync(fd)
            return FileRecord(self.name, self.nbytes, os.fstat(fd).st_mtime_ns, digest)

    def keep(self) -> None:
        """Leave bytes and map to the next download; remove both if nothing is here."""
        if self._here.nbytes:
            self._write_map()
        else:
            self.remove()

    def remove(self) -> None:
        self._folder.unlink(self._map_name)
        self._folder.unlink(self.name)

    def close(self) -> None:
        self._file.close()
        self._map_file.close()

    def _create(self, name: str, flags: int) -> SharedResource[int]:
        """Return a file of the folder, which its first use opens or creates."""
        open_file = partial(self._folder.file, name, flags | os.O_CREAT)
        return SharedResource(name, os.close, open=open_file)

    def _resume(self) -> ChunkMap | None:
        """Adopt the file of a partial download, if its size matches and its map is good."""
        with translate_errors("resume a download"), self._file as fd:
            chunk_map = None
            if os.fstat(fd).st_size == self.nbytes and self._folder.status(self._map_name):
                max_bytes = len(ChunkMap(self.nbytes).encoded())
                content = self._folder.read(self._map_name, max_bytes)
                chunk_map = ChunkMap.decoded(content, self.nbytes)
            if chunk_map is None:
                # The map first: it must not outlive the bytes that it tells of.
                self._folder.unlink(self._map_name)
                os.ftruncate(fd, 0)
                return None
            self._here = chunk_map.spans()
            self.resumed = self._here.nbytes > 0
            return chunk_map

    def _begin(self, reserve: Reserve) -> ChunkMap:
        with reserve(self.nbytes), self._file as fd:
            try:
                if self.nbytes:
                    os.posix_fallocate(fd, 0, self.nbytes)
            except OSError as error:
                os.ftruncate(fd, 0)
                raise translate(error, "make room for a download") from error
        return ChunkMap(self.nbytes)

    def _write_map(self) -> None:
        with self._map_file as fd:
            _write_all(fd, memoryview(self._map.encoded()), 0)

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
        stop = offset + sum([buffer.nbytes for buffer in buffers])
        if stop > self.nbytes:
            raise IntegrityError(f"{self._file.name} ends before byte {stop:,}")
        if not self._file.covers(offset, stop):
            raise InternalError(
                f"bytes {offset:,} to {stop:,} of {self._file.name} were read too early"
            )
        try:
            with self._descriptor as fd:
                if not fill(fd, buffers, offset):
                    raise IntegrityError(
                        f"{self._file.name} was cut while it was downloaded; load it again"
                    )
        except OSError as error:
            raise translate(error, _READING) from error

    def close(self) -> None:
        self._descriptor.close()


def this_boot() -> str:
    """Identify what runs the page cache: bytes that were not synced are lost with it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")


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
    """All partial downloads, in folders named `<entry>.<boot>.<unique>`.

    Methods raise `OSError`. Call `claim` with the directory locked.
    """

    def __init__(self, directory: CacheDirectory) -> None:
        self._directory = directory

    def of(self, entry: str) -> list[str]:
        with self._directory.open("partials") as parent:
            names = parent.names()
        return [name for name in names if is_partial_name(name) and name[:64] == entry]

    def claim(self, entry: str, *, alone: bool) -> OpenPartial | int:
        """Adopt what an interrupted download of the entry left, or begin a new one.

        While another one is under way, return its progress, a number that changes with each write;
        begin beside it if `alone`. Adopt the newest that was left since the machine was started,
        and remove the others. The caller owns the folder.
        """
        left = sorted(self.of(entry), key=self._changed_ns, reverse=True)
        busy = [name for name in left if self._directory.is_busy(name)]
        if busy and not alone:
            return self._changed_ns(busy[0])
        prefix, adopted = f"{entry}.{this_boot()}", None
        for name in left if not busy else ():
            if adopted is None and name.startswith(prefix):
                with suppress(FileNotFoundError):
                    adopted = self._open_folder(prefix, left=name)
            else:
                self._directory.drop(name)
        return adopted or self._open_folder(prefix)

    def _changed_ns(self, name: str) -> int:
        """Return when it was written to last, in nanoseconds since the epoch; 0 if never."""
        try:
            with self._directory.open("partials") as parent, parent.subfolder(name) as folder:
                statuses = [folder.status(file) for file in (".", *folder.names())]
        except (FileNotFoundError, NotADirectoryError):
            return 0
        return max((status.st_mtime_ns for status in statuses if status is not None), default=0)

    def _open_folder(self, prefix: str, left: str | None = None) -> OpenPartial:
        """Make a folder, or take over the one that was `left`: only one process can rename it."""
        name = f"{prefix}.{unique()}"
        with self._directory.open("partials") as parent, ExitStack() as undone:
            if left is None:
                os.mkdir(name, 0o700, dir_fd=parent.fd)
            else:
                os.rename(left, name, src_dir_fd=parent.fd, dst_dir_fd=parent.fd)
            folder = undone.enter_context(parent.subfolder(name))
            lock = folder.file(PARTIAL_LOCK, os.O_RDWR | os.O_CREAT)
            undone.callback(os.close, lock)
            if not try_lock(lock):  # another process has just adopted it
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            undone.pop_all()
            return OpenPartial(name, folder, lock)
