"""The files the benchmarks load: adapters of a Llama-3-8B's shapes, written as PEFT writes them."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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

PEFT_PREFIX = "base_model.model."
_PAGE = mmap.PAGESIZE
_PAGE_CACHED = 1  # lowest bit of each byte that mincore(2) writes


def module_paths() -> Iterator[tuple[str, int, int]]:
    """Every targeted module: its path in the base model, in and out features."""
    for layer in range(LAYERS):
        for name, (in_features, out_features) in TARGETS.items():
            yield f"model.layers.{layer}.{name}", in_features, out_features


@dataclass(frozen=True, slots=True)
class AdapterFolder:
    """One adapter on disk, and what safetensors' own reader says is in it.

    `tensors` holds views of `content`, the whole weights file in memory, in file order.
    """

    path: Path
    content: torch.Tensor
    data_start: int
    tensors: dict[str, torch.Tensor]

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS

    @property
    def data(self) -> torch.Tensor:
        """The weights alone, uint8 `[bytes]`."""
        return self.content[self.data_start :]

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return self.data.numel()

    def copied_to(self, path: Path) -> AdapterFolder:
        """The same bytes as new files (new inodes), on disk and in the page cache."""
        shutil.copytree(self.path, path)
        for name in (WEIGHTS, CONFIG):
            settle(path / name)
            (path / name).read_bytes()
        return AdapterFolder(path, self.content, self.data_start, self.tensors)


def write_adapter(path: Path, *, rank: int, dtype: torch.dtype, seed: int) -> AdapterFolder:
    """Write an adapter with random weights: `rank` 16 in bf16 is 84 MB in 448 tensors."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, in_features, out_features in module_paths():
        name = f"{PEFT_PREFIX}{module}"
        for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            values = torch.randn(shape, generator=random)
            tensors[f"{name}.lora_{part}.weight"] = values.to(dtype)
    path.mkdir(parents=True)
    save_file(dict(sorted(tensors.items())), path / WEIGHTS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(peft_config(rank), indent=2))
    for name in (WEIGHTS, CONFIG):
        settle(path / name)
    return read_folder(path)


def peft_config(rank: int) -> dict[str, object]:
    """`adapter_config.json` of a plain LoRA on the targets above."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.rpartition(".")[2] for name in TARGETS),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }


def read_folder(path: Path) -> AdapterFolder:
    """Read an adapter twice, as bytes and by safetensors' reader, and check one by the other."""
    raw = (path / WEIGHTS).read_bytes()
    content = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    data_start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:data_start])
    loaded = load_file(path / WEIGHTS)
    order = sorted(loaded, key=lambda name: header[name]["data_offsets"][0])
    tensors = {}
    for name in order:
        start, stop = (data_start + offset for offset in header[name]["data_offsets"])
        view = content[start:stop].view(loaded[name].dtype).view(loaded[name].shape)
        assert torch.equal(view, loaded[name]), name
        tensors[name] = view
    return AdapterFolder(path, content, data_start, tensors)


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
    """Drop a file from the page cache and see that it is gone."""
    settle(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    left = cached_pages(path)
    if left:
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
