"""A remote source over a loopback server, with a scripted locator."""

import asyncio
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
import tiny
from cancellation_sweep import stepwise
from fault_server import Asked, Client, FaultServer, answer
from range_downloads import PATIENT, Anywhere, engine
from web_folder import refuse

from lorax_async import AdapterKey, AdapterLoader, AdapterRef
from lorax_async.cache.disk_cache import DiskCache
from lorax_async.concurrency import FetchControl, WorkerThreads
from lorax_async.config import Checking, Limits, LoaderConfig
from lorax_async.errors import AccessDeniedError, AdapterError, AdapterNotFoundError
from lorax_async.formats.digests import Digest
from lorax_async.formats.peft_names import CONFIG_FILE, WEIGHTS_FILE
from lorax_async.http.range_downloader import RangeDownloader
from lorax_async.http.target import Target
from lorax_async.ids import HubRepository, ParsedRef
from lorax_async.lifecycle.policies import policy
from lorax_async.remote.base import LocatedAdapter, RemoteFile
from lorax_async.remote.opening import AdapterOpener, VersionResolver
from lorax_async.remote.remote_source import RemoteParts, RemoteSource
from lorax_async.sources.base import AdapterFile, Source
from lorax_async.urls import parse_url


@dataclass
class Stored:
    """One adapter at its source now; `token` is required for access."""

    config: bytes
    weights: bytes
    token: str | None = None
    named: str | None = None
    """What its source calls this version, if that is not a commit."""

    @property
    def version(self) -> str:
        return self.named or hashlib.sha1(self.config + b"\0" + self.weights).hexdigest()


@dataclass
class ToldLocator:
    """A scripted `Backend`; a revision of 40 digits is a version."""

    server: FaultServer
    there: dict[str, Stored] = field(default_factory=dict)
    promises: bool = True
    located: int = 0
    error: AdapterError | None = None
    silent: bool = False
    unanswered: int = 0

    def is_version(self, revision: str) -> bool:
        return len(revision) == 40

    async def scope(self, location: object, ref: AdapterRef) -> str:
        return _scope(ref)

    async def locate(self, location: object, ref: AdapterRef) -> LocatedAdapter:
        self.located += 1
        await (self._no_answer() if self.silent else asyncio.sleep(0))
        if self.error is not None:
            raise self.error.located()
        stored = self.there.get(ref.text)
        if stored is None:
            raise AdapterNotFoundError("there is no such adapter")
        if stored.token not in {None, ref.token}:
            raise AccessDeniedError("give a token that may have it")
        files = (
            self.file(ref, CONFIG_FILE, stored.config),
            self.file(ref, WEIGHTS_FILE, stored.weights),
        )
        return LocatedAdapter(ref.text, stored.version, _scope(ref), files)

    async def find_files(
        self, location: object, ref: AdapterRef, names: Sequence[str]
    ) -> list[RemoteFile]:
        """Return none: an adapter here has its config and weights only."""
        return []

    async def _no_answer(self) -> None:
        self.unanswered += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.unanswered -= 1

    def file(self, ref: AdapterRef, name: str, data: bytes) -> RemoteFile:
        path = f"/{ref.text}/{name}"
        url = parse_url(self.server.url(path))
        headers = {} if ref.token is None else {"Authorization": f"Bearer {ref.token}"}
        target = Target(url, path[1:], headers, Anywhere())
        if not self.promises:
            return RemoteFile(name, target)
        return RemoteFile(name, target, len(data), sha256(data))


def sha256(data: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(data).hexdigest())


def _scope(ref: AdapterRef) -> str:
    return "" if ref.token is None else f"scope of {ref.token}"


class Steps:
    """Counts the suspensions of a source's calls, and acts before one of them."""

    def __init__(self, source: Source) -> None:
        self.expect(0, lambda: None)
        for name in ("resolve", "open", "fetch_groups"):
            setattr(source, name, partial(self._stepped, getattr(source, name)))

    def expect(self, number: int, act: Callable[[], object]) -> None:
        """Call `act` before the suspension of that number from now."""
        self._left, self._act, self.met = number, act, False

    async def _stepped(self, method: Callable[..., Coroutine[Any, Any, Any]], *given: Any) -> Any:
        return await stepwise(method(*given), self._step)

    def _step(self, _: int) -> None:
        self._left -= 1
        if self._left == 0:
            self.met = True
            self._act()


class ToldSource(RemoteSource):
    """A remote source that accepts any text as an id."""

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        options = (ref.revision, ref.token, ref.digest, ref.allow_stale, ref.use_token)
        location = HubRepository("hub", "", None, f"{ref.text}/")
        return await super().resolve(ParsedRef(ref.id, "hub", *options, location=location))


class CachedSource(ToldSource):
    """A source that has every adapter in its cache before it is opened."""

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        key = await super().resolve(ref)
        file = await self.open(key, FetchControl())
        await self.fetch_groups(file, [], lambda _: None, FetchControl())
        file.reader.close()
        return key


RANK = 128
"""Some 400 KB: more than comes with the first request."""

Fault = Callable[["RemoteWorld", Asked, Client], None]


def adapter_of(asked: Asked) -> str:
    return asked.target.split("/")[1]


def is_weights(asked: Asked) -> bool:
    return asked.target.endswith(WEIGHTS_FILE)


class RemoteWorld:
    """A source with all its parts, closed at the end of the `with` block.

    Its cache is below a folder, as its adapters are. `faults` has what is done wrong, by their names.
    """

    holds = True

    def __init__(
        self,
        folder: Path,
        *,
        verify: Checking = "stream",
        cache_bytes: int = 64 << 20,
        revalidate: float = 0.0,
        limits: Limits | None = None,
        cached: bool = False,
        http: RangeDownloader | None = None,
    ) -> None:
        self.folder, self.adapters = folder / "cache", folder / "adapters"
        self.verify: Checking = verify
        self.versions: list[tuple[str, Stored]] = []
        self.faults: dict[str, Fault] = {}
        self.server = FaultServer(b"")
        self.server.__enter__()
        self.server.behave = self.serve
        self.locator = ToldLocator(self.server)
        self.engine = http or engine(timeouts=PATIENT)
        self.workers = WorkerThreads(4)
        self.later = 0.0
        """Seconds that its clock is ahead."""
        self.cache = DiskCache(self.folder, cache_bytes, policy("lru"))
        resolving = VersionResolver(
            *(self._find_backend, self.cache, self.workers),
            offline=False,
            fresh=revalidate,
            clock=lambda: time.monotonic() + self.later,
        )
        kind = CachedSource if cached else ToldSource
        limits = limits or Limits()
        opening = AdapterOpener(resolving, self.engine, self.workers, limits=limits, verify=verify)
        parts = RemoteParts(resolving, opening, self.workers, lambda: None)
        self.source: Source = kind(lambda: parts, verify=verify)

    async def _find_backend(self, _: object) -> ToldLocator:
        return self.locator

    def put(self, name: str, config: bytes, weights: bytes) -> AdapterRef:
        self.locator.there[name] = Stored(config, weights)
        self.versions.append((name, self.locator.there[name]))
        return self.ref(name)

    def stock(self, name: str = "one", seed: int = 0, rank: int = RANK) -> Path:
        """Put an adapter at the source, and in the returned folder."""
        folder = tiny.write(self.adapters / name, seed, rank)
        self.put(name, *tiny.files(folder))
        return folder

    def ref(self, name: str) -> AdapterRef:
        return AdapterRef(name, source="hub")

    def content(self, target: str) -> tuple[bytes, str]:
        """Return the bytes at a target, and their ETag. Raises `KeyError`."""
        name, file = target.removeprefix("/").split("/")
        stored = self.locator.there[name]
        data = stored.config if file == CONFIG_FILE else stored.weights
        return data, f'"{stored.version}-{file}"'

    def serve(self, asked: Asked, client: Client) -> None:
        self.faults.get(adapter_of(asked), RemoteWorld.well)(self, asked, client)

    def well(self, asked: Asked, client: Client) -> None:
        """Answer without faults."""
        try:
            data, etag = self.content(asked.target)
        except KeyError:
            refuse("404 Not Found")(asked, client)
        else:
            answer(asked, client, data, f"ETag: {etag}")

    def asked_of(self, name: str) -> list[Asked]:
        return [each for each in list(self.server.asked) if adapter_of(each) == name]

    def spans_of(self, name: str) -> list[tuple[int, int]]:
        """Return the requested spans of its weights."""
        return [asked.span for asked in self.asked_of(name) if is_weights(asked) and asked.span]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self.engine.close, self.workers.shutdown):
            end()
        self.server.__exit__()


def over(world: RemoteWorld, **settings: object) -> AdapterLoader:
    given: Any = {"device_bytes": 16 << 20, "max_slots": 8, "io_threads": 2, "timeout": 30}
    config = LoaderConfig(**given | {"verify": world.verify} | settings)
    return AdapterLoader(tiny.layout(), config, source=world.source)


async def opened(
    world: RemoteWorld, name: str = "one", control: FetchControl | None = None
) -> AdapterFile:
    key = await world.source.resolve(world.ref(name))
    return await world.source.open(key, control or FetchControl())


async def fetch_file(world: RemoteWorld, name: str = "one") -> AdapterFile:
    file = await opened(world, name)
    await world.source.fetch_groups(file, [], lambda _: None, FetchControl())
    return file


@pytest.fixture
def settings() -> dict[str, Any]:
    """Return the settings of the fixture `world`; tests override them."""
    return {}


@pytest.fixture
def world(tmp_path: Path, settings: dict[str, Any]) -> Iterator[RemoteWorld]:
    with RemoteWorld(tmp_path, **settings) as world:
        yield world
