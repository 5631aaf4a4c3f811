"""The warm list's file: what is written before what, and what is not lost meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from common import until
from lorax_async.server import warm_list
from lorax_async.server.warm_list import WarmList
from scheduling.serving import turns
from server.test_warm_list import named
from tiny_loaders import loader
from tiny_sources import over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


class Disk:
    """Writes a list when it is let, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.free.set()
        self.begun = 0
        self.ended = 0
        self._replace = warm_list._replace
        monkeypatch.setattr(warm_list, "_replace", self.replace)

    def replace(self, path: Path, content: bytes) -> None:
        self.begun += 1
        assert self.free.wait(20)
        self._replace(path, content)
        self.ended += 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_what_changes_while_it_is_written_is_written_then(tmp_path: Path, disk: Disk) -> None:
    source, path = stocked(tmp_path, "one", "two"), tmp_path / "warm"
    async with over(source) as there, WarmList(path, there, pause=0) as warm:
        for name in ("two", "one"):
            warm.used(name)
            (await there.load(name)).release()
        await until(lambda: named(path) == ["one", "two"])
        disk.free.clear()
        before = disk.begun
        warm.used("two")
        try:
            await until(lambda: disk.begun > before)
            warm.used("one")
            await asyncio.sleep(0)
        finally:
            disk.free.set()
        await until(lambda: disk.begun > before + 1)
        await until(lambda: named(path) == ["one", "two"])


async def test_leaving_waits_for_what_is_written(tmp_path: Path, disk: Disk) -> None:
    source, path = stocked(tmp_path, "one"), tmp_path / "warm"

    async def leave(warm: WarmList) -> None:
        await warm.__aexit__(None, None, None)

    async with over(source) as there:
        warm = await WarmList(path, there, pause=0).__aenter__()
        disk.free.clear()
        warm.used("one")
        (await there.load("one")).release()
        await until(lambda: disk.begun > disk.ended)
        first, second = (asyncio.create_task(leave(warm)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        assert not second.done()
        disk.free.set()
        await second
        assert disk.begun == disk.ended
        assert named(path) == ["one"]


async def test_it_is_written_once_in_a_pause_and_at_the_end(tmp_path: Path, disk: Disk) -> None:
    """However long that is: leaving waits for no pause."""
    source, path = stocked(tmp_path, "one", "two"), tmp_path / "warm"
    async with over(source) as there:
        async with WarmList(path, there, pause=1e6) as warm:
            warm.used("one")
            await until(lambda: disk.ended)
            for name in ("one", "two"):
                warm.used(name)
                (await there.load(name)).release()
            assert disk.begun == 1
        assert (disk.begun, named(path)) == (2, ["two", "one"])


def looks_of(warm: WarmList) -> list[object]:
    """One more for each time that it looks who is on the device."""
    looks, here = list[object](), warm._here

    def counted() -> Any:
        looks.append(None)
        return here()

    warm._here = counted  # type: ignore[method-assign]
    return looks


async def test_nothing_is_written_where_nothing_changed(tmp_path: Path, disk: Disk) -> None:
    async with loader() as there, WarmList(tmp_path / "warm", there, pause=0) as warm:
        looks = looks_of(warm)
        for _ in range(3):
            looks.clear()
            warm.used("org/elsewhere")
            await until(lambda: looks)
        assert disk.begun == 1


async def test_it_looks_when_something_changed(tmp_path: Path, disk: Disk) -> None:
    async with loader() as there, WarmList(tmp_path / "warm", there, pause=0) as warm:
        looks = looks_of(warm)
        warm.used("org/elsewhere")
        await until(lambda: disk.ended)
        await turns(100)
        assert len(looks) == 1


async def test_leaving_one_of_which_nothing_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "warm"
    async with loader() as there, WarmList(path, there):
        await turns()  # it waits for a change
    assert path.exists()
    assert named(path) == []


async def test_who_is_still_coming_at_the_end_stays_named(tmp_path: Path) -> None:
    """And comes no further."""
    source, path = stocked(tmp_path, "one"), tmp_path / "warm"
    path.write_text(json.dumps({"adapters": [{"id": "one", "source": None, "revision": None}]}))
    source.hold("one")
    async with over(source) as there:
        async with WarmList(path, there) as warm:
            warm.used("elsewhere/other")
        assert named(path) == ["one"]
        assert path.read_text().startswith("{\n"), "it was written anew"
        restored = warm.restored
        assert restored is not None
        await until(lambda: restored.done)
        source.allow("one")


async def test_who_came_back_and_left_is_named_no_more(tmp_path: Path) -> None:
    source, path = stocked(tmp_path, "one"), tmp_path / "warm"
    path.write_text(json.dumps({"adapters": [{"id": "one", "source": None, "revision": None}]}))
    async with over(source) as there, WarmList(path, there, pause=0) as warm:
        assert warm.restored is not None
        await warm.restored
        await there.unload("one")
        await until(lambda: named(path) == [])


async def test_the_loop_is_free_while_it_is_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[threading.Thread]()

    def noted(work: Any) -> Any:
        def elsewhere(*given: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*given)

        return elsewhere

    for name in ("read_warm_list", "_replace"):
        monkeypatch.setattr(warm_list, name, noted(getattr(warm_list, name)))
    async with loader() as there, WarmList(tmp_path / "warm", there):
        pass
    assert len(threads) == 2
    assert threading.main_thread() not in threads


async def test_nobody_is_told_of_after_the_end(tmp_path: Path) -> None:
    async with loader() as there:
        journal = there._machinery.driver.journal
        async with WarmList(tmp_path / "warm", there):
            assert journal.has_subscribers
        assert not journal.has_subscribers


def test_the_file_is_whole_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "warm", list[tuple[str, bytes]]()
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        assert not path.exists()
        steps.append(("fsync", os.pread(number, 100, 0)))
        fsync(number)

    def named_so(source: str, target: Path) -> None:
        steps.append(("replace", Path(source).read_bytes()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named_so)
    warm_list._replace(path, b"content")
    assert steps == [("fsync", b"content"), ("replace", b"content")]
    assert path.read_bytes() == b"content"


def test_a_file_that_gets_no_name_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(source: str, target: Path) -> None:
        raise OSError("it is read-only")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="read-only"):
        warm_list._replace(tmp_path / "warm", b"content")
    assert not list(tmp_path.iterdir())
