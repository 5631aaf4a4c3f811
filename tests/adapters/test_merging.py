"""Merges of folders: what is refused before a tensor is read, and what comes out."""

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny
import torch
from tiny_sources import WEIGHTS

import lorax_async
from lorax_async import Limits, errors
from lorax_async.adapters import (
    AdapterParameters,
    LoraConfig,
    Recipe,
    WeightsFile,
    merge_adapters,
    merge_folders,
    merging,
)
from lorax_async.sources.local import open_weights

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("nothing_left")

HALVES = Recipe("linear", [0.5, -2])
DROPPED = Recipe("dare_ties", [0.5, -2], density=0.5, seed=9)
HUGE = 10**5000
"""More digits than Python spells out."""


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [tiny.write(tmp_path / name, seed) for seed, name in enumerate("ab")]


@pytest.mark.parametrize(
    ("recipe", "problem"),
    [
        (("sum", [1, 1]), "one of linear, ties, dare_linear, dare_ties, not 'sum'"),
        ((["linear"], [1, 1]), "a strategy is one of"),
        *((("linear", weights), "one for each of 1 to 64") for weights in ([], [1] * 65, 1, None)),
        *(
            (("linear", [1, bad]), "finite number that float32 holds")
            for bad in (-inf, nan, 1e39, 10**400, HUGE, True, "1")
        ),
        (("linear", [1, 1], 0.5), "'linear' keeps every weight; leave the density out"),
        (("linear", [1, 1], None, "frequency"), "for strategies with 'ties' only"),
        (("dare_linear", [1, 1], 0.5, "frequency"), "for strategies with 'ties' only"),
        (("ties", [1, 1], 0.5, "most"), "total or frequency"),
        *(
            ((kind, [1, 1], bad), f"'{kind}' needs a density above 0 and up to 1, not")
            for kind in ("ties", "dare_linear", "dare_ties")
            for bad in (None, 0, -0.1, 1.01, HUGE, nan, True, "0.5")
        ),
        (("ties", [1], 0.5), "'ties' merges two adapters or more; one is for 'linear'"),
        (("linear", [1, 1], None, "total", 1), "for strategies with 'dare' only"),
        (("ties", [1, 1], 0.5, "total", 1), "for strategies with 'dare' only"),
        *(
            (("dare_ties", [1, 1], 0.5, "total", bad), r"a seed is an integer from 0 to 2\*\*63")
            for bad in (-1, 1 << 63, HUGE, 1.0, True)
        ),
    ],
    ids=lambda value: None if isinstance(value, tuple) else str(value)[:40],
)
def test_a_recipe_that_makes_no_sense_is_refused(recipe: tuple[Any, ...], problem: str) -> None:
    with pytest.raises(errors.UsageError, match=problem):
        Recipe(*recipe)


@pytest.mark.parametrize("given", ["ab", ["a"], ["a", "b", "c"], None])
def test_there_is_a_folder_for_each_weight(given: Any) -> None:
    with pytest.raises(errors.UsageError, match="a list of 2, one for each weight"):
        merge_folders(given, HALVES, tiny.layout())


def only(folder: Path, *layers: int, rank: int = 4) -> Path:
    """An adapter of some layers of the base."""
    tiny.write(folder, rank=rank)
    names = [f"layers.{layer}." for layer in layers]
    kept = {k: t for k, t in tiny.tensors(0, rank).items() if any(name in k for name in names)}
    safetensors.torch.save_file(kept, folder / WEIGHTS)
    return folder


def test_modules_of_either_part_in_the_models_order_and_of_one_rank(tmp_path: Path) -> None:
    parts = [only(tmp_path / "a", 3, 0), only(tmp_path / "b", 2, 0, rank=3)]
    tensors, config = merge_folders(parts, Recipe("linear", [1, 1]), tiny.layout())
    layers = [int(name.split(".")[4]) for name in tensors]
    assert (layers, config["r"], config["lora_alpha"]) == ([0] * 4 + [2] * 4 + [3] * 4, 7, 7)
    assert {min(tensor.shape) for tensor in tensors.values()} == {7}
    a = tensors["base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"]
    assert a[:3].all()
    assert not a[3:].any()


def unread(_: WeightsFile, key: str) -> torch.Tensor:
    raise AssertionError(f"{key} was read")


def test_limits_hold_for_the_whole_merge_before_it_takes_memory(
    folders: list[Path], monkeypatch: Patch
) -> None:
    """Though each part alone is within them."""
    content = sum(tensor.nbytes for tensor in tiny.tensors(0).values())
    within = Limits(max_rank=8, max_adapter_bytes=2 * content)
    merge_folders(folders, HALVES, tiny.layout(), within)
    monkeypatch.setattr(WeightsFile, "read", unread)
    for limits, problem in (
        (Limits(max_rank=7), "add up to 8, over the limit of 7"),
        (Limits(max_adapter_bytes=2 * content - 1), "over the limit of"),
    ):
        with pytest.raises(errors.UnsupportedAdapterError, match=problem):
            merge_folders(folders, HALVES, tiny.layout(), limits)


def test_a_part_that_a_load_refuses_is_named(folders: list[Path], monkeypatch: Patch) -> None:
    monkeypatch.setattr(WeightsFile, "read", unread)
    good, bad = folders
    absent = bad.parent / "absent"
    for folder, kind in ((absent, errors.AdapterNotFoundError), (bad, errors.AdapterFormatError)):
        (bad / "adapter_config.json").write_text("{")
        with pytest.raises(kind) as caught:
            merge_folders([good, folder], DROPPED, tiny.layout())
        assert caught.value.id == str(folder)


def test_more_than_plain_lora_is_refused(folders: list[Path]) -> None:
    tensors = tiny.tensors(1)
    for module in {name.partition(".lora_")[0] for name in tensors}:
        tensors[f"{module}.lora_magnitude_vector"] = torch.ones(2 * tiny.HIDDEN)
    safetensors.torch.save_file(tensors, folders[1] / WEIGHTS)
    (folders[1] / "adapter_config.json").write_text(json.dumps(tiny.config(use_dora=True)))
    with pytest.raises(
        errors.UnsupportedAdapterError, match="lora_magnitude_vector.*DoRA"
    ) as caught:
        merge_folders(folders, HALVES, tiny.layout())
    assert caught.value.id == str(folders[1])


def test_unequal_ranks_and_factors_beyond_float32(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(WeightsFile, "read", unread)
    parts = [tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", rank=3)]
    with pytest.raises(errors.IncompatibleAdapterError, match=r"q_proj.*have 4 and 3; 'linear'"):
        merge_folders(parts, DROPPED, tiny.layout())
    large = [tiny.write(tmp_path / "c", lora_alpha=1e38)]
    with pytest.raises(errors.AdapterFormatError, match=r"scaled by 2.5e\+37 and weighted by 20"):
        merge_folders(large, Recipe("linear", [20]), tiny.layout())


def test_a_folder_that_is_saved_while_it_is_opened(folders: list[Path], monkeypatch: Patch) -> None:
    """Config and weights are never of two versions."""

    def saved_before(*given: Any) -> Any:
        (folders[0] / "adapter_config.json").write_text(json.dumps(tiny.config(lora_alpha=2)))
        return open_weights(*given)

    monkeypatch.setattr(merging, "open_weights", saved_before)
    with pytest.raises(errors.IntegrityError, match="saved while") as caught:
        merge_folders(folders, HALVES, tiny.layout())
    assert caught.value.id == str(folders[0])


def test_a_file_that_is_cut_short_while_it_is_read(folders: list[Path], monkeypatch: Patch) -> None:
    """It is an error that names the folder; a mapped file would end the process."""
    read = WeightsFile.read

    def cut_before(self: WeightsFile, key: str) -> torch.Tensor:
        with (folders[1] / WEIGHTS).open("r+b") as file:
            file.truncate(4096)
        return read(self, key)

    monkeypatch.setattr(WeightsFile, "read", cut_before)
    with pytest.raises(errors.IntegrityError, match="changed") as caught:
        merge_folders(folders, HALVES, tiny.layout())
    assert caught.value.id == str(folders[1])


def test_lorax_parts_that_cannot_be_read_are_named(folders: list[Path]) -> None:
    config = LoraConfig("", 4, None, False, 8, False)
    names = [module.name for module in tiny.layout().modules]
    adapters = []
    for folder in folders:
        with WeightsFile.open(folder) as file:
            adapters.append((config.map_weights_for_model(file, names)[0], config))
    given = AdapterParameters(adapter_ids=["one", "two"])
    with pytest.raises(errors.FetchError, match="was closed") as caught:
        merge_adapters(adapters, given)
    assert caught.value.id == "one"


def test_the_id_that_merges_were_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(errors.UsageError, match=r"removed in 0\.3.*merge_folders.*load_tensors"):
        from lorax_async import Merge  # type: ignore[attr-defined]  # noqa: F401
    assert "Merge" not in dir(lorax_async)
