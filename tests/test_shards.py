"""A sharded loader: what a rank holds, reads, computes with the others, and refuses."""

import threading
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
import sharded_base as sharded
import tiny
from peft_adapters import llama
from tiny_loaders import fails

from lorax_async import AdapterLoader, LoaderConfig, Shard, layouts
from lorax_async.devices.base import Device
from lorax_async.devices.cuda import CudaDevice
from lorax_async.engines.transformers import attach
from lorax_async.errors import ConfigError, IncompatibleAdapterError
from lorax_async.planning.sharding import shard_layout
from lorax_async.planning.transfer_plan import plan_transfer
from lorax_async.sources.base import Source
from lorax_async.testing import FakeSource

pytestmark = pytest.mark.usefixtures("nothing_left")

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
