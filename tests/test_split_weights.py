"""An adapter whose weights are several files is the one that they are in one file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import sharded
import tiny
from core.adapter_files import file_of
from lorax_async import (
    AdapterFormatError,
    AdapterHandle,
    AdapterLoader,
    AdapterNotFoundError,
    IntegrityError,
    LoaderConfig,
    LocalRoot,
    LoraxError,
    Merge,
    Shard,
)
from split_files import CONFIG, INDEX, WEIGHTS, deal, name_of, split
from tiny_loaders import ONE, loader
from tiny_sources import where

pytestmark = pytest.mark.usefixtures("nothing_left")

Splitting = Callable[[Path, Path], Path]
BOTH = pytest.mark.parametrize("splitting", [split, deal])


def contents(handle: AdapterHandle) -> dict[str, tuple[float, list[bytes]]]:
    """Of each module: the scale, and the bytes of A and B on the device."""
    return {
        name: (
            module.scale,
            [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (module.a, module.b)],
        )
        for name, module in handle.modules.items()
    }


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_the_same_bytes_are_on_the_device(
    tmp_path: Path, splitting: Splitting, dtype: str, device: str
) -> None:
    one = tiny.write(tmp_path / "one", 7, 3)
    several = splitting(one, tmp_path / "several")
    async with (
        loader(device=device, dtype=dtype, staging_bytes=4096) as there,
        await there.load(one) as first,
        await there.load(several) as second,
    ):
        tiny.assert_equal_to_file(second, one)
        assert contents(second) == contents(first)
        assert first.slot != second.slot


@BOTH
async def test_layers_come_one_by_one(tmp_path: Path, splitting: Splitting) -> None:
    one = tiny.write(tmp_path / "one", 1)
    several = splitting(one, tmp_path / "several")
    async with loader() as there, there.stream(several) as handle:
        for layer in range(tiny.LAYERS):
            await handle.layer_ready(layer)
        tiny.assert_equal_to_file(handle, one)


@BOTH
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_has_its_share_of_them(
    tmp_path: Path, splitting: Splitting, rank: int
) -> None:
    """A's columns are strided, and B's rows are ranges, in whichever file they are."""
    one, shard = sharded.write(tmp_path / "one"), Shard(rank, 2)
    several = splitting(one, tmp_path / "several")
    config = LoaderConfig(shard=shard, device_bytes=1 << 20, max_slots=2)
    there = AdapterLoader(sharded.layout(), config)
    async with there, await there.load(several) as handle:
        expected = sharded.share_of(one, shard)
        assert handle.modules.keys() == expected.keys()
        for name, (a, b) in expected.items():
            assert torch.equal(handle.modules[name].a, a)
            assert torch.equal(handle.modules[name].b, b)


@BOTH
async def test_it_comes_back_from_its_files(tmp_path: Path, splitting: Splitting) -> None:
    one, other = (tiny.write(tmp_path / f"one{seed}", seed) for seed in (1, 2))
    several = splitting(one, tmp_path / "several")
    async with loader(device_bytes=ONE, max_slots=1) as there:
        for folder, same in [(several, one), (other, other)] * 3:
            async with await there.load(folder) as handle:
                tiny.assert_equal_to_file(handle, same)
        os.utime(several / name_of(2, 3), (5, 5))
        os.utime(several / INDEX, (6, 6))
        async with await there.load(several) as handle:
            tiny.assert_equal_to_file(handle, one)


async def test_it_is_held_in_host_memory(tmp_path: Path) -> None:
    one = tiny.write(tmp_path / "one", 1)
    several = split(one, tmp_path / "several")
    held = sum(path.stat().st_size for path in several.glob("*.safetensors"))
    roots = [LocalRoot(tmp_path, immutable=True)]
    async with loader(local_roots=roots, host_bytes=2 * held) as there:
        await there.prefetch("./several", tier="host")
        found = where(there, "./several")
        assert (found.tier, found.state) == ("host", "held")
        assert held <= found.host_bytes <= held + 64
        async with await there.load("./several") as handle:
            tiny.assert_equal_to_file(handle, one)


async def test_it_is_merged_with_one_that_is_whole(tmp_path: Path) -> None:
    ones = [tiny.write(tmp_path / f"one{seed}", seed) for seed in (1, 2)]
    several = deal(ones[0], tmp_path / "several")
    async with loader() as there:
        merges = [Merge("linear", [part, ones[1]], [0.5, 2.0]) for part in (ones[0], several)]
        first, second = [await there.load(merge) for merge in merges]
        assert contents(first) == contents(second)
        first.release()
        second.release()


async def test_what_is_changed_meanwhile_is_another_adapter(tmp_path: Path) -> None:
    ones = [tiny.write(tmp_path / f"one{seed}", seed) for seed in (1, 2)]
    several, later = (split(ones[n], tmp_path / f"several{n}") for n in (0, 1))
    async with loader() as there:
        old = await there.load(several)
        for number in (1, 2, 3):
            (later / name_of(number, 3)).rename(several / name_of(number, 3))
        async with await there.load(several) as new:
            tiny.assert_equal_to_file(new, ones[1])
            tiny.assert_equal_to_file(old, ones[0])
        old.release()


def lost(folder: Path) -> None:
    (folder / name_of(2, 3)).unlink()


def cut(folder: Path) -> None:
    os.truncate(folder / name_of(2, 3), 2000)


def outside(folder: Path) -> None:
    (folder / INDEX).write_bytes(json.dumps({"weight_map": {"a": "../x"}}).encode())


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (lost, AdapterNotFoundError, name_of(2, 3)),
        (cut, AdapterFormatError, name_of(2, 3)),
        (outside, AdapterFormatError, "'../x'"),
    ],
)
async def test_what_is_wrong_with_a_file_is_told(
    tmp_path: Path, spoil: Any, kind: type[LoraxError], words: str
) -> None:
    one = tiny.write(tmp_path / "one")
    several = split(one, tmp_path / "several")
    spoil(several)
    async with loader() as there:
        with pytest.raises(kind, match=words) as caught:
            await there.load(several)
        assert caught.value.id == str(several)
        with pytest.raises(kind, match=words):
            await there.prefetch(several, tier="device")
        async with await there.load(one) as handle:
            tiny.assert_equal_to_file(handle, one)


async def test_a_file_that_changes_before_its_copy(tmp_path: Path) -> None:
    """Its key is known and its headers were read: the copy itself notices."""
    several = split(tiny.write(tmp_path / "one"), tmp_path / "several")
    async with loader() as there:
        await there.prefetch(several, tier="disk")
        assert where(there, several).tier == "disk"
        (known,) = there.residency()
        os.utime(several / name_of(3, 3), (5, 5))
        with pytest.raises(IntegrityError, match=f"{name_of(3, 3)} was changed"):
            await there.load(known)


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_a_file_that_is_not_laid_out_by_layer(tmp_path: Path, device: str) -> None:
    """Every A before every B, and the layers back to front: each layer is several spans."""
    one = tiny.write(tmp_path / "one", 3)
    saved = safetensors.torch.load_file(one / WEIGHTS)
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(one / CONFIG, odd)
    order = sorted(sorted(saved, reverse=True), key=lambda name: "lora_B" in name)
    (odd / WEIGHTS).write_bytes(file_of([(name, saved[name]) for name in order]))
    for dtype in ("float32", "bfloat16"):
        async with loader(device=device, dtype=dtype, staging_bytes=4096) as there:
            async with await there.load(one) as first, await there.load(odd) as second:
                tiny.assert_equal_to_file(second, one)
                assert contents(second) == contents(first)
            async with there.stream(odd) as handle:
                await handle.layer_ready(0)
                await handle.layer_ready(tiny.LAYERS - 1)
                tiny.assert_equal_to_file(handle, one)
