"""The command line: `load`, `inspect`, `plan`, the demo, wrong usage, what a terminal gets."""

import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
import torch
from command_line import (
    ADAPTERS,
    adapter,
    base,
    on_a_terminal,
    output,
    query,
    read_until,
    tiny_base,
)
from fault_server import until

from lorax_async.cli import load, main
from lorax_async.cli.command_line import Terminal, as_size, run_on_uvloop
from lorax_async.cli.load import with_ticker

GOES_ON = re.compile(r"^([a-z' ]+: \d+ s|so far: .*)\n", re.MULTILINE)
"""What a pipe gets on a busy machine: a line after each 3 s of silence."""

CONTROL = re.compile(r"[^\n\x20-\x7e–─→…]")
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
PIRATE, JSON = str(ADAPTERS / "pirate"), str(ADAPTERS / "json")
SECRET = "hf_AbcDefGhi5ecre7"


def test_load_reports_each_adapter(tmp_path: Path, capsys: Capture) -> None:
    refused = adapter(tmp_path / "refused", query(0), use_bdlora={})
    (tmp_path / "pirate").symlink_to(PIRATE)
    paths = [PIRATE, refused, str(tmp_path / "absent"), JSON, str(tmp_path / "pirate")]
    options = ["--base", base(tmp_path / "base"), "--dtype", "float32", "--json"]
    assert main(["load", *paths, *options]) == 1
    captured = capsys.readouterr()
    pirate, bad, absent, other, twin = json.loads(captured.out)["adapters"]
    assert (pirate["name"], pirate["state"], pirate["error"]) == (PIRATE, "resident", None)
    assert pirate["layers"] == list(range(30))
    assert pirate["file_bytes"] == (ADAPTERS / "pirate/adapter_model.safetensors").stat().st_size
    assert pirate["device_bytes"] == 30 * 8 * (576 + 576 + 576 + 192) * 4
    assert 0 < pirate["first_layer_ms"] <= pirate["resident_ms"]
    assert (other["name"], other["layers"]) == ("json", list(range(15, 30)))
    assert (twin["name"], twin["state"]) == (paths[-1], "resident")
    assert (bad["state"], bad["error"]["type"]) == ("failed", "UnsupportedAdapterError")
    assert bad["error"]["stage"] == "verify"
    assert (absent["error"]["type"], absent["resident_ms"]) == ("AdapterNotFoundError", None)
    assert captured.err.count("\n") == 2
    assert "UnsupportedAdapterError: adapter" in captured.err


def test_torch_is_imported_when_needed_and_ctrl_c_meanwhile_is_one_line(tmp_path: Path) -> None:
    """A module by torch's name stands for a user who presses it while torch is imported."""
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path)}

    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "lorax_async", *words]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode, GOES_ON.sub("", done.stderr)

    for words in (["--help"], ["--version"], ["cache", "ls"], ["timeline", "--help"]):
        assert run(*words) == (0, "")
    code, complaint = run("timeline", "gone.json", "-o", "x.html")
    assert code == 1
    assert "gone.json: No such file or directory" in complaint
    assert run("load", "x", "--base", "y") == (130, "interrupted\n")


class Screen(io.StringIO):
    """A terminal of 80 columns, by the environment."""

    def isatty(self) -> bool:
        return True


def test_tables_fit_80_columns_without_cutting_digits(monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")
    screen, numbers = (
        Screen(),
        ["1,000,000", "47.6%", "524,127", "10,000", "40947.4 GiB", "2.0 GiB"],
    )
    titles = [
        "requests",
        "found there",
        "loads",
        "of them first",
        "to the device",
        "to the device/s",
    ]
    row = {"adapter": "an-organisation/a-name-of-many-letters-and-digits-4711"}
    row |= {f" {title}": number for title, number in zip(titles, numbers, strict=True)}
    Terminal(screen, screen).table([row, row])
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert all(screen.getvalue().count(number) == 2 for number in numbers)
    assert "…" not in screen.getvalue()
    names = "".join(line.split("  ")[0].strip() for line in lines)
    assert names.replace(" ", "").count("4711") == 2


def test_without_a_terminal_lines_say_that_a_step_goes_on(monkeypatch: Patch) -> None:
    monkeypatch.setattr("lorax_async.cli.command_line.QUIET_SECONDS", 0.01)
    err = io.StringIO()
    terminal = Terminal(io.StringIO(), err)
    with terminal.steps("starting") as report:
        until(lambda: err.getvalue().startswith("starting: 0 s\n"), 20)
        report("loading the base model")
        until(lambda: "loading the base model: 0 s\n" in err.getvalue(), 20)
    with terminal.bars() as bars:
        bars.update(0, "pirate", 1 << 20, 4 << 20, "filling")
        until(lambda: "so far: 1.0 MiB of 4.0 MiB\n" in err.getvalue(), 20)


def test_load_takes_turns_where_room_is_short(tmp_path: Path, capsys: Capture) -> None:
    names = ("pirate", "shout", "json")
    options = ["--base", base(tmp_path / "base"), "--device-bytes"]
    assert main(["load", *(str(ADAPTERS / name) for name in names), *options, "1MiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "resident " in line] == [*names]
    assert main(["load", PIRATE, *options, "100000"]) == 1
    assert "CapacityError: " in capsys.readouterr().err


def test_ctrl_c_closes_the_loader(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    async def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(load, "load_at_once", interrupted)
    assert main(["load", PIRATE, "--base", base(tmp_path / "base")]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert not [t for t in threading.enumerate() if t.name.startswith("lorax")]


def test_inspect_tells_what_the_adapter_is(tmp_path: Path, capsys: Capture) -> None:
    assert main(["inspect", JSON, "--json"]) == 0
    found = output(capsys)
    assert (found["loadable"], found["problems"], found["tensors"]) == (True, [], 2 * 2 * 15)
    assert found["config"]["rank_pattern"] == {"down_proj": 4}
    assert found["file_bytes"] == (ADAPTERS / "json/adapter_model.safetensors").stat().st_size
    down, value = found["targets"]
    layers = list(range(15, 30))
    plain = {"name": "down_proj", "modules": 15, "layers": layers, "ranks": [4], "scales": [1.0]}
    shape = {"shapes": [[1536, 576]], "dtypes": ["F32"], "nbytes": 15 * 4 * (1536 + 576) * 4}
    assert down == plain | shape
    assert (value["ranks"], value["scales"], value["layers"]) == ([12], [2.0], layers)
    assert found["device_bytes"] == down["nbytes"] + value["nbytes"]
    options = ["--base", base(tmp_path / "wide", hidden_size=1152, head_dim=64)]
    assert main(["inspect", PIRATE, *options, "--json"]) == 2
    found = output(capsys)
    (problem,) = found["problems"]
    assert problem["error"] == "IncompatibleAdapterError"
    assert "60 modules in all" in problem["text"]
    assert len(found["targets"]) == 2


def test_inspect_goes_on_after_each_problem(tmp_path: Path, capsys: Capture) -> None:
    tensors = query(0) | {
        "model.layers.0.self_attn.q_proj.lora_diag": torch.ones(8),
        "model.embed_tokens.lora_velora_embed": torch.ones(2, 2),
        "model.layers.99999999.q_proj.lora_A.weight": torch.ones(8, 4),
    }
    path = adapter(tmp_path / "bad", tensors, use_bdlora={}, bias="all", r="eight")
    assert main(["inspect", path, "--json"]) == 2
    found = output(capsys)
    texts = [problem["text"] for problem in found["problems"]]
    needles = ("'use_bdlora'", "'bias'", "r must be a", "lora_diag", "embed", "99999999")
    assert [sum(needle in text for text in texts) for needle in needles] == [1] * 6
    assert len(texts) == 6
    assert [(t["name"], t["ranks"], t["scales"]) for t in found["targets"]] == [("q_proj", [8], [])]


Q = "model.layers.0.self_attn.q_proj"
PAIR = query(0)
CONV = {f"{Q}.lora_A.weight": torch.ones(8, 3, 2, 2), f"{Q}.lora_B.weight": torch.ones(4, 8, 1, 1)}
EXPERTS = {f"{Q}.lora_A.weight": torch.ones(4, 8, 3), f"{Q}.lora_B.weight": torch.ones(4, 3, 8)}
MLX = {"peft_type": None, "lora_parameters": {"rank": 8}}


@pytest.mark.parametrize(
    ("tensors", "config", "error", "words"),
    [
        (PAIR, MLX, "UnsupportedAdapterError", ("MLX", "transpose")),
        (CONV, {}, "UnsupportedAdapterError", ("a convolution", "linear modules")),
        (EXPERTS, {}, "UnsupportedAdapterError", ("experts in one tensor",)),
        (
            PAIR,
            {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]},
            "AdapterFormatError",
            ("leaves out", "target_modules"),
        ),
        (PAIR, {"target_modules": []}, "AdapterFormatError", ("'target_modules' is empty",)),
        (
            PAIR | {"model.norm.lora_magnitude_vector": torch.ones(8)},
            {"use_dora": True},
            "AdapterFormatError",
            ("no A and B",),
        ),
        (
            PAIR | {f"{Q}.lora_embedding_A": torch.ones(8, 4)},
            {},
            "AdapterFormatError",
            ("of a linear module and of an embedding",),
        ),
    ],
)
def test_inspect_names_the_cause(
    tmp_path: Path,
    capsys: Capture,
    tensors: dict[str, torch.Tensor],
    config: dict[str, object],
    error: str,
    words: tuple[str, ...],
) -> None:
    """One problem, which blames no base where none was named."""
    path = adapter(tmp_path / "x", tensors, **config)
    assert main(["inspect", path, "--json"]) == 2
    (problem,) = output(capsys)["problems"]
    assert problem["error"] == error
    assert all(word in problem["text"] for word in words)
    assert "this loader" not in problem["text"]
    assert "the base has" not in problem["text"]


def test_a_base_is_not_blamed_for_a_convolution(tmp_path: Path, capsys: Capture) -> None:
    tensors = {name.replace("q_proj", "conv"): tensor for name, tensor in CONV.items()}
    for number, some in enumerate((tensors, CONV)):
        path = adapter(tmp_path / str(number), some, target_modules=["conv", "q_proj"])
        options = ["--base", base(tmp_path / f"base{number}"), "--json"]
        assert main(["inspect", path, *options]) == 2
        (problem,) = output(capsys)["problems"]
        assert problem["error"] == "UnsupportedAdapterError"
        assert "a convolution" in problem["text"]


def test_inspect_finds_weights_that_ruin_a_server(tmp_path: Path, capsys: Capture) -> None:
    tensors = query(0)
    first = next(iter(tensors.values()))
    first.view(-1)[-1] = float("nan")
    path = adapter(tmp_path / "nan", tensors)
    assert main(["inspect", path, "--json"]) == 2
    (problem,) = output(capsys)["problems"]
    assert problem["error"] == "AdapterFormatError"
    assert "NaN" in problem["text"]


def test_a_strangers_text_reaches_no_terminal_as_it_is(tmp_path: Path, capsys: Capture) -> None:
    hostile = "\x1b[31m\x9b31m\u202e[bold]:bomb:"
    tensors = {f"model.layers.{n}.norm.lora_diag": torch.ones(2) for n in range(25)}
    path = adapter(tmp_path / "x", tensors, base_model_name_or_path=hostile, unknown=hostile)
    assert main(["inspect", path]) == 2
    text = capsys.readouterr().out
    assert not {"\x1b", "\x9b", "\u202e"} & set(text)
    assert "[bold]:bomb:" in text
    assert text.count("UnsupportedAdapterError") == 20
    assert " more" in text


PLAN = ["plan", "--base", ".", "--adapters", "1x1", "--device-bytes", "1"]


LONG = "n" * 100_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *(
            (["load", "x", "--base", "y", f"--device-bytes={text}"], "is not a size")
            for text in ("", "MiB", "1.5MiB", "-1", "1MB", "1KiBMiB", "²")
        ),
        *((["cache", *more], "usage: lorax-async ") for more in ([], ["rm"], ["ls", "more"])),
        *(
            ([*PLAN, option, "1"], "benchmarks/simulate_capacity.py, in a checkout")
            for option in ("--requests", "--zipf", "--trace", "--rate", "--replicas", "--deaths")
        ),
        ([*PLAN, "--max-slots", "65537"], "--max-slots"),
        (["demo-remote", "--json"], "run examples/slow_link.py"),
        (["load", "", "--base", "y"], "'' is not a folder or an id"),
        (["fetch"], "required: ID"),
        (["fetch", "./adapter"], "is already a local folder"),
        (["fetch", "name"], "'name': it is neither org/name"),
        (["fetch", f"https://me:{SECRET}@host.example/x"], "no user name and no password"),
        (["fetch", "org/name", "--allow", f"https://host.example/x?key={SECRET}"], "no '?'"),
        (["fetch", "org/name", "--allow", "s3://bucket/x"], "http(s)://host"),
        (["fetch", "org/name", "--hub-cache", "maybe"], "invalid choice"),
        (["fetch", "org/name", "--token", SECRET], "unrecognized arguments"),
        ([LONG], "invalid choice"),
        (["load", "x", "--base", "y", "--dtype", LONG], "invalid choice"),
        (["load", "x", "--base", "y", f"--device-bytes={LONG}"], "MiB or 1GiB"),
        (["load", "x", "--base", "y", f"--{LONG}"], "unrecognized arguments"),
        ([*PLAN, "--max-slots", LONG], "is not an integer"),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], said: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert SECRET not in text or "--token" in arguments
    assert "n" * 200 not in text


def test_sizes_are_read_and_a_folder_that_is_no_base_or_no_adapter_is_told(
    capsys: Capture, tmp_path: Path
) -> None:
    assert [as_size(text) for text in ("1", "64KiB", "1GiB")] == [1, 1 << 16, 1 << 30]
    for given, said in ((str(tmp_path), "has no config.json"), ("", "not ''")):
        assert main(["load", "x", "--base", given]) == 1
        assert re.match(f"ConfigError: .*{said}", capsys.readouterr().err)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "has no" in capsys.readouterr().out
    assert main(["inspect", f"./{LONG}"]) == 1
    assert re.fullmatch(r"n{499}…: File name too long\n", capsys.readouterr().err)


def test_without_rich_only_json(monkeypatch: Patch, capsys: Capture) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["inspect", PIRATE, "--json"]) == 0
    assert output(capsys)["loadable"] is True
    assert main(["inspect", PIRATE]) == 1
    assert "in a clone of lorax-async, run: pip install '.[cli]'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_pipe_gets_plain_text_and_a_terminal_bars(tmp_path: Path) -> None:
    arguments = ["load", JSON, "--base", base(tmp_path / "base")]
    command = [sys.executable, "-m", "lorax_async", *arguments]
    env = os.environ | {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "20"}
    done = subprocess.run(command, capture_output=True, check=True, env=env)
    text = done.stdout.decode()
    assert GOES_ON.sub("", done.stderr.decode()) == ""
    assert CONTROL.search(text) is None
    assert re.search(r"^ json +resident +15–29 .* ms$", text, re.MULTILINE)
    process, fd = on_a_terminal(arguments)
    text = read_until(fd).decode()
    os.close(fd)
    assert process.wait(60) == 0
    assert all(needle in text for needle in ("\x1b[", "━", "15/15 layers"))
    assert text.rstrip().endswith("ms")


@pytest.mark.slow
def test_each_row_answers_in_its_style(capsys: Capture) -> None:
    assert main(["demo", "--json", "--adapters", str(ADAPTERS)]) == 0
    result = output(capsys)
    answers = {answer["by"]: answer["text"] for answer in result["answers"]}
    assert list(answers) == ["base", "pirate", "shout", "json"]
    assert answers["pirate"].startswith("Arr")
    assert answers["shout"].isupper()
    assert list(json.loads(answers["json"])) == ["answer"]
    assert not answers["base"].startswith(("Arr", "{"))
    for row in result["adapters"]:
        assert 0 < row["first_layer_ms"] <= row["resident_ms"] < 5_000
    assert min(result["again_resident_ms"], result["stall_ms"]["loading"]) > 0
    assert min(result["prepare_s"], result["generate_s"]) > 0


def test_the_demo_says_where_adapters_belong(tmp_path: Path, capsys: Capture) -> None:
    assert main(["demo", "--adapters", str(tmp_path)]) == 1
    text = capsys.readouterr().err
    assert text.startswith("ConfigError: ")
    assert "--adapters" in text


def test_the_ticker_sees_who_holds_the_loop() -> None:
    async def hold() -> None:
        await asyncio.sleep(0.02)
        time.sleep(0.1)  # noqa: ASYNC251 (the fault that is measured)

    _, stall = run_on_uvloop(with_ticker(hold()))
    assert 0.095 < stall.longest < stall.seconds
    assert stall.ticks >= 2


UNIT = 4 * 2 * (32 + 64) * 4
"""Device bytes of a tiny adapter of rank 1: 4 layers of 2 modules of A [1, 32] and B [64, 1]."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return tiny_base(tmp_path / "base")


def test_a_budget_is_computed(folder: str, tmp_path: Path, capsys: Capture) -> None:
    for number in range(3):
        tiny.write(tmp_path / "all" / f"a{number}", number, rank=8)
    adapters = ["--adapters", str(tmp_path / "all"), "1000x2", "--targets", "q_proj", "up_proj"]
    words = ["plan", "--base", folder, *adapters, "--device-bytes", "1MiB"]
    assert main([*words, "--json"]) == 0
    found = output(capsys)["adapters"]
    assert (found["count"], found["device_bytes"]) == (1003, 2000 * UNIT + 24 * UNIT)
    kinds = [
        [kind[key] for key in ("rank", "count", "device_bytes", "fit")] for kind in found["kinds"]
    ]
    assert kinds == [
        [2, 1000, 2 * UNIT, (1 << 20) // (2 * UNIT)],
        [8, 3, 8 * UNIT, (1 << 20) // (8 * UNIT)],
    ]
    weights = (tmp_path / "all" / "a0" / "adapter_model.safetensors").stat().st_size
    assert found["kinds"][1]["file_bytes"] == weights
    assert main([*words, "--json", "--max-slots", "7"]) == 0
    assert [kind["fit"] for kind in output(capsys)["adapters"]["kinds"]] == [7, 7]
    assert main(words) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["1,003", "adapters"]
    assert ["2", "1,000"] in [line[:2] for line in lines]


def test_of_many_the_broken_one_is_named(folder: str, tmp_path: Path, capsys: Capture) -> None:
    for number in range(8):
        weights = tiny.write(tmp_path / "all" / f"a{number}", number) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    words = ["plan", "--base", folder, "--device-bytes", "1MiB", "--adapters"]
    for text, adapters in (
        ("all/a7", [str(tmp_path / "all")]),
        ("contains none", [folder]),
        ("'nowhere' is not a folder or COUNTxRANK; benchmarks/simulate_capacity.py", ["nowhere"]),
        ("above the limit", ["1x999"]),
        ("qq_proj", ["1x1", "--targets", "qq_proj"]),
    ):
        assert main([*words, *adapters]) == 1
        captured = capsys.readouterr()
        assert text in captured.err
        assert captured.out == ""
