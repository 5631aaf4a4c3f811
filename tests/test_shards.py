"""A sharded loader: what a rank holds, reads, computes with the others, and refuses."""

import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import sharded_base as sharded
import tiny
import torch
from late_device.world import loaded
from peft_adapters import llama
from tiny_loaders import fails
from torch import Tensor

from lorax_async import AdapterLoader, LoaderConfig, Shard, layouts
from lorax_async.devices.base import Device
from lorax_async.devices.cuda import CudaDevice
from lorax_async.engines.transformers import attach
from lorax_async.errors import ConfigError, IncompatibleAdapterError
from lorax_async.planning.sharding import shard_layout
from lorax_async.planning.transfer_plan import plan_transfer
from lorax_async.sources.base import Source
from lorax_async.testing import FakeSource
from lorax_kernels import Plan, apply

pytestmark = pytest.mark.usefixtures("nothing_left")

late = pytest.fixture(loaded)
WORLDS = [1, 2, 4, 8]
MiB = 1 << 20


def ranks(world: int) -> list[Shard]:
    return [Shard(rank, world) for rank in range(world)]


def loader(
    shard: Shard | None, source: Source | None = None, on: Device | None = None, **settings: Any
) -> AdapterLoader:
    plain: dict[str, Any] = {"device_bytes": MiB, "max_slots": 2, "io_threads": 2, "timeout": 20}
    config = LoaderConfig(shard=shard, **plain | settings)
    return AdapterLoader(sharded.layout(), config, source=source, device=on)


@pytest.mark.parametrize("world", [1, 2, 8])
async def test_a_rank_reads_its_bytes_of_a_folder_that_all_ranks_share(
    world: int, tmp_path: Path
) -> None:
    """As the kernel counts them: beside these, the config, and the file's first 128 KiB."""
    folder = sharded.write(tmp_path / "a", rank=256)
    size = (folder / "adapter_model.safetensors").stat().st_size
    for shard in ranks(world):
        async with loader(shard, device_bytes=4 * MiB) as there:
            before = bytes_read()
            async with await there.load(folder) as handle:
                read = bytes_read() - before
                held = sum(module.a.nbytes + module.b.nbytes for module in handle.modules.values())
            assert held <= read <= held + (128 << 10) + 4096
            assert (held < 0.75 * size) == (world > 1)


def bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_a_rank_reads_its_share(device: str, dtype: str, rank: int, tmp_path: Path) -> None:
    """With so small a ring that groups come in several windows."""
    folder = sharded.write(tmp_path / "a", rank)
    for shard in [shard for world in WORLDS for shard in ranks(world)]:
        source = FakeSource()
        source.put("a", *tiny.files(folder))
        small = loader(shard, source, device=device, dtype=dtype, staging_bytes=4096)
        async with small as there, await there.load("a") as handle:
            sharded.assert_is_the_share(handle, folder, shard)
        pairs = sharded.share_of(folder, shard).values()
        assert source.counts.bytes_read == sum(a.nbytes + b.nbytes for a, b in pairs)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_late_device_has_the_share_too(dtype: str, tmp_path: Path) -> None:
    folder = sharded.write(tmp_path / "a", 3)
    for shard in (Shard(0, 2), Shard(3, 4)):
        held = shard_layout(sharded.layout(), shard).held
        stored = "F32" if dtype == "float32" else "BF16"
        device = CudaDevice(held, dtype=stored, nbytes=MiB, slots=2, device="late")
        late = loader(shard, on=device, dtype=dtype)
        async with late as there, await there.load(folder) as handle:
            sharded.assert_is_the_share(handle, folder, shard)


async def test_a_handle_and_the_loader_tell_the_shard(tmp_path: Path) -> None:
    folder = sharded.write(tmp_path / "a")
    for shard in (None, Shard(1, 4)):
        async with loader(shard) as there, await there.load(folder) as handle:
            async with handle.clone() as again:
                assert handle.shard is again.shard is there.config.shard is shard
            assert there.layout == sharded.layout()
            assert (there.held_layout is there.layout) == (shard is None)
            for module in there.held_layout.modules:
                weights = handle.modules[module.name]
                sizes = weights.a.shape[1], weights.b.shape[0]
                assert sizes == (module.in_features, module.out_features)
            # Kernels find A and B where the tables say, in the sizes of `held_layout`.
            tables: Any = there.device
            for n, module in enumerate(there.held_layout.modules):
                weights, slot = handle.modules[module.name], handle.slot.index
                addresses = tables.address[:, n, slot].tolist()
                assert addresses == [weights.a.data_ptr(), weights.b.data_ptr()]
                assert tables.rank[n, slot] == 4


@pytest.mark.parametrize(
    ("shard", "thread"), [(None, "MainThread"), (Shard(1, 2), "lorax-metadata")]
)
async def test_a_plan_with_many_moves_is_made_once_and_off_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: Shard | None, thread: str
) -> None:
    threads: list[str] = []

    def noted(*args: Any, **settings: Any) -> Any:
        threads.append(threading.current_thread().name)
        return plan_transfer(*args, **settings)

    monkeypatch.setattr("lorax_async.runtime.fetches.plan_transfer", noted)
    async with loader(shard) as there:
        for seed, name in enumerate("ab"):
            (await there.load(sharded.write(tmp_path / name, seed=seed))).release()
    assert [name[: len(thread)] for name in threads] == [thread]


# A module's outputs on each rank, of its inputs on each.
Linear = Callable[[str, list[Tensor]], list[Tensor]]


def attention(qkv: Tensor, heads: int, groups: int) -> Tensor:
    """Of one sequence without a mask; q heads share those of k and v in order."""
    dim = sharded.HEAD_DIM
    q, k, v = (
        part.view(len(qkv), -1, dim).transpose(0, 1)
        for part in qkv.tensor_split([heads * dim, (heads + groups) * dim], dim=1)
    )
    k, v = (part.repeat_interleave(heads // groups, 0) for part in (k, v))
    mixed: Tensor = (q @ k.transpose(1, 2) / dim**0.5).softmax(-1) @ v
    return mixed.transpose(0, 1).reshape(len(qkv), -1)


def forward(linear: Linear, x: Tensor, world: int) -> Tensor:
    """A model of which each rank has some heads and rows, and whose sums are of all ranks."""
    heads, groups = sharded.HEADS // world, max(1, sharded.GROUPS // world)
    for layer in range(sharded.LAYERS):
        path = f"model.layers.{layer}"
        qkv = linear(f"{path}.self_attn.qkv_proj", [x] * world)
        mixed = [attention(each, heads, groups) for each in qkv]
        x = x + torch.stack(linear(f"{path}.self_attn.o_proj", mixed)).sum(0)
        gate = linear(f"{path}.mlp.gate", [x] * world)[0].mean(1, keepdim=True).sigmoid()
        up = [each.relu() for each in linear(f"{path}.mlp.up_proj", [x] * world)]
        x = x + gate * torch.stack(linear(f"{path}.mlp.down_proj", up)).sum(0)
    return x


@pytest.mark.parametrize("world", [2, 4])
async def test_the_ranks_compute_what_the_whole_model_does(world: int, tmp_path: Path) -> None:
    """In float32 against float64. On four ranks two share each of the two heads of k and v."""
    random = torch.Generator().manual_seed(7)
    base = {
        module.name: torch.randn(module.out_features, module.in_features, generator=random) * 0.1
        for module in sharded.layout().modules
    }
    x = torch.randn(5, sharded.HIDDEN, generator=random)
    folder = sharded.write(tmp_path / "a", rank=3)
    pairs = sharded.share_of(folder, Shard(0, 1))

    def whole(name: str, inputs: list[Tensor]) -> list[Tensor]:
        a, b = (each.double() for each in pairs[name])
        return [each @ (base[name].double() + 2 * b @ a).T for each in inputs]

    async with AsyncExitStack() as stack:
        loaders = [await stack.enter_async_context(loader(each)) for each in ranks(world)]
        handles = [await stack.enter_async_context(await each.load(folder)) for each in loaders]

        def shares(name: str, inputs: list[Tensor]) -> list[Tensor]:
            found = []
            for there, handle, each, shard in zip(
                loaders, handles, inputs, ranks(world), strict=True
            ):
                rows, columns = sharded.rows_of(name, shard), sharded.columns_of(name, shard)
                y = each @ base[name][rows][:, columns].T
                plan, tables = Plan.from_segments([0, len(y)], [handle.slot.index]), there.tables
                apply(y, each.contiguous(), plan, there.held_layout.index(name), tables)
                found.append(y)
            return found

        found, wanted = forward(shares, x, world), forward(whole, x.double(), 1)
    assert (found.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_shard_is_a_value_and_cannot_be_wrong() -> None:
    assert Shard(1, 2) == Shard(rank=1, world_size=2)
    assert len({Shard(1, 2), Shard(1, 2), Shard(0, 2)}) == 2
    with pytest.raises(FrozenInstanceError):
        Shard(0, 1).rank = 1  # type: ignore[misc]
    wrong: list[tuple[Any, Any, str]] = [
        (2, 2, "rank 2 is outside 0 … 1"),
        (-1, 2, "rank must be an integer of at least 0, not -1"),
        (0, 0, "world_size must be a positive integer, not 0"),
        *((rank, 1, "rank must be") for rank in (False, "0")),
        *((0, world_size, "world_size must be") for world_size in (True, 2.0)),
    ]
    for rank, world_size, text in wrong:
        with pytest.raises(ConfigError, match=text):
            Shard(rank, world_size)


def test_a_base_that_cannot_be_sharded_is_refused_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"8 × 4 output features, which 3 ranks cannot share"):
        loader(Shard(0, 3))
    fused = layouts.from_adapter(sharded.write(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"qkv_proj' may be fused.*layouts\.from_pretrained"):
        AdapterLoader(fused, LoaderConfig(shard=Shard(0, 2)))
    AdapterLoader(fused.replicate("qkv_proj"), LoaderConfig(shard=Shard(0, 2)))


async def test_a_file_that_was_cut_already_is_refused(tmp_path: Path) -> None:
    folder = sharded.write(tmp_path / "a")
    sharded.save(folder, sharded.share_of(folder, Shard(0, 2)))
    async with loader(Shard(0, 2)) as there:
        words = "32 → 24, the base's is 32 → 48"
        await fails(there.load(folder), IncompatibleAdapterError, words)


async def test_a_whole_model_is_not_attached_to_a_sharded_loader() -> None:
    model = llama()
    layout, config = layouts.from_module(model), LoaderConfig(device_bytes=MiB)
    async with AdapterLoader(layout, replace(config, shard=Shard(0, 1))) as there:
        attach(model, there).detach()
    words = (
        r"the model is not the Shard\(rank=1, world_size=2\) that the loader holds.*q_proj' is "
        "32 → 32, not 32 → 16.*for a whole model make the loader without a shard"
    )
    async with AdapterLoader(layout, replace(config, shard=Shard(1, 2))) as there:
        with pytest.raises(ConfigError, match=words):
            attach(model, there)
