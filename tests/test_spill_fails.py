"""Spills that fail: each adapter is somewhere, and nothing is left."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from counted_calls import CHANGES, LOOKS, Calls, failing
from disk_cache_world import open_below

import tiny
from common import until
from given import assert_holds, used
from lorax_async import (
    AdapterLoader,
    CapacityError,
    IntegrityError,
    InternalError,
)
from spilling_loaders import (
    FILE,
    STEPS,
    WEIGHTS,
    assert_all_there,
    entries,
    entry_of,
    given,
    in_memory,
    off_device,
    roomy,
    spilled,
)

pytestmark = pytest.mark.usefixtures("nothing_left")


@contextmanager
def file_limit(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def refused(there: AdapterLoader, seed: int, why: str) -> None:
    """With both reasons; whatever was in memory stays there."""
    before = in_memory(there)
    with pytest.raises(CapacityError, match="do not fit beside .* in memory_bytes") as caught:
        await given(there, seed)
    assert why in caught.value.problem
    assert (caught.value.id, caught.value.stage, caught.value.retryable) == (
        str(seed),
        "fetch",
        True,
    )
    assert in_memory(there) == before
    assert used(there) == sum(there._machinery.given.values())


async def test_a_cache_that_is_too_small(tmp_path: Path) -> None:
    async with roomy(tmp_path, 1, cache_bytes=FILE // 2) as there:
        await given(there, 0)
        await refused(there, 1, "do not fit into the disk cache's 7,250")
        await assert_all_there(there, 0)
        assert entries(tmp_path) == []
        await there.unload("0")
        await given(there, 1)


async def test_a_cache_that_is_full_of_what_was_spilled(tmp_path: Path) -> None:
    async with roomy(tmp_path, 1, cache_bytes=int(2.5 * FILE)) as there:
        for seed in range(3):
            await given(there, seed)
        await refused(there, 3, "do not fit into the disk cache's")
        await assert_all_there(there, 0, 1, 2)
        await there.unload("1")
        await until(lambda: len(entries(tmp_path)) == 1)
        await given(there, 3)
        await assert_all_there(there, 0, 2, 3)


async def test_where_a_large_one_finds_no_room_a_small_one_may(tmp_path: Path) -> None:
    async with roomy(tmp_path, 5, cache_bytes=2 * FILE) as there:
        large = await there.load_tensors("large", tiny.tensors(9, 14), tiny.config(14))
        large.release()
        await given(there, 0)
        await given(there, 1)
        assert len(in_memory(there)) == 2
        assert large.key in in_memory(there)
        async with await there.load("large") as handle:
            assert_holds(handle, tiny.tensors(9, 14))
        await assert_all_there(there, 0, 1)


async def test_a_file_that_may_not_be_so_large(tmp_path: Path) -> None:
    async with roomy(tmp_path, 1) as there:
        await given(there, 0)
        with file_limit(4096):
            await refused(there, 1, "RLIMIT_FSIZE")
        await assert_all_there(there, 0)
        assert entries(tmp_path) == []
        await given(there, 1)
        await assert_all_there(there, 0, 1)


@pytest.mark.parametrize("wrong", ["a file", "others may write"])
async def test_a_folder_that_is_none(tmp_path: Path, wrong: str) -> None:
    folder = tmp_path / "cache"
    async with roomy(folder, 1) as there:
        if wrong == "a file":
            folder.write_text("")
        else:
            folder.mkdir()
            folder.chmod(0o777)
        await given(there, 0)
        await refused(there, 1, "nor can others make room on the disk: ")
        await assert_all_there(there, 0)
        if wrong == "a file":
            folder.unlink()
        else:
            folder.chmod(0o700)
        await given(there, 1)
        await assert_all_there(there, 0, 1)
    assert entries(folder) == []
    shutil.rmtree(folder)


async def test_no_more_than_a_quarter_of_the_open_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limit(_: int) -> tuple[int, int]:
        return 8, 1024

    async with roomy(tmp_path, 1) as there:
        monkeypatch.setattr("lorax_async.io.spilling.resource.getrlimit", limit)
        for seed in range(3):
            await given(there, seed)
        await refused(there, 3, "one of the 8 files that this process may open")
        await assert_all_there(there, 0, 1, 2)
        await there.unload("0")
        await until(lambda: len(entries(tmp_path)) == 1)
        await given(there, 3)


@pytest.mark.parametrize("step", ["hash", "write", "publish"])
async def test_a_fault_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("ordered")

    async with roomy(tmp_path, 1) as there:
        await given(there, 0)
        with monkeypatch.context() as patch:
            patch.setattr(STEPS[step], fail)
            with pytest.raises(InternalError, match="ordered") as caught:
                await given(there, 1)
            assert caught.value.id == "1"
        await assert_all_there(there, 0)
        await given(there, 1)
        await assert_all_there(there, 0, 1)


@pytest.mark.parametrize("change", ["cut", "removed"])
async def test_what_somebody_damages_says_what_to_do(tmp_path: Path, change: str) -> None:
    async with spilled(tmp_path) as (there, keys):
        await off_device(there)
        file = entry_of(tmp_path, keys[0]) / WEIGHTS
        if change == "cut":
            os.truncate(file, 100)
        else:
            file.unlink()
        with pytest.raises(IntegrityError, match="give its tensors again") as caught:
            await there.load("0")
        assert (caught.value.id, caught.value.retryable) == ("0", False)
        await there.unload("0")
        await given(there, 0)
        await assert_all_there(there, 0, 1)


@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
def test_whatever_call_fails_each_is_somewhere(tmp_path: Path, code: str) -> None:
    names = CHANGES + LOOKS if code == "EIO" else ("mkdir", "pwritev", "posix_fallocate", "rename")

    async def spill(folder: Path, calls: Calls) -> None:
        """The call that needs the room is let through, or refused."""
        async with roomy(folder, 1, max_slots=1) as there:
            key = await given(there, 0)
            with calls.counted():
                try:
                    await given(there, 1)
                except CapacityError as error:
                    assert "nor can others make room on the disk" in error.problem
                    assert in_memory(there) == [key]
                else:
                    assert key not in in_memory(there)
            assert used(there) == sum(there._machinery.given.values())
            await assert_all_there(there, 0)
            await given(there, 1)
            await assert_all_there(there, 0, 1)
        assert open_below(folder) == []
        assert not (folder / "entries").is_dir() or os.listdir(folder / "entries") == []

    calls = Calls(names)
    asyncio.run(spill(tmp_path / "counted", calls))
    assert "rename" in calls.made
    for at in range(1, len(calls.made) + 1):
        asyncio.run(spill(tmp_path / str(at), failing(names, at, getattr(errno, code))))
