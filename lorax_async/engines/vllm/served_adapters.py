"""An adapter's way from the name in a request to vLLM's engine, and out of it again."""

from __future__ import annotations

import asyncio
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

from lorax_async.engines.plugin_settings import (
    BaseRequirements,
    FailureLog,
    PluginSettings,
    explain,
)
from lorax_async.engines.vllm.engine_calls import EngineCalls
from lorax_async.errors import FetchError, IntegrityError, LoraxError
from lorax_async.lru import remember
from lorax_async.runtime.folders import AdapterFolder, StoreStatistics
from lorax_async.store import AdapterStore
from lorax_async.types import AdapterKey, AdapterRef

LINGER = 1.0
"""Seconds without a request before an unloaded adapter leaves: one may be on its way to it."""

PERIOD = 5.0
"""Seconds between two refreshes of what vLLM names."""

MAX_SERVED = 256
"""Adapters that vLLM names at once, as long as others are idle: each has open files."""

MAX_REMEMBERED = 256
"""Names of prefetched adapters."""

ATTEMPTS = 3
"""Builds of an adapter that changes meanwhile."""

POLL = 0.1
"""Seconds between two looks whether the requests of an earlier version have ended."""

_logger = logging.getLogger("vllm.lorax_async")  # vLLM writes what its children log


class Models(Protocol):
    """vLLM's `OpenAIServingModels`: the adapters that requests may use, by name."""

    lora_requests: dict[str, Any]
    lora_resolver_lock: dict[str, asyncio.Lock]
    lora_id_counter: Any


@dataclass(slots=True, eq=False)
class ServedAdapter:
    """One adapter that vLLM has, or is about to get, and the lease on its folder."""

    name: str
    ref: AdapterRef
    path: str
    """Another one for each version: vLLM keys what it computed by name and path."""
    folder: AdapterFolder | None
    """None for one of `--lora-modules` until it is prepared."""
    nbytes: int = 0
    request: Any = None
    """vLLM's LoRARequest, once there is one."""
    is_fixed: bool = False
    """Whether it stays as it was loaded: from a folder that the operator named, by
    `/v1/load_lora_adapter` or `--lora-modules`."""
    is_refused: bool = False
    """Whether what its name means now was refused: only requests that have begun use it."""
    is_retired: bool = False
    """Whether it leaves because it was idle, not because it was unloaded."""
    is_resolvable: bool = False
    """Whether a request by its name brings it back, so that it may leave while it is idle."""
    idle_since: float | None = None

    @property
    def version(self) -> str | None:
        """The commit or ETags of its files; None for a local folder."""
        return None if self.folder is None else self.folder.version

    @property
    def key(self) -> AdapterKey | None:
        return None if self.folder is None else self.folder.key


class ServedAdapters:
    """All adapters that vLLM has through the plug-in. On the API server's event loop.

    vLLM's `lora_requests` is the truth about what requests may use. An adapter that is no longer
    in it, by whatever route, is taken out of the engine once its requests have ended; only then
    is its folder released.
    """

    def __init__(
        self,
        settings: PluginSettings,
        store: AdapterStore,
        engine: EngineCalls,
        models: Models,
        base: Callable[[], BaseRequirements],
    ) -> None:
        self._settings = settings
        self._store = store
        self._engine = engine
        self._models = models
        self._make_base = base
        self._base: asyncio.Future[BaseRequirements] | None = None
        self._served: dict[str, ServedAdapter] = {}
        self._local_versions: dict[str, tuple[AdapterKey, int]] = {}
        self._leaving: list[ServedAdapter] = []
        self._prefetched: OrderedDict[str, ServedAdapter] = OrderedDict()
        self.failures = FailureLog(_logger)
        self.waiting = 0
        """Requests that wait for an adapter which is not ready."""
        self.on_wait: Callable[[float], object] = lambda _: None
        """Called with the seconds of each wait."""
        self._uses: Counter[str] = Counter()
        self._report: Mapping[str, Any] = {}
        self._lock = asyncio.Lock()
        self._background = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._discards: set[asyncio.Task[None]] = set()

    # -- into the engine --------------------------------------------------------------------------

    async def prepare(self, name: str, ref: AdapterRef, *, in_place: bool = False) -> ServedAdapter:
        """Fetch and check an adapter and build its weights. The caller passes it to `add`.

        With `in_place` it gets the number that the name has in vLLM.

        Raise what `AdapterStore.checkout` raises, `IncompatibleAdapterError` if it does not fit
        the base, and `UnsupportedAdapterError` if vLLM cannot load it. Nothing stays leased.
        """
        try:
            return await self._wait_for(name, ref, in_place=in_place)
        except LoraxError as error:
            self.failures.note(name, error)
            raise

    async def _wait_for(self, name: str, ref: AdapterRef, *, in_place: bool) -> ServedAdapter:
        """Prepare an adapter for a request that waits, for which failures are noted elsewhere."""
        began = monotonic()
        self.waiting += 1
        try:
            adapter = await self._prepare(name, ref)
            await self._wait_for_earlier(adapter, in_place=in_place)
            return adapter
        finally:
            self.waiting -= 1
            self.on_wait(monotonic() - began)

    async def _wait_for_earlier(self, adapter: ServedAdapter, *, in_place: bool) -> None:
        """Wait for requests of an earlier version of the name that must not share a step."""
        try:
            # Unless they are extended, vLLM's workers take two of one name in a batch for one.
            may_mix = not (in_place or self._engine.extended)
            while may_mix and self._has_requests(adapter.name):  # noqa: ASYNC110 - vLLM has no event
                await asyncio.sleep(POLL)
        except BaseException:
            self._discard_later(adapter)
            raise

    async def _prepare(self, name: str, ref: AdapterRef) -> ServedAdapter:
        for _ in range(ATTEMPTS):
            try:
                folder = await self._store.checkout(ref)
            except LoraxError as error:
                raise explain(error, ref) from error.__cause__
            adapter = ServedAdapter(name, ref, self._path_of(folder), folder)
            if await self._build(adapter, folder.key):
                return adapter
            await self._release(adapter, keep_copy=False)
        raise IntegrityError(
            "its files changed each time while they were read; save to a new folder and rename"
            " it into place",
            id=ref.text,
        )

    def _path_of(self, folder: AdapterFolder) -> str:
        """Return the folder's path, spelled in another way for each version of a local folder."""
        path, key = str(folder.path), folder.key
        if not key.files:
            return path  # it is the version's own
        last, number = self._local_versions.get(path, (key, 0))
        number += last != key
        self._local_versions[path] = key, number
        digits = f"{number:b}" if number else ""
        return path + "".join("/." if digit == "1" else "/" for digit in digits)

    async def _build(self, adapter: ServedAdapter, key: AdapterKey) -> bool:
        """Build its weights. Return whether its id means version `key` still.

        All that was read is of it then; and requests that waited, and began later, may have it.
        """
        self._uses[adapter.path] += 1
        try:
            base = await self.load_base()
            adapter.nbytes = await asyncio.to_thread(base.check, Path(adapter.path))
            await self._engine.build(adapter.path, self._settings.timeout)
            return await self._store.resolve(adapter.ref) == key
        except BaseException as error:
            self._discard_later(adapter)
            if not isinstance(error, LoraxError):
                raise
            located = explain(error.located(id=adapter.ref.text), adapter.ref)
            raise located from error.__cause__

    async def load_base(self) -> BaseRequirements:
        """Return the base, which is read in a thread the first time."""
        if self._base is None:
            self._base = asyncio.ensure_future(asyncio.to_thread(self._make_base))
        return await asyncio.shield(self._base)

    def add(self, adapter: ServedAdapter, request: Any) -> None:
        """Keep an adapter as long as vLLM names it; the name's earlier one leaves."""
        adapter.request = request
        self.failures.clear(adapter.name)
        self._prefetched.pop(adapter.name, None)
        if (before := self._served.get(adapter.name)) is not None:
            self._leaving.append(before)
        self._served[adapter.name] = adapter

    async def renew(self, name: str) -> None:
        """Let `name` mean what it means now, for a request that begins with it.

        Another version of a served adapter takes its name; requests that have begun keep theirs.
        Raise the error of its source, or what `prepare` raises.
        """
        while True:
            adapter = self._served.get(name)
            if adapter is None or adapter.is_fixed or not self._is_named(adapter):
                return  # vLLM asks the resolver, or answers by itself
            if self._store.current_key(adapter.ref) == adapter.key:
                return
            try:
                is_done = await self._renew(adapter)
            except LoraxError as error:
                adapter.is_refused = True
                explained = explain(error, adapter.ref)
                self.failures.note(name, explained)
                raise explained from error.__cause__
            if is_done:
                adapter.is_refused = False
                self.failures.clear(name)
                return

    async def _renew(self, adapter: ServedAdapter) -> bool:
        """Replace an adapter unless its name means it still.

        Return False if another request replaced it meanwhile: with a version that may have been
        asked for before this request began.
        """
        if await self._store.resolve(adapter.ref) == adapter.key:
            return True
        async with self._models.lora_resolver_lock[adapter.name]:
            is_served = self._served.get(adapter.name) is adapter and self._is_named(adapter)
            if is_served:
                await self._replace(adapter)
            return is_served

    async def _replace(self, adapter: ServedAdapter) -> None:
        """Give an adapter's name to the version that it means now. vLLM's lock is held."""
        new = await self._wait_for(adapter.name, adapter.ref, in_place=False)
        new.is_resolvable = adapter.is_resolvable
        request = copy(adapter.request)
        request.lora_int_id = self._models.lora_id_counter.inc(1)
        request.lora_path = new.path
        try:
            await self._engine.add(request)
        except BaseException:
            self._discard_later(new)
            raise
        self._models.lora_requests[adapter.name] = request
        self.add(new, request)

    def add_loaded(self) -> None:
        """Add the adapters of `--lora-modules`, which vLLM has loaded, and prepare them again."""
        for name, request in self._models.lora_requests.items():
            path = os.path.abspath(os.path.expanduser(request.lora_path))
            if os.path.isdir(path):  # otherwise it is one of the hub, or has gone
                request.lora_path = path
            self._uses[request.lora_path] += 1
            ref = AdapterRef(Path(request.lora_path))
            self.add(ServedAdapter(name, ref, request.lora_path, None, is_fixed=True), request)
        self._start(self._prepare_loaded(tuple(self._served.values())))

    async def _prepare_loaded(self, adapters: Iterable[ServedAdapter]) -> None:
        for adapter in adapters:
            try:
                async with self._background:
                    prepared = await self._prepare(adapter.name, adapter.ref)
            except LoraxError as error:
                self.failures.note(adapter.name, error, "of --lora-modules is loaded by vLLM alone")
                continue
            if self._served.get(adapter.name) is adapter and self._is_named(adapter):
                prepared.is_fixed = True
                adapter.request.lora_path = prepared.path
                self.add(prepared, adapter.request)
            else:
                await self.discard(prepared)

    async def discard(self, adapter: ServedAdapter) -> None:
        """Release an adapter that vLLM did not get; its weights stay while there is room."""
        await self._release(adapter, keep_copy=True)

    async def _release(self, adapter: ServedAdapter, *, keep_copy: bool) -> None:
        """Let the workers forget an adapter, unless it has another name, and end its lease."""
        self._uses[adapter.path] -= 1
        try:
            if not self._uses[adapter.path]:
                del self._uses[adapter.path]
                await self._engine.forget(adapter.path, keep_copy=keep_copy)
        finally:
            if adapter.folder is not None:
                adapter.folder.release()

    def prefetch(self, name: str, ref: AdapterRef) -> None:
        """Fetch and check an adapter and build its weights, in the background."""
        self._start(self._prefetch(name, ref))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        _start_in(self._tasks, work)

    def _discard_later(self, adapter: ServedAdapter) -> None:
        _start_in(self._discards, self.discard(adapter))

    async def _prefetch(self, name: str, ref: AdapterRef) -> None:
        try:
            await self._store.prefetch(ref)  # leaves the connections to requests
            async with self._background:  # a request waits for one to be built, not for all
                adapter = await self._prepare(name, ref)
        except LoraxError as error:
            self.failures.note(name, explain(error, ref))
            return
        await self.discard(adapter)
        if name not in self._served:
            remember(self._prefetched, name, adapter, MAX_REMEMBERED)

    # -- out of the engine ------------------------------------------------------------------------

    async def watch(self) -> None:
        """Look every `PERIOD` seconds, until cancelled."""
        while True:
            await asyncio.sleep(LINGER if self._leaving else PERIOD)
            try:
                await self.refresh()
            except Exception:
                _logger.exception("could not look after adapters")

    async def refresh(self) -> None:
        """Let adapters go that vLLM no longer names, and read the workers' report."""
        async with self._lock:
            for name, adapter in tuple(self._served.items()):
                if not self._is_named(adapter) and not self._is_locked(name):
                    del self._served[name]
                    self._leaving.append(adapter)
            self._retire_idle()
            for adapter in tuple(self._leaving):
                if self._is_idle(adapter):
                    self._leaving.remove(adapter)
                    await self._let_go(adapter)
            self._report = await self._engine.report()
        for path, reason in self._report["lost"].items():
            await self._fail(path, reason)

    def _is_named(self, adapter: ServedAdapter) -> bool:
        named = self._models.lora_requests.get(adapter.name)
        return named is not None and named.lora_path == adapter.path

    def _has_requests(self, name: str) -> bool:
        """Return whether requests use an adapter that has the name, or had it."""
        had = (*self._leaving, *self._served.values())
        return any(each.name == name and self._engine.uses(each.path) for each in had)

    def _retire_idle(self) -> None:
        """Stop naming idle adapters that were refused, and others for room on disk.

        vLLM never does, and a leased folder stays in the cache: at most half of it, and of the
        adapters that were seen in use last.
        """
        for name, adapter in tuple(self._served.items()):
            if self._engine.uses(adapter.path):
                self._served[name] = self._served.pop(name)
        leased = sum(each.nbytes for each in self._served.values() if each.version is not None)
        number = sum(each.is_resolvable for each in self._served.values())
        for name, adapter in tuple(self._served.items()):
            has_room = leased <= self._settings.cache_bytes // 2 and number <= MAX_SERVED
            if has_room and not adapter.is_refused:
                continue
            is_free = adapter.is_resolvable and not self._is_locked(name)
            if is_free and self._is_idle(adapter):
                self._models.lora_requests.pop(name, None)
                adapter.is_retired, adapter.idle_since = True, None
                self._leaving.append(self._served.pop(name))
                leased -= 0 if adapter.version is None else adapter.nbytes
                number -= 1

    def _is_locked(self, name: str) -> bool:
        """Return whether vLLM adds or removes the adapter just now."""
        lock = self._models.lora_resolver_lock.get(name)
        return lock is not None and lock.locked()

    def _is_idle(self, adapter: ServedAdapter) -> bool:
        """Return whether an adapter has had no request for `LINGER` seconds."""
        if self._engine.uses(adapter.path):
            adapter.idle_since = None
            return False
        if adapter.idle_since is None:
            adapter.idle_since = monotonic()
        return monotonic() - adapter.idle_since >= LINGER

    async def _let_go(self, adapter: ServedAdapter) -> None:
        number = adapter.request.lora_int_id
        try:
            if all(number != named.lora_int_id for named in self._models.lora_requests.values()):
                await self._engine.remove(number)
        finally:
            await self._release(adapter, keep_copy=adapter.is_retired)

    def handle_loss(self, path: str, reason: str) -> None:
        """Fail the requests of an adapter that a worker could not read again, in the background."""
        self._start(self._fail(path, reason))

    async def _fail(self, path: str, reason: str) -> None:
        """End the requests of a lost adapter, which has zeros for weights, and its names."""
        problem = f"its files could not be read again: {reason}"
        for name, named in tuple(self._models.lora_requests.items()):
            if named.lora_path == path:
                self.failures.note(name, FetchError(problem, id=name))
                del self._models.lora_requests[name]
        await self._engine.fail(path, problem)

    async def close(self) -> None:
        """Release all folders, as the engine ends."""
        for task in self._tasks:
            task.cancel()
        while left := self._tasks | self._discards:  # a cancelled task may begin a discard
            await asyncio.wait(left)
        for adapter in (*self._served.values(), *self._leaving):
            if adapter.folder is not None:
                adapter.folder.release()

    # -- reports ----------------------------------------------------------------------------------

    @property
    def counts(self) -> Mapping[str, int]:
        """What the workers did since they started, as of the last refresh."""
        counts: Mapping[str, int] = self._report.get("counts", {})
        return counts

    @property
    def downloads(self) -> StoreStatistics:
        return self._store.statistics()

    def tiers(self) -> Iterable[tuple[str, str]]:
        """Yield the name and tier ("device", "host" or "disk") of each adapter, as last seen."""
        for adapter in (*self._served.values(), *self._prefetched.values()):
            yield adapter.name, self._tier(adapter)

    def _tier(self, adapter: ServedAdapter) -> str:
        number = None if adapter.request is None else adapter.request.lora_int_id
        if number in self._report.get("device", ()):
            return "device"
        built = adapter.path in self._report.get("built", ())
        return "host" if built or number in self._report.get("cached", ()) else "disk"

    def describe(self) -> list[dict[str, Any]]:
        """Return a JSON object for each adapter, and for each name that could not be served."""
        rows: list[dict[str, Any]] = [
            {
                "name": adapter.name,
                "id": adapter.ref.text,
                "tier": self._tier(adapter),
                "bytes": adapter.nbytes,
                "version": adapter.version,
                "last_error": self.failures.text(adapter.name),
            }
            for adapter in (*self._served.values(), *self._prefetched.values())
        ]
        named = {row["name"] for row in rows}
        rows += [
            {"name": name, "tier": None, "last_error": self.failures.text(name)}
            for name in self.failures
            if name not in named
        ]
        return rows


def _start_in(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work, name="lorax adapter")
    tasks.add(task)
    task.add_done_callback(tasks.discard)
