"""Files that change under a load, and processes that are killed in the midst of one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
from lorax_async import AdapterFormatError, IntegrityError
from lorax_async.io.sources.checked_open import FileReader
from lorax_async.io.sources.local_hold import LocalHold
from sweeping_tiers import DEVICE_VERBS, RANK, Kind, TierBench, local_tiers
from tiny_sources import WEIGHTS

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]


def truncate(weights: Path) -> None:
    os.truncate(weights, weights.stat().st_size // 2)


def touch(weights: Path) -> None:
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")


def replace(weights: Path) -> None:
    """A new file under the old name leaves the open one whole: its ctime tells."""
    fresh = tiny.write(weights.parent.with_name("fresh"), 9, RANK)
    os.replace(fresh / WEIGHTS, weights)


each_damage = pytest.mark.parametrize("damage", [truncate, touch, replace])


async def assert_recovers(bench: TierBench) -> None:
    await bench.settle()
    bench.renew()
    await bench.assert_works()
    await bench.assert_clean()


@each_damage
@pytest.mark.parametrize("kind", ["cpu", "simulated"])
@pytest.mark.parametrize("verb", DEVICE_VERBS)
async def test_a_file_changes_under_the_copies(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    kind: Kind,
    damage: Callable[[Path], None],
) -> None:
    """Between any two reads of the weights, with copies of what was read before on their way.

    What was saved anew is loaded once more, unless a caller has a handle; what was cut short is no
    adapter any more.
    """
    original = FileReader.read_into

    async def one(number: int) -> bool:
        reads = 0

        def read(reader: FileReader, buffers: list[memoryview], offset: int) -> None:
            nonlocal reads
            reads += bool(buffers)
            if reads == number and buffers:
                damage(tmp_path / "a" / WEIGHTS)
            original(reader, buffers, offset)

        async with local_tiers(tmp_path, kind, io_threads=1) as bench:
            await bench.disk()
            with monkeypatch.context() as patch:
                patch.setattr(FileReader, "read_into", read)
                refused = False
                try:
                    await bench.do(verb)
                except (IntegrityError, AdapterFormatError):
                    refused = True
            damaged = reads >= number
            assert refused == (damaged and (damage is truncate or verb == "stream"))
            await assert_recovers(bench)
        return damaged

    number = 1
    while await one(number):
        number += 5
    assert number > tiny.LAYERS


@each_damage
async def test_a_file_changes_while_it_is_populated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    original = LocalHold.populate

    def populate(hold: LocalHold, start: int) -> None:
        damage(tmp_path / "a" / WEIGHTS)
        original(hold, start)

    async with local_tiers(tmp_path) as bench:
        with monkeypatch.context() as patch:
            patch.setattr(LocalHold, "populate", populate)
            with pytest.raises((IntegrityError, AdapterFormatError)):
                await bench.host()  # it changes again while it is loaded once more
        await bench.assert_clean()
        await assert_recovers(bench)


@each_damage
async def test_a_file_changes_while_it_is_held(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """The map is not touched by anybody, so that a file that was cut kills nobody."""
    async with local_tiers(tmp_path) as bench:
        await bench.host()
        key = next(iter(bench.loader.residency()))
        damage(tmp_path / "a" / WEIGHTS)
        with pytest.raises(IntegrityError):
            await bench.loader.load(key)
        await bench.assert_clean()
        await assert_recovers(bench)


CHILD = """
import asyncio, sys
from pathlib import Path
from sweeping_tiers import local_tiers

async def main(base: Path, at: str) -> None:
    async with local_tiers(base) as bench:
        if at != "copying":
            await bench.host()
        if at == "resident":
            await bench.pin()
        if at == "copying":
            bench.device.gate.clear()
            asyncio.create_task(bench.load())
            while not bench.device.copies:
                await asyncio.sleep(0.001)
        print("here", flush=True)
        await asyncio.sleep(60)

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("at", ["copying", "held", "resident"])
def test_a_process_that_is_killed_leaves_whole_files(tmp_path: Path, at: str) -> None:
    path = os.pathsep.join(sys.path)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path, at],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": path},
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"here\n"
        before = {each.name for each in tmp_path.rglob("*")}
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert {each.name for each in tmp_path.rglob("*")} == before

    async def body() -> None:
        async with local_tiers(tmp_path) as bench:
            await bench.assert_works()
            await bench.assert_clean()

    asyncio.run(body())
