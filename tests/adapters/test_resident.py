"""LoraWeights.from_adapter: what a loader holds, in LoRAX's form; and the memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapters import small_base as base
from adapters.small_base import loaded
from lorax_async import AdapterHandle, AdapterLoader, LoaderConfig, Shard
from lorax_async.adapters import LayoutModel, LoraConfig, LoraWeights
from lorax_async.core.layout import ModelLayout, Module, Parallel
from lorax_async.errors import HandleClosedError, UnsupportedAdapterError, UsageError

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_the_same_as_from_the_file(
    tmp_path: Path, rank: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
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
async def test_more_than_a_and_b_of_linear_modules_is_refused_by_name(
    tmp_path: Path, more: dict[str, torch.Tensor], config: dict[str, Any], feature: str
) -> None:
    """Whichever type is asked for."""
    made = base.tensors(types=["q_proj"], skip=[(1, "q_proj"), (2, "q_proj")])
    folder = base.write(tmp_path / "a", made | more, **config)
    embedding = Module("model.embed_tokens", 100, 840, -1, Parallel.REPLICATED, embedding=True)
    small = base.layout()
    layout = ModelLayout((embedding, *small.modules), small.num_layers, "F32", "model.")
    async with (
        AdapterLoader(layout, LoaderConfig(device_bytes=8 << 20)) as loader,
        await loader.load(folder) as handle,
    ):
        with pytest.raises(UnsupportedAdapterError, match=feature):
            LoraWeights.from_adapter(handle, "q_proj")


# -- at most the result and one layer at a time, by the process's own peak ------------------------

LAYERS, HIDDEN, RANK = 24, 8192, 64
MIB = 1 << 20
PROGRAM = """
import asyncio, json, sys
import torch
from pathlib import Path
from lorax_async import AdapterLoader, LoaderConfig
from lorax_async.adapters import LayoutModel, LoraConfig, LoraWeights, WeightsFile
from lorax_async.core.layout import ModelLayout, Module, Parallel

folder, dtype, world_size, layers, hidden, origin = sys.argv[1:]
modules = tuple(
    Module(f"layers.{n}.q_proj", int(hidden), int(hidden), n, Parallel.COLUMN)
    for n in range(int(layers))
)
layout = ModelLayout(modules, int(layers), "BF16")
model = LayoutModel(layout, getattr(torch, dtype), int(world_size))
config = LoraConfig("", 64, None, False, 128, False)

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

def load():
    with WeightsFile.open(Path(folder)) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        return LoraWeights.load(config, model, module_map, "q_proj", names)

torch.set_num_threads(1)
a, b = torch.ones(64, int(hidden)), torch.ones(int(hidden), 64)
module_map = {n: {"lora_A": (a, n), "lora_B": (b, n)} for n in model.weight_names[:1]}
LoraWeights.load(config, model, module_map, "q_proj", set())  # what torch allocates once
del a, b, module_map

def measured(load):
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    weights = load()
    print(json.dumps({
        "peak": status("VmHWM") - before,
        "result": weights.weights_a.nbytes + weights.weights_b.nbytes,
    }))

async def resident():
    settings = LoaderConfig(device_bytes=64 << 20, max_slots=1)
    async with AdapterLoader(layout, settings) as loader, await loader.load(Path(folder)) as handle:
        measured(lambda: LoraWeights.from_adapter(handle, "q_proj"))

if origin == "file":
    measured(load)
else:
    asyncio.run(resident())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "dtype", "world_size", "origin"),
    [
        ("bfloat16", "bfloat16", 1, "file"),
        ("float32", "bfloat16", 1, "file"),
        ("bfloat16", "bfloat16", 2, "file"),
        ("bfloat16", "bfloat16", 1, "loader"),
    ],
)
def test_the_peak(tmp_path: Path, stored: str, dtype: str, world_size: int, origin: str) -> None:
    made, of = {}, {"dtype": getattr(torch, stored)}
    for layer in range(LAYERS):
        name = f"base_model.model.layers.{layer}.q_proj"
        made[f"{name}.lora_A.weight"] = torch.ones(RANK, HIDDEN, **of)
        made[f"{name}.lora_B.weight"] = torch.ones(HIDDEN, RANK, **of)
    save_file(made, tmp_path / base.WEIGHTS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 128, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    arguments = [str(tmp_path), dtype, str(world_size), str(LAYERS), str(HIDDEN), origin]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["result"] == LAYERS * 2 * HIDDEN * RANK * 2 // world_size
    one_layer = 2 * HIDDEN * RANK * getattr(torch, stored).itemsize
    # A list of one type's layers would be another 48 MiB; the interpreter's own noise is not.
    allowed = found["result"] + one_layer * (1 if world_size == 1 else 2) + 2 * MIB
    assert found["result"] - 2 * MIB < found["peak"] <= allowed
