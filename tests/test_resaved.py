"""Adapters that are saved again in place while they are loaded."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from common import until
from lorax_async import (
    AdapterFormatError,
    AdapterHandle,
    AdapterLoader,
    AdapterNotFoundError,
    Event,
    Failed,
    IntegrityError,
    LoaderConfig,
    Merge,
)
from lorax_async.io.devices.gated import GatedDevice
from tiny_loaders import loader as tiny_loader

pytestmark = pytest.mark.usefixtures("nothing_left")

WEIGHTS = "adapter_model.safetensors"
VERSIONS = [tiny.tensors(seed) for seed in range(1, 4)]
CLIENTS = 16
SECONDS = 0.6
PAUSE = 0.25
"""Between two saves; a version that is whole for no longer than files must rest is never loaded."""

Save = Callable[[dict[str, torch.Tensor], Path], object]


def rewrite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """As safetensors does: the file is emptied first."""
    save_file(tensors, path)


def rewrite_slowly(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path.with_suffix(".new"))
    content = path.with_suffix(".new").read_bytes()
    with path.open("wb") as file:
        for start in range(0, len(content), 1 << 13):
            file.write(content[start : start + (1 << 13)])
            file.flush()
            time.sleep(0.002)


def overwrite(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """All bytes at once, over those that are there."""
    save_file(tensors, path.with_suffix(".new"))
    with path.open("r+b") as file:
        file.write(path.with_suffix(".new").read_bytes())


def rename(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


SAVES = [rewrite, rewrite_slowly, overwrite, rename]


@contextmanager
def resaving(folder: Path, save: Save, pause: float = PAUSE) -> Iterator[threading.Event]:
    """While it is entered, one version after the other is saved; the event is set at the first."""
    ended, begun = threading.Event(), threading.Event()

    def work() -> None:
        number = 0
        while not ended.is_set():
            save(VERSIONS[number % len(VERSIONS)], folder / WEIGHTS)
            number += 1
            begun.set()
            ended.wait(pause)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(20)
        yield begun
    finally:
        ended.set()
        thread.join()


def is_whole(handle: AdapterHandle) -> bool:
    """Whether it is one of the versions, in all of its tensors."""
    found = {}
    for name, module in handle.modules.items():
        found[f"base_model.model.{name}.lora_A.weight"] = module.a
        found[f"base_model.model.{name}.lora_B.weight"] = module.b
    return any(
        all(torch.equal(found[name], tensor) for name, tensor in version.items())
        for version in VERSIONS
    )


@pytest.mark.parametrize("verb", ["load", "stream", "prefetch"])
@pytest.mark.parametrize("save", SAVES)
async def test_whoever_asks_gets_one_whole_version(tmp_path: Path, save: Save, verb: str) -> None:
    folder = tiny.write(tmp_path / "a", 1)

    async def client(loader: AdapterLoader) -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if verb == "load":
                try:
                    async with await loader.load(folder) as handle:
                        assert is_whole(handle)
                except IntegrityError as error:  # a busy machine lets a slow writer rest
                    assert save is rewrite_slowly
                    assert "once more" in str(error)
            elif verb == "stream":
                # The slot may be had before the last byte was read.
                async with loader.stream(folder) as handle:
                    try:
                        await handle.layer_ready(tiny.LAYERS - 1)
                    except IntegrityError:
                        continue
                    assert is_whole(handle)
            else:
                await loader.prefetch(folder)
            await asyncio.sleep(0.001)

    async with tiny_loader(max_slots=8, timeout=20) as loader:
        with resaving(folder, save):
            async with asyncio.TaskGroup() as group:
                for _ in range(CLIENTS):
                    group.create_task(client(loader))


def gated_loader() -> tuple[AdapterLoader, GatedDevice]:
    device = GatedDevice(tiny.layout(), dtype="F32", nbytes=1 << 20, slots=4)
    config = LoaderConfig(device_bytes=1 << 20, max_slots=4, io_threads=2)
    return AdapterLoader(tiny.layout(), config, device=device), device


async def interrupted(
    loader: AdapterLoader, device: GatedDevice, ask: Callable[[], Any], *changes: Callable[[], Any]
) -> Any:
    """Ask, and make each change when the next try has begun its copies."""
    failures: list[Event] = []
    unsubscribe = loader.subscribe(
        lambda event: failures.append(event) if isinstance(event, Failed) else None
    )
    device.gate.clear()
    asked = asyncio.create_task(ask())
    for number, change in enumerate(changes, 1):
        before = device.copies
        await until(lambda before=before: device.copies > before)  # type: ignore[misc]
        change()
        device.gate.set()
        await until(lambda number=number: len(failures) == number)  # type: ignore[misc]
        device.gate.clear()
    device.gate.set()
    unsubscribe()
    return await asked


async def test_a_second_change_is_told(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    loader, device = gated_loader()
    async with loader:
        changes = [lambda: tiny.write(folder, 2), lambda: tiny.write(folder, 3)]
        with pytest.raises(IntegrityError, match="again while they were loaded once more"):
            await interrupted(loader, device, lambda: loader.load(folder), *changes)
        async with await loader.load(folder) as handle:
            tiny.assert_equal_to_file(handle, folder)


async def test_one_change_is_not(tmp_path: Path) -> None:
    """Nor in a part of a merge."""
    one, two = tiny.write(tmp_path / "a", 1), tiny.write(tmp_path / "b", 2)
    loader, device = gated_loader()
    async with loader:
        change = lambda: tiny.write(one, 3)  # noqa: E731
        ask = lambda: loader.load(one)  # noqa: E731
        async with await interrupted(loader, device, ask, change) as handle:
            tiny.assert_equal_to_file(handle, one)
        merge = Merge("linear", [one, two], [1, 1])
        ask = lambda: loader.load(merge)  # noqa: E731
        change = lambda: tiny.write(one, 4)  # noqa: E731
        (await interrupted(loader, device, ask, change)).release()


async def test_a_key_means_one_version(tmp_path: Path) -> None:
    """Whoever asks for it gets no other."""
    folder = tiny.write(tmp_path / "a", 1)
    async with tiny_loader() as loader:
        async with await loader.load(folder) as handle:
            key = handle.key
        await loader.unload(folder)
        tiny.write(folder, 2)
        with pytest.raises(IntegrityError):
            await loader.load(key)


async def test_a_digest_is_not_asked_twice(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with tiny_loader() as loader:
        with pytest.raises(IntegrityError, match="sha256"):
            await loader.load(folder, digest="0" * 64)
        assert loader.statistics().loads <= 1


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"{" * 100])
async def test_what_rests_in_pieces_is_malformed(tmp_path: Path, content: bytes) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    (folder / WEIGHTS).write_bytes(content)
    async with tiny_loader() as loader:
        began = time.monotonic()
        with pytest.raises(AdapterFormatError):
            await loader.load(folder)
        assert time.monotonic() - began < 1


async def test_what_was_removed_is_told(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    loader, device = gated_loader()
    async with loader:
        remove = (folder / WEIGHTS).unlink
        with pytest.raises((IntegrityError, AdapterNotFoundError)):
            await interrupted(loader, device, lambda: loader.load(folder), remove)


async def test_what_never_rests_ends_in_time(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path / "a", 1)
    async with tiny_loader() as loader:
        with resaving(folder, rewrite_slowly, pause=0):
            began = time.monotonic()
            with suppress(IntegrityError, AdapterFormatError):
                (await loader.load(folder, timeout=10)).release()
            assert time.monotonic() - began < 6
