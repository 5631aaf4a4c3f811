"""Open, read, hash, map and lock files that strangers may have put there."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import stat
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from hashlib import sha256
from typing import NamedTuple, Protocol

import torch

from lorax_async.concurrency import FetchControl, SharedResource
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterFormatError,
    FetchError,
    IntegrityError,
    UsageError,
)
from lorax_async.formats.digests import FileHash
from lorax_async.types import FileIdentity


class Reader(Protocol):
    """Checked access to the bytes of one adapter's weights. The opener must close it."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill the buffers in order with the bytes from `offset` on. Blocks.

        Raises `IntegrityError` if the file is too short or has changed since it was opened, and
        `FetchError` if it cannot be read.
        """

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        """Fill the buffer with `rows` equal parts of the file at `offset`, `offset + pitch`, ….

        Each part has at least one byte. Bytes between the parts are not read. Blocks, and raises as
        `read_into` does.
        """

    def close(self) -> None:
        """Close the reader. Quick and idempotent."""


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
    try:
        with locate(path) as file:
            if file.identity != identity or not stat.S_ISREG(file.status.st_mode):
                raise changed_error(name)
            return file.open()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise changed_error(name) from error
    except OSError as error:
        raise to_adapter_error(error, name) from error


def require_same(path: str, identity: FileIdentity) -> None:
    """Raise as `open_same` unless the file has this identity."""
    name = os.path.basename(path)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise changed_error(name) from error
    except OSError as error:
        raise to_adapter_error(error, name) from error
    if identity_of(status) != identity:
        raise changed_error(name)


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
        self._identity = identity
        self._name = name
        self._descriptor = SharedResource(name, os.close, open=partial(_open_sequential, opener))

    @property
    def name(self) -> str:
        return self._name

    @property
    def nbytes(self) -> int:
        return self._identity.size

    @property
    def identity(self) -> FileIdentity:
        """The identity that the file must have."""
        return self._identity

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        if not self._checked(lambda fd: fill(fd, buffers, offset)):
            raise self._ends_before(offset + sum(buffer.nbytes for buffer in buffers))

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        if not self._checked(lambda fd: _fill_rows(fd, buffer.cast("B"), offset, rows, pitch)):
            raise self._ends_before(offset + (rows - 1) * pitch + buffer.nbytes // rows)

    def _checked(self, read: Callable[[int], bool]) -> bool:
        """Return the result of `read`; raise `IntegrityError` if the file has changed by then."""
        with self.held() as fd:
            try:
                complete = read(fd)
                same = identity_of(os.fstat(fd)) == self._identity
            except OSError as error:
                raise to_adapter_error(error, self._name) from error
        if not same:
            raise changed_error(self._name)
        return complete

    def _ends_before(self, stop: int) -> IntegrityError:
        return IntegrityError(f"{self._name} ends before byte {stop:,}")

    def read_ahead(self) -> None:
        """Start reading the whole file into the page cache; do not wait."""
        with self.held() as fd:
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
            except OSError as error:
                raise to_adapter_error(error, self._name) from error

    def close(self) -> None:
        self._descriptor.close()

    def held(self) -> AbstractContextManager[int]:
        """Keep the descriptor open within the block, so that its number is not reused.

        The first use opens it, which blocks and raises as `read_into` does.
        """
        return self._descriptor.use()

    def __del__(self) -> None:
        if self._descriptor.opened is not None and not self._descriptor.closed:
            warnings.warn(f"unclosed reader of {self._name}", ResourceWarning, stacklevel=2)
            self.close()


def _open_sequential(opener: Callable[[], int]) -> int:
    fd = opener()
    # Adapters are read whole, mostly in file order: double the read-ahead.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd


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


POPULATE_READ = 22
POPULATE_WRITE = 23
"""MADV_POPULATE_… of Linux 5.14, missing from Python's mmap. EINVAL on older kernels."""

WILLNEED = mmap.MADV_WILLNEED

_MLOCK_ONFAULT = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_LIBRARY = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mmap.restype = ctypes.c_void_p
_LIBRARY.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
)
_LIBRARY.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_LIBRARY.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def map_privately(fd: int, nbytes: int) -> int:
    """Map a file's first bytes, private and writable; return the address.

    The descriptor may be closed afterwards. Raises `OSError`.
    """
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address: int | None = _LIBRARY.mmap(None, nbytes, access, mmap.MAP_PRIVATE, fd, 0)
    if address is None or address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return address


def unmap(address: int, nbytes: int) -> int:
    """Call munmap(2); return errno, 0 for success. Takes milliseconds for a large map."""
    return ctypes.get_errno() if _LIBRARY.munmap(address, nbytes) else 0


def madvise(address: int, nbytes: int, advice: int) -> int:
    """Call madvise(2); return errno, 0 for success."""
    return ctypes.get_errno() if _LIBRARY.madvise(address, nbytes, advice) else 0


def lock_on_fault(address: int, nbytes: int) -> int:
    """Lock the resident pages, and others as they are faulted in; return errno, 0 for success.

    Plain mlock(2) would write-fault the pages of a writable private map, which copies each of them.
    """
    extent = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
    # Looked up at the call: other platforms lack it, and must still import this module.
    return ctypes.get_errno() if _LIBRARY.mlock2(*extent, ctypes.c_uint(_MLOCK_ONFAULT)) else 0


_POPULATE_BYTES = 32 << 20
"""Bytes per call, between which other threads may map and fault."""


class MappedFile:
    """A private map of a whole file, which keeps the file's pages in memory.

    Reading a map of a truncated file kills the process (SIGBUS). So the loader copies through the
    file's checked descriptor, and the map only keeps those pages in memory. Use `view` only for
    files that do not change.

    Parameters
    ----------
    fd
        The file, open for reading; may be closed once the map is made.
    nbytes
        Size of the file, more than 0.
    name
        The file's name in errors.

    Raises
    ------
    OSError
        The file cannot be mapped.
    """

    def __init__(self, fd: int, nbytes: int, name: str) -> None:
        self.nbytes = nbytes
        self._name = name
        self._lock_granted = False
        self._populates = True
        self._memory: ctypes.Array[ctypes.c_char] | None = None
        self._memory = _mapped(fd, nbytes)

    @property
    def locked(self) -> bool:
        """Whether the kernel may not evict the resident pages."""
        return self._lock_granted and self._populates

    def lock(self) -> bool:
        """Lock the resident pages and later ones, if permitted; return `locked`.

        If False (for example over RLIMIT_MEMLOCK without CAP_IPC_LOCK), the kernel may evict pages.
        Lock before populating, so that no page is evicted in between.
        """
        address = ctypes.addressof(self._open_memory())
        self._lock_granted = lock_on_fault(address, self.nbytes) == 0
        return self.locked

    def populate(self, start: int = 0, stop: int | None = None) -> None:
        """Read these bytes' pages into memory and map them. Blocks. None is the file's end.

        A kernel before 5.14 only reads ahead, and `locked` becomes False. Raises `IntegrityError`
        if the file is shorter or its disk fails, else `OSError`.
        """
        memory = self._open_memory()  # a concurrent `close` must not unmap during this call
        start -= start % mmap.PAGESIZE
        stop = self.nbytes if stop is None else min(stop, self.nbytes)
        address = ctypes.addressof(memory)
        try:
            for offset in range(start, stop, _POPULATE_BYTES):
                self._populate(address + offset, offset, min(stop, offset + _POPULATE_BYTES))
        finally:
            del memory  # else an error's traceback would keep the map

    def _populate(self, address: int, start: int, stop: int) -> None:
        code = madvise(address, stop - start, POPULATE_READ)
        if code == errno.EINVAL:
            self._populates = False
            code = madvise(address, stop - start, WILLNEED)
        if code == errno.EFAULT:
            raise IntegrityError(
                f"{self._name} ends before byte {stop:,}, or its disk fails; load the adapter again"
            )
        if code:
            raise OSError(code, os.strerror(code))

    def view(self, start: int, stop: int) -> torch.Tensor:
        """Return the bytes as uint8 `[stop - start]` without a copy. The view keeps the map alive.

        Writes change this map only, not the file.
        """
        if not 0 <= start <= stop <= self.nbytes:
            raise UsageError(f"bytes {start:,} to {stop:,} are not in a map of {self.nbytes:,}")
        return torch.frombuffer(self._open_memory(), dtype=torch.uint8)[start:stop]

    def close(self) -> None:
        """Drop the map; the last view unmaps it. Blocks for milliseconds. Idempotent."""
        self._memory = None

    def _open_memory(self) -> ctypes.Array[ctypes.c_char]:
        memory = self._memory
        if memory is None:
            raise UsageError(f"the map of {self._name} was closed before it was used")
        return memory

    def __del__(self) -> None:
        if self._memory is not None:
            warnings.warn(f"unclosed map of {self._name}", ResourceWarning, stacklevel=2)


def _mapped(fd: int, nbytes: int) -> ctypes.Array[ctypes.c_char]:
    """Map a file; unmap it with the last reference, but not at interpreter exit."""
    address = map_privately(fd, nbytes)
    memory = (ctypes.c_char * nbytes).from_address(address)
    # Views may be read until the interpreter exits.
    weakref.finalize(memory, unmap, address, nbytes).atexit = False
    return memory
