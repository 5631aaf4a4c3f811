"""Resolve ids to versions: by a recent answer, by the cache, or by a query to the source."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from lorax_async.cache.base import Cache, CacheKey
from lorax_async.concurrency import WorkerThreads
from lorax_async.errors import AdapterNotFoundError, CapacityError, FetchError, IntegrityError
from lorax_async.formats.split_weights import FileRole
from lorax_async.remote.base import AnotherVersionError, Backend, LocatedAdapter, RemoteFile
from lorax_async.types import AdapterRef, RemoteKey

MAX_REFS = 65_536
MAX_KEYS = 16_384
"""The lifecycle remembers as many idle adapters."""

MAX_ANSWERS = 64
"""Unused first bytes that came with a version; about 256 KiB each."""


ANSWER_SECONDS = 1.0
"""Request older first bytes again: the source may have changed its file under the same validator,
and the first bytes of one version would be joined with the rest of another."""

LOCATED_SECONDS = 600.0
"""A file's location is valid for this long: signed URLs expire."""


@dataclass(frozen=True, slots=True)
class OriginState:
    """The last request for a key, and its source's answer; None if it must be asked again."""

    ref: AdapterRef
    located: LocatedAdapter | None
    since: float


class ResolutionCache:
    """Sources' answers, by request and by key, valid for `seconds` of `clock`."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._seconds = seconds
        self._clock = clock
        self._keys: OrderedDict[AdapterRef, tuple[RemoteKey, float]] = OrderedDict()
        self._origins: OrderedDict[RemoteKey, OriginState] = OrderedDict()
        self._answered: OrderedDict[RemoteKey, None] = OrderedDict()

    def recent(self, ref: AdapterRef) -> RemoteKey | None:
        """Return the key that `ref` recently resolved to."""
        key, since = self._keys.get(ref, (None, 0.0))
        if key is None or self._clock() - since >= self._seconds:
            return None
        self._asked(ref, key)
        return key

    def remember(self, ref: AdapterRef, key: RemoteKey, located: LocatedAdapter | None) -> None:
        """Record that `ref` is `key` now, by the source, or by the cache if none was asked."""
        self._keys[ref] = (key, self._clock())
        self._keys.move_to_end(ref)
        if len(self._keys) > MAX_REFS:
            self._keys.popitem(last=False)
        if located is None and self._asked(ref, key):
            return
        self._origins[key] = OriginState(ref, located, self._clock())
        self._origins.move_to_end(key)
        if len(self._origins) > MAX_KEYS:
            gone, _ = self._origins.popitem(last=False)
            self._answered.pop(gone, None)
        if located is not None and any(file.answer for file in located.files):
            self._answered[key] = None
            self._answered.move_to_end(key)
            if len(self._answered) > MAX_ANSWERS:
                self.used(next(iter(self._answered)))

    def _asked(self, ref: AdapterRef, key: RemoteKey) -> bool:
        """Let the key be fetched in the name of its last request; False if the key is unknown.

        Another request's token might be refused, and its digest is not this one's.
        """
        origin = self._origins.get(key)
        if origin is not None and origin.ref != ref:
            self._origins[key] = replace(origin, ref=ref)
        return origin is not None

    def origin(self, key: RemoteKey) -> OriginState | None:
        origin = self._origins.get(key)
        seconds = ANSWER_SECONDS if key in self._answered else LOCATED_SECONDS
        if origin is None or self._clock() - origin.since < seconds:
            return origin
        return replace(origin, located=None)

    def used(self, key: RemoteKey) -> None:
        """Drop the first bytes that came with `key`: locate it again."""
        if key in self._answered:
            del self._answered[key]
            self._origins[key] = replace(self._origins[key], located=None)


Caches = Callable[[str], Cache]
"""Return the cache for a kind of source. The first call makes it, and blocks."""


class ResolutionRequest(NamedTuple):
    """A request to a source under a scope's authority; "" for a field that the caller left out."""

    source: str
    text: str
    revision: str
    scope: str

    @classmethod
    def of(cls, ref: AdapterRef, scope: str) -> ResolutionRequest:
        return cls(ref.source or "", ref.text, ref.revision or "", scope)

    def __str__(self) -> str:
        """Return the form that caches record; `resolution_request` parses it."""
        return "\n".join(self)


def resolution_request(text: str) -> ResolutionRequest | None:
    """Return the request that `text` stands for, or None."""
    parts = text.split("\n")
    return ResolutionRequest(*parts) if len(parts) == len(ResolutionRequest._fields) else None


class VersionResolver:
    """Resolves refs by the backends of their kinds of sources, as the settings allow.

    Parameters
    ----------
    backends, caches
        Return those for an `AdapterRef.source`; both may block.
    known
        Recent answers.
    offline
        Send no request to any source.
    fresh
        Seconds for which a grant lets a scope have a cached adapter.
    """

    def __init__(
        self,
        backends: Callable[[str], Backend],
        caches: Caches,
        known: ResolutionCache,
        workers: WorkerThreads,
        *,
        offline: bool,
        fresh: float,
    ) -> None:
        self._make_backend = backends
        self._caches = caches
        self._known = known
        self._workers = workers
        self._offline = offline
        self._fresh = fresh
        self._recorded: dict[str, str] = {}
        self._backends: dict[str, Backend] = {}

    async def resolve(self, ref: AdapterRef) -> RemoteKey:
        key = self._known.recent(ref)
        return key if key is not None else await self._resolve(ref)

    async def locate(self, key: RemoteKey) -> LocatedAdapter:
        """Return where the key's files are. Ask the source if that is unknown."""
        origin = self._known.origin(key)
        if origin is None:
            raise AdapterNotFoundError("where this key lies is no longer known; load it by its id")
        if origin.located is not None:
            return origin.located
        located = await self._query(origin.ref)
        located_key = RemoteKey(located.source, (), located.version)
        self._known.remember(origin.ref, located_key, located)
        if located_key != key:
            raise IntegrityError("it is another version by now; load it again")
        return located

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """Return the files that the index names."""
        key = RemoteKey(located.source, (), located.version)
        origin = self._known.origin(key)
        assert origin is not None, "it was located a moment ago"
        return await (await self._backend(origin.ref)).shards(located, roles)

    async def _resolve(self, ref: AdapterRef) -> RemoteKey:
        backend = await self._backend(ref)
        await backend.scope(ref)  # from then on the backend knows this machine's token
        pinned = backend.pinned_version(ref)
        cached = await self._cached_key(ref, pinned, self._fresh)
        if cached is not None:
            return cached
        try:
            located = await self._query(ref)
        except (FetchError, AnotherVersionError) as error:
            unreachable = isinstance(error, FetchError)
            if unreachable and not error.retryable and not self._offline:
                raise
            cached = await self._cached_key(ref, pinned, inf)
            if cached is None and unreachable:
                cached = await self._last_known(ref, backend)
            if cached is None:
                raise
            return cached
        key = RemoteKey(located.source, (), located.version)
        self._known.remember(ref, key, located)
        await self._record(ref, located)
        return key

    async def _cached_key(
        self, ref: AdapterRef, pinned: tuple[str, str, str] | None, within: float
    ) -> RemoteKey | None:
        """Return the key of a pinned revision, if the cache has it for this caller."""
        if pinned is None or not await self._may_have(ref, *pinned, within):
            return None
        key = RemoteKey(pinned[0], (), pinned[1])
        self._known.remember(ref, key, None)
        return key

    async def _query(self, ref: AdapterRef) -> LocatedAdapter:
        if self._offline:
            raise FetchError(
                f"it is not in the cache{_for_whom(ref)}, and the loader is offline; fetch it"
                " before, or set LoaderConfig(offline=False)",
                retryable=False,
            )
        return await (await self._backend(ref)).locate(ref)

    async def _backend(self, ref: AdapterRef) -> Backend:
        kind = ref.source or ""
        if kind not in self._backends:
            self._backends[kind] = await self._workers.run(lambda: self._make_backend(kind))
        return self._backends[kind]

    async def _may_have(
        self, ref: AdapterRef, source: str, version: str, scope: str, within: float
    ) -> bool:
        """Return whether the cache has it, public or granted to `scope` in the last `within` s."""

        def look() -> bool:
            entry = self._caches(ref.source or "").open(CacheKey(source, version))
            if entry is None:
                return False
            try:
                if entry.granted(PUBLIC) is not None:
                    return True
                since = entry.granted(scope)
            finally:
                entry.close()
            return since is not None and since <= within

        return await self._workers.run(look)

    async def _last_known(self, ref: AdapterRef, backend: Backend) -> RemoteKey | None:
        """Return the source's last answer, if it is cached and the caller accepts a stale one."""
        if not ref.allow_stale and not self._offline:
            return None
        scope = await backend.scope(ref)
        request = str(ResolutionRequest.of(ref, scope))
        last = await self._workers.run(lambda: self._caches(ref.source or "").last_version(request))
        if last is None:
            return None
        source, version = last
        if not await self._may_have(ref, source, version, scope, inf):
            return None
        key = RemoteKey(source, (), version, stale=True)
        self._known.remember(ref, key, None)
        return key

    async def _record(self, ref: AdapterRef, located: LocatedAdapter) -> None:
        """Record the answer for times when the source is unreachable. Ignore failures."""
        request = str(ResolutionRequest.of(ref, located.scope))
        if self._recorded.get(request) == located.version:
            return
        answer = (located.source, located.version)
        try:
            await self._workers.run(
                lambda: self._caches(ref.source or "").note_version(request, *answer)
            )
        except (CapacityError, FetchError):
            return  # a cached adapter needs no room; a download reports the failure itself
        if len(self._recorded) >= _MAX_RECORDED:
            self._recorded.clear()
        self._recorded[request] = located.version


def _for_whom(ref: AdapterRef) -> str:
    """Return advice for callers without a token, the same whether the adapter exists or not."""
    if ref.source != "hub" or ref.token is not None or ref.use_token:
        return ""
    return (
        " for callers without a token (on a machine that has one, adapters that other tools stored"
        " there are for ids with use_token=True)"
    )


_MAX_RECORDED = 65_536

PUBLIC = ""
"""The scope of callers without a token."""
