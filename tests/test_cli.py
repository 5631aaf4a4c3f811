"""The command line: what it prints, to whom, and its exit status."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorax_async import cli, terminal
from lorax_async.cli import main

ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"
CONTROL = re.compile(r"[^\n\x20-\x7e–─→…]")
# SmolLM2-135M's; 30 layers of hidden size 576, 9 heads of 64, 3 of them for keys and values.
BASE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 30,
    "vocab_size": 49152,
    "dtype": "bfloat16",
}
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., str]:
    """Makes the folder of a base: its config is all that the command line needs."""

    def make(**changes: object) -> str:
        folder = tmp_path / "base"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(BASE | changes))
        return str(folder)

    return make


def adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> str:
    folder.mkdir(parents=True)
    plain = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(plain | config))
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return str(folder)


def query(layer: int, rank: int = 8) -> dict[str, torch.Tensor]:
    path = f"model.layers.{layer}.self_attn.q_proj"
    return {
        f"{path}.lora_A.weight": torch.ones(rank, 576),
        f"{path}.lora_B.weight": torch.ones(576, rank),
    }


def output(capsys: Capture) -> Any:
    return json.loads(capsys.readouterr().out)


# -- inspect --------------------------------------------------------------------------------------


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


def test_inspect_takes_a_base(base: Callable[..., str], capsys: Capture) -> None:
    assert main(["inspect", str(ADAPTERS / "pirate"), "--base", base(), "--json"]) == 0
    found = output(capsys)
    assert (found["device_dtype"], found["loadable"]) == ("BF16", True)


def test_inspect_finds_that_the_base_does_not_fit(
    base: Callable[..., str], capsys: Capture
) -> None:
    other = base(hidden_size=1152, head_dim=64)
    assert main(["inspect", str(ADAPTERS / "pirate"), "--base", other, "--json"]) == 2
    found = output(capsys)
    assert [problem["error"] for problem in found["problems"]] == ["IncompatibleAdapterError"]
    assert "60 modules in all" in found["problems"][0]["text"]
    assert len(found["targets"]) == 2


def test_inspect_goes_on_after_each_problem(tmp_path: Path, capsys: Capture) -> None:
    tensors = query(0) | {
        "model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(576),
        "model.embed_tokens.weight": torch.ones(2, 2),
        "model.layers.99999999.q_proj.lora_A.weight": torch.ones(8, 4),
    }
    path = adapter(tmp_path / "bad", tensors, use_dora=True, bias="all", r="eight")
    assert main(["inspect", path, "--json"]) == 2
    found = output(capsys)
    texts = [problem["text"] for problem in found["problems"]]
    for needle in ("'use_dora'", "'bias'", "r must be a positive", "vector", "embed", "99999999"):
        assert sum(needle in text for text in texts) == 1, needle
    assert len(texts) == 6
    # Even so: what the file holds is shown.
    assert [(t["name"], t["ranks"], t["scales"]) for t in found["targets"]] == [("q_proj", [8], [])]


def test_inspect_checks_the_tensors_of_a_refused_config(
    base: Callable[..., str], tmp_path: Path, capsys: Capture
) -> None:
    path = adapter(tmp_path / "bad", query(0, rank=4), use_dora=True)
    assert main(["inspect", path, "--base", base(), "--json"]) == 2
    errors = [problem["error"] for problem in output(capsys)["problems"]]
    assert errors == ["UnsupportedAdapterError", "AdapterFormatError"]  # DoRA, and rank 4 is not 8


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
    assert not CONTROL.sub("", text.replace("\N{REPLACEMENT CHARACTER}", "")).count("\x1b")
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert "[bold]:bomb:" in text


# -- load -----------------------------------------------------------------------------------------


def test_load_reports_each_adapter(
    base: Callable[..., str], tmp_path: Path, capsys: Capture
) -> None:
    refused = adapter(tmp_path / "refused", query(0), use_dora=True)
    paths = [str(ADAPTERS / "pirate"), refused, str(tmp_path / "absent"), str(ADAPTERS / "json")]
    assert main(["load", *paths, "--base", base(), "--dtype", "float32", "--json"]) == 1
    captured = capsys.readouterr()
    pirate, bad, absent, other = json.loads(captured.out)["adapters"]
    assert (pirate["name"], pirate["state"], pirate["error"]) == ("pirate", "resident", None)
    assert pirate["layers"] == list(range(30))
    assert pirate["file_bytes"] == (ADAPTERS / "pirate/adapter_model.safetensors").stat().st_size
    assert pirate["device_bytes"] == 30 * 8 * (576 + 576 + 576 + 192) * 4
    assert 0 < pirate["first_layer_ms"] <= pirate["resident_ms"]
    assert other["layers"] == list(range(15, 30))
    assert (bad["state"], bad["error"]["type"]) == ("failed", "UnsupportedAdapterError")
    assert bad["error"]["stage"] == "verify"
    assert (absent["error"]["type"], absent["resident_ms"]) == ("AdapterNotFoundError", None)
    assert captured.err.count("\n") == 2
    assert "UnsupportedAdapterError: adapter" in captured.err


def test_load_takes_turns_where_room_is_short(base: Callable[..., str], capsys: Capture) -> None:
    paths = [str(ADAPTERS / name) for name in ("pirate", "shout", "json")]
    assert main(["load", *paths, "--base", base(), "--device-bytes", "1MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "resident " in line] == [
        [name, "resident"] for name in ("pirate", "shout", "json")
    ]


def test_load_says_what_does_not_fit(base: Callable[..., str], capsys: Capture) -> None:
    arguments = ["load", str(ADAPTERS / "pirate"), "--base", base(), "--device-bytes", "100000"]
    assert main(arguments) == 1
    assert "CapacityError: " in capsys.readouterr().err


def test_one_adapter_by_two_names(
    base: Callable[..., str], tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "pirate").symlink_to(ADAPTERS / "pirate")
    paths = [str(ADAPTERS / "pirate"), str(tmp_path / "pirate")]
    assert main(["load", *paths, "--base", base(), "--json"]) == 0
    rows = output(capsys)["adapters"]
    assert [row["name"] for row in rows] == paths
    assert all(row["first_layer_ms"] > 0 for row in rows)


def test_ctrl_c_closes_the_loader(
    base: Callable[..., str], monkeypatch: Patch, capsys: Capture
) -> None:
    async def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(cli, "load_at_once", interrupted)
    assert main(["load", str(ADAPTERS / "pirate"), "--base", base()]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert not [t for t in threading.enumerate() if t.name.startswith("lorax")]


# -- the program ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"), [("1", 1), ("64KiB", 65_536), ("3MiB", 3_145_728), ("1GiB", 1_073_741_824)]
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert cli._size(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "1.5MiB", "-1", "1MB", "1KiBMiB", "²"])
def test_other_sizes_are_wrong_usage(text: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["load", "x", "--base", "y", f"--device-bytes={text}"])
    assert exit.value.code == 2
    assert "is no size" in capsys.readouterr().err


def test_a_base_that_is_none(capsys: Capture, tmp_path: Path) -> None:
    assert main(["load", "x", "--base", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("ConfigError: ")


def test_version_and_help(capsys: Capture) -> None:
    for arguments, needle in ((["--version"], "lorax-async 0."), (["--help"], "exit status:")):
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == 0
        assert needle in capsys.readouterr().out


def test_without_rich_only_json(monkeypatch: Patch, capsys: Capture) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["inspect", str(ADAPTERS / "pirate"), "--json"]) == 0
    assert output(capsys)["loadable"] is True
    assert main(["inspect", str(ADAPTERS / "pirate")]) == 1
    assert "pip install 'lorax-async[cli]'" in capsys.readouterr().err


def test_people_read_sizes_and_spans() -> None:
    sizes = [terminal.size(n) for n in (0, 1023, 1024, 1536, 5 << 20, 3 << 30, 2 << 40)]
    assert sizes == ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 MiB", "3.0 GiB", "2048.0 GiB"]
    assert [terminal.spans(n) for n in ((), (4,), (-1, 0, 1, 5, 7, 8))] == ["", "4", "-1–1, 5, 7–8"]


def test_a_pipe_gets_plain_text(base: Callable[..., str]) -> None:
    command = [sys.executable, "-m", "lorax_async", "load", str(ADAPTERS / "json")]
    done = subprocess.run(
        [*command, "--base", base()],
        capture_output=True,
        check=True,
        env=os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "20"},
    )
    text = done.stdout.decode()
    assert done.stderr == b""
    assert CONTROL.search(text) is None
    assert re.search(r"^ json +resident +15–29 .* ms$", text, re.MULTILINE)


def test_a_terminal_gets_bars(base: Callable[..., str]) -> None:
    command = [sys.executable, "-m", "lorax_async", "load", str(ADAPTERS / "json")]
    mine, theirs = os.openpty()
    try:
        process = subprocess.Popen(
            [*command, "--base", base()],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
        )
    finally:
        os.close(theirs)
    text = _everything(mine).decode()
    assert process.wait(60) == 0
    assert "\x1b[" in text
    assert "━" in text
    assert "15/15 layers" in text
    assert text.rstrip().endswith("ms")


def _everything(fd: int) -> bytes:
    """Read a pseudo-terminal until its other side is closed, which Linux reports as EIO."""
    parts = []
    with open(fd, "rb", buffering=0) as file:
        try:
            while part := file.read(65_536):
                parts.append(part)
        except OSError as error:
            assert error.errno == errno.EIO
    return b"".join(parts)
