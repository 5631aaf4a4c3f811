"""An adapter whose weights are several files is the one that they are in one file."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

import sharded
import tiny
from core.adapter_files import file_of
from lorax_async import AdapterLoader, LoaderConfig, Shard, errors, layouts
from lorax_async.cli import main
from split_files import CONFIG, INDEX, WEIGHTS, deal, name_of, split
from tiny_loaders import fails, loader

pytestmark = pytest.mark.usefixtures("nothing_left")

Capture = pytest.CaptureFixture[str]
Splitting = Callable[[Path, Path], Path]
BOTH = pytest.mark.parametrize("splitting", [split, deal])


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_same_bytes(tmp_path: Path, splitting: Splitting, dtype: str, device: str) -> None:
    one = tiny.write(tmp_path / "one", 7, 3)
    several = splitting(one, tmp_path / "several")
    small = loader(device=device, dtype=dtype, staging_bytes=4096)
    async with small as there, there.stream(several) as second:
        for layer in range(tiny.LAYERS):
            await second.layer_ready(layer)
        tiny.assert_equal_to_file(second, one)
        assert {module.scale for module in second.modules.values()} == {8 / 3}


@BOTH
@pytest.mark.parametrize("rank", [0, 1])
async def test_a_rank_has_its_share(tmp_path: Path, splitting: Splitting, rank: int) -> None:
    """A's columns are strided, and B's rows are ranges, in whichever file they are."""
    one, shard = sharded.write(tmp_path / "one"), Shard(rank, 2)
    several = splitting(one, tmp_path / "several")
    config = LoaderConfig(shard=shard, device_bytes=1 << 20, max_slots=2)
    there = AdapterLoader(sharded.layout(), config)
    async with there, await there.load(several) as handle:
        sharded.assert_is_the_share(handle, one, shard)


async def test_a_file_that_is_wrong_is_named(tmp_path: Path) -> None:
    several = split(tiny.write(tmp_path / "one"), tmp_path / "several")
    file = several / name_of(2, 3)
    os.truncate(file, 2000)
    async with loader() as there:
        error = await fails(there.load(several), errors.AdapterFormatError, file.name)
        assert error.id == str(several)
        file.unlink()
        await fails(there.prefetch(several), errors.AdapterNotFoundError, file.name)
        (several / INDEX).write_text(json.dumps({"weight_map": {"a": "../x"}}))
        await fails(there.load(several), errors.AdapterFormatError, "'../x'")


@pytest.mark.parametrize("device", ["cpu", "simulated"])
async def test_tensors_may_lie_in_any_order(tmp_path: Path, device: str) -> None:
    """Every A before every B, and the layers back to front: each layer is several spans."""
    one = tiny.write(tmp_path / "one", 3)
    saved = safetensors.torch.load_file(one / WEIGHTS)
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(one / CONFIG, odd)
    order = sorted(sorted(saved, reverse=True), key=lambda name: "lora_B" in name)
    (odd / WEIGHTS).write_bytes(file_of([(name, saved[name]) for name in order]))
    for dtype in ("float32", "bfloat16"):
        small = loader(device=device, dtype=dtype, staging_bytes=4096)
        async with small as there, there.stream(odd) as handle:
            await handle.layer_ready(0)
            await handle.layer_ready(tiny.LAYERS - 1)
            tiny.assert_equal_to_file(handle, one)


@BOTH
def test_inspect_reads_split_weights(tmp_path: Path, capsys: Capture, splitting: Splitting) -> None:
    one = tiny.write(tmp_path / "one")
    several = splitting(one, tmp_path / "several")
    found = []
    for folder in (one, several):
        assert main(["inspect", str(folder), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    nbytes = sum(path.stat().st_size for path in several.glob("*.safetensors"))
    assert found[1] == found[0] | {"path": str(several), "file_bytes": nbytes}
    of_one, of_several = layouts.from_adapter(one), layouts.from_adapter(several)
    assert set(of_one.modules) == set(of_several.modules)
    (several / name_of(1, 3)).unlink()
    assert main(["inspect", str(several), "--json"]) == 2
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert name_of(1, 3) in problem["text"]
