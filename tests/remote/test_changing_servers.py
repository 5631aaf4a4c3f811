"""Servers that change files, validators and manners between two loads: no wrong byte is lent, and no refusal stays."""

import asyncio
import base64
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest
import torch
from cancellation_sweep import settle
from fault_server import Asked, Client, FaultServer, Hangup
from safetensors.torch import load
from source_inputs import header_bytes
from tiny_loaders import fails
from user_loads import at, contents, has, loader, stored_in, until, written
from web_folder import CONFIG, WEIGHTS, Folder, name_of, redirect, refuse

from lorax_async import AdapterHandle, AdapterLoader, AdapterRef, AdapterStore, errors

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

LAYERS = 4
Files = dict[str, bytes]


@dataclass
class Origin(Folder):
    """A folder whose files, ETag and manners a test changes."""

    etag: str | None = '"fixed"'
    promises: bool = False
    """Whether each file's sha256 is sent beside it."""
    ranges: bool = True
    stop_at: int | None = None
    """Before which byte of the weights each answer ends."""
    status: str | None = None
    silent: bool = False

    def serve(self, asked: Asked, client: Client) -> None:
        name, span = name_of(asked), asked.span if self.ranges else None
        data, head = self.files[name], [] if self.etag is None else [f"ETag: {self.etag}"]
        if self.promises:
            digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
            head.append(f"Repr-Digest: sha-256=:{digest}:")  # RFC 9530
        start, stop = span or (0, len(data))
        if self.status is not None:
            client.head(self.status, "Content-Length: 0")
        elif start >= len(data):
            client.head("416 No", f"Content-Range: bytes */{len(data)}", "Content-Length: 0")
        else:
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

    def change(self, random: Random) -> None:
        size = len(self.files[WEIGHTS])
        self.stop_at = random.choice([None, None, random.randrange(size), size * 3 // 4])
        self.status = random.choice([None] * 6 + ["503 Busy", "404 Gone", "403 No", "500 Oh"])
        self.silent, self.ranges = random.random() < 0.05, random.random() < 0.8
        self.etag = random.choice(['"fixed"'] * 5 + ['"other"', 'W/"weak"', None])

    def become_right(self) -> None:
        self.stop_at = self.status = None
        self.silent, self.ranges = False, True

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
    adapters: list[Path]
    """Two of one shape that differ in every tensor; some 2.4 MB each."""

    @property
    def id(self) -> str:
        return self.server.url("/adapter/")

    def loader(self, *, layers: int = LAYERS, **settings: object) -> AdapterLoader:
        given: dict[str, object] = {"revalidate": 0, "allow": (at(self.server.netloc),), **settings}
        return loader(self.folder, layers=layers, **given)

    def stored(self) -> tuple[int, int]:
        """How many entries and partial downloads the cache has."""
        return stored_in(self.folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("saved")
    return [written(folder / str(n), n, layers=LAYERS, rank=256) for n in range(2)]


@pytest.fixture
def world(tmp_path: Path, adapters: list[Path]) -> Iterator[World]:
    origin = Origin(contents(adapters[0]))
    with FaultServer(b"", origin) as server:
        yield World(origin, server, tmp_path, adapters)


async def interrupted(world: World, there: AdapterLoader) -> None:
    """A load that ends after 1.5 MB of weights, and leaves them to the next one."""
    world.origin.stop_at = 1_500_000
    await fails(there.load(world.id), errors.FetchError)
    world.origin.stop_at = None
    await until(lambda: world.stored() == (0, 1))


async def published(world: World) -> None:
    """Store what the origin has now, unchecked by any layout: as `lorax-async fetch` does."""
    async with world.loader() as there:
        config = there.config
    async with AdapterStore(config) as store, store.checkout(world.id):
        pass


@pytest.mark.parametrize(
    "again", ["the same loader", pytest.param("another loader", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "promises", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["no digest", "digest"]
)
async def test_interrupted(world: World, again: str, promises: bool) -> None:
    world.origin.promises = promises
    async with world.loader() as there:
        await interrupted(world, there)
        world.origin.files = contents(world.adapters[1])
        if again == "the same loader":
            await has(there, world.id, world.adapters[1])
    for _ in range(2):
        async with world.loader() as there:
            await has(there, world.id, world.adapters[1])


async def test_a_fetch_begins_anew_after_other_bytes(world: World) -> None:
    """They differ behind the first answer, so that it is noticed while the rest comes."""
    old, new = (contents(adapter)[WEIGHTS] for adapter in world.adapters)
    world.origin.files[WEIGHTS] = old
    async with world.loader() as there:
        await interrupted(world, there)
        world.origin.files[WEIGHTS] = mixed = old[:1_000_000] + new[1_000_000:]
        with await there.fetch(world.id) as folder:
            assert (folder.path / WEIGHTS).read_bytes() == mixed


async def test_a_stream_begins_anew_after_other_bytes_behind_the_header(world: World) -> None:
    """They are noticed before it has a handle, whose layers would fail."""
    old, new = (contents(adapter)[WEIGHTS] for adapter in world.adapters)
    async with world.loader() as there:
        await interrupted(world, there)
        world.origin.files[WEIGHTS] = mixed = old[:100_000] + new[100_000:]
        async with there.stream(world.id) as handle:
            await handle.layer_ready(handle.layers[-1])
            verification = await handle.verified()
        assert verification.digest == hashlib.sha256(mixed).hexdigest()


@pytest.mark.slow
async def test_an_interrupted_config_is_compared(world: World) -> None:
    """Another alpha of as many digits: the scale of the adapter that is served is the new one."""
    right = contents(world.adapters[0])
    config = json.loads(right[CONFIG])
    old, new = (json.dumps(config | {"lora_alpha": alpha}).encode() for alpha in (8, 9))
    assert len(old) == len(new)

    async def scale(there: AdapterLoader) -> float:
        async with await there.load(world.id) as handle:
            (scale,) = {module.scale for module in handle.modules.values()}
            return scale

    world.origin.files = right | {CONFIG: old}
    async with world.loader() as there:
        await interrupted(world, there)
        world.origin.files = right | {CONFIG: new}
        assert await scale(there) == 9 / 256
    async with world.loader() as there:
        assert await scale(there) == 9 / 256


def _nan(weights: bytes) -> bytes:
    """The header is right: only the bytes, once they are copied, show that they are not."""
    return weights[:-400_000] + b"\x00\x00\xc0\x7f" + weights[-399_996:]


def _of_weights(change: Callable[[bytes], bytes]) -> Callable[[Files], Files]:
    return lambda files: files | {WEIGHTS: change(files[WEIGHTS])}


UPLOADS: dict[str, Callable[[Files], Files]] = {
    "room that was reserved": _of_weights(lambda weights: bytes(len(weights))),
    "a header alone": _of_weights(lambda weights: weights[: header_bytes(weights)]),
    "a byte too many": _of_weights(lambda weights: weights + b"\0"),
    "a part of the config": lambda files: files | {CONFIG: files[CONFIG][:-1]},
    "NaN": _of_weights(_nan),
    "an unknown dtype": _of_weights(lambda weights: weights.replace(b'"F32"', b'"F33"')),
    "another kind": lambda files: files | {CONFIG: files[CONFIG].replace(b'"LORA"', b'"LOHA"')},
    "other modules": _of_weights(lambda weights: weights.replace(b"q_proj", b"x_proj")),
}
"""What a server may have before it is right. The last four can be stored; two fit other bases."""
OTHER_KINDS = {
    "another kind": errors.UnsupportedAdapterError,
    "other modules": errors.IncompatibleAdapterError,
}


@pytest.mark.parametrize(
    ("upload", "stored"),
    [*((name, False) for name in list(UPLOADS)[:6]), *((name, True) for name in list(UPLOADS)[4:])],
)
async def test_what_is_refused_does_not_stay(world: World, upload: str, stored: bool) -> None:
    """Be it downloaded now or stored before; what its server has by then is loaded."""
    world.origin.files = UPLOADS[upload](contents(world.adapters[0]))
    if stored:
        await published(world)
        assert world.stored() == (1, 0)
    async with world.loader(check_finite=True) as there:
        kind = OTHER_KINDS.get(upload, errors.AdapterFormatError)
        assert type(await fails(there.load(world.id), errors.LoraxError)) is kind
        await settle(there)  # or the next load would join the fetch that was refused
        if upload == "NaN" or not stored:  # else its server still has the same
            await until(lambda: world.stored() == (0, 0))
        world.origin.files = contents(world.adapters[0])
        await has(there, world.id, world.adapters[0])
    async with world.loader(check_finite=True) as there:
        await has(there, world.id, world.adapters[0])


async def test_an_adapter_of_another_base_is_kept(world: World) -> None:
    """It is for another base; its source still has the same: other loaders go on using it."""
    async with world.loader() as there:
        await has(there, world.id, world.adapters[0])
    async with world.loader(layers=2) as there:
        await fails(there.load(world.id), errors.IncompatibleAdapterError)
    assert world.stored() == (1, 0)
    before = world.origin.bytes_asked()
    async with world.loader() as there:
        await has(there, world.id, world.adapters[0])
    assert world.origin.bytes_asked() - before <= 256 << 10  # the beginning, for its version


async def test_a_damaged_header_of_promised_weights_is_fetched_again(world: World) -> None:
    world.origin.promises = True
    async with world.loader() as there:
        await has(there, world.id, world.adapters[0])
    (stored,) = (world.folder / "cache" / "entries").glob(f"*/{WEIGHTS}")
    before = stored.stat()
    stored.write_bytes(stored.read_bytes().replace(b'"F32"', b'"F33"'))
    os.utime(stored, ns=(before.st_atime_ns, before.st_mtime_ns))
    async with world.loader() as there:
        await has(there, world.id, world.adapters[0])


@pytest.mark.slow
@pytest.mark.parametrize("certificates", [True, False])
async def test_a_refusal_stands_while_it_is_down(
    world: World, certificates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or cannot be asked over TLS."""
    world.origin.files = UPLOADS["an unknown dtype"](contents(world.adapters[0]))
    await published(world)
    async with world.loader() as there:
        error = await fails(there.load(world.id), errors.AdapterFormatError)
    ref = AdapterRef(world.id, revision=str(error.key.version))  # type: ignore[attr-defined]
    behave = refuse("503 Service Unavailable")
    if not certificates:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(world.folder / "none.pem"))
        behave = redirect(f"https://{world.server.netloc}/adapter/")
    world.origin.instead = dict.fromkeys((CONFIG, WEIGHTS), behave)
    plain = at(world.server.netloc)
    allow = plain, replace(plain, scheme="https")
    async with world.loader(revalidate=60, allow=allow) as there:
        await fails(there.load(ref), errors.AdapterFormatError)
    assert world.stored() == (1, 0)


async def test_what_comes_back_was_planned(world: World) -> None:
    """Evicted, and fetched anew by another loader as other bytes of the same version meanwhile."""
    local, swapped = (
        written(world.folder / "local", 9, layers=LAYERS, rank=8),
        world.folder / "swapped",
    )
    swapped.mkdir()
    files = contents(world.adapters[0])
    # The first layer's tensors lie where the last one's were, and the other way round.
    for old, new in ((b"s.0.", b"s.#."), (b"s.3.", b"s.0."), (b"s.#.", b"s.3.")):
        files[WEIGHTS] = files[WEIGHTS].replace(old, new)
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


@pytest.mark.parametrize("promised", [False, True], ids=["nobody vouched", "the server vouched"])
async def test_a_callers_digest_fetches_again(world: World, promised: bool) -> None:
    """Stored bytes that only we have hashed are others: the source may have the right ones by now."""
    right = contents(world.adapters[0])
    digest = hashlib.sha256(right[WEIGHTS]).hexdigest()
    world.origin.promises = promised
    world.origin.files = contents(world.adapters[1])
    async with world.loader() as there:
        await has(there, world.id, world.adapters[1])
    world.origin.files = right
    async with world.loader() as there:
        if promised:  # then the version is what was stored, and the digest another one's
            await fails(there.load(AdapterRef(world.id, digest=digest)), errors.IntegrityError)
            await has(there, world.id, world.adapters[1])
        else:
            await has(there, AdapterRef(world.id, digest=digest), world.adapters[0])
    assert world.stored() == (1, 0)


def odd_versions(folder: Path, whole: Files) -> list[Files]:
    """What a server may have before it is right. The last two can be loaded, and are what they are."""
    weights = whole[WEIGHTS]
    half = (header_bytes(weights) + len(weights)) // 2
    return [
        *(change(whole) for name, change in UPLOADS.items() if name != "NaN"),
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
    mine = {
        f"base_model.model.{name}.lora_{part}.weight": getattr(module, part.lower())
        for name, module in handle.modules.items()
        for part in "AB"
    }
    return saved.keys() == mine.keys() and all(
        torch.equal(mine[name], saved[name]) for name in mine
    )


@dataclass
class RandomLoads:
    server: FaultServer
    origin: Origin
    folder: Path
    random: Random
    whole: list[Files]
    odd: list[Files]
    loader: AdapterLoader | None = None
    served: list[Files] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.server.url("/adapter/")

    def serve(self, files: Files) -> None:
        self.origin.files = dict(files)
        self.served.append(files)

    async def turn(self) -> None:
        """Once the server is right, the second load at the latest is too."""
        for _ in range(self.random.randrange(1, 4)):
            self.serve(self.random.choice([*self.whole, *self.odd]))
            self.origin.change(self.random)
            with suppress(errors.AdapterError, TimeoutError):
                calls = [self.load] * 5 + [self.cancel, self.hint, self.kill]
                await self.random.choice(calls)()
            if self.random.random() < 0.3:
                await self.close()
            if self.random.random() < 0.05:
                shutil.rmtree(self.folder / "cache", ignore_errors=True)
        self.origin.become_right()
        self.serve(self.random.choice(self.whole))
        try:
            await self.load(20)
        except errors.AdapterError:
            await self.load(20)

    async def load(self, timeout: float = 0.5) -> None:
        async with await (await self.open()).load(self.id, timeout=timeout) as handle:
            await handle.verified()
            assert any(is_of(handle, files) for files in self.served)
            assert {module.scale * module.rank for module in handle.modules.values()} == {8}

    async def cancel(self) -> None:
        loading = asyncio.create_task((await self.open()).load(self.id, timeout=0.5))
        await asyncio.wait([loading], timeout=self.random.random() * 0.03)
        loading.cancel()
        await asyncio.wait([loading])
        if not loading.cancelled():
            loading.result().release()

    async def hint(self) -> None:
        await (await self.open()).prefetch(self.id, tier="disk", timeout=0.5)

    async def kill(self) -> None:
        """A process of its own that fetches, as far as it comes."""
        begun, quiet = len(self.origin.asked), asyncio.subprocess.DEVNULL
        command = [sys.executable, "-m", "lorax_async", "fetch", self.id, "--hub-cache", "off"]
        command += ["--cache-dir", str(self.folder / "cache")]
        process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        ended = asyncio.create_task(process.wait())
        while not ended.done() and len(self.origin.asked) == begun:
            await asyncio.wait([ended], timeout=0.02)
        await asyncio.wait([ended], timeout=self.random.random() * 0.1)
        if not ended.done():
            process.kill()
        await ended

    async def open(self) -> AdapterLoader:
        if self.loader is None:
            given = {"allow": (at(self.server.netloc),), "max_slots": self.random.choice([1, 4])}
            opening = loader(self.folder, layers=LAYERS, revalidate=0, **given)
            self.loader = await opening.__aenter__()
        return self.loader

    async def close(self) -> None:
        closing, self.loader = self.loader, None
        if closing is not None:
            await closing.close()


@pytest.mark.soak
@pytest.mark.each_loop
async def test_servers_at_random(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    seconds, seed = pytestconfig.getoption("soak_seconds"), pytestconfig.getoption("soak_seed")
    folders = [written(tmp_path / str(n), n, layers=LAYERS, rank=96) for n in range(3)]
    whole = [contents(folder) for folder in folders]
    origin = Origin(dict(whole[0]))
    with FaultServer(b"", origin) as server:
        odd = odd_versions(tmp_path, whole[0])
        loads = RandomLoads(server, origin, tmp_path, Random(seed), whole, odd)
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                await loads.turn()
        finally:
            await loads.close()
