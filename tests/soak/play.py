"""One soak, from beginning to end."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

from common import LOOPS
from soak.callers import AT_ONCE, Callers
from soak.expected import expected
from soak.judging import Judge
from soak.library import library
from soak.residue import require_nothing_left, require_right_on_disk
from soak.setting import FaultyProcess, Setting, faulty_process, setting
from soak.tally import SoakError, Tally
from soak.watch import Opened, Watch

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
        with _no_complaints() as complaints, ThreadPoolExecutor(2, "soak") as threads:
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
        if complaints:
            raise SoakError("it complained", complaints)

    async def _storm(self, callers: Callers, watch: Watch, until: float) -> None:
        draws = [random.Random(f"{self._seed} caller {n}") for n in range(AT_ONCE)]
        async with asyncio.TaskGroup() as group:
            group.create_task(watch.each_second(until))
            group.create_task(watch.each_moment(until))
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


@contextmanager
def _no_complaints() -> Iterator[list[str]]:
    """What is logged as an error, or told to the loop, while this is entered."""
    told: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(self.format(record))

    def complain(loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        told.append(str(context))

    asyncio.get_running_loop().set_exception_handler(complain)
    logger, listening = logging.getLogger("lorax_async"), Listening(logging.ERROR)
    logger.addHandler(listening)
    try:
        yield told
    finally:
        logger.removeHandler(listening)
