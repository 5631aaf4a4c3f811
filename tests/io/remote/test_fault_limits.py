"""What this machine does not give: room, descriptors, a folder of one's own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from fault_processes import LARGE
from fault_world import FaultyWorld, over
from test_fault_processes import run_script

from lorax_async import ConfigError

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.slow]

RIGHT = {"kind": "right"}
FULL = {"kind": "CapacityError", "stage": "fetch", "retryable": True}


def stocked(tmp_path: Path, numbered: int = 0) -> FaultyWorld:
    world = FaultyWorld(tmp_path / "unused", tmp_path / "adapters")
    world.stock("large", **LARGE)
    world.stock("small", 1, layers=16, rank=32)
    for n in range(0, numbered, 2):
        world.stock(f"n{n}", n, layers=16, rank=32)
    return world


def is_full(told: dict[str, Any], words: str) -> bool:
    return FULL.items() <= told.items() and words in told["text"]


def test_files_may_not_be_so_large(tmp_path: Path) -> None:
    with stocked(tmp_path) as world:
        place = (tmp_path / "cache", world.adapters, world.server.port)
        large, small, then = run_script("fault_limits.py", "file size", *place)
        assert is_full(large, "EFBIG"), large
        assert small == then == RIGHT


def test_descriptors_run_out(tmp_path: Path) -> None:
    with stocked(tmp_path, 24) as world:
        place = (tmp_path / "cache", world.adapters, world.server.port)
        first, *each, then = run_script("fault_limits.py", "descriptors", *place)
        assert first == then == RIGHT
        failed = [told for told in each if told != RIGHT]
        assert each[0] in failed
        assert each[-1] == RIGHT
        for told in failed:
            assert told["kind"] == "FetchError", told
            assert told["retryable"], told
            assert "EMFILE" in told["text"], told
        assert {told["stage"] for told in failed} <= {"resolve", "fetch", "copy"}


@pytest.mark.needs("unshare")
def test_the_disk_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    with stocked(tmp_path, 2) as world:
        place = (disk / "cache", world.adapters, world.server.port)
        told = run_script("fault_limits.py", "small disk", *place, disk=disk)
        large, small, kept, new, then = told
        assert is_full(large, "ENOSPC"), large
        assert is_full(new, "ENOSPC"), new
        assert small == kept == then == RIGHT


# -- the folder -----------------------------------------------------------------------------------


def open_to_all(folder: Path) -> Path:
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def a_file(folder: Path) -> Path:
    folder.write_text("not a folder")
    return folder


def of_another_user(folder: Path) -> Path:
    """Of root; where we are root, of somebody else."""
    if os.geteuid():
        return Path("/usr")
    folder.mkdir()
    os.chown(folder, 12_345, 12_345)
    return folder


FOLDERS = {
    "others may write to it": (open_to_all, "chmod 700"),
    "a file": (a_file, "Not a directory"),
    "another user's": (of_another_user, "belongs to another user"),
    "nobody may write there": (lambda folder: Path("/proc/self/cache"), "cannot be opened"),
}


@pytest.mark.parametrize("name", FOLDERS)
async def test_folders_that_cannot_be_ours(tmp_path: Path, name: str) -> None:
    make, words = FOLDERS[name]
    folder = make(tmp_path / "cache")
    with FaultyWorld(folder, tmp_path / "adapters") as world:
        world.stock("bad")

        async def body() -> None:
            async with over(world) as loader:
                loading = (loader.load(world.ref("bad")) for _ in range(2))
                errors = await asyncio.gather(*loading, return_exceptions=True)
                for error in errors:
                    assert type(error) is ConfigError, error
                    assert words in error.problem
                    assert not error.retryable
                assert errors[0] is not errors[1]

        await body()
        assert not world.asked_of("bad")
