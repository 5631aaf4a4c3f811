"""Servers that change files, validators and manners between two loads: no wrong byte is lent, and no refusal stays."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
from fault_server import Asked, Client, FaultServer, Hangup
from safetensors.torch import load
from user_loads import at, contents, has, loader, stored_in, until, written
from web_folder import CONFIG, WEIGHTS, Folder, name_of

from common import LOOPS
from lorax_async.cli.fetch import FetchRow, fetch_all
from lorax_async.errors import (
    AdapterError,
    AdapterFormatError,
    FetchError,
    IncompatibleAdapterError,
    IntegrityError,
)
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.remote.remote_source import open_remote_source
from lorax_async.types import AdapterRef

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


@dataclass
class Origin(Folder):
    """A folder that is served as it is told.

    `etag` is that of every file, whatever is in it; None sends none. `stop_at` ends each answer for
    weights before the file's byte of that number. `status`, if set, is every answer; `silent` sends
    the head of an answer and then nothing. `promises` sends each file's sha256 beside it.
    """

    etag: str | None = '"fixed"'
    ranges: bool = True
    promises: bool = False
    stop_at: int | None = None
    status: str | None = None
    silent: bool = False

    def serve(self, asked: Asked, client: Client) -> None:
        name, span = name_of(asked), asked.span if self.ranges else None
        data, head = self.files[name], self._fields(self.files[name])
        if self.status is not None:
            client.head(self.status, "Content-Length: 0")
            return
        start, stop = span or (0, len(data))
        if start >= len(data):
            client.head("416 No", f"Content-Range: bytes */{len(data)}", "Content-Length: 0")
            return
        stop = min(stop, len(data))
        if span is None:
            client.head("200 OK", f"Content-Length: {len(data)}", *head)
        else:
            client.part(start, stop, len(data), *head)
        if self.silent:
            client.stall()
        cut = name == WEIGHTS and self.stop_at is not None and self.stop_at < stop
        client.send(data[start : self.stop_at if cut else stop])
        if cut:
            raise Hangup

    def _fields(self, data: bytes) -> list[str]:
        tag = [] if self.etag is None else [f"ETag: {self.etag}"]
        if self.promises:
            digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
            tag.append(f"Repr-Digest: sha-256=:{digest}:")  # RFC 9530
        return tag

    def bytes_asked(self, since: int = 0) -> int:
        """Of weights, by all requests from the number `since` on."""
        size = len(self.files[WEIGHTS])
        spans = [each.span or (0, size) for each in self.asked[since:] if name_of(each) == WEIGHTS]
        return sum(min(stop, size) - start for start, stop in spans)


@dataclass
class World:
    """One origin, and loaders of its adapter over one cache below `folder`."""

    origin: Origin
    server: FaultServer
    folder: Path

    @property
    def id(self) -> str:
        return self.server.url("/adapter/")

    def loader(self, **settings: object) -> AdapterLoader:
        plain: dict[str, object] = {
            "layers": 4,
            "revalidate": 0,
            "allow": (at(f"127.0.0.1:{self.server.port}"),),
        }
        return loader(self.folder, **(plain | settings))  # type: ignore[arg-type]

    def stored(self) -> tuple[int, int]:
        """How many entries and partial downloads the cache has."""
        return stored_in(self.folder)


@contextmanager
def changing(folder: Path, adapter: Path) -> Iterator[World]:
    origin = Origin(contents(adapter))
    with FaultServer(b"", origin) as server:
        yield World(origin, server, folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one shape that differ in every tensor; some 2.4 MB each."""
    folder = tmp_path_factory.mktemp("saved")
    return [written(folder / str(n), n, layers=LAYERS, rank=256) for n in range(2)]


@pytest.fixture
def world(tmp_path: Path, adapters: list[Path]) -> Iterator[World]:
    with changing(tmp_path, adapters[0]) as made:
        yield made


def zeros_of(adapter: Path) -> dict[str, bytes]:
    """The files as a server has them whose upload has reserved its room and sent nothing yet."""
    files = contents(adapter)
    return files | {WEIGHTS: bytes(len(files[WEIGHTS]))}


def unknown_dtype_in(adapter: Path) -> dict[str, bytes]:
    """The length of the header is right, and its text is not: planning refuses it."""
    files = contents(adapter)
    return files | {WEIGHTS: files[WEIGHTS].replace(b'"F32"', b'"F33"')}


async def refused(
    there: AdapterLoader, id: str | AdapterRef, error: type[AdapterError]
) -> AdapterError:
    with pytest.raises(error) as caught:
        async with await there.load(id):
            pass
    return caught.value


async def interrupted(world: World, there: AdapterLoader, at: int) -> None:
    """A load that ends after `at` bytes of weights, and leaves them to the next one."""
    world.origin.stop_at = at
    with pytest.raises(FetchError):
        async with await there.load(world.id, timeout=20):
            pass
    world.origin.stop_at = None
    await until(lambda: world.stored() == (0, 1))


async def published(world: World) -> None:
    """Store what the origin has now, unchecked by any layout: as `lorax-async fetch` does."""
    async with world.loader() as there:
        config = there.config
    with open_remote_source(config) as source:
        row = FetchRow(AdapterRef(world.id, source="http"))
        await fetch_all(source, [row], lambda *_: None)
    assert row.error is None, row.error


@pytest.mark.parametrize(
    "again", ["the same loader", pytest.param("another loader", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "promises", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["no digest", "digest"]
)
async def test_interrupted(world: World, adapters: list[Path], again: str, promises: bool) -> None:
    world.origin.promises = promises
    async with world.loader() as there:
        await interrupted(world, there, 1_500_000)
        world.origin.files = contents(adapters[1])
        if again == "the same loader":
            await has(there, world.id, adapters[1])
    if again != "the same loader":
        async with world.loader() as there:
            await has(there, world.id, adapters[1])
    async with world.loader() as there:
        await has(there, world.id, adapters[1])


async def test_a_fetch_begins_anew_after_other_bytes(world: World, adapters: list[Path]) -> None:
    """They differ behind the first answer, so that it is noticed while the rest comes."""
    old, new = (contents(adapter)[WEIGHTS] for adapter in adapters)
    world.origin.files[WEIGHTS] = old
    async with world.loader() as there:
        await interrupted(world, there, 1_500_000)
        world.origin.files[WEIGHTS] = mixed = old[:1_000_000] + new[1_000_000:]
        with await there.fetch(world.id) as folder:
            assert (folder.path / WEIGHTS).read_bytes() == mixed


async def test_an_interrupted_config_is_compared(world: World, adapters: list[Path]) -> None:
    """Another alpha of as many digits: the scale of the adapter that is served is the new one."""
    right = contents(adapters[0])
    config = json.loads(right[CONFIG])
    old, new = (json.dumps(config | {"lora_alpha": alpha}).encode() for alpha in (8, 9))
    assert len(old) == len(new)

    async def scale(there: AdapterLoader) -> float:
        async with await there.load(world.id) as handle:
            (scale,) = {module.scale for module in handle.modules.values()}
            return scale

    world.origin.files = right | {CONFIG: old}
    async with world.loader() as there:
        await interrupted(world, there, 1_500_000)
        world.origin.files = right | {CONFIG: new}
        assert await scale(there) == 9 / 256
    async with world.loader() as there:
        assert await scale(there) == 9 / 256


async def fetching(world: World) -> asyncio.subprocess.Process:
    """A process of its own that fetches the adapter into the same cache."""
    command = [sys.executable, "-m", "lorax_async", "fetch", world.id]
    command += ["--cache-dir", str(world.folder / "cache"), "--hub-cache", "off"]
    quiet = asyncio.subprocess.DEVNULL
    return await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)


@pytest.mark.slow
async def test_a_killed_process_is_gone_on_with(world: World, adapters: list[Path]) -> None:
    world.origin.stop_at = 1_800_000
    process = await fetching(world)
    await until(lambda: world.origin.bytes_asked() > len(world.origin.files[WEIGHTS]))
    process.kill()
    await process.wait()
    assert world.stored() == (0, 1)
    world.origin.stop_at = None
    before = len(world.origin.asked)
    async with world.loader(connections=4) as there:
        await has(there, world.id, adapters[0])
    assert world.origin.bytes_asked(before) < 0.7 * len(world.origin.files[WEIGHTS])


@pytest.mark.parametrize("wrong", ["header", "config", "rank"])
async def test_stored_and_refused(
    world: World, adapters: list[Path], wrong: str, tmp_path: Path
) -> None:
    right = contents(adapters[0])
    stored = {
        "header": unknown_dtype_in(adapters[0]),
        "config": right | {CONFIG: right[CONFIG].replace(b'"LORA"', b'"LOHA"')},
        "rank": contents(written(tmp_path / "other", 3, layers=LAYERS - 1, rank=256)),
    }
    world.origin.files = stored[wrong]
    if wrong == "rank":  # of a base with fewer layers, and so with other modules
        world.origin.files = {
            name: data.replace(b"q_proj", b"x_proj") for name, data in stored[wrong].items()
        }
    await published(world)
    assert world.stored() == (1, 0)
    async with world.loader() as there:
        await refused(there, world.id, AdapterError)
        world.origin.files = right
        await has(there, world.id, adapters[0])
    async with world.loader() as there:
        await has(there, world.id, adapters[0])


async def test_an_adapter_of_another_base_is_kept(world: World, adapters: list[Path]) -> None:
    """It is for another base; its source still has the same: other loaders go on using it."""
    async with world.loader() as there:
        await has(there, world.id, adapters[0])
    async with world.loader(layers=2) as there:
        await refused(there, world.id, IncompatibleAdapterError)
    assert world.stored() == (1, 0)
    before = world.origin.bytes_asked()
    async with world.loader() as there:
        await has(there, world.id, adapters[0])
    assert world.origin.bytes_asked() - before <= 256 << 10  # the beginning, for its version


@pytest.mark.slow
async def test_a_refusal_stands_while_it_is_down(world: World, adapters: list[Path]) -> None:
    async def version(there: AdapterLoader) -> str:
        error = await refused(there, world.id, AdapterFormatError)
        return str(error.key.version)  # type: ignore[attr-defined]

    world.origin.files = unknown_dtype_in(adapters[0])
    await published(world)
    async with world.loader() as there:
        ref = AdapterRef(world.id, revision=await version(there))
    world.origin.status = "503 Service Unavailable"
    async with world.loader(revalidate=60) as there:
        await refused(there, ref, AdapterFormatError)
    assert world.stored() == (1, 0)


async def test_what_comes_back_was_planned(
    world: World, adapters: list[Path], tmp_path: Path
) -> None:
    """Evicted, and fetched anew by another loader as other bytes of the same version meanwhile."""
    local, swapped = written(tmp_path / "local", 9, layers=LAYERS, rank=8), tmp_path / "swapped"
    swapped.mkdir()
    files = contents(adapters[0])
    # The first layer's tensors lie where the last one's were, and the other way round.
    files[WEIGHTS] = (
        files[WEIGHTS]
        .replace(b"layers.0.", b"layers.#.")
        .replace(b"layers.3.", b"layers.0.")
        .replace(b"layers.#.", b"layers.3.")
    )
    for name, data in files.items():
        (swapped / name).write_bytes(data)
    async with world.loader(max_slots=1, host_bytes=0) as there:
        async with await there.load(world.id) as handle:
            key = handle.key
        async with await there.load(local):
            pass  # it has the one slot now
        idle = {"present", "read ahead"}
        await until(
            lambda: (
                key in there.placement().adapters and there.placement().adapters[key].state in idle
            )
        )
        world.origin.files = files
        for entry in (world.folder / "cache" / "entries").iterdir():
            shutil.rmtree(entry)
        await published(world)
        await has(there, world.id, swapped)


def nan_in(adapter: Path) -> dict[str, bytes]:
    """The header is right: only the bytes, once they are copied, show that they are not."""
    files = contents(adapter)
    wrong = bytearray(files[WEIGHTS])
    wrong[-400_000:-399_996] = b"\x00\x00\xc0\x7f"  # NaN, as F32
    return files | {WEIGHTS: bytes(wrong)}


@pytest.mark.parametrize(
    ("make", "stored"),
    [(zeros_of, False), (unknown_dtype_in, False), (nan_in, False), (nan_in, True)],
)
async def test_what_is_refused_is_not_kept(
    world: World, adapters: list[Path], make: Callable[[Path], dict[str, bytes]], stored: bool
) -> None:
    """Be it downloaded now or stored before; what its server has by then is loaded."""
    world.origin.files = make(adapters[0])
    if stored:
        await published(world)
    async with world.loader(check_finite=True) as there:
        await refused(there, world.id, AdapterFormatError)
        await until(lambda: world.stored() == (0, 0))
        world.origin.files = contents(adapters[0])
        await has(there, world.id, adapters[0])
    async with world.loader(check_finite=True) as there:
        await has(there, world.id, adapters[0])


@pytest.mark.parametrize("promised", [False, True], ids=["nobody vouched", "the server vouched"])
async def test_a_callers_digest_fetches_again(
    world: World, adapters: list[Path], promised: bool
) -> None:
    """Stored bytes that only we have hashed are others: the source may have the right ones by now."""
    right = contents(adapters[0])
    digest = hashlib.sha256(right[WEIGHTS]).hexdigest()
    world.origin.promises = promised
    world.origin.files = contents(adapters[1])
    async with world.loader() as there:
        await has(there, world.id, adapters[1])
    world.origin.files = right
    async with world.loader() as there:
        if promised:  # then the version is what was stored, and the digest another one's
            await refused(there, AdapterRef(world.id, digest=digest), IntegrityError)
            await has(there, world.id, adapters[1])
        else:
            await has(there, AdapterRef(world.id, digest=digest), adapters[0])
    assert world.stored() == (1, 0)


LAYERS = 4

Files = Mapping[str, bytes]


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
        contents(written(folder / "deeper", 8, layers=LAYERS + 1, rank=96)),
        contents(written(folder / "other rank", 9, layers=LAYERS, rank=48)),
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
    """One origin that changes its mind, one cache, and loads of which each is right or refused."""

    world: World
    random: Random
    whole: list[Files]
    odd: list[Files]
    kills: float = 0.0
    loader: AdapterLoader | None = None
    served: list[Files] = field(default_factory=list)
    history: list[str] = field(default_factory=list)

    async def play(self, seconds: float, rounds: int) -> None:
        end = time.monotonic() + seconds
        try:
            while rounds and time.monotonic() < end:
                rounds -= 1
                for _ in range(self.random.randrange(1, 4)):
                    self._change()
                    await self._happens()
                await self._becomes_right()
        finally:
            await self._leave()

    def _change(self) -> None:
        origin, random = self.world.origin, self.random
        self._serve(random.choice([*self.whole, *self.odd]))
        size = len(origin.files[WEIGHTS])
        origin.stop_at = random.choice([None, None, random.randrange(size), size * 3 // 4])
        origin.status = random.choice([None] * 6 + ["503 Busy", "404 Gone", "403 No", "500 Oh"])
        origin.silent = random.random() < 0.05
        origin.ranges = random.random() < 0.8
        origin.promises = random.random() < 0.3
        origin.etag = random.choice(['"fixed"'] * 5 + ['"other"', 'W/"weak"', None])
        told = (origin.stop_at, origin.status, origin.silent, origin.ranges, origin.promises)
        self.history.append(f"{told} {origin.etag}")

    def _serve(self, files: Files) -> None:
        self.history.append(f"version {[*self.whole, *self.odd].index(files)}")
        self.world.origin.files = dict(files)
        self.served.append(files)

    async def _happens(self) -> None:
        random, cache = self.random, self.world.folder / "cache"
        if random.random() < self.kills:
            await self._is_killed()
        else:
            with suppress(AdapterError, TimeoutError):
                await random.choice([self._load] * 5 + [self._cancels, self._hints])()
        chance = random.random()
        if chance < 0.3:
            await self._leave()
        if chance < 0.1:
            for folder in [cache] if chance < 0.05 else (cache / "entries").glob("*"):
                shutil.rmtree(folder, ignore_errors=True)

    async def _becomes_right(self) -> None:
        """From here on it serves what its author saved: at the second attempt it is there."""
        origin = self.world.origin
        origin.stop_at = origin.status = None
        origin.silent, origin.ranges = False, True
        self._serve(self.random.choice(self.whole))
        if self.random.random() < 0.3:
            await self._leave()
        try:
            await self._load(20)
        except AdapterError:
            await self._load(20)

    async def _load(self, timeout: float = 0.5) -> None:
        async with await (await self._open()).load(self.world.id, timeout=timeout) as handle:
            await handle.verified()
            history = "\n".join(self.history[-20:])
            assert any(is_of(handle, files) for files in self.served), history
            assert {module.scale * module.rank for module in handle.modules.values()} == {8}

    async def _cancels(self) -> None:
        loading = asyncio.create_task((await self._open()).load(self.world.id, timeout=0.5))
        await asyncio.sleep(self.random.random() * 0.03)
        loading.cancel()
        await asyncio.wait([loading])
        if not loading.cancelled():
            loading.result().release()

    async def _hints(self) -> None:
        await (await self._open()).prefetch(self.world.id, tier="disk", timeout=0.5)

    async def _is_killed(self) -> None:
        """A process of its own that fetches, as far as it comes."""
        begun = len(self.world.origin.asked)
        process = await fetching(self.world)
        ended = asyncio.create_task(process.wait())
        await until(lambda: ended.done() or len(self.world.origin.asked) > begun)
        await asyncio.wait([ended], timeout=self.random.random() * 0.1)
        if not ended.done():
            process.kill()
        await ended

    async def _open(self) -> AdapterLoader:
        if self.loader is None:
            slots = self.random.choice([1, 4])
            self.loader = await self.world.loader(max_slots=slots).__aenter__()
        return self.loader

    async def _leave(self) -> None:
        loader, self.loader = self.loader, None
        if loader is not None:
            await loader.close()


def play(
    folder: Path, *, loop: str, seconds: float, rounds: int, seed: int, kills: float = 0.0
) -> None:
    folders = [written(folder / str(n), n, layers=LAYERS, rank=96) for n in range(3)]
    whole: list[Files] = [contents(each) for each in folders]
    odd = odd_versions(folder, whole[0])
    with changing(folder, folder / "0") as world, asyncio.Runner(loop_factory=LOOPS[loop]) as run:
        run.run(Game(world, Random(seed), whole, odd, kills).play(seconds, rounds))


@pytest.mark.soak
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_changing_servers_for_long(tmp_path: Path, pytestconfig: pytest.Config, loop: str) -> None:
    seconds, seed = pytestconfig.getoption("soak_seconds"), pytestconfig.getoption("soak_seed")
    play(tmp_path, loop=loop, seconds=seconds, rounds=-1, seed=seed, kills=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_changing_servers(tmp_path: Path, seed: int) -> None:
    play(tmp_path, loop="uvloop", seconds=60, rounds=5, seed=seed)
