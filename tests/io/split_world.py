"""A folder whose weights are three files, which have something of each layer."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from local_world import CONFIG_NAME
from source_inputs import CONFIG, tensors

from split_files import INDEX, name_of, write

FILES = [CONFIG_NAME, INDEX, name_of(1, 3), name_of(2, 3), name_of(3, 3)]


def parts(seed: int) -> list[dict[str, torch.Tensor]]:
    """Each layer's tensors in two files."""
    made: list[dict[str, torch.Tensor]] = [{}, {}, {}]
    for n, (name, tensor) in enumerate(tensors(seed).items()):
        made[n % 3][name] = tensor
    return made


def put(folder: Path, seed: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_NAME).write_bytes(CONFIG)
    write(folder, parts(seed))
    return folder


def touch(path: Path) -> None:
    os.utime(path, (5, 5))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def replace(path: Path) -> None:
    path.with_name("new").write_bytes(path.read_bytes())
    path.with_name("new").rename(path)
