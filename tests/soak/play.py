"""One soak, from beginning to end."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from common import LOOPS
from contention.play import complaints
from soak.callers import AT_ONCE, Callers, expected
from soak.judging import Judge, SoakError, Tally
from soak.library import library
from soak.setting import FaultyProcess, Setting, faulty_process, setting
from soak.watch import Opened, Watch, require_nothing_left, require_right_on_disk

AFTERWARDS = 10
"""So many adapters are loaded when the source is good again."""


def play(
    folder: Path, tell: Callable[[str], None], *, device: str, loop: str, seconds: float, seed: int
) -> None:
    """Tells the seed first, and the numbers at the end, whatever comes of it.

    Raises `SoakError`, in a group, if anything was not right.
    """
    tell("")
    tell(f"soak on {device!r} and {loop}: {seconds:g} seconds, seed {seed}")
    tally = Tally()
    expected(seed)
    try:
        with faulty_process(seed) as process, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            soak = Soak(folder / "cache", process, tally, device, seed)
            runner.run(soak.run(seconds))
    finally:
        for line in tally.lines():
            tell(f"  {line}")


class Soak:
    def __init__(
        self, folder: Path, process: FaultyProcess, tally: Tally, device: str, seed: int
    ) -> None:
        self._folder = folder
        self._process = process
        self._tally = tally
        self._device = device
        self._seed = seed
        self._judge = Judge()

    async def run(self, seconds: float) -> None:
        before = Opened.now()
        there = library(self._seed)
        complained: list[str] = []
        heard = complaints(lambda _, problem: complained.append(problem))
        with heard, ThreadPoolExecutor(2, "soak") as threads:
            async with setting(there, self._process, self._folder, self._device) as found:
                found.loader.subscribe(self._judge.heard)
                callers = Callers(found, expected(self._seed), self._judge, self._tally, threads)
                watch = Watch(found, callers, self._judge, self._tally, before)
                await self._storm(callers, watch, monotonic() + seconds)
                await self._calm(found, callers)
                await watch.look()
            watch.require_flat()
            await asyncio.get_running_loop().shutdown_default_executor()
            require_nothing_left(found)
            self._tally.peak("entries at the end", require_right_on_disk(found))
        if complained:
            raise SoakError("it complained", complained)

    async def _storm(self, callers: Callers, watch: Watch, until: float) -> None:
        draws = [random.Random(f"{self._seed} caller {n}") for n in range(AT_ONCE)]
        async with asyncio.TaskGroup() as group:
            group.create_task(watch.each_second(until))
            for draw in draws:
                group.create_task(callers.caller(draw, until))

    async def _calm(self, found: Setting, callers: Callers) -> None:
        """The source is good from now on: then everything loads."""
        counts = await asyncio.to_thread(self._process.told, "counts")
        await asyncio.to_thread(self._process.told, "calm")
        faults, damaged = counts["faults"], counts["damaged"]
        assert isinstance(faults, dict)
        assert isinstance(damaged, dict)
        self._tally.outcomes["requests"] = int(str(counts["requests"]))
        self._tally.outcomes.update({f"faults ({kind})": n for kind, n in faults.items()})
        self._judge.require_reasons(damaged)
        draw = random.Random(f"{self._seed} afterwards")
        for stored in draw.sample(found.library, AFTERWARDS):
            await callers.everything_loads(stored, draw)
