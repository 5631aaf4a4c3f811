"""LoraWeights.from_adapter: what a loader holds, in LoRAX's form."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import small_base as base
from lorax_async import AdapterLoader, LoaderConfig, ModelLayout, ModuleWeights, Shard
from lorax_async.adapters import LayoutModel, LoraConfig, LoraWeights
from lorax_async.core.layout import Module, Parallel
from lorax_async.errors import HandleClosedError, UnsupportedAdapterError, UsageError

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_the_same_as_from_the_file(tmp_path: Path, rank: int, device: str) -> None:
    made = base.tensors(
        rank, dtype=torch.bfloat16, skip=[(1, "v_proj")], types=["q_proj", "v_proj"]
    )
    folder = base.write(tmp_path / "a", made, rank, use_rslora=True)
    config = LoraConfig.load(folder)
    model = LayoutModel(base.layout("BF16"), torch.bfloat16, 1)
    module_map, names = config.map_weights_for_model(
        load_file(folder / "adapter_model.safetensors"), model.weight_names
    )
    settings = LoaderConfig(device=device, device_bytes=8 << 20, max_slots=2)
    async with (
        AdapterLoader(base.layout("BF16"), settings) as loader,
        await loader.load(folder) as handle,
    ):
        for layer_type in ("q_proj", "v_proj"):
            wanted = LoraWeights.load(config, model, module_map, layer_type, names)
            assert wanted is not None
            for got in (
                LoraWeights.from_adapter(handle, layer_type),
                await LoraWeights.from_adapter_async(handle, layer_type),
            ):
                assert got is not None
                assert torch.equal(got.weights_a, wanted.weights_a)
                assert torch.equal(got.weights_b, wanted.weights_b)
                assert got.adapter_config.padded_rank == wanted.adapter_config.padded_rank
                assert got.adapter_config.r == rank
                scale = got.adapter_config.lora_alpha / rank
                assert scale == pytest.approx(16 / rank**0.5)
        assert LoraWeights.from_adapter(handle, "lm_head") is None
        with pytest.raises(UsageError, match="no layer type 'k_proj'"):
            LoraWeights.from_adapter(handle, "k_proj")
        kept = LoraWeights.from_adapter(handle, "q_proj")
    with pytest.raises(HandleClosedError):
        LoraWeights.from_adapter(handle, "q_proj")
    assert kept is not None
    assert torch.equal(kept.weights_a_t[2, :rank], made[base.key(2, "q_proj", "A")])


@dataclass
class Handle:
    """As much of a handle as is read."""

    modules: Mapping[str, ModuleWeights]
    layout: ModelLayout = field(default_factory=base.layout)
    shard: Any = None
    users: list[int] = field(default_factory=list)

    @contextmanager
    def use(self) -> Iterator[None]:
        self.users.append(threading.get_ident())
        yield


NAME = base.module_name(0, "q_proj")


def weights(**more: torch.Tensor) -> ModuleWeights:
    return ModuleWeights(torch.ones(8, 840), torch.ones(840, 8), 2.0, 8, **more)


async def test_the_slot_is_used_while_it_is_copied_and_elsewhere_than_on_the_loop() -> None:
    handle = Handle({NAME: weights()})
    got = await LoraWeights.from_adapter_async(handle, "q_proj")
    assert got is not None
    assert got.weights_b.sum((1, 2)).tolist() == [2 * 8 * 840, 0, 0]
    assert len(handle.users) == 1
    assert threading.get_ident() not in handle.users


@dataclass
class OneOf:
    world_size: int


def test_a_shard_is_refused() -> None:
    with pytest.raises(UsageError, match=r"one shard.*LoraWeights.load"):
        LoraWeights.from_adapter(Handle({NAME: weights()}, shard=OneOf(2)), "q_proj")
    assert LoraWeights.from_adapter(Handle({NAME: weights()}, shard=OneOf(1)), "q_proj") is not None


async def test_a_loaders_shard_is_refused(tmp_path: Path) -> None:
    folder = base.write(tmp_path / "a", base.tensors(types=["q_proj"]))
    settings = LoaderConfig(device_bytes=8 << 20, shard=Shard(1, 2))
    async with (
        AdapterLoader(base.layout(), settings) as loader,
        await loader.load(folder) as handle,
    ):
        with pytest.raises(UsageError, match="one shard"):
            await LoraWeights.from_adapter_async(handle, "q_proj")


@pytest.mark.parametrize(("part", "feature"), [("bias", "lora_bias"), ("magnitude", "DoRA")])
def test_more_than_a_and_b_is_refused_by_name(part: str, feature: str) -> None:
    handle = Handle({NAME: weights(**{part: torch.ones(840)})})
    with pytest.raises(UnsupportedAdapterError, match=feature):
        LoraWeights.from_adapter(handle, "q_proj")


def test_an_embedding_is_refused_whichever_type_is_asked_for() -> None:
    layout = base.layout()
    embedding = Module("model.embed_tokens", 100, 840, -1, Parallel.REPLICATED, embedding=True)
    layout = dataclasses.replace(layout, modules=(embedding, *layout.modules))
    handle = Handle({NAME: weights(), embedding.name: weights()}, layout)
    with pytest.raises(UnsupportedAdapterError, match="embedding"):
        LoraWeights.from_adapter(handle, "q_proj")
