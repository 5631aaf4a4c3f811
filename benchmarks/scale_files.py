"""Very many small adapters on disk, and adapters of 448 tensors that hardly take any disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from harness import WrongBytesError
from lorax_async.handle import AdapterHandle
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from work_files import CONFIG, LAYERS, PEFT_PREFIX, WEIGHTS, module_paths, peft_config

SMALL_HIDDEN = 32
SMALL_RANK = 2
SMALL_TARGET = "self_attn.q_proj"


def small_layout() -> ModelLayout:
    """A base of 32 layers with one module of 32 × 32 each."""
    names = enumerate(_small_modules())
    modules = (Module(name, SMALL_HIDDEN, SMALL_HIDDEN, n, Parallelism.COLUMN) for n, name in names)
    return ModelLayout(tuple(modules), LAYERS, "BF16", "model.")


def _small_modules() -> Iterator[str]:
    return (f"model.layers.{layer}.{SMALL_TARGET}" for layer in range(LAYERS))


class SmallAdapters:
    """`count` adapters of 64 tensors below `root`, as if all were trained alike.

    Each has files of its own; all its values are its number (modulo 256, which bf16 holds).
    """

    def __init__(self, root: Path, count: int) -> None:
        self.root = root
        config = json.dumps({**peft_config(SMALL_RANK), "target_modules": ["q_proj"]})
        header, items = _small_file()
        for number in range(count):
            folder = root / self.id(number)
            folder.mkdir()
            (folder / CONFIG).write_text(config)
            values = torch.full((items,), number % 256, dtype=torch.bfloat16)
            (folder / WEIGHTS).write_bytes(header + values.view(torch.uint8).numpy().tobytes())

    @staticmethod
    def id(number: int) -> str:
        """Below the root, and about as long as ids are: a task and a tenant."""
        return f"./summaries-of-customer-{number:05d}"

    @staticmethod
    def check(handle: AdapterHandle, number: int) -> None:
        modules = handle.modules
        if len(modules) != LAYERS:
            raise WrongBytesError(f"{len(modules)} modules instead of {LAYERS}")
        for name, module in modules.items():
            if not (module.a == number % 256).all() or not (module.b == number % 256).all():
                raise WrongBytesError(f"{name} is not that of adapter {number}")


def _small_file() -> tuple[bytes, int]:
    """The header that all have, and how many values follow."""
    shapes = {"A": (SMALL_RANK, SMALL_HIDDEN), "B": (SMALL_HIDDEN, SMALL_RANK)}
    tensors = {
        f"{PEFT_PREFIX}{name}.lora_{part}.weight": torch.zeros(shape, dtype=torch.bfloat16)
        for name in _small_modules()
        for part, shape in shapes.items()
    }
    items = sum(tensor.numel() for tensor in tensors.values())
    whole = save(tensors)
    return whole[: len(whole) - 2 * items], items


def large_layout() -> ModelLayout:
    """Of the shapes in `work_files`."""
    modules = (
        Module(path, inside, outside, int(path.split(".")[2]), Parallelism.COLUMN)
        for path, inside, outside in module_paths()
    )
    return ModelLayout(tuple(modules), LAYERS, "BF16", "model.")


def write_sparse(folder: Path, *, rank: int, mark: str) -> Path:
    """An adapter of 448 tensors, all zero: its weights are a hole in the file.

    Two with different marks have different headers.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", "mark": mark}}
    at = 0
    for path, inside, outside in module_paths():
        for part, shape in (("A", (rank, inside)), ("B", (outside, rank))):
            stop = at + 2 * shape[0] * shape[1]
            entries[f"{PEFT_PREFIX}{path}.lora_{part}.weight"] = {
                "dtype": "BF16",
                "shape": shape,
                "data_offsets": (at, stop),
            }
            at = stop
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps(peft_config(rank)))
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()
        os.truncate(file.fileno(), 8 + len(header) + at)
    return folder
