"""Loaders in processes: killed at each checkpoint, at the same adapter at once, or with few means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fault_processes import CHECKPOINTS, CONNECTIONS, LARGE
from fault_server import Asked, Client, Hangup
from fault_world import CHUNK, FaultyWorld, assert_true_cache, is_weights, part_of

from lorax_async.io.remote.beginning import FIRST_BYTES
from tools import on_a_small_disk

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.slow]

HERE = Path(__file__).parent

TESTS = HERE.parent.parent

PATHS = [HERE, HERE.parent / "http", HERE.parent, TESTS, TESTS.parent, TESTS.parent / "kernels"]


def run_script(*words: object, disk: Path | None = None) -> Any:
    """What it tells; with a `disk`, one of 2 MiB that is there for it alone."""
    apart = [] if disk is None else on_a_small_disk(disk)
    done = subprocess.run(
        [*apart, sys.executable, HERE / "fault_processes.py", *map(str, words)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(done.stdout)


def asked_by(world: FaultyWorld, who: str, name: str) -> list[tuple[int, int]]:
    """The spans of weights, as far as there is something of them, that a process asked for."""
    nbytes = len(world.locator.there[name].weights)
    return [
        (asked.span[0], min(asked.span[1], nbytes))
        for asked in world.asked_of(name)
        if asked.fields["user-agent"] == who and is_weights(asked) and asked.span
    ]


def nbytes_in(spans: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in spans)


def test_killed_at_any_checkpoint_the_next_process_goes_on(tmp_path: Path) -> None:
    with FaultyWorld(tmp_path / "unused", tmp_path / "adapters") as world:
        for seed, name in enumerate(CHECKPOINTS):
            world.stock(name, seed, **LARGE)
        place = tmp_path / "caches"
        place.mkdir()
        outcomes = run_script("kills", place, world.adapters, world.server.port)
        assert [outcome["name"] for outcome in outcomes] == list(CHECKPOINTS)
        for outcome in outcomes:
            name, here = outcome["name"], outcome["here"]
            assert (outcome["code"], outcome["told"]) == (0, ["loaded"]), outcome
            assert_true_cache(place / name, world.versions)
            assert len(list((place / name / "entries").iterdir())) == 1
            assert not list((place / name / "partials").iterdir())
            again = nbytes_in(asked_by(world, "second", name))
            nbytes = len(world.locator.there[name].weights)
            missing = 0 if here < 0 else nbytes - here
            assert again <= missing + CONNECTIONS * CHUNK, (name, again, missing)
        here_at = {outcome["name"]: outcome["here"] for outcome in outcomes}
        assert here_at["open"] == here_at["first-write"] == 0, "a chunk counts once it is whole"
        assert 0 < here_at["mid-write"] < nbytes
        assert here_at["before-fsync"] == nbytes == here_at["before-rename"]
        assert here_at["after-rename"] == -1, "it was published"
        assert not asked_by(world, "second", "after-rename")


def later(world: FaultyWorld, asked: Asked, client: Client) -> None:
    """So that the other process comes while this one downloads."""
    if part_of(asked) == "body":
        time.sleep(0.3)
    world.well(asked, client)


@pytest.mark.parametrize("locks", [True, False])
def test_two_processes_want_the_same(tmp_path: Path, locks: bool) -> None:
    with FaultyWorld(tmp_path / "unused", tmp_path / "adapters") as world:
        world.stock("wanted", **LARGE)
        world.faults["wanted"] = later
        what = "together" if locks else "together without locks"
        cache = tmp_path / "cache"
        outcomes = run_script(what, cache, world.adapters, world.server.port)
        assert outcomes == [[0, ["loaded"]], [0, ["loaded"]]]
        assert_true_cache(cache, world.versions)
        assert len(list((cache / "entries").iterdir())) == 1
        assert not list((cache / "partials").iterdir())
        if locks:
            spans = [asked_by(world, who, "wanted") for who in ("one", "two")]
            nbytes = len(world.locator.there["wanted"].weights)
            # Each byte once, for one of them; but for what came slowly behind the header.
            none, all_of_it = sorted(map(nbytes_in, spans))
            assert none == 0
            assert nbytes <= all_of_it <= nbytes + FIRST_BYTES


# -- what this machine does not give --------------------------------------------------------------

RIGHT = {"kind": "right"}
FULL = {"kind": "CapacityError", "stage": "fetch", "retryable": True}


def is_full(told: dict[str, Any], words: str) -> bool:
    return FULL.items() <= told.items() and words in told["text"]


def and_hangs_up(world: FaultyWorld, asked: Asked, client: Client) -> None:
    """So that each load needs connections of its own."""
    world.well(asked, client)
    raise Hangup


def told_of(tmp_path: Path, what: str, cache: Path, disk: Path | None = None) -> list[Any]:
    """What came of the loads of a process with that limit."""
    with FaultyWorld(tmp_path / "unused", tmp_path / "adapters") as world:
        world.stock("large", **LARGE)
        world.stock("small", 1, layers=16, rank=32)
        for n in range(0, 24, 2):
            world.stock(f"n{n}", n, layers=16, rank=32)
            world.faults[f"n{n}"] = and_hangs_up
        told: list[Any] = run_script(what, cache, world.adapters, world.server.port, disk=disk)
        return told


def test_descriptors_run_out(tmp_path: Path) -> None:
    first, *each, then = told_of(tmp_path, "descriptors", tmp_path / "cache")
    assert first == then == RIGHT
    failed = [told for told in each if told != RIGHT]
    assert each[0] in failed
    assert each[-1] == RIGHT
    for told in failed:
        assert told["kind"] == "FetchError", told
        assert told["retryable"], told
        assert "EMFILE" in told["text"], told
    assert {told["stage"] for told in failed} <= {"resolve", "fetch", "copy"}


@pytest.mark.needs("unshare")
def test_the_disk_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    large, small, kept, new, then = told_of(tmp_path, "small disk", disk / "cache", disk)
    assert is_full(large, "ENOSPC"), large
    assert is_full(new, "ENOSPC"), new
    assert small == kept == then == RIGHT
