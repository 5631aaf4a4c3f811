"""Servers that change their mind between two loads: whatever they did before, whatever the cache has
left of it, no wrong byte is lent, and no adapter stays refused once its server is right.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
from changing_origin import CONFIG, WEIGHTS, World, changing
from safetensors.torch import load
from user_loads import contents, until, written

from common import LOOPS
from lorax_async import AdapterError, AdapterHandle, AdapterLoader
from lorax_async.adapter import AdapterRef
from lorax_async.commands.fetching import Fetched
from lorax_async.io.remote.elsewhere import elsewhere_of

pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.slow]

LAYERS = 4
RANK = 96
Files = Mapping[str, bytes]


def whole_versions(folder: Path) -> list[Files]:
    """Adapters as their author saved them, which differ in every tensor; 0.9 MB each."""
    return [contents(written(folder / str(n), n, layers=LAYERS, rank=RANK)) for n in range(3)]


def odd_versions(folder: Path, whole: Files) -> list[Files]:
    """What a server may have before it is right. The last two can be loaded, and are what they are."""
    weights, config = whole[WEIGHTS], whole[CONFIG]
    header = 8 + int.from_bytes(weights[:8], "little")
    half = (header + len(weights)) // 2
    return [
        {**whole, WEIGHTS: bytes(len(weights))},
        {**whole, WEIGHTS: weights.replace(b'"F32"', b'"F33"')},
        {**whole, WEIGHTS: weights[:header]},
        {**whole, WEIGHTS: weights + b"\0"},
        {**whole, CONFIG: config.replace(b'"LORA"', b'"LOHA"')},
        {**whole, CONFIG: config[:-1]},
        contents(written(folder / "deeper", 8, layers=LAYERS + 1, rank=RANK)),
        contents(written(folder / "other rank", 9, layers=LAYERS, rank=RANK // 2)),
        {**whole, WEIGHTS: weights[:half].ljust(len(weights), b"\0")},
    ]


def is_of(handle: AdapterHandle, files: Files) -> bool:
    """Whether all on the device is what safetensors' own reader finds in the file."""
    try:
        saved = load(files[WEIGHTS])
    except Exception:
        return False
    names = {f"base_model.model.{name}": module for name, module in handle.modules.items()}
    return saved.keys() == {
        f"{name}.lora_{part}.weight" for name in names for part in "AB"
    } and all(
        torch.equal(module.a, saved[f"{name}.lora_A.weight"])
        and torch.equal(module.b, saved[f"{name}.lora_B.weight"])
        for name, module in names.items()
    )


@dataclass
class Game:
    """One origin, one cache, and what became of the loads."""

    world: World
    random: Random
    whole: list[Files]
    odd: list[Files]
    kills: float = 0.0
    loader: AdapterLoader | None = None
    served: list[Files] = field(default_factory=list)
    told: dict[str, int] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)

    async def play(self, seconds: float, rounds: int) -> None:
        until = time.monotonic() + seconds
        try:
            while rounds and time.monotonic() < until:
                rounds -= 1
                for _ in range(self.random.randrange(1, 4)):
                    self._change()
                    await self._something_happens()
                await self._becomes_right()
        finally:
            await self._leave()

    def _change(self) -> None:
        """The server changes its mind in one or more ways."""
        origin, random = self.world.origin, self.random
        self._serve(random.choice([*self.whole, *self.odd]))
        size = len(origin.files[WEIGHTS])
        origin.stop_at = random.choice([None, None, random.randrange(size), size * 3 // 4])
        origin.status = random.choice([None] * 6 + ["503 Busy", "404 Gone", "403 No", "500 Oh"])
        origin.silent = random.random() < 0.05
        origin.ranges = random.random() < 0.8
        origin.promises = random.random() < 0.3
        origin.etag = random.choice(['"fixed"'] * 5 + ['"other"', 'W/"weak"', None])
        self.history.append(f"{origin}")

    def _serve(self, files: Files) -> None:
        self.history.append(f"version {[*self.whole, *self.odd].index(files)}")
        self.world.origin.files = dict(files)
        self.served.append(files)

    async def _something_happens(self) -> None:
        random = self.random
        if random.random() < self.kills:
            await self._is_killed()
        else:
            await random.choice([self._loads] * 5 + [self._cancels, self._hints, self._fetches])()
        chance = random.random()
        if chance < 0.3:
            await self._leave()
        if chance < 0.05:
            shutil.rmtree(self.world.folder / "cache", ignore_errors=True)
        elif chance < 0.1:
            for entry in (self.world.folder / "cache" / "entries").glob("*"):
                shutil.rmtree(entry)

    async def _becomes_right(self) -> None:
        """From here on it serves what its author saved: at the second attempt it is there."""
        origin = self.world.origin
        origin.stop_at = origin.status = None
        origin.silent, origin.ranges = False, True
        self._serve(self.random.choice(self.whole))
        if self.random.random() < 0.3:
            await self._leave()
        for last in (False, True):
            try:
                await self._load(timeout=20)
            except AdapterError as error:
                self._tell(f"right, but {type(error).__name__}")
                if last:
                    raise
            else:
                break
        self._tell("right")

    async def _loads(self) -> None:
        try:
            await self._load(timeout=0.5)
        except (AdapterError, TimeoutError) as error:
            self._tell(type(error).__name__)
        else:
            self._tell("loaded")

    async def _load(self, timeout: float) -> None:
        async with await (await self._open()).load(self.world.id, timeout=timeout) as handle:
            verification = await handle.verified()
            of = [files for files in self.served if is_of(handle, files)]
            history = "\n".join(self.history[-20:])
            assert of, f"{verification} of bytes that the server never had together\n{history}"
            (scale,) = {module.scale for module in handle.modules.values()}
            assert scale == 8 / next(iter(handle.modules.values())).rank

    async def _cancels(self) -> None:
        there = await self._open()
        loading = asyncio.create_task(there.load(self.world.id, timeout=0.5))
        await asyncio.sleep(self.random.random() * 0.03)
        loading.cancel()
        await asyncio.wait([loading])
        if not loading.cancelled() and loading.exception() is None:
            async with loading.result():
                pass
        self._tell("cancelled")

    async def _hints(self) -> None:
        try:
            await (await self._open()).prefetch(self.world.id, tier="disk", timeout=0.5)
        except (AdapterError, TimeoutError) as error:
            self._tell(f"hint: {type(error).__name__}")

    async def _fetches(self) -> None:
        """As `lorax-async fetch` does: stored without being checked against a base."""
        config = (await self._open()).config
        with elsewhere_of(config) as source:
            row = Fetched(AdapterRef(self.world.id, source="http"))
            try:
                async with asyncio.timeout(0.5):
                    await row.run(source, lambda _: "")
            except TimeoutError:
                self._tell("fetch: late")
            else:
                self._tell(f"fetch: {row.state}")

    async def _is_killed(self) -> None:
        """A process of its own that fetches, as far as it comes."""
        begun = len(self.world.origin.asked)
        command = [sys.executable, "-m", "lorax_async", "fetch", self.world.id]
        command += ["--cache-dir", str(self.world.folder / "cache"), "--hub-cache", "off"]
        quiet = asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        ended = asyncio.create_task(process.wait())
        await until(lambda: ended.done() or len(self.world.origin.asked) > begun)
        await asyncio.wait([ended], timeout=self.random.random() * 0.1)
        if not ended.done():
            process.kill()
        self._tell("process killed" if await ended < 0 else "process ended")

    async def _open(self) -> AdapterLoader:
        if self.loader is None:
            slots = self.random.choice([1, 4])
            self.loader = await self.world.loader(layers=LAYERS, max_slots=slots).__aenter__()
        return self.loader

    async def _leave(self) -> None:
        loader, self.loader = self.loader, None
        if loader is not None:
            await loader.close()

    def _tell(self, what: str) -> None:
        self.history.append(what)
        self.told[what] = self.told.get(what, 0) + 1


def play(
    folder: Path,
    tell: Callable[[str], None],
    *,
    loop: str,
    seconds: float,
    rounds: int,
    seed: int,
    kills: float = 0.0,
) -> None:
    tell(f"seed {seed}")
    whole = whole_versions(folder)
    odd = odd_versions(folder, whole[0])
    with changing(folder, folder / "0") as world, asyncio.Runner(loop_factory=LOOPS[loop]) as run:
        game = Game(world, Random(seed), whole, odd, kills)
        run.run(game.play(seconds, rounds))
    tell(", ".join(f"{count} {what}" for what, count in sorted(game.told.items())))
    assert game.told["right"]


@pytest.mark.soak
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_servers_that_change_their_mind_for_long(
    tmp_path: Path, pytestconfig: pytest.Config, capfd: pytest.CaptureFixture[str], loop: str
) -> None:
    def tell(line: str) -> None:
        with capfd.disabled():
            sys.stdout.write(f"{line}\n")

    seconds, seed = pytestconfig.getoption("soak_seconds"), pytestconfig.getoption("soak_seed")
    play(tmp_path, tell, loop=loop, seconds=seconds, rounds=-1, seed=seed, kills=0.05)


@pytest.mark.parametrize("seed", range(2))
def test_servers_that_change_their_mind(tmp_path: Path, seed: int) -> None:
    told: list[str] = []
    play(tmp_path, told.append, loop="uvloop", seconds=60, rounds=5, seed=seed)
