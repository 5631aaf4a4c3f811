"""`lorax-async plan`: against the real loader on the same trace, and what it says of its adapters."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from command_line import ADAPTERS, base
from lorax_async import AdapterLoader, LoaderConfig, SlotGranted, layouts
from lorax_async.cli import main
from lorax_async.config import Eviction
from lorax_async.core.policies import EVICTION_POLICIES
from planned import TINY, Capture, adapters, plan

__all__ = ["adapters"]

UNIT = 4 * 2 * (32 + 64) * 4
"""Device bytes of a tiny adapter of rank 1: 4 layers of 2 modules of A [1, 32] and B [64, 1]."""


# -- against the loader ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVICTION_POLICIES)
@pytest.mark.parametrize(
    ("device_bytes", "slots"), [(20 * UNIT + 100, 16), (1 << 20, 5)], ids=["bytes", "slots"]
)
async def test_the_loader_does_what_was_planned(
    tmp_path: Path,
    capsys: Capture,
    adapters: list[Path],
    name: Eviction,
    device_bytes: int,
    slots: int,
) -> None:
    weights = [1 / (n + 1) for n in range(len(adapters))]
    asked = random.Random(7).choices(adapters, weights, k=300)
    folder, trace = base(tmp_path / "base", **TINY), tmp_path / "trace"
    trace.write_text("".join(f"{each.name}\n" for each in asked))
    room = ("--device-bytes", device_bytes, "--max-slots", slots)
    told = plan(capsys, "--base", folder, "--adapters", tmp_path / "all", "--trace", trace, *room)
    (planned,) = (each for each in told["policies"] if each["policy"] == name)
    config = LoaderConfig(device_bytes=device_bytes, max_slots=slots, io_threads=2, eviction=name)
    granted: list[str] = []

    async def body() -> Any:
        async with AdapterLoader(layouts.from_pretrained(folder), config) as loader:
            loader.subscribe(
                lambda event: (
                    granted.append(event.key.location) if isinstance(event, SlotGranted) else None
                )
            )
            hits = 0
            for each in asked:
                before = len(granted)
                (await loader.load(each)).release()
                hits += len(granted) == before
            return hits, loader.statistics()

    hits, statistics = await body()
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
    folder = base(tmp_path / "base")
    common = ("--base", folder, "--device-bytes", "1GiB", "--requests", "10")
    real = plan(capsys, *common, "--adapters", ADAPTERS / "pirate")["adapters"]
    targets = ("q_proj", "v_proj")
    made = plan(capsys, *common, "--adapters", "1x8", "--targets", *targets)["adapters"]
    expected = 30 * 8 * (576 + 576 + 576 + 192) * 2
    assert real["device_bytes"] == made["device_bytes"] == expected
    assert made["kinds"][0]["rank"] == 8
    assert made["kinds"][0]["fit"] == (1 << 30) // expected


@pytest.mark.parametrize(("device", "padded"), [("cpu", 3), ("cuda", 8)])
def test_ranks_are_padded_as_the_device_wants(
    tmp_path: Path, capsys: Capture, device: str, padded: int
) -> None:
    folder = base(tmp_path / "base", **TINY)
    arguments = ("--adapters", "2x3", "--targets", "q_proj", "up_proj", "--device", device)
    told = plan(capsys, "--base", folder, *arguments, "--device-bytes", "1MiB", "--requests", "9")
    assert told["adapters"]["count"] == 2
    assert told["adapters"]["device_bytes"] == 2 * padded * UNIT
    weights = 3 * UNIT
    assert weights < told["adapters"]["kinds"][0]["file_bytes"] < weights + 4096


def test_files_may_have_another_dtype(tmp_path: Path, capsys: Capture) -> None:
    folder = base(tmp_path / "base", **TINY)
    arguments = ("--adapters", "1x4", "--targets", "q_proj", "up_proj", "--dtype", "bfloat16")
    told = plan(
        capsys, "--base", folder, *arguments, "--file-dtype", "float32", "--device-bytes", "1MiB"
    )
    assert told["dtype"] == "BF16"
    assert told["adapters"]["device_bytes"] == 4 * UNIT // 2
    assert told["adapters"]["file_bytes"] > 4 * UNIT


def test_lists_are_read(tmp_path: Path, capsys: Capture, adapters: list[Path]) -> None:
    folder = base(tmp_path / "base", **TINY)
    rows: list[object] = [
        {"name": "one", "rank": 2},
        {"name": "many", "bytes": 1000, "count": 3},
        {"path": f"all/{adapters[3].name}"},
    ]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "list.csv").write_text(
        f"name,rank,bytes,count,path\none,2,,,\nmany,,1000,3,\n,,,,all/{adapters[3].name}\n"
    )
    found = [
        plan(
            capsys,
            *("--base", folder, "--adapters", tmp_path / name, "--device-bytes", "1MiB"),
            *("--targets", "q_proj", "up_proj"),
        )
        for name in ("list.json", "list.csv")
    ]
    assert found[0] == found[1]
    told = found[0]["adapters"]
    assert told["count"] == 5
    # 1000 bytes in 4 layers are 250 each, which take 256 on the device.
    assert told["device_bytes"] == 2 * UNIT + 3 * 4 * 256 + 8 * UNIT
    assert [(kind["rank"], kind["count"]) for kind in told["kinds"]] == [(None, 3), (2, 1), (8, 1)]
    assert told["kinds"][0]["file_bytes"] == 1000


def test_names_of_a_trace_are_those_of_the_adapters(tmp_path: Path, capsys: Capture) -> None:
    folder, trace = base(tmp_path / "base", **TINY), tmp_path / "trace"
    trace.write_text("r4/1\n\nr4/0\nr4/1\nr4/2\n")
    common = ("--base", folder, "--adapters", "3x4", "--device-bytes", "1MiB", "--trace", trace)
    told = plan(capsys, *common, "--max-slots", 1, "--rate", "2")
    first = told["policies"][0]
    assert (told["distinct"], first["requests"], first["hits"], first["evictions"]) == (3, 4, 0, 3)
    assert first["loads_per_second"] == 2
    assert first["bytes_per_second"] == 2 * told["adapters"]["kinds"][0]["device_bytes"]
    cut = plan(capsys, *common, "--requests", 3)["policies"][0]
    assert (cut["requests"], cut["hits"], cut["loads"]) == (3, 1, 2)


def test_the_same_seed_draws_the_same(tmp_path: Path, capsys: Capture) -> None:
    folder = base(tmp_path / "base", **TINY)
    common = ("--base", folder, "--adapters", "50x1", "50x8", "--device-bytes", "512KiB")
    one, same, other = (plan(capsys, *common, "--requests", 500, "--seed", n) for n in (1, 1, 2))
    assert one == same
    assert one["policies"] != other["policies"]
    flat = plan(capsys, *common, "--requests", 500, "--zipf", "0", "--seed", 1)
    assert flat["policies"][0]["hits"] < one["policies"][0]["hits"]


def test_it_is_shown(tmp_path: Path, capsys: Capture) -> None:
    folder = base(tmp_path / "base", **TINY)
    arguments = ["--adapters", "4x8", "1x64", "--device-bytes", "300KiB", "--requests", "100"]
    assert main(["plan", "--base", folder, *arguments, "--rate", "10"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:2] == ["5", "adapters"]
    assert [line[0] for line in lines if line[1:2] == ["100"]] == ["lru", "lfu", "gdsf"]
    assert lines[-1][1:4] == ["requests", "were", "refused:"]


# -- faults ---------------------------------------------------------------------------------------
