"""Files that are mapped: what is held is what was opened, and is the file's own pages."""

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from leaks import descriptors
from local_world import WEIGHTS_NAME, LocalWorld, cut, maps_below, nothing_left_open, replace, touch
from page_cache import drop_pages, map_sizes, may_lock
from source_conformance import held

from lorax_async import AdapterRef, errors, files
from lorax_async.runtime import host_tier
from lorax_async.runtime.host_tier import MappedFile

Patch = pytest.MonkeyPatch


@pytest.fixture
def host(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path, immutable=True) as world:
        yield world


@pytest.mark.parametrize("change", [touch, cut, replace])
@pytest.mark.parametrize("when", ["before", "during", "after"])
async def test_a_file_that_changes_is_not_held(
    host: LocalWorld, monkeypatch: Patch, change: Callable[[Path], None], when: str
) -> None:
    folder = host.roots[0] / "one"
    populate = MappedFile.populate
    path = host.fill(folder) / WEIGHTS_NAME

    def changing(pages: MappedFile, start: int, stop: int) -> None:
        if when == "during" and not start:
            change(path)
        populate(pages, start, stop)
        if when == "after" and stop >= pages.nbytes:
            change(path)

    key = await host.source.resolve(AdapterRef("./one"))
    if when == "before":
        change(path)
    monkeypatch.setattr(MappedFile, "populate", changing)
    with pytest.raises(errors.IntegrityError, match=f"{WEIGHTS_NAME}.*again"):
        await held(host.source, key, holdable=True)
    assert maps_below(folder) == []


@pytest.mark.parametrize(("owner", "call"), [(host_tier, "MappedFile"), (MappedFile, "populate")])
async def test_no_memory(host: LocalWorld, monkeypatch: Patch, owner: Any, call: str) -> None:
    def refused(*_: Any) -> NoReturn:
        raise files.to_adapter_error(OSError(errno.ENOMEM, ""), WEIGHTS_NAME)

    monkeypatch.setattr(owner, call, refused)
    host.fill(host.roots[0] / "one")
    key = await host.source.resolve(AdapterRef("./one"))
    before = descriptors()
    with pytest.raises(errors.FetchError, match=rf"{WEIGHTS_NAME} cannot be read \(ENOMEM\)"):
        await held(host.source, key, holdable=True)
    assert (descriptors(), maps_below(host.roots[0])) == (before, [])


NBYTES, ROUNDED = 9 * mmap.PAGESIZE + 100, 10 * mmap.PAGESIZE


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
    with path.open("rb") as opened:
        file = MappedFile(opened.fileno(), NBYTES, "weights")  # which needs no descriptor
    with closing(file):
        yield file


def test_locked_pages_are_the_files_own(path: Path) -> None:
    """Private copies would cost memory, and the next reader of the file would not find them."""
    allowed = may_lock(NBYTES)
    with opened(path) as file:
        file.populate(0, NBYTES)
        assert file.locked is allowed
        (sizes,) = map_sizes(path)
        assert sizes["Locked"] == (ROUNDED if allowed else 0)
        assert sizes["Rss"] == ROUNDED
        assert (sizes["Anonymous"], sizes["Private_Dirty"]) == (0, 0)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOMEM, errno.EAGAIN])
def test_locking_is_best_effort(path: Path, monkeypatch: Patch, code: int) -> None:
    monkeypatch.setattr(host_tier, "lock_on_fault", lambda address, nbytes: code)
    with opened(path) as file:
        file.populate(0, NBYTES)
        assert not file.locked
        (sizes,) = map_sizes(path)
        assert (sizes["Locked"], sizes["Rss"]) == (0, ROUNDED)


def test_an_old_kernel_reads_ahead(path: Path, monkeypatch: Patch) -> None:
    """Nothing is mapped then, so nothing can be locked."""
    advices: list[int] = []
    madvise = files.madvise

    def old(address: int, nbytes: int, advice: int) -> int:
        advices.append(advice)
        known = advice != 22  # MADV_POPULATE_READ
        return madvise(address, nbytes, advice) if known else errno.EINVAL

    monkeypatch.setattr(host_tier, "madvise", old)
    monkeypatch.setattr(host_tier, "lock_on_fault", lambda address, nbytes: 0)
    with opened(path) as file:
        before = file.locked
        file.populate(0, NBYTES)
        assert (before, file.locked) == (True, False)
    assert advices == [22, 3]  # then MADV_WILLNEED


def test_memory_that_cannot_be_mapped_or_populated(path: Path, monkeypatch: Patch) -> None:
    with opened(path) as file:
        os.truncate(path, 100)
        with pytest.raises(errors.IntegrityError, match="weights ends before byte"):
            file.populate(0, NBYTES)
        monkeypatch.setattr(host_tier, "madvise", lambda *_: errno.ENOMEM)
        with pytest.raises(errors.FetchError, match=r"weights cannot be read \(ENOMEM\)"):
            file.populate(0, NBYTES)
    with pytest.raises(errors.FetchError, match="EBADF"):
        MappedFile(-1, NBYTES, "weights")


def test_closed_while_it_is_populated(path: Path, monkeypatch: Patch) -> None:
    """Another map may take the addresses as soon as they are free."""
    madvise = files.madvise
    with opened(path) as file:

        def slow(address: int, nbytes: int, advice: int) -> int:
            file.close()
            assert len(map_sizes(path)) == 1
            return madvise(address, nbytes, advice)

        monkeypatch.setattr(host_tier, "madvise", slow)
        file.populate(0, NBYTES)
        assert map_sizes(path) == []
        with pytest.raises(errors.FetchError, match="the map of weights was closed"):
            file.populate(0, 1)


def test_a_map_that_was_forgotten_is_told(path: Path) -> None:
    with (
        path.open("rb") as file,
        pytest.warns(ResourceWarning, match="the map of weights was never closed"),
    ):
        MappedFile(file.fileno(), NBYTES, "weights")
