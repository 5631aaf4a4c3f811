"""WeightsFile: opened once, checked, read tensor by tensor; LoraWeights made straight from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters import small_base as base
from adapters.opened import opens
from common import Run, open_files
from lorax_async.adapters import LayoutModel, LoraConfig, LoraWeights, WeightsFile
from lorax_async.errors import (
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    LoraxError,
    UnsupportedAdapterError,
    UsageError,
)

pytestmark = pytest.mark.usefixtures("nothing_left")

WEIGHTS = "adapter_model.safetensors"
A, B = base.key(0, "q_proj", "A"), base.key(0, "q_proj", "B")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return base.write(tmp_path / "adapter", base.tensors(types=["q_proj", "v_proj"]))


# -- one file -------------------------------------------------------------------------------------


def test_it_holds_what_safetensors_reads(folder: Path) -> None:
    saved = load_file(folder / WEIGHTS)
    with WeightsFile.open(folder) as file:
        assert set(file) == set(saved)
        assert len(file) == 12
        assert A in file
        assert "x" not in file
        for key, tensor in saved.items():
            assert file.shape(key) == tuple(tensor.shape)
            assert file.dtype(key) is torch.float32
            assert torch.equal(file.read(key), tensor)


@pytest.mark.parametrize(
    "target",
    [
        torch.zeros(840, 8),
        torch.zeros(8, 840, dtype=torch.float16),
        torch.zeros(840, 8).T,
        torch.zeros(8, 840, device="meta"),
    ],
)
def test_a_target_fits_exactly(folder: Path, target: torch.Tensor) -> None:
    with WeightsFile.open(folder) as file, pytest.raises(UsageError, match="does not fit"):
        file.read_into(A, target)


def test_names_it_does_not_have(folder: Path) -> None:
    with WeightsFile.open(folder) as file, pytest.raises(UsageError, match="no tensor 'x'"):
        file.read("x")


def test_closed_it_reads_nothing(folder: Path) -> None:
    file = WeightsFile.open(folder)
    file.close()
    file.close()
    with pytest.raises(FetchError, match="closed"):
        file.read(A)


def test_a_file_that_changed_is_no_mixture(folder: Path) -> None:
    with WeightsFile.open(folder) as file:
        with (folder / WEIGHTS).open("r+b") as there:
            there.seek(-1, os.SEEK_END)
            there.write(b"x")
        with pytest.raises(IntegrityError, match="changed"):
            file.read(A)


def _spoil(folder: Path, how: str) -> None:
    path = folder / WEIGHTS
    made = load_file(path)
    path.unlink()
    if how == "cut":
        save_file(made, path)
        os.truncate(path, path.stat().st_size - 1)
    elif how == "none":
        save_file({}, path)
    elif how == "flat":
        save_file(made | {A: torch.zeros(8)}, path)
    elif how == "int":
        save_file(made | {A: torch.zeros(8, 840, dtype=torch.int8)}, path)
    elif how == "dora":
        save_file(made | {A[: -len("A.weight")] + "magnitude_vector": torch.zeros(8)}, path)
    elif how == "long name":
        save_file(made | {"x" * 600: torch.zeros(1)}, path)
    elif how == "pickle":
        (folder / "adapter_model.bin").write_bytes(b"x")


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("missing", AdapterNotFoundError, WEIGHTS),
        ("cut", AdapterFormatError, "fetch it again"),
        ("none", AdapterFormatError, "no tensors"),
        ("flat", AdapterFormatError, r"shape \[8\]"),
        ("int", UnsupportedAdapterError, "I8"),
        ("dora", UnsupportedAdapterError, "DoRA"),
        ("long name", AdapterFormatError, "512"),
        ("pickle", AdapterFormatError, "pickle"),
    ],
)
def test_strange_files_are_refused_and_closed(
    folder: Path, how: str, kind: type[LoraxError], text: str
) -> None:
    _spoil(folder, how)
    before = open_files()
    with pytest.raises(kind, match=text) as caught:
        WeightsFile.open(folder)
    assert caught.value.id == str(folder)
    assert open_files() == before


def test_a_header_that_is_longer_than_the_first_read(tmp_path: Path) -> None:
    made = {
        f"base_model.model.{'x' * 400}.{n}.lora_{part}.weight": torch.full((1, 1), float(n))
        for n in range(150)
        for part in "AB"
    }
    folder = base.write(tmp_path / "long", made, 1)
    assert int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little") > 128 << 10
    with WeightsFile.open(folder) as file:
        assert len(file) == 300
        assert file.read(f"base_model.model.{'x' * 400}.149.lora_B.weight").item() == 149


# -- LoraWeights from it --------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rank", [5, 16, 64, 160])
def test_the_same_as_from_tensors(
    tmp_path: Path, world_size: int, stored: torch.dtype, rank: int
) -> None:
    folder = base.write(
        tmp_path / "a", base.tensors(rank, dtype=stored, skip=[(1, "v_proj")]), rank
    )
    config, saved = LoraConfig.load(folder), load_file(folder / WEIGHTS)
    model = LayoutModel(base.layout(), torch.bfloat16, world_size, world_size - 1)
    with WeightsFile.open(folder) as file:
        from_file, names = config.map_weights_for_model(file, model.weight_names)
        from_memory, _ = config.map_weights_for_model(saved, model.weight_names)
        assert from_file["lm_head"]["lora_A"] == (file, "base_model.model.lm_head.lora_A.weight")
        for layer_type in base.SHAPES:
            ours = LoraWeights.load(config, model, from_file, layer_type, names)
            theirs = LoraWeights.load(config, model, from_memory, layer_type, set())
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours.weights_a, theirs.weights_a)
            assert torch.equal(ours.weights_b, theirs.weights_b)
    assert not names


def test_the_file_is_opened_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, model = LoraConfig.load(folder), base.FakeModel()
    with opens(monkeypatch) as seen, WeightsFile.open(folder) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
        seen.clear()  # the config's and the weights' permissions are looked at, by opening them
        for layer_type in base.SHAPES:
            LoraWeights.load(config, model, module_map, layer_type, names)
    assert seen == []


# -- files that are named by their paths ----------------------------------------------------------


def _lazily(*paths: Path | str) -> dict[str, Path | str]:
    """As LoRAX's `load_module_map` does: every tensor's name, with the file that it is in."""
    found: dict[str, Path | str] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _split(folder: Path) -> tuple[Path, Path]:
    """The adapter's tensors in two files, each with another half."""
    saved = load_file(folder / WEIGHTS)
    halves = folder / "a.safetensors", folder / "b.safetensors"
    for path, part in zip(halves, ("lora_A", "lora_B"), strict=True):
        save_file({name: tensor for name, tensor in saved.items() if part in name}, path)
    return halves


async def test_one_file_by_its_path(folder: Path) -> None:
    renamed = (folder / WEIGHTS).rename(folder / "part-1.safetensors")
    saved = load_file(renamed)
    for file in (WeightsFile.at(renamed), await WeightsFile.at_async(str(renamed))):
        with file:
            assert set(file) == set(saved)
            assert torch.equal(file.read(A), saved[A])


@pytest.mark.parametrize("how", ["str", "Path", "split"])
def test_paths_in_place_of_tensors(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    config, model, path = LoraConfig.load(folder), base.FakeModel(), folder / WEIGHTS
    paths = _split(folder) if how == "split" else (str(path) if how == "str" else path,)
    module_map, names = config.map_weights_for_model(_lazily(*paths), model.weight_names)
    in_memory, _ = config.map_weights_for_model(load_file(path), model.weight_names)
    wanted = LoraWeights.load(config, model, in_memory, "v_proj", set())
    assert wanted is not None
    for load in (
        lambda: LoraWeights.load(config, model, module_map, "v_proj", names),
        lambda: run(LoraWeights.load_async(config, model, module_map, "v_proj", names)),
    ):
        with opens(monkeypatch) as seen:
            got = load()
        assert len(seen) == len(paths)  # once each, not for every module
        assert got is not None
        assert torch.equal(got.weights_a, wanted.weights_a)
        assert torch.equal(got.weights_b, wanted.weights_b)
    assert len(names) == 6


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("missing", AdapterNotFoundError, "no file 'adapter_model.safetensors' at this path"),
        ("cut", AdapterFormatError, "fetch it again"),
        ("int", UnsupportedAdapterError, "I8"),
        ("folder", AdapterFormatError, "a folder"),
    ],
)
def test_strange_files_behind_paths(
    folder: Path, how: str, kind: type[LoraxError], text: str
) -> None:
    config, model, path = LoraConfig.load(folder), base.FakeModel(), folder / WEIGHTS
    module_map, names = config.map_weights_for_model(_lazily(path), model.weight_names)
    _spoil(folder, how)
    if how == "folder":
        path.mkdir()
    before = open_files()
    with pytest.raises(kind, match=text) as caught:
        LoraWeights.load(config, model, module_map, "q_proj", names)
    assert caught.value.id == str(path)
    assert open_files() == before
    assert len(names) == 12


def test_a_file_that_is_closed_meanwhile(folder: Path) -> None:
    config, model = LoraConfig.load(folder), base.FakeModel()
    with WeightsFile.open(folder) as file:
        module_map, names = config.map_weights_for_model(file, model.weight_names)
    with pytest.raises(FetchError, match="closed"):
        LoraWeights.load(config, model, module_map, "q_proj", names)
    assert len(names) == 12
