"""The files the benchmarks load: adapters of a Llama-3-8B's shapes, written as PEFT writes them."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import torch
from safetensors.torch import load_file, save_file

HIDDEN = 4096
KEY_VALUE = 1024
INTERMEDIATE = 14336
LAYERS = 32

TARGETS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, KEY_VALUE),
    "self_attn.v_proj": (HIDDEN, KEY_VALUE),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}
"""Target module of one layer → (in, out) features."""

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

SCALE = 2.0
"""lora_alpha over the rank, of every adapter here."""

PEFT_PREFIX = "base_model.model."
_MARK = re.compile(rb"copy \d{8}")
_DROPS, _DROP_SECONDS = 20, 0.02
_PAGE = mmap.PAGESIZE
_PAGE_CACHED = 1  # lowest bit of each byte that mincore(2) writes


def module_paths(divisor: int = 1) -> Iterator[tuple[str, int, int]]:
    """Every targeted module: its path in the base model, in and out features (÷ `divisor`)."""
    for layer in range(LAYERS):
        for name, (in_features, out_features) in TARGETS.items():
            yield f"model.layers.{layer}.{name}", in_features // divisor, out_features // divisor


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """One adapter on disk, and what safetensors' own reader says is in it.

    `header` and `data` are the two parts of the weights file; `tensors` are views of `data`
    (uint8 `[bytes]`) in the file's order.
    """

    path: Path
    header: bytes
    data: torch.Tensor
    tensors: dict[str, torch.Tensor]

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def data_start(self) -> int:
        """Where the weights begin in the file."""
        return len(self.header)

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return self.data.numel()

    @property
    def file_size(self) -> int:
        return len(self.header) + self.nbytes

    def copied_to(self, path: Path, mark: int | None = None) -> AdapterFolder:
        """The same weights as new files (new inodes), on disk and in the page cache.

        With a `mark` the header's bytes differ as well, so that a loader that remembers headers
        has not seen this one.
        """
        shutil.copytree(self.path, path)
        header = self.header
        if mark is not None:
            header = _MARK.sub(_mark(mark), header, count=1)
            with (path / WEIGHTS).open("r+b") as file:
                file.write(header)
        for name in (WEIGHTS, CONFIG):
            settle(path / name)
            (path / name).read_bytes()
        return AdapterFolder(path, header, self.data, self.tensors)


def write_adapter(
    path: Path, *, rank: int, dtype: torch.dtype, seed: int, mark: int = 0, divisor: int = 1
) -> AdapterFolder:
    """Write an adapter with random weights: `rank` 16 in bf16 is 84 MB in 448 tensors.

    Two with the same `mark` have the same header. A `divisor` makes the base so much narrower.
    """
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, in_features, out_features in module_paths(divisor):
        name = f"{PEFT_PREFIX}{module}"
        for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            values = torch.randn(shape, generator=random)
            tensors[f"{name}.lora_{part}.weight"] = values.to(dtype)
    path.mkdir(parents=True)
    metadata = {"mark": _mark(mark).decode()}  # one field: their order is left to chance
    save_file(dict(sorted(tensors.items())), path / WEIGHTS, metadata=metadata)
    (path / CONFIG).write_text(json.dumps(peft_config(rank), indent=2))
    for name in (WEIGHTS, CONFIG):
        settle(path / name)
    return read_folder(path)


def _mark(number: int) -> bytes:
    """Stands in the header's metadata, and is as long for every number."""
    return b"copy %08d" % number


def peft_config(rank: int) -> dict[str, object]:
    """`adapter_config.json` of a plain LoRA on the targets above."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in TARGETS),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def read_folder(path: Path) -> AdapterFolder:
    """Read an adapter twice, as bytes and by safetensors' reader, and check one by the other."""
    raw = (path / WEIGHTS).read_bytes()
    data_start = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:data_start])
    data = torch.frombuffer(bytearray(raw[data_start:]), dtype=torch.uint8)
    loaded = load_file(path / WEIGHTS)
    tensors = {}
    for name in sorted(loaded, key=lambda name: entries[name]["data_offsets"][0]):
        view = data[slice(*entries[name]["data_offsets"])].view(loaded[name].dtype)
        tensors[name] = view.view(loaded[name].shape)
        assert torch.equal(tensors[name], loaded[name]), name
    return AdapterFolder(path, raw[:data_start], data, tensors)


def settle(path: Path) -> None:
    """Wait until the file is on the disk, so that no writing back disturbs a measurement."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PagesStayedError(RuntimeError):
    """The kernel did not drop a file from the page cache: a cold number would be a lie."""


def drop_from_cache(path: Path) -> None:
    """Drop a file from the page cache and see that it is gone.

    The kernel keeps pages that are in use at that moment: try again for a while.
    """
    for _ in range(_DROPS):
        settle(path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        left = cached_pages(path)
        if not left:
            return
        sleep(_DROP_SECONDS)
    raise PagesStayedError(
        f"{path.name}: {left} pages are still cached after posix_fadvise(DONTNEED);"
        " put --work on a local disk that supports it (not tmpfs)"
    )


def cached_pages(path: Path) -> int:
    """How many pages of the file are in the page cache, by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as map:
        flags = (ctypes.c_ubyte * -(-len(map) // _PAGE))()
        start = ctypes.c_char.from_buffer(map)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            address = ctypes.c_void_p(ctypes.addressof(start))
            if libc.mincore(address, ctypes.c_size_t(len(map)), flags) != 0:
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            del start
        return sum(flag & _PAGE_CACHED for flag in flags)
