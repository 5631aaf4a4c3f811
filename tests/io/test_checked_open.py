"""Descriptors under pressure: names that change, reads that fall short, closes that come too soon."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from local_world import CONFIG_NAME, WEIGHTS_NAME, LocalWorld, descriptors, nothing_left_open
from source_inputs import CONFIG

from lorax_async import errors
from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.io.ports import AdapterFile, Demand
from lorax_async.io.sources import local, local_weights
from lorax_async.io.sources.checked_open import located, open_same

SECRET = b"the secret of another tenant"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path) as world:
        yield world


def patched(monkeypatch: pytest.MonkeyPatch, opener: Callable[[str, Any], int]) -> None:
    """Config and weights are both opened so."""
    monkeypatch.setattr(local, "open_same", opener)
    monkeypatch.setattr(local_weights, "open_same", opener)


def retarget(link: Path, target: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


def swing_link(folder: Path) -> None:
    retarget(folder / "link", folder / "secret")


def replace_file(folder: Path) -> None:
    (folder / "secret").rename(folder / "mine")


@pytest.mark.parametrize("change", [swing_link, replace_file])
def test_a_descriptor_is_opened_not_its_name(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "secret").write_bytes(SECRET)
    retarget(tmp_path / "link", tmp_path / "mine")
    with located(str(tmp_path / "link")) as file:
        change(tmp_path)
        fd = file.open()
    assert os.read(fd, 100) == b"mine"
    assert not os.get_inheritable(fd)
    assert not os.get_blocking(fd)
    os.close(fd)


def test_a_link_that_swings_never_lets_a_secret_out(world: LocalWorld) -> None:
    folder = world.fill(world.roots[0] / "one")
    secret = world.outside / "secret"
    secret.write_bytes(SECRET)
    (folder / CONFIG_NAME).rename(folder / "mine.json")
    retarget(folder / CONFIG_NAME, folder / "mine.json")
    stop, outcomes = threading.Event(), set[object]()

    def swing() -> None:
        while not stop.is_set():
            for target in (secret, folder / "mine.json"):
                retarget(folder / CONFIG_NAME, target)

    async def main() -> None:
        for turn in range(20_000):
            if turn > 300 and len(outcomes) > 1:
                break
            try:
                file = await world.source.open(
                    await world.source.resolve(AdapterRef("./one")), Demand()
                )
            except (errors.AccessDeniedError, errors.IntegrityError) as error:
                outcomes.add(type(error))
            else:
                outcomes.add(file.config)
                file.reader.close()

    thread = threading.Thread(target=swing)
    thread.start()
    try:
        asyncio.run(main())
    finally:
        stop.set()
        thread.join()
    assert CONFIG in outcomes
    assert errors.AccessDeniedError in outcomes
    assert outcomes <= {CONFIG, errors.AccessDeniedError, errors.IntegrityError}


def opens(world: LocalWorld) -> Callable[[AdapterKey], Coroutine[Any, Any, AdapterFile]]:
    return lambda key: world.source.open(key, Demand())


def reads_reopened(world: LocalWorld) -> Callable[[AdapterKey], Coroutine[Any, Any, None]]:
    async def step(key: AdapterKey) -> None:
        reader = world.source.reopen(key)
        try:
            reader.read_into([memoryview(bytearray(8))], 0)
        finally:
            reader.close()

    return step


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_a_fifo_that_takes_the_files_place(world: LocalWorld, name: str) -> None:
    path = world.fill(world.roots[0] / "one") / name

    async def main() -> None:
        key = await world.source.resolve(AdapterRef("./one"))
        path.unlink()
        os.mkfifo(path)
        for step in (opens(world), reads_reopened(world), world.source.populate):
            with pytest.raises(errors.IntegrityError, match=name):
                await step(key)
        path.unlink()
        for step in (opens(world), reads_reopened(world), world.source.populate):
            with pytest.raises(errors.IntegrityError, match=name):
                await step(key)

    asyncio.run(main())


def test_a_config_that_changes_while_it_is_read(
    world: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world.fill(world.roots[0] / "one")
    close = local._close_after_status

    def edit_and_close(file: Any) -> os.stat_result:
        (folder / CONFIG_NAME).write_bytes(CONFIG.replace(b"8", b"9"))
        return close(file)

    async def main() -> None:
        key = await world.source.resolve(AdapterRef("./one"))
        monkeypatch.setattr(local, "_close_after_status", edit_and_close)
        with pytest.raises(errors.IntegrityError, match=r"adapter_config\.json.*again"):
            await world.source.open(key, Demand())

    asyncio.run(main())


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_closed_even_when_the_open_was_given_up(
    world: LocalWorld, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The thread opens the file after nobody wants it any more."""
    folder = world.fill(world.roots[0] / "one")
    entered, go = threading.Event(), threading.Event()

    def slow(path: str, identity: Any) -> int:
        if path.endswith(name):
            entered.set()
            assert go.wait(10)
        return open_same(path, identity)

    async def main() -> None:
        key = await world.source.resolve(AdapterRef(folder))
        patched(monkeypatch, slow)
        opening = asyncio.ensure_future(world.source.open(key, Demand()))
        await asyncio.to_thread(entered.wait, 10)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        go.set()

    asyncio.run(main())


def test_an_error_waits_for_the_other_file(
    world: LocalWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once `open` has failed, no thread of its is at work and nothing is open."""
    folder = world.fill(world.roots[0] / "one")
    through = []

    def slow(path: str, identity: Any) -> int:
        if path.endswith(WEIGHTS_NAME):
            threading.Event().wait(0.05)
            through.append(path)
        return open_same(path, identity)

    async def main() -> None:
        key = await world.source.resolve(AdapterRef(folder))
        patched(monkeypatch, slow)
        (folder / CONFIG_NAME).write_bytes(b"{}")
        before = descriptors()
        with pytest.raises(errors.IntegrityError, match=CONFIG_NAME):
            await world.source.open(key, Demand())
        assert through
        assert descriptors() == before

    asyncio.run(main())
