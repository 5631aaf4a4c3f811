"""`benchmarks/simulate_capacity.py`: what it reads, and that a loader does what it says."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny
from command_line import output, tiny_base

from lorax_async import AdapterLoader, Event, SlotGranted, layouts
from lorax_async.config import Eviction, LoaderConfig
from lorax_async.lifecycle.policies import EVICTION_POLICIES
from simulate_capacity import main

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

ONE = ("--adapters", "1x1")
UNIT = 4 * 2 * (32 + 64) * 4
"""Device bytes of a tiny adapter of rank 1: 4 layers of 2 modules of A [1, 32] and B [64, 1]."""


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return tiny_base(tmp_path / "base")


def simulated(capsys: Capture, folder: str, *arguments: object) -> Any:
    assert main(["--base", folder, *map(str, arguments), "--json"]) == 0
    return output(capsys)


def refused(capsys: Capture, folder: str, *arguments: object) -> str:
    words = ["--base", folder, "--device-bytes", "1MiB", *map(str, arguments), "--json"]
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return err


def many(base: Path) -> list[Path]:
    return [tiny.write(base / "all" / f"a{n:02}", n, 1 << n % 4) for n in range(24)]


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@pytest.mark.parametrize("room", [(20 * UNIT + 100, 16), (1 << 20, 5)], ids=["bytes", "slots"])
async def test_the_loader_does_what_was_simulated(
    tmp_path: Path, capsys: Capture, folder: str, name: Eviction, room: tuple[int, int]
) -> None:
    device_bytes, slots = room
    adapters = many(tmp_path)
    weights = [1 / (n + 1) for n in range(len(adapters))]
    asked = random.Random(7).choices(adapters, weights, k=300)
    trace = tmp_path / "trace"
    trace.write_text("".join(f"{each.name}\n" for each in asked))
    options = ("--device-bytes", device_bytes, "--max-slots", slots)
    told = simulated(capsys, folder, "--adapters", tmp_path / "all", "--trace", trace, *options)
    (planned,) = (each for each in told["policies"] if each["policy"] == name)
    config = LoaderConfig(device_bytes=device_bytes, max_slots=slots, io_threads=2, eviction=name)
    heard: list[Event] = []
    async with AdapterLoader(layouts.from_pretrained(folder), config) as loader:
        loader.subscribe(heard.append)
        for each in asked:
            (await loader.load(each)).release()
        statistics = loader.statistics()
    granted = [event.key.location for event in heard if isinstance(event, SlotGranted)]
    hits = len(asked) - len(granted)
    assert 60 < hits < 240
    assert planned["hits"] == hits
    assert planned["loads"] == statistics.loads == len(granted)
    assert planned["first_loads"] == len(set(granted)) == told["distinct"]
    assert planned["evictions"] == statistics.departures
    assert planned["device_bytes"] == statistics.bytes_moved
    sizes = {str(each): (each / "adapter_model.safetensors").stat().st_size for each in adapters}
    assert planned["file_bytes"] == sum(sizes[where] for where in granted)


def test_lists_are_read(folder: str, tmp_path: Path, capsys: Capture) -> None:
    tiny.write(tmp_path / "all" / "a", rank=8)
    lines = ("name,rank,bytes,count,path", "one,2,,,", "many,,1000,3,", ",,,,all/a", "")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    rows: list[object] = [{"name": "one", "rank": 2}, {"name": "many", "bytes": 1000, "count": 3}]
    (tmp_path / "list.json").write_text(json.dumps([*rows, {"path": "all/a"}]))
    options = ("--device-bytes", "1MiB", "--targets", "q_proj", "up_proj", "--adapters")
    found = simulated(capsys, folder, *options, tmp_path / "list.json")
    assert found == simulated(capsys, folder, *options, tmp_path / "list.csv")
    told = found["adapters"]
    # 1000 bytes in 4 layers are 250 each, which take 256 on the device.
    assert (told["count"], told["device_bytes"]) == (5, 2 * UNIT + 3 * 4 * 256 + 8 * UNIT)
    assert [(kind["rank"], kind["count"]) for kind in told["kinds"]] == [(None, 3), (2, 1), (8, 1)]
    sizes = (4 * 256, 2 * UNIT, 8 * UNIT)
    assert [kind["fit"] for kind in told["kinds"]] == [(1 << 20) // size for size in sizes]


def test_a_person_reads_a_table(folder: str, capsys: Capture) -> None:
    arguments = ["--adapters", "4x8", "1x64", "--device-bytes", "300KiB", "--requests", "100"]
    assert main(["--base", folder, *arguments, "--rate", "10"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["5", "adapters"]
    assert [line[0] for line in lines if line[1:2] == ["100"]] == ["lru", "lfu", "gdsf"]
    assert lines[-1][1:4] == ["requests", "were", "refused:"]


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        *(
            (text, content, ("--adapters", "list"))
            for text, *contents in (
                ("exactly one of rank, bytes and path", '[{"name": "a"}]'),
                ("an adapter has a name and", '[{"rank": 1}]'),
                ("rank is an integer", '[{"name": "a", "rank": -1}]'),
                ("above the limit", '[{"name": "a", "rank": 999}]'),
                ("bytes is an integer", '[{"name": "a", "bytes": 0}]'),
                ("bytes is an integer", '[{"name": "a", "bytes": "' + "9" * 5000 + '"}]'),
                ("AdapterNotFoundError", '[{"name": "a", "path": "nowhere"}]'),
                ("InvalidAdapterIdError", '[{"name": "a", "path": "a\\u0000"}]'),
                ("must list objects", '["a"]'),
                ("lists no adapter", "[]", "name,rank\n"),
                ("is not JSON or CSV", "[" * 100_000, "a\n\udcff\n", f"a,b\na,{'1' * 200_000}"),
            )
            for content in contents
        ),
        ("COUNTxRANK", "", ("--adapters", "nowhere")),
        ("contains none", "", ("--adapters", ".")),
        ("at most", "", ("--adapters", "99999999x1")),
        ("Zipf's law", "", ("--adapters", "0x1")),
        ("Zipf's law", "", (*ONE, "--zipf", "-1")),
        ("--rate", "", (*ONE, "--rate", "0")),
        ("qq_proj", "", (*ONE, "--targets", "qq_proj")),
        ("'other', which is not in --adapters", "r1\nother\n", (*ONE, "--trace", "list")),
        ("two adapters are named 'r1'", "r1\n", (*ONE, "1x1", "--trace", "list")),
        ("absent", "", (*ONE, "--trace", "absent")),
        ("is not UTF-8 text", "r8\nr8\udcff\n", ("--adapters", "1x8", "--trace", "list")),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_simulated_is_said(
    folder: str, monkeypatch: Patch, capsys: Capture, text: str, content: str, arguments: Any
) -> None:
    monkeypatch.chdir(folder)
    Path("list").write_bytes(content.encode(errors="surrogateescape"))
    assert text in refused(capsys, folder, *arguments)
