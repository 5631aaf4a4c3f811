"""LoraWeights.from_adapter: what a loader holds, in LoRAX's form; and the memory that takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import small_base as base
from adapters.small_base import loaded
from lorax_async.adapters.layout_model import LayoutModel
from lorax_async.adapters.lora import LoraConfig, LoraWeights
from lorax_async.adapters.weights_file import WeightsFile
from lorax_async.config import LoaderConfig, Shard
from lorax_async.errors import HandleClosedError, UnsupportedAdapterError, UsageError
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.planning.layout import ModelLayout, Module, Parallelism

Patch = pytest.MonkeyPatch

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_as_from_the_file(tmp_path: Path, rank: int, device: str, monkeypatch: Patch) -> None:
    made = base.tensors(
        rank, dtype=torch.bfloat16, skip=[(1, "v_proj")], types=["q_proj", "v_proj"]
    )
    folder = base.write(tmp_path / "a", made, rank, use_rslora=True)
    model = LayoutModel(base.layout("BF16"), torch.bfloat16, 1)
    users, real = list[int](), AdapterHandle.use

    def use(handle: AdapterHandle) -> AbstractContextManager[None]:
        users.append(threading.get_ident())
        return real(handle)

    monkeypatch.setattr(AdapterHandle, "use", use)
    settings = LoaderConfig(device=device, device_bytes=8 << 20, max_slots=2)
    async with (
        AdapterLoader(base.layout("BF16"), settings) as loader,
        await loader.load(folder) as handle,
    ):
        for layer_type in ("q_proj", "v_proj"):
            wanted = loaded(LoraConfig.load(folder), model, made, layer_type)
            plain = LoraWeights.from_adapter(handle, layer_type)
            users.clear()
            in_thread = await LoraWeights.from_adapter_async(handle, layer_type)
            # The slot is in use while it is copied, and elsewhere than on the loop.
            assert len(users) == 1
            assert threading.get_ident() not in users
            for got in (plain, in_thread):
                assert got is not None
                assert torch.equal(got.weights_a, wanted.weights_a)
                assert torch.equal(got.weights_b, wanted.weights_b)
                config = got.adapter_config
                assert (config.r, config.padded_rank) == (rank, wanted.adapter_config.padded_rank)
                assert config.lora_alpha / rank == pytest.approx(16 / rank**0.5)
        assert LoraWeights.from_adapter(handle, "lm_head") is None
        with pytest.raises(UsageError, match="no layer type 'k_proj'"):
            LoraWeights.from_adapter(handle, "k_proj")
        kept = LoraWeights.from_adapter(handle, "q_proj")
    with pytest.raises(HandleClosedError):
        LoraWeights.from_adapter(handle, "q_proj")
    assert kept is not None
    assert torch.equal(kept.weights_a_t[2, :rank], made[base.key(2, "q_proj", "A")])


@pytest.mark.parametrize("world_size", [1, 2])
async def test_a_shard_is_refused(tmp_path: Path, world_size: int) -> None:
    folder = base.write(tmp_path / "a", base.tensors(types=["q_proj"]))
    settings = LoaderConfig(device_bytes=8 << 20, shard=Shard(world_size - 1, world_size))
    async with (
        AdapterLoader(base.layout(), settings) as loader,
        await loader.load(folder) as handle,
    ):
        if world_size == 1:
            assert LoraWeights.from_adapter(handle, "q_proj") is not None
        else:
            with pytest.raises(UsageError, match=r"one shard.*LoraWeights.load"):
                await LoraWeights.from_adapter_async(handle, "q_proj")


Q = f"base_model.model.{base.module_name(0, 'q_proj')}"
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_"


@pytest.mark.parametrize(
    ("more", "config", "feature"),
    [
        ({f"{Q}.lora_B.bias": torch.ones(840)}, {"lora_bias": True}, "lora_bias"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(840)}, {"use_dora": True}, "DoRA"),
        (
            {f"{EMBEDDING}A": torch.ones(8, 100), f"{EMBEDDING}B": torch.ones(840, 8)},
            {"target_modules": ["q_proj", "embed_tokens"]},
            "embedding",
        ),
    ],
)
async def test_more_than_a_and_b_fails(
    tmp_path: Path, more: dict[str, torch.Tensor], config: dict[str, Any], feature: str
) -> None:
    made = base.tensors(types=["q_proj"], skip=[(1, "q_proj"), (2, "q_proj")])
    folder = base.write(tmp_path / "a", made | more, **config)
    embedding = Module("model.embed_tokens", 100, 840, -1, Parallelism.REPLICATED, embedding=True)
    small = base.layout()
    layout = ModelLayout((embedding, *small.modules), small.num_layers, "F32", "model.")
    async with (
        AdapterLoader(layout, LoaderConfig(device_bytes=8 << 20)) as loader,
        await loader.load(folder) as handle,
    ):
        with pytest.raises(UnsupportedAdapterError, match=feature):
            LoraWeights.from_adapter(handle, "q_proj")


LAYERS, HIDDEN, RANK = 24, 8192, 64
MIB = 1 << 20


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _peak(load: Callable[[], LoraWeights | None]) -> int:
    load()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _memory("VmRSS")
    weights = load()
    assert weights is not None
    return _memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "world_size", "resident"),
    [("bfloat16", 1, False), ("float32", 1, False), ("bfloat16", 2, False), ("bfloat16", 1, True)],
)
async def test_the_peak(tmp_path: Path, stored: str, world_size: int, resident: bool) -> None:
    modules, made = list[Module](), dict[str, torch.Tensor]()
    for layer in range(LAYERS):
        name = f"layers.{layer}.q_proj"
        modules.append(Module(name, HIDDEN, HIDDEN, layer, Parallelism.COLUMN))
        made |= base.pair(name, HIDDEN, HIDDEN, RANK)
    dtype: torch.dtype = getattr(torch, stored)
    given = {name: tensor.to(dtype) for name, tensor in made.items()}
    folder = base.write(tmp_path / "a", given, RANK, target_modules=["q_proj"])
    del made, given
    layout, config = ModelLayout(tuple(modules), LAYERS, "BF16"), LoraConfig.load(folder)
    model = LayoutModel(layout, torch.bfloat16, world_size)
    if resident:
        settings = LoaderConfig(device_bytes=64 << 20, max_slots=1)
        async with AdapterLoader(layout, settings) as loader, await loader.load(folder) as handle:
            peak = _peak(lambda: LoraWeights.from_adapter(handle, "q_proj"))
    else:
        with WeightsFile.open(folder) as file:
            peak = _peak(lambda: base.load(config, model, file, "q_proj"))
    result = LAYERS * 2 * HIDDEN * RANK * 2 // world_size
    one_layer = 2 * HIDDEN * RANK * dtype.itemsize
    # A list of one type's layers would be another 48 MiB; the interpreter's own noise is not.
    allowed = result + one_layer * (1 if world_size == 1 else 2) + 2 * MIB
    assert result - 2 * MIB < peak <= allowed
