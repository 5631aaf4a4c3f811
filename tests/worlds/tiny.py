"""Tiny adapters and layouts for tests of everything that does not need a real model."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lorax_async.handle import AdapterHandle
from lorax_async.planning.layout import ModelLayout, Module, Parallelism

LAYERS = 4
HIDDEN = 32
TARGETS = ("self_attn.q_proj", "mlp.up_proj")


def layout(dtype: str = "F32", *, layers: int = LAYERS, hidden: int = HIDDEN) -> ModelLayout:
    modules = tuple(
        Module(f"model.layers.{layer}.{target}", hidden, 2 * hidden, layer, Parallelism.COLUMN)
        for layer in range(layers)
        for target in TARGETS
    )
    return ModelLayout(modules, layers, dtype, "model.")


def tensors(
    seed: int,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = LAYERS,
    hidden: int = HIDDEN,
) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    made = {}
    for layer in range(layers):
        for target in TARGETS:
            name = f"base_model.model.model.layers.{layer}.{target}"
            a = torch.randn(rank, hidden, generator=random)
            b = torch.randn(2 * hidden, rank, generator=random)
            made[f"{name}.lora_A.weight"] = a.to(dtype)
            made[f"{name}.lora_B.weight"] = b.to(dtype)
    return made


def config(rank: int = 4, **changes: object) -> dict[str, object]:
    plain: dict[str, object] = {"peft_type": "LORA", "r": rank, "lora_alpha": 8}
    plain["target_modules"] = [target.split(".")[1] for target in TARGETS]
    return plain | changes


def write(
    folder: Path,
    seed: int = 0,
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
    *,
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    **changes: object,
) -> Path:
    """Write an adapter folder with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config(rank, **changes)))
    weights = folder / "adapter_model.safetensors"
    save_file(tensors(seed, rank, dtype, layers=layers, hidden=hidden), weights)
    return folder


def files(folder: Path) -> tuple[bytes, bytes]:
    """Return config and weights of an adapter folder, as `FakeSource.put` takes them."""
    config = (folder / "adapter_config.json").read_bytes()
    return config, (folder / "adapter_model.safetensors").read_bytes()


def assert_equal_to_file(handle: AdapterHandle, folder: Path) -> None:
    """Assert that the device has the file's tensors, read by safetensors and cast by torch."""
    assert_holds(handle, load_file(folder / "adapter_model.safetensors"))


def assert_holds(handle: AdapterHandle, tensors: Mapping[str, torch.Tensor]) -> None:
    """Assert that the device has these tensors, named as in a file, cast by torch."""
    assert len(tensors) == 2 * len(handle.modules)
    for name, module in handle.modules.items():
        for part, found in (("A", module.a), ("B", module.b)):
            expected = tensors[f"base_model.model.{name}.lora_{part}.weight"]
            assert torch.equal(found.cpu(), expected.to(found.dtype))


def weights_of(handle: AdapterHandle) -> dict[str, torch.Tensor]:
    return {
        f"{name} {factor}": tensor.clone()
        for name, found in handle.modules.items()
        for factor, tensor in (("a", found.a), ("b", found.b))
    }


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
