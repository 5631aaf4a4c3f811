"""`lorax-async plan`: against the real loader on the same trace, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import tiny
from command_line import ADAPTERS, base, output
from lorax_async import AdapterLoader, LoaderConfig, SlotGranted, layouts
from lorax_async.cli import main
from lorax_async.config import Eviction
from lorax_async.core.policies import EVICTION_POLICIES

Capture = pytest.CaptureFixture[str]
RANKS = (1, 2, 4, 8)
UNIT = 4 * 2 * (32 + 64) * 4
"""Device bytes of a tiny adapter of rank 1: 4 layers of 2 modules of A [1, 32] and B [64, 1]."""

TINY: dict[str, Any] = {  # as `tiny.layout` has q_proj and up_proj: 32 to 64
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "dtype": "float32",
}


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A base whose layers have the tiny adapters' shapes."""
    return base(tmp_path / "base", **TINY)


def plan(capsys: Capture, folder: str, *arguments: object) -> Any:
    assert main(["plan", "--base", folder, *map(str, arguments), "--json"]) == 0
    return output(capsys)


def refused(capsys: Capture, folder: str, *arguments: object) -> str:
    words = ["plan", "--base", folder, "--device-bytes", "1MiB", *map(str, arguments), "--json"]
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def many(base: Path) -> list[Path]:
    return [
        tiny.write(base / "all" / f"a{n:02}", seed=n, rank=RANKS[n % len(RANKS)]) for n in range(24)
    ]


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@pytest.mark.parametrize(
    ("device_bytes", "slots"), [(20 * UNIT + 100, 16), (1 << 20, 5)], ids=["bytes", "slots"]
)
async def test_the_loader_does_what_was_planned(
    tmp_path: Path,
    capsys: Capture,
    folder: str,
    name: Eviction,
    device_bytes: int,
    slots: int,
) -> None:
    adapters = many(tmp_path)
    weights = [1 / (n + 1) for n in range(len(adapters))]
    asked = random.Random(7).choices(adapters, weights, k=300)
    trace = tmp_path / "trace"
    trace.write_text("".join(f"{each.name}\n" for each in asked))
    room = ("--device-bytes", device_bytes, "--max-slots", slots)
    told = plan(capsys, folder, "--adapters", tmp_path / "all", "--trace", trace, *room)
    (planned,) = (each for each in told["policies"] if each["policy"] == name)
    config = LoaderConfig(device_bytes=device_bytes, max_slots=slots, io_threads=2, eviction=name)
    granted: list[str] = []

    def hear(event: object) -> None:
        if isinstance(event, SlotGranted):
            granted.append(event.key.location)

    async with AdapterLoader(layouts.from_pretrained(folder), config) as loader:
        loader.subscribe(hear)
        hits = 0
        for each in asked:
            before = len(granted)
            (await loader.load(each)).release()
            hits += len(granted) == before
        statistics = loader.statistics()
    assert 60 < hits < 240
    assert planned["hits"] == hits
    assert planned["loads"] == statistics.loads == len(granted)
    assert planned["first_loads"] == len(set(granted)) == told["distinct"]
    assert planned["evictions"] == statistics.departures
    assert planned["device_bytes"] == statistics.bytes_moved
    sizes = {str(each): (each / "adapter_model.safetensors").stat().st_size for each in adapters}
    assert planned["file_bytes"] == sum(sizes[where] for where in granted)


# -- what adapters need ---------------------------------------------------------------------------


def test_an_adapter_of_a_rank_needs_what_one_on_the_disk_does(
    tmp_path: Path, capsys: Capture
) -> None:
    """pirate is of rank 8, on q_proj (576 to 576) and v_proj (576 to 192) of 30 layers."""
    common = (base(tmp_path / "base"), "--device-bytes", "1GiB", "--requests", "10")
    real = plan(capsys, *common, "--adapters", ADAPTERS / "pirate")["adapters"]
    targets = ("q_proj", "v_proj")
    made = plan(capsys, *common, "--adapters", "1x8", "--targets", *targets)["adapters"]
    expected = 30 * 8 * (576 + 576 + 576 + 192) * 2
    assert real["device_bytes"] == made["device_bytes"] == expected
    assert made["kinds"][0]["rank"] == 8
    assert made["kinds"][0]["fit"] == (1 << 30) // expected


@pytest.mark.parametrize(
    ("options", "on_device"),
    [
        ("--device cpu", 3 * UNIT),
        ("--device cuda", 8 * UNIT),  # which pads ranks
        ("--dtype bfloat16 --file-dtype float32", 3 * UNIT // 2),
    ],
)
def test_bytes_are_those_of_rank_dtype_and_device(
    folder: str, capsys: Capture, options: str, on_device: int
) -> None:
    arguments = ("--adapters", "2x3", "--targets", "q_proj", "up_proj", *options.split())
    told = plan(capsys, folder, *arguments, "--device-bytes", "1MiB", "--requests", "9")
    assert told["dtype"] == ("BF16" if "bfloat16" in options else "F32")
    assert told["adapters"]["count"] == 2
    assert told["adapters"]["device_bytes"] == 2 * on_device
    assert 3 * UNIT < told["adapters"]["kinds"][0]["file_bytes"] < 3 * UNIT + 4096


def test_lists_are_read(folder: str, tmp_path: Path, capsys: Capture) -> None:
    tiny.write(tmp_path / "all" / "a", rank=8)
    rows: list[object] = [
        {"name": "one", "rank": 2},
        {"name": "many", "bytes": 1000, "count": 3},
        {"path": "all/a"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    lines = ("name,rank,bytes,count,path", "one,2,,,", "many,,1000,3,", ",,,,all/a", "")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    options = ("--device-bytes", "1MiB", "--targets", "q_proj", "up_proj")
    found = [
        plan(capsys, folder, "--adapters", tmp_path / name, *options)
        for name in ("list.json", "list.csv")
    ]
    assert found[0] == found[1]
    told = found[0]["adapters"]
    assert told["count"] == 5
    # 1000 bytes in 4 layers are 250 each, which take 256 on the device.
    assert told["device_bytes"] == 2 * UNIT + 3 * 4 * 256 + 8 * UNIT
    assert [(kind["rank"], kind["count"]) for kind in told["kinds"]] == [(None, 3), (2, 1), (8, 1)]
    assert told["kinds"][0]["file_bytes"] == 1000


def test_names_of_a_trace_are_those_of_the_adapters(
    folder: str, tmp_path: Path, capsys: Capture
) -> None:
    trace = tmp_path / "trace"
    trace.write_text("r4/1\n\nr4/0\nr4/1\nr4/2\n")
    common = (folder, "--adapters", "3x4", "--device-bytes", "1MiB", "--trace", trace)
    told = plan(capsys, *common, "--max-slots", 1, "--rate", "2")
    first = told["policies"][0]
    assert (told["distinct"], first["requests"], first["hits"], first["evictions"]) == (3, 4, 0, 3)
    assert first["loads_per_second"] == 2
    assert first["bytes_per_second"] == 2 * told["adapters"]["kinds"][0]["device_bytes"]
    cut = plan(capsys, *common, "--requests", 3)["policies"][0]
    assert (cut["requests"], cut["hits"], cut["loads"]) == (3, 1, 2)


def test_the_same_seed_draws_the_same(folder: str, capsys: Capture) -> None:
    common = (folder, "--adapters", "50x1", "50x8", "--device-bytes", "512KiB", "--requests", 500)
    one, same, other = (plan(capsys, *common, "--seed", n) for n in (1, 1, 2))
    assert one == same
    assert one["policies"] != other["policies"]
    flat = plan(capsys, *common, "--zipf", "0", "--seed", 1)
    assert flat["policies"][0]["hits"] < one["policies"][0]["hits"]


def test_a_person_reads_a_table(folder: str, capsys: Capture) -> None:
    arguments = ["--adapters", "4x8", "1x64", "--device-bytes", "300KiB", "--requests", "100"]
    assert main(["plan", "--base", folder, *arguments, "--rate", "10"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["5", "adapters"]
    assert [line[0] for line in lines if line[1:2] == ["100"]] == ["lru", "lfu", "gdsf"]
    assert lines[-1][1:4] == ["requests", "were", "refused:"]


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('[{"name": "a"}]', "one of rank, bytes and path"),
        ('[{"name": "a", "rank": 1, "bytes": 2}]', "one of rank, bytes and path"),
        ('[{"rank": 1}]', "an adapter has a name"),
        ('[{"name": "a", "rank": -1}]', "rank is a whole number"),
        ('[{"name": "a", "rank": true}]', "rank is a whole number"),
        ('[{"name": "a", "rank": 999}]', "above the limit"),
        ('[{"name": "a", "bytes": 0}]', "bytes is a whole number"),
        ('[{"name": "a", "bytes": "' + "9" * 5000 + '"}]', "bytes is a whole number"),
        ('[{"name": "a", "path": "nowhere"}]', "AdapterNotFoundError"),
        ('["a"]', "a list of objects"),
        ("[]", "lists no adapter"),
        ("", "lists no adapter"),
        ("name,rank\n", "lists no adapter"),
        ("[" * 100_000, "no JSON or CSV"),
        ("[{]", "no JSON or CSV"),
        ("name,rank\na,\udcff\n", "no JSON or CSV"),
        ("name,rank\na," + "1" * 200_000, "no JSON or CSV"),
    ],
    ids=lambda text: text[:40],
)
def test_a_list_that_is_none_is_refused(
    folder: str, tmp_path: Path, capsys: Capture, content: str, text: str
) -> None:
    (tmp_path / "list").write_bytes(content.encode(errors="surrogateescape"))
    assert text in refused(capsys, folder, "--adapters", tmp_path / "list")


def test_of_many_the_broken_one_is_named(folder: str, tmp_path: Path, capsys: Capture) -> None:
    weights = many(tmp_path)[5] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    assert "all/a05" in refused(capsys, folder, "--adapters", tmp_path / "all")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--adapters", "nowhere"), "not as 10000x16"),
        (("--adapters", "."), "holds none"),
        (("--adapters", "99999999x1"), "at most"),
        (("--adapters", "0x1"), "Zipf's law"),
        (("--adapters", "1x1", "--zipf", "-1"), "Zipf's law"),
        (("--adapters", "1x1", "--rate", "0"), "--rate"),
        (("--adapters", "1x1", "--targets", "qq_proj"), "qq_proj"),
        (("--adapters", "1x1", "--trace", "trace"), "'other', which --adapters has not"),
        (("--adapters", "1x1", "1x1", "--trace", "trace"), "two adapters are called 'r1'"),
        (("--adapters", "1x1", "--trace", "absent"), "absent"),
        (("--adapters", "1x8", "--trace", "binary"), "no text in UTF-8"),
    ],
)
def test_what_cannot_be_planned_is_said(
    folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    arguments: tuple[str, ...],
    text: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    Path("trace").write_text("r1\nother\n")
    Path("binary").write_bytes(b"r8\nr8\xff\n")
    assert text in refused(capsys, folder, *arguments)
