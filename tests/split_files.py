"""Weights in several files: made by huggingface_hub, or file by file as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict

import tiny

INDEX = "adapter_model.safetensors.index.json"


def name_of(number: int, count: int) -> str:
    return f"adapter_model-{number:05d}-of-{count:05d}.safetensors"


def index_of(parts: Sequence[Mapping[str, torch.Tensor]]) -> bytes:
    weight_map = {
        name: name_of(number, len(parts)) for number, part in enumerate(parts, 1) for name in part
    }
    return json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}).encode()


def contents_of(parts: Sequence[Mapping[str, torch.Tensor]]) -> list[bytes]:
    return [safetensors.torch.save(dict(part), {"format": "pt"}) for part in parts]


def write(folder: Path, parts: Sequence[Mapping[str, torch.Tensor]]) -> list[Path]:
    """The index, then each part in a file of its own."""
    paths = [folder / INDEX]
    paths[0].write_bytes(index_of(parts))
    for number, content in enumerate(contents_of(parts), 1):
        paths.append(folder / name_of(number, len(parts)))
        paths[-1].write_bytes(content)
    return paths


def tiny_adapter(folder: Path, seed: int = 0, files: int = 3, **changes: object) -> Path:
    """The tiny adapter of this seed, split by huggingface_hub into so many files."""
    rank = 4
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(tiny.config(rank, **changes)))
    tensors = tiny.tensors(seed, rank)
    most = -(-sum(t.nbytes for t in tensors.values()) // files)
    pattern = "adapter_model{suffix}.safetensors"
    save_torch_state_dict(
        tensors, folder, filename_pattern=pattern, max_shard_size=most + most // 8
    )
    assert len(list(folder.glob("*.safetensors"))) == files
    return folder
