"""Adapters that are saved again in place while they are loaded: one whole version, or an error."""

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import cycle
from pathlib import Path

import pytest
import safetensors.torch
import tiny
from gated_device import GatedDevice
from tiny_loaders import begin_copies, fails, gated, loader
from tiny_sources import WEIGHTS

from lorax_async import AdapterHandle, AdapterKey, AdapterLoader, errors, files
from lorax_async.sources import local

pytestmark = pytest.mark.usefixtures("nothing_left")

VERSIONS = [tiny.tensors(seed) for seed in range(1, 4)]
CLIENTS = 15
SECONDS = 0.8
PAUSE = 0.25
"""Between two saves."""
SAVED = (errors.SavedDuringLoadError, errors.AdapterFormatError)
"""What a load ends with whose files are just saved: in the middle, the file is cut."""

Save = Callable[[bytes, Path], object]
Change = Callable[[], object]


def rewrite(content: bytes, path: Path) -> None:
    """As safetensors does: the file is emptied first."""
    path.write_bytes(content)


def rewrite_slowly(content: bytes, path: Path) -> None:
    with path.open("wb") as file:
        for start in range(0, len(content), 1 << 13):
            file.write(content[start : start + (1 << 13)])
            file.flush()
            time.sleep(0.002)


def overwrite(content: bytes, path: Path) -> None:
    """All bytes at once, over those that are there."""
    with path.open("r+b") as file:
        file.write(content)


def rename(content: bytes, path: Path) -> None:
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


@contextmanager
def resaving(folder: Path, save: Save, pause: float = PAUSE) -> Iterator[None]:
    """While it is entered, one version after the other is saved."""
    ended, begun = threading.Event(), threading.Event()

    def work() -> None:
        for version in cycle(VERSIONS):
            save(safetensors.torch.save(version), folder / WEIGHTS)
            begun.set()
            if ended.wait(pause):
                return

    with ThreadPoolExecutor(1) as threads:
        saved = threads.submit(work)
        try:
            assert begun.wait(20)
            yield
        finally:
            ended.set()
            saved.result()


def is_whole(handle: AdapterHandle) -> bool:
    """Whether it is one of the versions, in all of its tensors."""
    for version in VERSIONS:
        with suppress(AssertionError):
            tiny.assert_holds(handle, version)
            return True
    return False


@pytest.mark.parametrize("save", [rewrite, rewrite_slowly, overwrite, rename])
async def test_every_call_gets_one_whole_version(tmp_path: Path, save: Save) -> None:
    folder, loaded = tiny.write(tmp_path / "a", 1), list[AdapterKey]()

    async def call(there: AdapterLoader, number: int) -> None:
        if number % 3 == 0:
            await there.prefetch(folder)
        elif number % 3 == 1:  # the slot may be had before the last byte was read
            async with there.stream(folder) as handle:
                with suppress(errors.IntegrityError):
                    await handle.layer_ready(tiny.LAYERS - 1)
                    assert is_whole(handle)
        else:
            async with await there.load(folder) as handle:
                assert is_whole(handle)
                loaded.append(handle.key)

    async def client(there: AdapterLoader, number: int) -> None:
        end = time.monotonic() + SECONDS  # from here on: opening and the first save take time, too
        while time.monotonic() < end:
            try:
                with suppress(errors.SavedDuringLoadError):
                    await call(there, number)
            except errors.AdapterFormatError:  # the file is empty or a part of it meanwhile
                assert save in {rewrite, rewrite_slowly}
            await asyncio.sleep(0.001)

    async with loader(max_slots=8, timeout=20) as there:
        with resaving(folder, save):
            await asyncio.gather(*(client(there, number) for number in range(CLIENTS)))
    assert len(set(loaded)) > 1


async def interrupted(
    there: AdapterLoader, device: GatedDevice, call: Awaitable[AdapterHandle], *changes: Change
) -> AdapterHandle:
    """The call's answer, with each change made when the next try has begun its copies."""
    tries = set[AdapterKey]()
    asked = asyncio.ensure_future(call)
    for change in changes:
        await begin_copies(there, device, tries)
        change()
    device.gate.set()
    return await asked


async def test_one_change_is_loaded_anew_and_a_second_is_an_error(tmp_path: Path) -> None:
    one = tiny.write(tmp_path / "a", 1)
    there, device = gated()

    def change(seed: int) -> Change:
        return lambda: tiny.write(one, seed)

    async with there:
        async with await interrupted(there, device, there.load(one), change(3)) as handle:
            tiny.assert_equal_to_file(handle, one)
        tiny.write(one, 5)
        again = interrupted(there, device, there.load(one), change(6), change(7))
        await fails(again, errors.SavedDuringLoadError, "saved while it was loaded")
        async with await there.load(one) as handle:
            tiny.assert_equal_to_file(handle, one)


async def test_a_file_removed_during_a_load_is_an_error(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    there, device = gated()
    async with there:
        removed = interrupted(there, device, there.load(folder), (folder / WEIGHTS).unlink)
        with pytest.raises((errors.IntegrityError, errors.AdapterNotFoundError)):
            await removed


async def test_a_key_means_one_version_and_a_digest_is_not_tried_twice(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with loader() as there:
        await fails(there.load(folder, digest="0" * 64), errors.IntegrityError, "sha256")
        assert there.statistics().loads <= 1
        async with await there.load(folder) as handle:
            key = handle.key
        await there.unload(folder)
        tiny.write(folder, 2)
        await fails(there.load(key), errors.IntegrityError)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"{" * 100])
async def test_a_half_written_file_that_rests_is_malformed(tmp_path: Path, content: bytes) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    (folder / WEIGHTS).write_bytes(content)
    async with loader() as there:
        await fails(there.load(folder, timeout=1), errors.AdapterFormatError)


@pytest.mark.slow
async def test_a_load_of_a_file_that_never_rests_ends_in_time(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with loader() as there:
        with resaving(folder, rewrite_slowly, pause=0), suppress(*SAVED):
            (await there.load(folder, timeout=5)).release()


@pytest.mark.parametrize("on_server", [False, True])
async def test_a_file_server_that_hangs_does_not_hold_up_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_server: bool
) -> None:
    """Resident adapters are looked at on the loop if the kernel has the answer, else in a thread."""
    looked, look, is_local = set(), os.stat, files.is_local

    def noted(path: int | str, **options: object) -> os.stat_result:
        looked.add((path, threading.current_thread() is threading.main_thread()))
        return look(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(local, "is_local", lambda fd: is_local(fd) and not on_server)
    folder = tiny.write(tmp_path / "adapter")
    async with loader() as one:
        (await one.load(folder)).release()
        monkeypatch.setattr(os, "stat", noted)
        (await one.load(folder)).release()
        monkeypatch.undo()
        assert one.statistics().hits["device"] == 1
    assert ((f"{folder}/{WEIGHTS}", True) in looked) is not on_server
