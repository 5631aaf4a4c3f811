"""Open, read and hash files that strangers may have put there."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from typing import NamedTuple, Protocol, runtime_checkable

from lorax_async.concurrency import FetchControl, SharedResource
from lorax_async.config import Limits
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterFormatError,
    FetchError,
    IntegrityError,
)
from lorax_async.formats.digests import FileHash
from lorax_async.formats.safetensors import header_size
from lorax_async.types import FileIdentity


class Reader(Protocol):
    """Checked access to the bytes of one adapter's weights. The opener must close it."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        """Fill the buffers in order with the bytes from `offset` on. Blocks.

        Of several `rows`, which begin `pitch` bytes apart and have at least one byte, fill a single
        buffer with the equal parts, and read no byte between them. Raises `IntegrityError` if the
        file is too short or has changed since it was opened, and `FetchError` if it cannot be read.
        """

    def close(self) -> None:
        """Close the reader. Quick and idempotent."""


@runtime_checkable
class FileBacked(Protocol):
    """A `Reader` whose bytes are those of one file on this machine."""

    def file(self) -> FileReader:
        """Return the reader of that file, which closes with this one. Blocks; raises as a read."""


IOV_MAX = 1024
"""The most buffers that Linux takes in one call."""

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class FilePosition(NamedTuple):
    """The target of a path: an `O_PATH` descriptor and its status."""

    fd: int
    status: os.stat_result

    @property
    def real_path(self) -> str:
        return os.readlink(f"/proc/self/fd/{self.fd}")

    @property
    def kind(self) -> str:
        return _KINDS.get(stat.S_IFMT(self.status.st_mode), "something else")

    @property
    def identity(self) -> FileIdentity:
        return identity_of(self.status)

    def open(self) -> int:
        """Open this very file for reading; return the descriptor. Only for a regular file."""
        return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def locate(path: str, *, within: int | None = None) -> Iterator[FilePosition]:
    """Follow `path`, relative to the folder descriptor `within`. Raises `OSError`."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=within)
    try:
        yield FilePosition(fd, os.fstat(fd))
    finally:
        os.close(fd)


def identity_of(status: os.stat_result) -> FileIdentity:
    return FileIdentity(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


_TICKS_NS = 20_000_000
"""Two ticks of the slowest clock that stamps files."""


def is_settled(identity: FileIdentity, now_ns: int) -> bool:
    """Return whether a change from `now_ns` (since the epoch) on changes the identity."""
    return now_ns - identity.ctime_ns >= _TICKS_NS


def has_identity(status: os.stat_result, identity: FileIdentity) -> bool:
    """Return `identity_of(status) == identity`, in a quarter of the time."""
    return (
        status.st_ino == identity.inode
        and status.st_ctime_ns == identity.ctime_ns
        and status.st_mtime_ns == identity.mtime_ns
        and status.st_size == identity.size
        and status.st_dev == identity.device
    )


def require_file(name: str, file: FilePosition, max_bytes: int) -> None:
    """Raise `AdapterFormatError` unless it is a regular file of 1 to `max_bytes` bytes."""
    if not stat.S_ISREG(file.status.st_mode):
        raise AdapterFormatError(f"{name} is {file.kind}, not a regular file; put the file there")
    size = file.status.st_size
    if size == 0:
        # Retryable: a program that saves a file in place truncates it first.
        raise AdapterFormatError(
            f"{name} is empty; fetch or save the adapter again", retryable=True
        )
    if size > max_bytes:
        raise AdapterFormatError(f"{name} has {size:,} bytes, over the limit of {max_bytes:,}")


def open_same(path: str, identity: FileIdentity, name: str | None = None) -> int:
    """Open the file at `path` for reading if it has this identity; return the descriptor.

    Raises `IntegrityError` if not, and as `to_adapter_error` says otherwise. `name` is the file's
    name in errors, by default the path's last part.
    """
    name = name or os.path.basename(path)
    with _checking(name), locate(path) as file:
        if file.identity != identity or not stat.S_ISREG(file.status.st_mode):
            raise changed_error(name)
        return file.open()


def require_same(path: str, identity: FileIdentity) -> None:
    """Raise as `open_same` unless the file has this identity."""
    name = os.path.basename(path)
    with _checking(name):
        if not has_identity(os.stat(path), identity):
            raise changed_error(name)


@contextmanager
def _checking(name: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise changed_error(name) from error
    except OSError as error:
        raise to_adapter_error(error, name) from error


def changed_error(name: str) -> IntegrityError:
    return IntegrityError(f"{name} was changed or replaced meanwhile; load the adapter again")


def code_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, "unknown error")


def to_adapter_error(error: OSError, name: str) -> AdapterError:
    """Return this package's error for an `OSError`, without the path in its text."""
    if isinstance(error, PermissionError):
        return AccessDeniedError(
            f"{name} may not be read by this process ({code_of(error)}); give it permission:"
            " safetensors writes files that only their owner may read (mode 0600)"
        )
    return FetchError(f"{name} cannot be read ({code_of(error)})")


class FileReader:
    """A `Reader` over a descriptor that it owns, from `opener` at the first read."""

    def __init__(self, opener: Callable[[], int], identity: FileIdentity, name: str) -> None:
        self.name = name
        self.nbytes = identity.size
        self.identity = identity
        self.descriptor = SharedResource(
            name, os.close, open=partial(_open_sequential, opener), warns=True
        )
        """The first use opens it, which blocks and raises as `read_into` does."""

    def read_into(
        self, buffers: Sequence[memoryview], offset: int, rows: int = 1, pitch: int = 0
    ) -> None:
        with self.descriptor as fd:
            try:
                if rows == 1:
                    complete = fill(fd, buffers, offset)
                else:
                    complete = _fill_rows(fd, buffers[0].cast("B"), offset, rows, pitch)
                same = has_identity(os.fstat(fd), self.identity)
            except OSError as error:
                raise to_adapter_error(error, self.name) from error
        if not same:
            raise changed_error(self.name)
        if not complete:
            stop = offset + (rows - 1) * pitch + sum(buffer.nbytes for buffer in buffers) // rows
            raise IntegrityError(f"{self.name} ends before byte {stop:,}")

    def file(self) -> FileReader:
        return self

    def is_cached(self) -> bool:
        """Return whether the page cache seems to have the whole file, from four samples."""
        samples = (self.nbytes * part // 4 - 1 for part in (1, 2, 3, 4))
        with self.descriptor as fd:
            return all(_reads_at_once(fd, max(0, offset)) for offset in samples)

    def read_ahead(self) -> None:
        """Start reading the whole file into the page cache; do not wait."""
        with self.descriptor as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self.descriptor.close()


def _open_sequential(opener: Callable[[], int]) -> int:
    fd = opener()
    # Adapters are read whole, mostly in file order: double the read-ahead.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd


def _reads_at_once(fd: int, offset: int) -> bool:
    """Return whether the byte is read without waiting; False where the kernel cannot tell."""
    try:
        return os.preadv(fd, (bytearray(1),), offset, os.RWF_NOWAIT) == 1
    except OSError:
        return False


def fill(fd: int, buffers: Sequence[memoryview], offset: int) -> bool:
    """Read until every buffer is full; return False if the file ends earlier."""
    unfilled = [buffer for buffer in buffers if buffer.nbytes]
    first = 0
    while first < len(unfilled):
        count = os.preadv(fd, unfilled[first : first + IOV_MAX], offset)
        if count == 0:
            return False
        offset += count
        while first < len(unfilled) and count >= unfilled[first].nbytes:
            count -= unfilled[first].nbytes
            first += 1
        if count:
            unfilled[first] = unfilled[first].cast("B")[count:]
    return True


def _fill_rows(fd: int, content: memoryview, offset: int, rows: int, pitch: int) -> bool:
    """Read row by row, and no byte between them; return False if the file ends earlier."""
    size = content.nbytes // rows
    for first in range(0, rows * size, size):
        row = content[first : first + size]
        count = os.preadv(fd, (row,), offset)
        if count < size and not fill(fd, [row[count:]], offset + count):
            return False
        offset += pitch
    return True


PREFIX_BYTES = 128 << 10
"""Bytes of the first read of the weights: they contain the header of nearly every adapter."""


def read_prefix(reader: Reader, limits: Limits) -> bytes:
    """Return the beginning of a safetensors file, which ends with its header."""
    prefix = bytearray(min(PREFIX_BYTES, reader.nbytes))
    reader.read_into([memoryview(prefix)], 0)
    needed = header_size(memoryview(prefix), reader.nbytes, limits)
    if needed > len(prefix):
        rest = bytearray(needed - len(prefix))
        reader.read_into([memoryview(rest)], len(prefix))
        prefix += rest
    return bytes(prefix[:needed])


HASH_STEP_BYTES = 4 << 20
"""Bytes per step of hashing: milliseconds, after which the thread is free for other work."""


async def sha256_of(reader: Reader, threads: Executor, control: FetchControl | None = None) -> str:
    """Hash a file in `threads`; return its SHA-256 in lower-case hexadecimal.

    Raises as `Reader.read_into`, and `FetchError` when `control` is cancelled.
    """
    loop, digest = asyncio.get_running_loop(), sha256()
    buffer = memoryview(bytearray(min(HASH_STEP_BYTES, reader.nbytes)))

    def feed(start: int) -> None:
        """Hash one step in a thread, which alone uses the buffer even after a cancellation."""
        content = buffer[: reader.nbytes - start]
        reader.read_into([content], start)
        digest.update(content)

    for start in range(0, reader.nbytes, HASH_STEP_BYTES):
        if control is not None and control.cancelled:
            raise FetchError("no caller waits for the adapter any more")
        await loop.run_in_executor(threads, feed, start)
    return digest.hexdigest()


def hash_on(fd: int, file_hash: FileHash, stop: int, name: str) -> None:
    """Continue a hash up to `stop`. Raise `OSError`, or `IntegrityError` if the file is shorter."""
    buffer = memoryview(bytearray(min(1 << 20, max(0, stop - file_hash.done))))
    while file_hash.done < stop:
        content = buffer[: stop - file_hash.done]
        if not fill(fd, [content], file_hash.done):
            raise IntegrityError(f"{name} in the cache ends before byte {stop:,}")
        file_hash.feed(content)


_SYNC_WRITE = 2
"""SYNC_FILE_RANGE_WRITE."""


def start_writeback(fd: int) -> None:
    """Let the kernel write the file's bytes to the disk meanwhile.

    It reports failures to the fsync that follows, which has less to wait for.
    """
    whole = ctypes.c_int64(0), ctypes.c_int64(0)
    _LIBRARY.sync_file_range(fd, *whole, ctypes.c_uint(_SYNC_WRITE))  # other platforms lack it


_LOCAL_FILE_SYSTEMS = {
    *(0xEF53, 0x58465342, 0x9123683E, 0xCA451A4E),  # ext2 to ext4, XFS, Btrfs, bcachefs
    *(0x2FC12FC1, 0xF2F52010, 0xE0F5E1E2, 0x73717368),  # ZFS, F2FS, EROFS, SquashFS
    *(0x01021994, 0x858458F6, 0x794C7630),  # tmpfs, ramfs, overlayfs
}
"""Their `f_type` in statfs(2)."""


def is_local(fd: int) -> bool:
    """Return whether no server is asked for the attributes of a file.

    That of a network file system, or a program behind FUSE, may not answer. False if unknown.
    """
    status = (ctypes.c_long * 32)()  # a struct statfs, which begins with `f_type`
    failed = _LIBRARY.fstatfs(fd, ctypes.byref(status))
    return not failed and status[0] & 0xFFFFFFFF in _LOCAL_FILE_SYSTEMS


POPULATE_READ = 22
POPULATE_WRITE = 23
"""MADV_POPULATE_… of Linux 5.14, missing from Python's mmap. EINVAL on older kernels."""

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def madvise(address: int, nbytes: int, advice: int) -> int:
    """Call madvise(2); return errno, 0 for success."""
    return ctypes.get_errno() if _LIBRARY.madvise(address, nbytes, advice) else 0
