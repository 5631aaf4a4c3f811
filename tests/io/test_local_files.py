"""What lies in a local folder: every kind of file is judged without waiting, and read as it was."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
from local_world import CONFIG_NAME, LIMITS, WEIGHTS_NAME, LocalWorld, nothing_left_open, refusal
from source_inputs import CONFIG, header_bytes, tensors, weights

from lorax_async import errors
from lorax_async.adapter import AdapterRef
from lorax_async.io.ports import Demand
from lorax_async.io.sources.local import LocalSource


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path) as world:
        yield world


def fifo(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name has at most 107 bytes
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/ptmx")


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def empty(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (fifo, "FIFO"),
        (folder, "folder"),
        (unix_socket, "socket"),
        (device, "device"),
        (terminal, "device"),
        (huge, "1,099,511,627,776"),
        (empty, "empty"),
    ],
)
def test_no_ordinary_file(
    world: LocalWorld, name: str, make: Callable[[Path], None], word: str
) -> None:
    path = world.fill(world.roots[0] / "one") / name
    path.unlink()
    make(path)
    error = refusal(world, path.parent)
    assert type(error) is errors.AdapterFormatError
    assert name in error.problem
    assert word in error.problem


@pytest.mark.parametrize("make", [fifo, unix_socket, device, huge, empty])
@pytest.mark.parametrize("named", [str, Path])
def test_no_folder(
    world: LocalWorld, make: Callable[[Path], None], named: Callable[[Path], str | Path]
) -> None:
    path = world.roots[0] / "adapter.tar.gz"
    make(path)
    error = refusal(world, named(path))
    leaves = make is device and named is str
    assert type(error) is (errors.AccessDeniedError if leaves else errors.AdapterFormatError)


@pytest.mark.parametrize(
    ("present", "kind", "words"),
    [
        ([], errors.AdapterNotFoundError, [CONFIG_NAME, WEIGHTS_NAME]),
        ([CONFIG_NAME], errors.AdapterNotFoundError, [WEIGHTS_NAME]),
        ([WEIGHTS_NAME], errors.AdapterNotFoundError, [CONFIG_NAME]),
        ([CONFIG_NAME, "adapter_model.bin"], errors.AdapterFormatError, ["pickle", "re-save"]),
        (
            [CONFIG_NAME, f"{WEIGHTS_NAME}.index.json"],
            errors.AdapterFormatError,
            ["index.json", "names no tensors"],
        ),
    ],
)
def test_an_incomplete_folder(
    world: LocalWorld, present: list[str], kind: type, words: list[str]
) -> None:
    for name in present:
        (world.folder("one") / name).write_bytes(b"{}")
    world.folder("one")
    error = refusal(world, "./one")
    assert type(error) is kind
    assert all(word in error.problem for word in words)
    assert not any(name in error.problem for name in present[:1])


def test_limits_are_the_last_size_that_passes(world: LocalWorld) -> None:
    path = world.fill(world.roots[0] / "one")
    config = CONFIG.ljust(LIMITS.max_config_bytes)
    (path / CONFIG_NAME).write_bytes(config)

    async def main() -> None:
        file = await world.source.open(await world.source.resolve(AdapterRef(path)), Demand())
        assert file.config == config
        file.reader.close()

    asyncio.run(main())
    (path / CONFIG_NAME).write_bytes(config + b" ")
    assert type(refusal(world, path)) is errors.AdapterFormatError


def test_a_header_of_any_legal_size_is_brought(world: LocalWorld) -> None:
    for size, legal in ((130_000, True), (1_000_000, True), (1_100_000, False)):
        content = weights(1, {"note": "x" * size})
        assert (header_bytes(content) <= LIMITS.max_header_bytes) is legal
        ref = world.put("one", CONFIG, content)

        async def main(ref: AdapterRef = ref) -> bytes:
            file = await world.source.open(await world.source.resolve(ref), Demand())
            file.reader.close()
            return file.prefix

        if legal:
            prefix = asyncio.run(main())
            assert prefix == content[: len(prefix)]
            assert len(prefix) >= header_bytes(content)
        else:
            with pytest.raises(errors.AdapterFormatError, match="limit"):
                asyncio.run(main())


def become_nobody() -> None:
    """This thread alone, and for files alone; root could read everything."""
    ctypes.CDLL(None).setfsuid(65_534)


@pytest.mark.parametrize("denied", ["", CONFIG_NAME, WEIGHTS_NAME])
@pytest.mark.parametrize("step", ["resolve", "open"])
def test_what_the_process_may_not_read(denied: str, step: str) -> None:
    async def main(base: Path) -> None:
        source = LocalSource(roots=[base], limits=LIMITS, threads=threads)
        key = await source.resolve(AdapterRef(base / "one"))
        mode = 0o000 if denied else 0o600
        (base / "one" / denied).chmod(mode)
        if step == "resolve":
            for id in (base / "one", "./one"):
                with pytest.raises(errors.AccessDeniedError, match="permission"):
                    await source.resolve(AdapterRef(id))
        else:
            # A new mode is another version of a file.
            with pytest.raises(errors.IntegrityError if denied else errors.AccessDeniedError):
                await source.open(key, Demand())

    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor(2, initializer=become_nobody) as threads,
    ):
        base = Path(name).resolve()
        (base / "one").mkdir()
        (base / "one" / CONFIG_NAME).write_bytes(CONFIG)
        safetensors.torch.save_file(tensors(1), base / "one" / WEIGHTS_NAME)
        (base / "one" / WEIGHTS_NAME).chmod(0o644)
        base.chmod(0o755)
        asyncio.run(main(base))
