"""What else reads adapters from folders reads those whose weights are several files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tiny
from adapters import hub_cache
from command_line import adapter, base, query
from lorax_async import layouts
from lorax_async.adapters import WeightsFile
from lorax_async.cli import main
from split_files import WEIGHTS, deal, name_of, split

pytestmark = pytest.mark.usefixtures("nothing_left")

Splitting = Callable[[Path, Path], Path]
BOTH = pytest.mark.parametrize("splitting", [split, deal])


@BOTH
def test_inspect_and_layouts_read_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], splitting: Splitting
) -> None:
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


def test_the_command_line_loads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = adapter(tmp_path / "one", query(0) | query(3) | query(7))
    several = split(Path(one), tmp_path / "several")
    assert main(["load", str(several), "--base", base(tmp_path / "base"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["adapters"]
    assert found["state"] == "resident"
    nbytes = sum(path.stat().st_size for path in several.glob("*.safetensors"))
    assert found["file_bytes"] == nbytes


@BOTH
@pytest.mark.parametrize("cached", [False, True])
def test_the_contract_of_lorax_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splitting: Splitting, cached: bool
) -> None:
    one = tiny.write(tmp_path / "one", 5)
    several: Path | str = splitting(one, tmp_path / "several")
    if cached:
        files = {path.name: path.read_bytes() for path in Path(several).iterdir()}
        hub_cache.put(tmp_path / "hub", "org/split", files, commit="1" * 40, refs=("main",))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        several = "org/split"
    saved = safetensors.torch.load_file(one / WEIGHTS)
    with WeightsFile.open(several) as file:
        assert set(file) == saved.keys()
        for name, tensor in saved.items():
            assert torch.equal(file.read(name), tensor)
