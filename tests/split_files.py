"""Weights in several files: made by huggingface_hub, or file by file as a test wants them."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
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


def split(one: Path, several: Path, files: int = 3) -> Path:
    """The adapter in the folder `one`, its weights split by huggingface_hub into so many files."""
    several.mkdir()
    shutil.copy(one / CONFIG, several)
    tensors = safetensors.torch.load_file(one / WEIGHTS)
    most = -(-sum(tensor.nbytes for tensor in tensors.values()) // files)
    save_torch_state_dict(
        tensors,
        several,
        filename_pattern="adapter_model{suffix}.safetensors",
        max_shard_size=most + max(tensor.nbytes for tensor in tensors.values()) // 2,
    )
    assert len(list(several.glob("*.safetensors"))) == files
    return several


def deal(one: Path, several: Path, files: int = 3) -> Path:
    """The same, dealt out tensor by tensor: every file has something of every layer."""
    several.mkdir()
    shutil.copy(one / CONFIG, several)
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(files)]
    for n, (name, tensor) in enumerate(sorted(safetensors.torch.load_file(one / WEIGHTS).items())):
        parts[n % files][name] = tensor
    write(several, parts)
    return several
