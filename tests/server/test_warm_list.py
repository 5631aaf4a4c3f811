"""The warm list: written as adapters come and go, read by the server that comes after."""

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from event_loops import until
from scheduler_world import warm
from tiny_loaders import loader
from tiny_sources import is_resident, make_source, over

from engines.conftest import watched
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.placement import Placement
from lorax_async.server.warm_list import keep_warm_list, read_warm_list
from lorax_async.types import AdapterRef

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "warm"


def named(path: Path) -> list[str]:
    rows: list[Any] = json.loads(path.read_text())["adapters"] if path.exists() else []
    return [row.get("id") or row["path"] for row in rows]


def kept(path: Path, there: AdapterLoader, pause: float = 1.0) -> Any:
    """Keep the list as a server does whose settings name all of it."""
    return keep_warm_list(path, there, read_warm_list(path), pause)


async def use(there: AdapterLoader, record_use: Callable[[Any], None], *adapters: Any) -> None:
    for adapter in adapters:
        record_use(adapter)
        await warm(there, adapter)


async def test_it_names_what_is_on_the_device_last_used_first(tmp_path: Path, path: Path) -> None:
    source = make_source(tmp_path, "one", "two", "three")
    async with over(source, max_slots=2) as there, kept(path, there, pause=0) as record_use:
        await use(there, record_use, "one", "two")
        await until(lambda: named(path) == ["two", "one"])
        record_use("one")
        await until(lambda: named(path) == ["one", "two"])
        await use(there, record_use, "three")  # one of the others has left for it
        await until(lambda: named(path)[0] == "three" and len(named(path)) == 2)


async def test_few_names_are_looked_up(tmp_path: Path, path: Path, monkeypatch: Patch) -> None:
    async with (
        over(make_source(tmp_path, "one")) as there,
        kept(path, there, pause=0) as record_use,
    ):
        await warm(there, "one")
        for number in range(500):
            record_use(f"another/{number}")
        record_use("one")
        looks = watched(monkeypatch, Placement, "key")
        await until(lambda: named(path) == ["one"])
    assert {look.args[1] for look in looks} == {AdapterRef("one")}


@pytest.mark.parametrize("kind", ["id", "operator's", "path"])
async def test_the_next_server_brings_them_back(tmp_path: Path, path: Path, kind: str) -> None:
    """With the operator's authority where it named them; a path is one again, in any bytes."""
    source = make_source(tmp_path, "one", "two")
    folder = (tmp_path / "one").rename(tmp_path / os.fsdecode(b"\xff")) if kind == "path" else None
    ref: Any = {"id": "one", "path": folder}.get(kind, AdapterRef("one", use_token=True))
    server = loader if kind == "path" else partial(over, source)
    async with server() as there, kept(path, there) as record_use:
        await use(there, record_use, ref)
    async with server() as there, kept(path, there) as record_use:
        (row,) = json.loads(path.read_text())["adapters"]
        assert row.get("use_token", False) is (kind == "operator's")
        await until(lambda: is_resident(there, ref))
        assert len(there.placement().adapters) == 1
    assert json.loads(path.read_text())["adapters"] == [row]


async def test_tokens_are_not_written(tmp_path: Path, path: Path) -> None:
    async with over(make_source(tmp_path, "one")) as there, kept(path, there) as record_use:
        await use(there, record_use, AdapterRef("one", token="SECRET"))
    assert named(path) == []


@pytest.mark.parametrize("comes", [True, False])
async def test_an_adapter_still_coming_stays_named(tmp_path: Path, path: Path, comes: bool) -> None:
    """Killed meanwhile, the list is what it was; at the end it comes no further."""
    path.write_text(json.dumps({"adapters": [{"id": "one", "source": None, "revision": None}]}))
    source = make_source(tmp_path, "one")
    source.hold("one")
    async with over(source) as there:
        async with kept(path, there, pause=0) as record_use:
            record_use("elsewhere/other")
            await until(lambda: path.read_text().startswith("{\n"))  # it was written anew
            assert named(path) == ["one"]
            if comes:
                source.allow("one")
                await until(lambda: is_resident(there, "one"))
                await there.unload("one")
                await until(lambda: named(path) == [])
        source.allow("one")
        await until(lambda: not there.placement().usage.waiting)
        assert not there.placement().adapters or comes
    assert named(path) == ([] if comes else ["one"])


class Disk:
    """Names a file when it is let, and counts; no thread of the loop touches it."""

    def __init__(self, path: Path, monkeypatch: Patch) -> None:
        self.free = threading.Event()
        self.free.set()
        self.begun = self.ended = 0
        self.threads = set[threading.Thread]()
        opened, replaced = os.open, os.replace

        def open_file(name: Any, *given: Any, **more: Any) -> int:
            if name == path:
                self.threads.add(threading.current_thread())
            return opened(name, *given, **more)

        def replace(source: str, target: Path) -> None:
            self.begun += 1
            self.threads.add(threading.current_thread())
            assert self.free.wait(20)
            replaced(source, target)
            self.ended += 1

        monkeypatch.setattr(os, "open", open_file)
        monkeypatch.setattr(os, "replace", replace)


@pytest.fixture
def disk(path: Path, monkeypatch: Patch) -> Iterator[Disk]:
    disk = Disk(path, monkeypatch)
    yield disk
    assert threading.main_thread() not in disk.threads


async def test_changes_during_a_write_are_written(tmp_path: Path, path: Path, disk: Disk) -> None:
    source = make_source(tmp_path, "one", "two")
    async with over(source) as there, kept(path, there, pause=0) as record_use:
        await use(there, record_use, "two", "one")
        await until(lambda: named(path) == ["one", "two"])
        disk.free.clear()
        before = disk.begun
        record_use("two")
        await until(lambda: disk.begun > before)
        record_use("one")
        await asyncio.sleep(0)
        disk.free.set()
        await until(lambda: disk.begun > before + 1)
        await until(lambda: named(path) == ["one", "two"])


async def leave_while_it_writes(path: Path, there: Any, disk: Disk) -> asyncio.Task[object]:
    keeping = kept(path, there, pause=0)
    record_use = await keeping.__aenter__()
    disk.free.clear()
    await use(there, record_use, "one")
    await until(lambda: disk.begun > disk.ended)
    return asyncio.create_task(keeping.__aexit__(None, None, None))


async def test_leaving_waits_for_what_is_written(tmp_path: Path, path: Path, disk: Disk) -> None:
    async with over(make_source(tmp_path, "one")) as there:
        leaving = await leave_while_it_writes(path, there, disk)
        await asyncio.sleep(0.05)
        assert not leaving.done()
        disk.free.set()
        await leaving
        assert disk.begun == disk.ended
        assert named(path) == ["one"]
        path.unlink()
        await there.unload("one")
        await asyncio.sleep(0.05)
        assert not path.exists(), "the loader tells it no more"


async def test_leaving_is_cancelled_but_not_a_write(tmp_path: Path, path: Path, disk: Disk) -> None:
    async with over(make_source(tmp_path, "one")) as there:
        leaving = await leave_while_it_writes(path, there, disk)
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        assert leaving.cancelled()
        (task,) = (each for each in asyncio.all_tasks() if each.get_name() == "lorax warm list")
        disk.free.set()
        await task
        assert disk.begun == disk.ended
        assert named(path) == ["one"]


async def test_one_write_a_pause_and_one_at_the_end(tmp_path: Path, path: Path, disk: Disk) -> None:
    async with over(make_source(tmp_path, "one", "two")) as there:
        async with kept(path, there, pause=1e6) as record_use:
            record_use("one")
            await until(lambda: disk.ended)
            await use(there, record_use, "one", "two")
            assert disk.begun == 1
        assert (disk.begun, named(path)) == (2, ["two", "one"])


async def test_the_file_is_whole_on_disk_before_its_name(path: Path, monkeypatch: Patch) -> None:
    steps, fsync, replace = list[bytes](), os.fsync, os.replace

    def synced(number: int) -> None:
        assert not path.exists()
        steps.append(os.pread(number, 100, 0))
        fsync(number)

    def named_so(source: str, target: Path) -> None:
        assert steps
        steps.append(Path(source).read_bytes())
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named_so)
    async with loader() as there, kept(path, there):
        pass
    assert steps == [path.read_bytes()] * 2


async def test_a_file_that_cannot_be_written_is_told_of_and_nothing_is_left(
    tmp_path: Path, path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    async with loader() as there, kept(folder / "warm", there):
        folder.rmdir()
    assert caplog.text.count("could not be written") == 1

    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError("it is read-only")))
    async with loader() as there, kept(path, there):
        pass
    assert caplog.text.count("could not be written") == 2
    assert not list(tmp_path.iterdir())
