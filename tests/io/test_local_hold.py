"""The host tier of local folders: what is mapped and locked, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from local_world import (
    FILES,
    LIMITS,
    WEIGHTS_NAME,
    LocalWorld,
    cut,
    descriptors,
    maps_below,
    nothing_left_open,
    put_split,
    replace,
    touch,
)

from lorax_async import errors, host_memory
from lorax_async.concurrency import FetchControl
from lorax_async.config import LocalRoot
from lorax_async.errors import UsageError
from lorax_async.host_memory import MappedFile
from lorax_async.sources import local_weights
from lorax_async.sources.base import PinnedPages
from lorax_async.sources.local import LocalSource
from lorax_async.types import AdapterRef
from page_looks import drop_pages, map_sizes, may_lock


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path, immutable=True) as world:
        yield world


async def opened_and_held(source: LocalSource, ref: AdapterRef) -> tuple[bool, PinnedPages]:
    key = await source.resolve(ref)
    file = await source.open(key, FetchControl())
    file.reader.close()
    return file.holdable, await source.populate(key)


def is_held(source: LocalSource, id: str | Path, base: Path) -> bool:
    holdable, hold = asyncio.run(opened_and_held(source, AdapterRef(id)))
    assert bool(hold.nbytes) is holdable
    assert len(maps_below(base)) == holdable
    hold.close()
    assert maps_below(base) == []
    return holdable


def test_only_what_lies_in_an_immutable_root_is_held(tmp_path: Path) -> None:
    with nothing_left_open(tmp_path) as world, ThreadPoolExecutor(1) as threads:
        first, second = world.roots
        roots = (first, LocalRoot(second, immutable=True))
        source = LocalSource(roots=roots, limits=LIMITS, threads=threads)
        for folder in (first / "one", second / "a" / "two", world.outside / "three", second):
            world.fill(folder)
        beside = world.fill(second.with_name(f"{second.name}2") / "four")
        (second / "out").symlink_to(world.outside / "three")
        (world.outside / "in").symlink_to(second / "a" / "two")
        for id in (second / "a" / "two", "./a/two", world.outside / "in", second):
            assert is_held(source, id, tmp_path)
        for id in ("./one", first / "one", world.outside / "three", beside, second / "out"):
            assert not is_held(source, id, tmp_path)


@pytest.mark.parametrize(("immutable", "held"), [("", True), ("snapshots", False)])
def test_of_a_hub_cache_the_blob_is_what_counts(tmp_path: Path, immutable: str, held: bool) -> None:
    with nothing_left_open(tmp_path) as world, ThreadPoolExecutor(1) as threads:
        repository = world.roots[0] / "models--o--n"
        folder = world.fill(repository / "snapshots" / ("c" * 40))
        blob = repository / "blobs" / ("b" * 64)
        blob.parent.mkdir()
        (folder / WEIGHTS_NAME).rename(blob)
        (folder / WEIGHTS_NAME).symlink_to(os.path.relpath(blob, folder))
        roots = (world.roots[0], LocalRoot(repository / immutable, immutable=True))
        source = LocalSource(roots=roots, limits=LIMITS, threads=threads)
        for id in (str(folder), folder):
            assert is_held(source, id, tmp_path) is held


@pytest.mark.parametrize("number", [2, 3, 4])
def test_a_file_outside_of_the_root_leaves_all_unheld(host: LocalWorld, number: int) -> None:
    folder, other = put_split(host.roots[0] / "one"), put_split(host.outside / "two")
    (folder / FILES[number]).unlink()
    (folder / FILES[number]).symlink_to(other / FILES[number])
    assert not is_held(host.source, folder, host.outside.parent)


@pytest.mark.parametrize("name", [WEIGHTS_NAME, *FILES[2:]])
@pytest.mark.parametrize("change", [touch, cut, replace])
@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_a_file_that_changes_is_not_held(
    host: LocalWorld,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[Path], None],
    when: str,
) -> None:
    """Of several, none is."""
    folder = host.roots[0] / "one"
    fill = host.fill if name == WEIGHTS_NAME else put_split
    populate = local_weights.LocalPages.populate
    path = fill(folder) / name

    def changing(hold: local_weights.LocalPages, start: int) -> None:
        last = start == hold.starts[-1]
        if when == "during" and not start:
            change(path)
        populate(hold, start)
        if when == "after" and last:
            change(path)

    key = await host.source.resolve(AdapterRef("./one"))
    if when == "before":
        change(path)
    monkeypatch.setattr(local_weights.LocalPages, "populate", changing)
    with pytest.raises(errors.IntegrityError, match=f"{name}.*again"):
        await host.source.populate(key)
    assert maps_below(folder) == []


@pytest.mark.parametrize("nth", [0, 1, 2, "populate"])
async def test_no_memory(host: LocalWorld, monkeypatch: pytest.MonkeyPatch, nth: int | str) -> None:
    made: list[MappedFile] = []

    def refused(*given: Any) -> Any:
        if nth in (len(made), "populate"):
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        made.append(MappedFile(*given))
        return made[-1]

    owner = host_memory.MappedFile if nth == "populate" else local_weights
    monkeypatch.setattr(owner, nth if isinstance(nth, str) else "MappedFile", refused)
    put_split(host.roots[0] / "one")
    key = await host.source.resolve(AdapterRef("./one"))
    before, name = descriptors(), FILES[2 + (nth if isinstance(nth, int) else 0)]
    with pytest.raises(errors.FetchError, match=rf"{name} cannot be read \(ENOMEM\)"):
        await host.source.populate(key)
    made.clear()
    assert (descriptors(), maps_below(host.roots[0])) == (before, [])


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


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOMEM, errno.EAGAIN])
def test_locking_is_best_effort(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr(host_memory, "lock_on_fault", lambda address, nbytes: code)
    with opened(path) as file:
        assert not file.lock()
        file.populate()
        assert not file.locked
        (sizes,) = map_sizes(path)
        assert (sizes["Locked"], sizes["Rss"]) == (0, ROUNDED)


def test_an_old_kernel_reads_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is mapped then, so nothing can be locked."""
    advices: list[int] = []
    madvise = host_memory.madvise

    def old(address: int, nbytes: int, advice: int) -> int:
        advices.append(advice)
        known = advice != 22  # MADV_POPULATE_READ
        return madvise(address, nbytes, advice) if known else errno.EINVAL

    monkeypatch.setattr(host_memory, "madvise", old)
    monkeypatch.setattr(host_memory, "lock_on_fault", lambda address, nbytes: 0)
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
    madvise = host_memory.madvise
    with opened(path) as file:
        madvise = host_memory.madvise

        def slow(address: int, nbytes: int, advice: int) -> int:
            file.close()
            assert len(map_sizes(path)) == 1
            return madvise(address, nbytes, advice)

        monkeypatch.setattr(host_memory, "madvise", slow)
        file.populate()
        assert map_sizes(path) == []


def test_a_map_that_was_forgotten_is_told(path: Path) -> None:
    with path.open("rb") as file, pytest.warns(ResourceWarning, match="unclosed map of weights"):
        MappedFile(file.fileno(), NBYTES, "weights")
