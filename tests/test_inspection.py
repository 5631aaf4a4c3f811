"""`lorax-async inspect`: what an adapter is, and all that it would be refused for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from command_line import ADAPTERS, adapter, base, output, query
from lorax_async.cli import main

Capture = pytest.CaptureFixture[str]


def test_inspect_tells_what_the_adapter_is(capsys: Capture) -> None:
    assert main(["inspect", str(ADAPTERS / "json"), "--json"]) == 0
    found = output(capsys)
    assert found["loadable"] is True
    assert found["problems"] == []
    assert found["config"]["rank_pattern"] == {"down_proj": 4}
    assert found["tensors"] == 2 * 2 * 15
    assert found["file_bytes"] == (ADAPTERS / "json/adapter_model.safetensors").stat().st_size
    down, value = found["targets"]
    layers = list(range(15, 30))
    assert down == {
        "name": "down_proj",
        "modules": 15,
        "layers": layers,
        "ranks": [4],
        "scales": [1.0],
        "shapes": [[1536, 576]],
        "dtypes": ["F32"],
        "nbytes": 15 * 4 * (1536 + 576) * 4,
    }
    assert (value["ranks"], value["scales"], value["layers"]) == ([12], [2.0], layers)
    assert found["device_bytes"] == down["nbytes"] + value["nbytes"]


def test_inspect_takes_a_base(tmp_path: Path, capsys: Capture) -> None:
    assert (
        main(["inspect", str(ADAPTERS / "pirate"), "--base", base(tmp_path / "base"), "--json"])
        == 0
    )
    found = output(capsys)
    assert (found["device_dtype"], found["loadable"]) == ("BF16", True)


def test_inspect_finds_that_the_base_does_not_fit(tmp_path: Path, capsys: Capture) -> None:
    other = base(tmp_path / "base", hidden_size=1152, head_dim=64)
    assert main(["inspect", str(ADAPTERS / "pirate"), "--base", other, "--json"]) == 2
    found = output(capsys)
    assert [problem["error"] for problem in found["problems"]] == ["IncompatibleAdapterError"]
    assert "60 modules in all" in found["problems"][0]["text"]
    assert len(found["targets"]) == 2


def test_inspect_goes_on_after_each_problem(tmp_path: Path, capsys: Capture) -> None:
    tensors = query(0) | {
        "model.layers.0.self_attn.q_proj.lora_diag": torch.ones(8),
        "model.embed_tokens.weight": torch.ones(2, 2),
        "model.layers.99999999.q_proj.lora_A.weight": torch.ones(8, 4),
    }
    path = adapter(tmp_path / "bad", tensors, use_bdlora={}, bias="all", r="eight")
    assert main(["inspect", path, "--json"]) == 2
    found = output(capsys)
    texts = [problem["text"] for problem in found["problems"]]
    for needle in (
        "'use_bdlora'",
        "'bias'",
        "r must be a positive",
        "lora_diag",
        "embed",
        "99999999",
    ):
        assert sum(needle in text for text in texts) == 1, needle
    assert len(texts) == 6
    # Even so: what the file holds is shown.
    assert [(t["name"], t["ranks"], t["scales"]) for t in found["targets"]] == [("q_proj", [8], [])]


def test_inspect_checks_the_tensors_of_a_refused_config(tmp_path: Path, capsys: Capture) -> None:
    path = adapter(tmp_path / "bad", query(0, rank=4), use_bdlora={})
    assert main(["inspect", path, "--base", base(tmp_path / "base"), "--json"]) == 2
    errors = [problem["error"] for problem in output(capsys)["problems"]]
    assert errors == ["UnsupportedAdapterError", "AdapterFormatError"]  # and rank 4 is not 8


def test_inspect_knows_magnitudes_and_their_absence(tmp_path: Path, capsys: Capture) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    whole = adapter(tmp_path / "whole", query(0) | {name: torch.ones(576)}, use_dora=True)
    assert main(["inspect", whole, "--base", base(tmp_path / "base"), "--json"]) == 0
    found = output(capsys)
    assert (found["config"]["use_dora"], found["tensors"]) == (True, 3)
    # A and B are cast to bf16; the magnitude stays as it is.
    assert found["device_bytes"] == 2 * 8 * 1152 + 4 * 576
    assert found["targets"][0]["nbytes"] == 4 * 8 * 1152 + 4 * 576
    assert main(["inspect", adapter(tmp_path / "flag", query(0), use_dora=True), "--json"]) == 2
    (problem,) = output(capsys)["problems"]
    assert problem["error"] == "AdapterFormatError"
    assert "use_dora is set" in problem["text"]


def test_inspect_leaves_out_what_repeats(tmp_path: Path, capsys: Capture) -> None:
    tensors = {f"model.layers.{n}.norm.weight": torch.ones(2) for n in range(25)}
    assert main(["inspect", adapter(tmp_path / "bad", tensors)]) == 2
    text = capsys.readouterr().out
    assert text.count("UnsupportedAdapterError") == 20
    # 25 tensors, and the module layout that cannot be made of them repeats the first one's text.
    assert "… and 5 more" in text


@pytest.mark.parametrize("kind", ["absent", "empty", "fifo", "pickle"])
def test_inspect_of_what_is_no_adapter(kind: str, tmp_path: Path, capsys: Capture) -> None:
    if kind != "absent":
        (tmp_path / kind).mkdir()
    if kind == "fifo":
        os.mkfifo(tmp_path / kind / "adapter_config.json")
        os.mkfifo(tmp_path / kind / "adapter_model.safetensors")
    if kind == "pickle":
        (tmp_path / kind / "adapter_config.json").write_text("{}")
        (tmp_path / kind / "adapter_model.bin").write_bytes(b"x")
    assert main(["inspect", str(tmp_path / kind)]) == 2
    says = {"absent": "no such folder", "empty": "has no", "fifo": "a FIFO", "pickle": "a pickle"}
    assert says[kind] in capsys.readouterr().out


def test_a_strangers_text_reaches_no_terminal_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    hostile = "\x1b[31m\x9b31m\u202e[bold]:bomb:"
    path = adapter(tmp_path / "x", query(0), base_model_name_or_path=hostile, unknown=hostile)
    assert main(["inspect", path]) == 2
    text = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert "[bold]:bomb:" in text
