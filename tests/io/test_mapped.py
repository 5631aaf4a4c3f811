"""A file's bytes in memory: brought, locked where it is allowed, and gone with the last view."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lorax_async.errors import UsageError
from lorax_async.io import mapped, memory_calls
from lorax_async.io.mapped import MappedFile
from page_looks import LIBRARY, drop_pages, map_sizes, may_lock

NBYTES = 9 * mmap.PAGESIZE + 100

ROUNDED = 10 * mmap.PAGESIZE


@pytest.fixture
def path() -> Iterator[Path]:
    """Where pages can be dropped: not on a tmpfs, which has them nowhere else."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        path = Path(folder).resolve() / "weights"
        path.write_bytes(bytes(range(256)) * (NBYTES // 256) + b"x" * (NBYTES % 256))
        drop_pages(path)
        yield path
        assert map_sizes(path) == []


@contextmanager
def opened(path: Path) -> Iterator[MappedFile]:
    fd = os.open(path, os.O_RDONLY)
    try:
        file = MappedFile(fd, path.stat().st_size, "weights")
    finally:
        os.close(fd)  # the map needs it no more
    try:
        yield file
    finally:
        file.close()


@pytest.mark.parametrize("first", ["lock", "populate"])
def test_locked_pages_are_the_files_own(path: Path, first: str) -> None:
    """Private copies would cost memory, and the next reader of the file would not find them."""
    allowed = may_lock(NBYTES)
    with opened(path) as file:
        if first == "populate":
            file.populate()
        assert file.lock() is file.locked is allowed
        file.populate()
        (sizes,) = map_sizes(path)
        assert sizes["Locked"] == (ROUNDED if allowed else 0)
        assert sizes["Rss"] == ROUNDED
        assert (sizes["Anonymous"], sizes["Private_Dirty"]) == (0, 0)


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


CAP_IPC_LOCK = 14


def give_up_locking() -> None:
    """This thread alone: capabilities are each thread's own."""
    header, words = _Header(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert LIBRARY.capget(ctypes.byref(header), words) == 0
    words[0] &= ~(1 << CAP_IPC_LOCK)  # of the effective ones
    assert LIBRARY.capset(ctypes.byref(header), words) == 0


@contextmanager
def lock_limit(nbytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


@pytest.mark.parametrize("limit", [0, mmap.PAGESIZE])
def test_where_locking_is_refused_it_is_best_effort(path: Path, limit: int) -> None:
    def attempt() -> tuple[bool, bool, bool]:
        with opened(path) as file:
            granted = file.lock()
            file.populate()
            (sizes,) = map_sizes(path)
            assert (sizes["Locked"], sizes["Rss"]) == (0, ROUNDED)
            return may_lock(NBYTES), granted, file.locked

    with lock_limit(limit), ThreadPoolExecutor(1, initializer=give_up_locking) as thread:
        assert thread.submit(attempt).result() == (False, False, False)


def test_an_old_kernel_reads_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is mapped then, so nothing can be locked."""
    advices: list[int] = []

    def old(address: int, nbytes: int, advice: int) -> int:
        advices.append(advice)
        known = advice != 22  # MADV_POPULATE_READ
        return memory_calls.madvise(address, nbytes, advice) if known else errno.EINVAL

    monkeypatch.setattr(mapped, "madvise", old)
    monkeypatch.setattr(mapped, "lock_on_fault", lambda address, nbytes: 0)
    with opened(path) as file:
        assert file.lock()
        file.populate()
        assert not file.locked
        assert not file.lock()
    assert advices == [22, 3]  # then MADV_WILLNEED


def test_views_are_the_files_bytes_and_end_with_the_last(path: Path) -> None:
    content = path.read_bytes()
    with opened(path) as file:
        for start, stop in [(0, NBYTES), (5, 9), (4090, 4200), (7, 7), (NBYTES, NBYTES)]:
            view = file.view(start, stop)
            assert (view.dtype, tuple(view.shape)) == (torch.uint8, (stop - start,))
            assert bytes(view.numpy()) == content[start:stop]
        assert file.view(9, 20).data_ptr() == file.view(0, 1).data_ptr() + 9
        for start, stop in [(-1, 4), (5, 4), (0, NBYTES + 1), (-3, -1)]:
            with pytest.raises(UsageError, match=f"are not in a map of {NBYTES:,}"):
                file.view(start, stop)
        file.view(0, 100).zero_()
        assert not file.view(0, 100).any()
        view = file.view(4000, 9000)
        part = view[10:20]
        file.close()
        file.close()
        for use in (file.lock, file.populate, lambda: file.view(0, 1)):
            with pytest.raises(UsageError, match="the map of weights was closed"):
                use()
        assert len(map_sizes(path)) == 1
        del view
        assert bytes(part.numpy()) == content[4010:4020]
        del part
        assert map_sizes(path) == []
    assert path.read_bytes() == content


def test_closed_while_it_is_populated(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another map may take the addresses as soon as they are free."""
    with opened(path) as file:

        def slow(address: int, nbytes: int, advice: int) -> int:
            file.close()
            assert len(map_sizes(path)) == 1
            return memory_calls.madvise(address, nbytes, advice)

        monkeypatch.setattr(mapped, "madvise", slow)
        file.populate()
        assert map_sizes(path) == []


def test_a_map_that_was_forgotten_is_told(path: Path) -> None:
    with path.open("rb") as file, pytest.warns(ResourceWarning, match="unclosed map of weights"):
        MappedFile(file.fileno(), NBYTES, "weights")


def test_what_cannot_be_mapped(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=r"No such device"):
            MappedFile(fd, 10, "weights")
    finally:
        os.close(fd)
