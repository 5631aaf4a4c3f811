"""What of a folder with several files of weights is refused, by the names of all of them."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from local_world import CONFIG_NAME, LIMITS, WEIGHTS_NAME, LocalWorld, nothing_left_open, refusal
from source_inputs import read, tensors
from split_world import FILES, cut, parts, put

from common import Run
from lorax_async import errors
from lorax_async.adapter import AdapterKey, AdapterRef
from lorax_async.io.ports import Demand
from split_files import INDEX, index_of, name_of


@pytest.fixture
def world(tmp_path: Path) -> Iterator[LocalWorld]:
    with nothing_left_open(tmp_path) as world:
        yield world


@pytest.fixture
def folder(world: LocalWorld) -> Path:
    return put(world.roots[0] / "one")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_file_that_is_not_there(world: LocalWorld, folder: Path, number: int) -> None:
    (folder / FILES[1 + number]).unlink()
    for id in ("./one", folder):
        error = refusal(world, id)
        assert type(error) is errors.AdapterNotFoundError
        assert f"{FILES[1 + number]}, which {INDEX} names" in error.problem


def test_without_a_config_it_is_no_adapter(world: LocalWorld, folder: Path) -> None:
    (folder / CONFIG_NAME).unlink()
    error = refusal(world, folder)
    assert type(error) is errors.AdapterNotFoundError
    assert error.problem == f"the folder has no {CONFIG_NAME}"


def cut_short(folder: Path) -> None:
    cut(folder / FILES[3])


def cut_in_the_header(folder: Path) -> None:
    os.truncate(folder / FILES[3], 30)


def longer(folder: Path) -> None:
    with (folder / FILES[3]).open("ab") as file:
        file.write(b"x")


def more_tensors(folder: Path) -> None:
    safetensors.torch.save_file(parts(1)[1] | {"more": torch.ones(1)}, folder / FILES[3])


def fewer_tensors(folder: Path) -> None:
    last = dict(list(parts(1)[1].items())[1:])
    safetensors.torch.save_file(last, folder / FILES[3])


def swapped(folder: Path) -> None:
    (folder / FILES[3]).rename(folder / "x")
    (folder / FILES[2]).rename(folder / FILES[3])
    (folder / "x").rename(folder / FILES[2])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut_short, f"{FILES[3]}: tensor .* ends 1 bytes before"),
        (cut_in_the_header, f"{FILES[3]}: .*ends inside its header"),
        (longer, f"{FILES[3]}: .*1 bytes after the last tensor"),
        (more_tensors, f"{FILES[3]}: has tensor 'more'.*nowhere"),
        (fewer_tensors, f"{FILES[3]}: has no tensor 'base_model"),
        (swapped, f"{FILES[2]}: has tensor .* is in {FILES[3]}"),
    ],
)
def test_files_that_do_not_belong_together(
    world: LocalWorld, folder: Path, run: Run, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(folder)

    async def main() -> None:
        key = await world.source.resolve(AdapterRef(folder))
        for work in (world.source.open(key, Demand()), asyncio.to_thread(first_byte, world, key)):
            with pytest.raises(errors.AdapterFormatError, match=words):
                await work

    run(main())


def first_byte(world: LocalWorld, key: AdapterKey) -> bytes:
    reader = world.source.reopen(key)
    try:
        return read(reader, 0, 1)
    finally:
        reader.close()


def weight_map(**files: str) -> bytes:
    return json.dumps({"weight_map": files}).encode()


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (weight_map(a="../two/adapter_model.safetensors"), "'../two/adapter_model.safetensors'"),
        (weight_map(a=WEIGHTS_NAME), WEIGHTS_NAME),
        (weight_map(a="/etc/passwd"), "'/etc/passwd'"),
        (weight_map(a=name_of(1, 99_999)), "99,999 files"),
        (b'{"weight_map": {"a": "x", "a": "x"}}', "'a'"),
        (index_of(parts(1)).replace(b"lora_B", b"lora_A"), "stands there twice"),
        (index_of(parts(1)).ljust(LIMITS.max_header_bytes + 1), "over the limit of 1,048,576"),
        (b"", "is empty"),
    ],
)
def test_an_index_of_a_stranger(world: LocalWorld, folder: Path, index: bytes, words: str) -> None:
    (folder / INDEX).write_bytes(index)
    error = refusal(world, folder)
    assert type(error) is errors.AdapterFormatError
    assert INDEX in error.problem
    assert words in error.problem


def test_limits_hold_for_all_files_together(world: LocalWorld, folder: Path) -> None:
    for name in FILES[2:4]:
        os.truncate(folder / name, LIMITS.max_adapter_bytes // 2)
    error = refusal(world, folder)
    assert type(error) is errors.AdapterFormatError
    assert f"the files up to {FILES[4]} have" in error.problem


@pytest.mark.parametrize("name", [INDEX, FILES[3]])
def test_no_ordinary_file(world: LocalWorld, folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    error = refusal(world, folder)
    assert type(error) is errors.AdapterFormatError
    assert f"{name} is a FIFO" in error.problem


@pytest.mark.parametrize("name", [INDEX, FILES[3]])
def test_links_stay_in_the_folder(world: LocalWorld, folder: Path, run: Run, name: str) -> None:
    (folder / "sub").mkdir()
    (folder / name).rename(folder / "sub" / "file")
    (folder / name).symlink_to("sub/file")
    run(world.source.resolve(AdapterRef("./one")))
    other = put(world.roots[0] / "other")
    for target in (other / name, other / "nothing"):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        error = refusal(world, "./one")
        assert type(error) is errors.AccessDeniedError
        assert name in error.problem
    (folder / name).unlink()
    (folder / name).symlink_to(other / name)
    key = run(world.source.resolve(AdapterRef(folder)))
    assert key.files[FILES.index(name)].inode == (other / name).stat().st_ino


def test_the_hub_cache_keeps_its_links(world: LocalWorld, run: Run) -> None:
    repository = world.roots[0] / "models--o--n"
    folder = put(repository / "snapshots" / ("c" * 40))
    (repository / "blobs").mkdir()
    for n, name in enumerate(FILES):
        blob = repository / "blobs" / (f"{n}" * 64)
        (folder / name).rename(blob)
        (folder / name).symlink_to(os.path.relpath(blob, folder))
    key = run(world.source.resolve(AdapterRef(str(folder))))
    file = run(world.source.open(key, Demand()))
    content = read(file.reader, 0, file.reader.nbytes)
    assert safetensors.torch.load(content).keys() == tensors(1).keys()
    file.reader.close()
    secret = put(world.roots[0] / "secret")
    (folder / FILES[4]).unlink()
    (folder / FILES[4]).symlink_to(secret / FILES[4])
    assert type(refusal(world, str(folder))) is errors.AccessDeniedError
