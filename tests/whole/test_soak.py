"""Many callers, a bad source, little room, for as long as told: `make soak`."""

import asyncio
import gc
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from contention_observer import complaints
from event_loops import LOOPS
from faulty_source import COUNT, HIDDEN, LARGEST, LAYERS, MODULES, TARGETS, Stored, library
from leaks import open_sockets
from safetensors.torch import load

from lorax_async import AdapterHandle, AdapterLoader, Allow, Limits, LoaderConfig, errors
from lorax_async.cache import disk_cache
from lorax_async.cache.disk_cache import DiskCache
from lorax_async.concurrency import WorkerThreads
from lorax_async.devices.staging import StagingRing
from lorax_async.events import Event, Failed, SlotId
from lorax_async.http.failures import RetryPolicy
from lorax_async.http.range_downloader import RangeDownloader
from lorax_async.http.settings import HttpSettings, Timeouts
from lorax_async.lifecycle.policies import policy
from lorax_async.planning.layout import ModelLayout, Module, Parallelism
from lorax_async.remote.base import AllowRules
from lorax_async.remote.opening import AdapterOpener, VersionResolver
from lorax_async.remote.remote_source import RemoteParts, RemoteSource
from lorax_async.remote.web import WebBackend
from lorax_async.types import AdapterKey, AdapterRef, Verification, VerificationKind


class SoakError(AssertionError):
    """Something was not as it must be: what, and the story of the adapter."""

    def __init__(self, problem: str, story: Sequence[object] = ()) -> None:
        super().__init__("\n  ".join([problem, *map(str, story)]))


class Tally(Counter[str]):
    """What came of it, in numbers that take no more room the longer it lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.rss: list[int] = []  # Bytes, each second

    def peak(self, what: str, value: int) -> None:
        self[f"most {what}"] = max(self[f"most {what}"], value)


ALLOWED: dict[type[errors.LoraxError], set[str]] = {
    errors.FetchError: {"resolve", "fetch"},
    errors.FetchTimeoutError: {"resolve", "fetch"},
    errors.EvictedError: {"fetch"},
    errors.IntegrityError: {"resolve", "fetch"},
    errors.AdapterTimeoutError: {"queue", "resolve", "fetch", "verify", "stage", "copy", "ready"},
}
"""By stage. All of them may pass, and say so."""


class Judge:
    """Hears what the loader tells, and what callers met."""

    def __init__(self) -> None:
        self.broken: dict[tuple[AdapterKey, SlotId], type[errors.LoraxError]] = {}
        """Stays in a slot that ended with an error, and of which kind."""
        self.doubted: set[Stored] = set()
        """Adapters about which the loader said that their bytes are not what they should be."""
        self._change_event = asyncio.Event()

    def heard(self, event: Event) -> None:
        if isinstance(event, Failed) and event.slot is not None:
            self.broken[event.key, event.slot] = type(event.error)
            self._change_event.set()
            self._change_event = asyncio.Event()

    async def verdict(self, handle: AdapterHandle) -> type[errors.LoraxError] | None:
        """What that stay ended with, or will soon."""
        stay = handle.key, handle.slot
        with suppress(TimeoutError):
            async with asyncio.timeout(GRACE):
                while stay not in self.broken:
                    await self._change_event.wait()
        return self.broken.get(stay)

    def require_allowed(self, stored: Stored, error: BaseException | None) -> None:
        """Raises `SoakError` for what must not come to a caller."""
        if not isinstance(error, errors.LoraxError):
            raise SoakError(f"{stored.name}: {error!r}") from error
        stages = next((ALLOWED[kind] for kind in type(error).__mro__ if kind in ALLOWED), set())
        if error.stage not in stages or not error.retryable or error.id is None:
            told = f"{type(error).__name__}, retryable {error.retryable}: {error}"
            raise SoakError(told, error.story) from error
        if "status 503" in error.problem and error.retry_after is None:
            raise SoakError(f"it does not say when to come back: {error}", error.story)
        # How often the file went before it was read, as far as the story, which is cut, goes back.
        causes = [event.error for event in error.story if isinstance(event, Failed)]
        evictions = sum(isinstance(each, errors.EvictedError) for each in causes)
        if isinstance(error, errors.EvictedError) and evictions < 2:
            raise SoakError(f"it could have been fetched again: {error}", error.story)
        if isinstance(error, errors.IntegrityError):
            self.doubted.add(stored)

    def require_reasons(self, damaged: dict[str, list[str]]) -> None:
        """Nobody is doubted whose bytes and ETags were always right."""
        guilty = {name for names in damaged.values() for name in names}
        innocent = sorted({stored.name for stored in self.doubted} - guilty)
        if innocent:
            raise SoakError(f"they were sent right, and refused all the same: {innocent}")


SLOTS = 4
DEVICE_BYTES = LARGEST * 7 // 2
PINNED_BYTES = LARGEST
HOST_BYTES = LARGEST + (64 << 10)  # Files are held with their headers
CONNECTIONS = 16
REVALIDATE = 1.0

TIMEOUTS = Timeouts(connect=5, read=1.0, slowest=20_000, over=1.0, idle=2.0)
"""Shorter than some of the source's stalls, and faster than it drips."""
RETRIES = RetryPolicy(attempts=5, base=0.05, most=0.5, obeyed=5.0)

_MODULES = (
    Module(name, HIDDEN, HIDDEN, number * LAYERS // len(MODULES), Parallelism.COLUMN)
    for number, name in enumerate(MODULES)
)
LAYOUT = ModelLayout(tuple(_MODULES), LAYERS, "BF16", "model.")


def told_by(url: str, what: str) -> Any:
    """Blocks."""
    with urlopen(f"{url}/{what}", timeout=60) as answer:
        return json.loads(answer.read())


@contextmanager
def faulty_process(seed: int) -> Iterator[str]:
    """Its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "faulty_source", str(seed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    )
    with process:  # whose end closes its stdin, which ends it
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"


@dataclass(frozen=True)
class Setting:
    """What a soak is about."""

    library: tuple[Stored, ...]
    url: str
    cache: DiskCache
    folder: Path
    cache_bytes: int
    loader: AdapterLoader

    def ref(self, stored: Stored) -> AdapterRef:
        return AdapterRef(f"{self.url}/{stored.name}/", source="http")

    def stored(self, location: str) -> Stored:
        """Which of the library's a key or a record is about."""
        name = location.removesuffix("/").rpartition("/")[2]
        return next(stored for stored in self.library if stored.name == name)


@asynccontextmanager
async def setting(
    library: tuple[Stored, ...], url: str, folder: Path, device: str
) -> AsyncIterator[Setting]:
    """Entered with the loader open; afterwards all has ended."""
    cache_bytes = sum(len(stored.config) + stored.nbytes for stored in library) // 4
    rules = AllowRules((Allow("http", "127.0.0.1", int(url.rpartition(":")[2])),))
    http = HttpSettings(connections=CONNECTIONS, timeouts=TIMEOUTS, retries=RETRIES, proxies={})
    engine, workers, limits = RangeDownloader(http), WorkerThreads(4), Limits()
    cache = DiskCache(folder, cache_bytes, policy("lru"))
    backend = WebBackend(engine, rules, limits)

    async def find_backend(_: object) -> WebBackend:
        return backend

    resolving = VersionResolver(find_backend, cache, workers, offline=False, fresh=REVALIDATE)
    opening = AdapterOpener(resolving, engine, workers, limits=limits, verify="stream")
    parts = RemoteParts(resolving, opening, workers, engine.close)
    source = RemoteSource(lambda: parts, verify="stream")
    sizes: dict[str, Any] = {"device_bytes": DEVICE_BYTES, "host_bytes": HOST_BYTES}
    sizes |= {"pinned_bytes": PINNED_BYTES, "staging_bytes": 8 << 20, "max_slots": SLOTS}
    sizes |= {"io_threads": 2, "timeout": 60, "starvation_age": 1.0}
    sizes["check_finite"] = False  # the weights are random bytes, some of them no numbers
    config = LoaderConfig(device=device, **sizes)
    try:
        async with AdapterLoader(LAYOUT, config, source=source) as loader:
            yield Setting(library, url, cache, folder, cache_bytes, loader)
    finally:
        for end in (engine.close, workers.shutdown):
            await asyncio.to_thread(end)


AT_ONCE = 64
ZIPF = 1.1
CANCELLED = 0.2
VERIFIED = 0.5  # Of those who load: they wait for the digest
GRACE = 60.0  # Seconds after its deadline, or its cancellation, in which a call must have ended
MOST_PINNED = 2

WISHES = {"load": 55, "stream": 20, "prefetch": 15, "pin": 10}
TIERS = ("disk", "host", "device")
_POPULAR = list(accumulate(1 / (1 + n) ** ZIPF for n in range(COUNT)))

Digests = tuple[str, ...]  # Of A and B of a device's modules, one for each layer


def digests(modules: Callable[[str], Iterable[torch.Tensor]], layers: range) -> Digests:
    found = []
    for layer in layers:
        digest = hashlib.sha256()
        for name in MODULES[layer * len(TARGETS) : (layer + 1) * len(TARGETS)]:
            for tensor in modules(name):  # as raw bytes: not all of them are numbers
                digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
        found.append(digest.hexdigest())
    return tuple(found)


def on_device(handle: AdapterHandle, layers: range) -> Digests:
    """In any thread: the slot is kept meanwhile, whoever releases the handle."""
    with handle.use():
        modules = handle.modules
        return digests(lambda name: (modules[name].a, modules[name].b), layers)


@cache
def expected(seed: int) -> list[Digests]:
    keys = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"
    files = (load(stored.weights()) for stored in library(seed))
    return [
        digests(lambda name: (saved[key.format(name)] for key in keys), range(LAYERS))
        for saved in files
    ]


MOST = {"sockets": 2 * CONNECTIONS + 8, "threads": CONNECTIONS + 24}
MOST |= {"descriptors": 6 * AT_ONCE, "tasks": 4 * AT_ONCE}
"""More than there were before; 16 connections are in use, and as many idle."""
RSS_SAMPLES, RSS_MARGIN = 60, 48 << 20
"""In fewer seconds nothing can be said about growth."""
AFTERWARDS = 10  # So many adapters are loaded when the source is good again


def opened() -> dict[str, int]:
    """What the process has now."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "sockets": open_sockets(),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }


class Soak:
    """`held` are the handles that are out now; `threads` look at the device."""

    def __init__(self, setting: Setting, seed: int, tally: Tally, before: dict[str, int]) -> None:
        self.held: set[AdapterHandle] = set()
        self._setting = setting
        self._seed = seed
        self._expected = expected(seed)
        self._judge = Judge()
        self._tally = tally
        self._before = before
        self._threads = ThreadPoolExecutor(2, "soak")
        self._pinned: set[Stored] = set()
        setting.loader.subscribe(self._judge.heard)

    async def run(self, seconds: float) -> None:
        until = monotonic() + seconds
        draws = [random.Random(f"{self._seed} caller {n}") for n in range(AT_ONCE)]
        with self._threads:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._each_second(until))
                for draw in draws:
                    group.create_task(self._caller(draw, until))
            await self._calm()
            await self._look_around()

    async def _calm(self) -> None:
        """The source is good from now on: then everything loads."""
        counts = await asyncio.to_thread(told_by, self._setting.url, "counts")
        await asyncio.to_thread(told_by, self._setting.url, "calm")
        self._tally["requests"] = counts["requests"]
        self._tally.update({f"faults ({kind})": n for kind, n in counts["faults"].items()})
        self._judge.require_reasons(counts["damaged"])
        draw = random.Random(f"{self._seed} afterwards")
        for stored in draw.sample(self._setting.library, AFTERWARDS):
            await self._everything_loads(stored, draw)

    async def _caller(self, draw: random.Random, until: float) -> None:
        """One of them, one wish after the other."""
        while monotonic() < until:
            (stored,) = draw.choices(self._setting.library, cum_weights=_POPULAR)
            (wish,) = draw.choices(list(WISHES), list(WISHES.values()))
            await self._wish(wish, stored, draw)

    async def _everything_loads(self, stored: Stored, draw: random.Random) -> None:
        """Now that the source is good; what was left of a bad download may show once."""
        for _ in range(5):
            try:
                return await self._load(stored, draw, 120)
            except errors.LoraxError as error:
                self._judge.require_allowed(stored, error)
                failed = error
        raise SoakError(f"{stored.name} does not load any more: {failed}", failed.story)

    async def _wish(self, wish: str, stored: Stored, draw: random.Random) -> None:
        seconds = draw.uniform(1, 10)
        impatient = draw.random() < CANCELLED
        task = asyncio.ensure_future(getattr(self, f"_{wish}")(stored, draw, seconds))
        try:
            if impatient:
                await asyncio.wait([task], timeout=draw.uniform(0, 1.5))
                impatient = task.cancel()
            await asyncio.wait([task], timeout=seconds + GRACE)
            self._require(task.done(), f"{wish} of {stored.name} neither ends nor fails")
        finally:
            if task.cancel():
                await asyncio.wait([task], timeout=GRACE)
        if task.cancelled():
            self._require(impatient, f"{wish} of {stored.name} was cancelled by nobody")
            self._tally["cancelled"] += 1
        elif (error := task.exception()) is None:
            self._tally[wish] += 1
        elif isinstance(error, SoakError):
            raise error
        else:
            self._judge.require_allowed(stored, error)
            stage = error.stage if isinstance(error, errors.LoraxError) else ""
            self._tally["failed"] += 1
            self._tally[f"{type(error).__name__} ({stage})"] += 1

    async def _load(self, stored: Stored, draw: random.Random, seconds: float) -> None:
        ref = self._setting.ref(stored)
        handle = await self._setting.loader.load(ref, timeout=seconds, priority=draw.randrange(3))
        with self._holding(handle):
            await self._look(stored, handle, range(LAYERS))
            if draw.random() < VERIFIED:
                await self._verify(stored, handle, seconds)
            await asyncio.sleep(draw.uniform(0, 0.2))

    async def _verify(self, stored: Stored, handle: AdapterHandle, seconds: float) -> None:
        found = await handle.verified(timeout=seconds)
        kind: VerificationKind = "sha256" if stored.promised else "transport"
        right = found == Verification(kind, stored.digests[1])
        self._require(right, f"{stored.name} was checked, and is {found}")
        self._tally["verified"] += 1

    async def _stream(self, stored: Stored, draw: random.Random, seconds: float) -> None:
        ref = self._setting.ref(stored)
        async with self._setting.loader.stream(ref, timeout=seconds) as handle:
            with self._holding(handle):
                for layer in range(LAYERS):
                    await handle.layer_ready(layer, timeout=seconds)
                    await self._look(stored, handle, range(layer, layer + 1))

    async def _prefetch(self, stored: Stored, draw: random.Random, seconds: float) -> None:
        ref, tier = self._setting.ref(stored), draw.choice(TIERS)
        hint = self._setting.loader.prefetch(ref, tier=tier, timeout=seconds)  # type: ignore[arg-type]
        try:
            await hint
        finally:
            hint.cancel()

    async def _pin(self, stored: Stored, draw: random.Random, seconds: float) -> None:
        """For a while."""
        if len(self._pinned) == MOST_PINNED or stored in self._pinned:
            await self._load(stored, draw, seconds)
            return
        ref, loader = self._setting.ref(stored), self._setting.loader
        self._pinned.add(stored)
        try:
            await loader.pin(ref, timeout=seconds)
            await asyncio.sleep(draw.uniform(0, 0.3))
        finally:
            self._pinned.discard(stored)
            loader.unpin(ref)

    @contextmanager
    def _holding(self, handle: AdapterHandle) -> Iterator[None]:
        self.held.add(handle)
        try:
            yield
        finally:
            self.held.discard(handle)
            handle.release()

    async def _look(self, stored: Stored, handle: AdapterHandle, layers: range) -> None:
        """The bytes are the source's; or the loader, which had no time to check them, finds out."""
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._threads, on_device, handle, layers)
        self._tally["layers compared"] += len(layers)
        if found == self._expected[stored.number][layers.start : layers.stop]:
            return
        told = await self._judge.verdict(handle)
        # A download that fails before all bytes are here has no digest to compare.
        if not (stored.promised and told and issubclass(told, errors.FetchError)):
            story = self._setting.loader.placement().story(handle.key)
            raise SoakError(f"{stored.name}: {layers} on the device is wrong ({told})", story)
        self._judge.doubted.add(stored)  # at the end, the source must have damaged it
        self._tally["wrong bytes that were told of"] += len(layers)

    async def _each_second(self, until: float) -> None:
        while monotonic() < until:
            await self._look_around()
            await asyncio.sleep(1)

    async def _look_around(self) -> None:
        self._require_room()
        self._require_leased()
        for what, count in opened().items():
            more = count - self._before[what]
            self._tally.peak(what, more)
            self._require(more <= MOST[what], f"{more} {what} more than before")
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        self._tally.rss.append(resident * os.sysconf("SC_PAGE_SIZE"))
        used, budget = (
            await asyncio.to_thread(self._setting.cache.budget.used),
            self._setting.cache_bytes,
        )
        self._tally.peak("bytes on disk", used)
        self._require(used <= budget, f"the cache has {used:,} bytes of {budget:,}")

    def _require_room(self) -> None:
        residency = self._setting.loader.placement().adapters.values()
        slots = [where.slot.index for where in residency if where.slot is not None]
        self._require(len(slots) == len(set(slots)) <= SLOTS, f"slots {slots}")
        for what, most, taken in (
            ("device", DEVICE_BYTES, sum(where.device_bytes for where in residency)),
            ("host", HOST_BYTES, sum(where.host_bytes for where in residency)),
            ("pinned", PINNED_BYTES, sum(where.pinned_bytes for where in residency)),
        ):
            self._tally.peak(f"{what} bytes", taken)
            self._require(taken <= most, f"{taken:,} {what} bytes of {most:,}")

    def _require_leased(self) -> None:
        """Whoever holds a handle has his slot, but for what the loader told to be broken."""
        residency = self._setting.loader.placement().adapters
        self._tally.peak("handles", len(self.held))
        for handle in self.held:
            where = residency.get(handle.key)
            there = where is not None and where.slot == handle.slot and not handle.released
            broken = (handle.key, handle.slot) in self._judge.broken
            if not there and not broken:
                story = self._setting.loader.placement().story(handle.key)
                raise SoakError(f"{handle.id} is leased, and gone: {where}", story)

    def _require(self, right: object, problem: str) -> None:
        if not right:
            raise SoakError(problem)


def require_flat(rss: list[int]) -> None:
    """The process took in the second half what it took in the first, warmed up."""
    samples = rss[len(rss) // 4 :]
    if len(samples) < RSS_SAMPLES:
        return
    half = len(samples) // 2
    first, second = max(samples[:half]), max(samples[half:])
    if second > first + RSS_MARGIN:
        raise SoakError(f"the process grew from {first:,} to {second:,} bytes")


def require_nothing_left(setting: Setting) -> None:
    """On the loop, at the end."""
    tasks = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
    threads = [each.name for each in threading.enumerate() if each.name.startswith("lorax")]
    rings = [each for each in gc.get_objects() if isinstance(each, StagingRing)]
    for what, left in (
        ("tasks", [task.get_name() for task in tasks]),
        ("threads", threads),
        ("staging buffers", [ring for ring in rings if ring.free < ring.buffers]),
        ("trash", os.listdir(setting.folder / "trash")),
        ("answers half written", [*(setting.folder / "answers").glob("*.*")]),
    ):
        if left:
            raise SoakError(f"{what} are left: {left}")


def require_right_on_disk(setting: Setting) -> int:
    """Every entry is within its budget, whole, and the source's; how many there are. Blocks."""
    cache = DiskCache(setting.folder, setting.cache_bytes, policy("lru"))
    if cache.budget.used() > setting.cache_bytes:
        raise SoakError(f"{cache.budget.used():,} bytes are left of {setting.cache_bytes:,}")
    in_use = [each.name for each in disk_cache.ls(cache) if each.in_use]
    if in_use:
        raise SoakError(f"entries or downloads are in use still: {in_use}")
    for entry in disk_cache.verify(cache):
        if entry.problem is not None or entry.record is None:
            raise SoakError(f"an entry of the cache is damaged: {entry}")
        stored = setting.stored(entry.record.source)
        found = [file.digest.value for file in sorted(entry.record.files, key=lambda f: f.name)]
        if found != list(stored.digests):
            raise SoakError(f"the cache has other bytes of {stored.name} than its source")
    return len(disk_cache.ls(cache))


def play(
    folder: Path, tell: Callable[[str], None], *, device: str, loop: str, seconds: float, seed: int
) -> None:
    """Tells the seed first, and the numbers at the end, whatever comes of it.

    Raises `SoakError`, in a group, if anything was not right.
    """
    tell(f"\nsoak on {device!r} and {loop}: {seconds:g} seconds, seed {seed}")
    tally = Tally()
    expected(seed)  # it takes seconds
    try:
        with faulty_process(seed) as url, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(_play(folder / "cache", url, device, seed, seconds, tally))
    finally:
        tell(f"  {dict(sorted(tally.items()))}")


async def _play(
    folder: Path, url: str, device: str, seed: int, seconds: float, tally: Tally
) -> None:
    before, complained = opened(), list[str]()
    with complaints(lambda _, problem: complained.append(problem)):
        async with setting(library(seed), url, folder, device) as found:
            await Soak(found, seed, tally, before).run(seconds)
        require_flat(tally.rss)
        await asyncio.get_running_loop().shutdown_default_executor()
        require_nothing_left(found)
        tally.peak("entries at the end", require_right_on_disk(found))
    if complained:
        raise SoakError("it complained", complained)


pytestmark = [pytest.mark.usefixtures("nothing_left", "no_socket_left"), pytest.mark.slow]

Capture = pytest.CaptureFixture[str]
DEVICES = pytest.mark.parametrize(("device", "loop"), [("cpu", "uvloop"), ("simulated", "asyncio")])


@pytest.mark.soak
@DEVICES
def test_a_bad_source_for_long(
    tmp_path: Path, request: pytest.FixtureRequest, capfd: Capture, device: str, loop: str
) -> None:
    seconds, seed = map(request.config.getoption, ("soak_seconds", "soak_seed"))
    with capfd.disabled():
        tell: Any = lambda line: sys.stdout.write(f"{line}\n")  # noqa: E731
        play(tmp_path, tell, device=device, loop=loop, seconds=seconds, seed=seed)


@DEVICES
def test_a_bad_source_for_a_moment(tmp_path: Path, device: str, loop: str) -> None:
    told: list[str] = []
    play(tmp_path, told.append, device=device, loop=loop, seconds=5, seed=5)
    assert told
