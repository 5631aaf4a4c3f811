"""Resolve an id to a version by asking its source, or from what it answered before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from lorax_async.cache.base import Cache
from lorax_async.cache.records import CacheKey
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
"""Older first bytes are requested again: the source may have changed its file under the same
validator, and they would be joined with the rest of another version."""

LOCATED_SECONDS = 600.0
"""How long a file's location counts: signed URLs expire."""


@dataclass(frozen=True, slots=True)
class OriginState:
    """The last request for a key, and its source's answer; None if it must be asked again."""

    ref: AdapterRef
    located: LocatedAdapter | None
    since: float


class ResolutionCache:
    """Sources' answers, by request and by key.

    They count for `seconds` of `clock`.
    """

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
    """A source and what it is asked for, on whose authority; "" where the caller said nothing."""

    source: str
    text: str
    revision: str
    scope: str

    @classmethod
    def of(cls, ref: AdapterRef, scope: str) -> ResolutionRequest:
        return cls(ref.source or "", ref.text, ref.revision or "", scope)

    def __str__(self) -> str:
        """As caches note it; `resolution_request` reads it."""
        return "\n".join(self)


def resolution_request(text: str) -> ResolutionRequest | None:
    """Return the request that `text` stands for, or None."""
    parts = text.split("\n")
    return ResolutionRequest(*parts) if len(parts) == len(ResolutionRequest._fields) else None


class VersionResolver:
    """Resolves refs by the locators of their kinds of sources, as far as settings allow.

    Parameters
    ----------
    locators, caches
        By `AdapterRef.source`; both may block.
    known
        Recent answers.
    offline
        Ask no source.
    fresh
        Seconds for which a scope may have a cached adapter that it was granted.
    """

    def __init__(
        self,
        locators: Callable[[str], Backend],
        caches: Caches,
        known: ResolutionCache,
        workers: WorkerThreads,
        *,
        offline: bool,
        fresh: float,
    ) -> None:
        self._locators = locators
        self._caches = caches
        self._known = known
        self._workers = workers
        self._offline = offline
        self._fresh = fresh
        self._noted: dict[str, str] = {}
        self._here: dict[str, Backend] = {}

    async def resolve(self, ref: AdapterRef) -> RemoteKey:
        key = self._known.recent(ref)
        return key if key is not None else await self._resolve(ref)

    async def located(self, key: RemoteKey) -> LocatedAdapter:
        """Return where the key's files are. Ask the source if that is unknown."""
        origin = self._known.origin(key)
        if origin is None:
            raise AdapterNotFoundError("where this key lies is no longer known; load it by its id")
        if origin.located is not None:
            return origin.located
        located = await self._asked(origin.ref)
        found = RemoteKey(located.source, (), located.version)
        self._known.remember(origin.ref, found, located)
        if found != key:
            raise IntegrityError("it is another version by now; load it again")
        return located

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """Return the files that the index names."""
        key = RemoteKey(located.source, (), located.version)
        origin = self._known.origin(key)
        assert origin is not None, "it was located a moment ago"
        return await (await self._locator(origin.ref)).shards(located, roles)

    async def _resolve(self, ref: AdapterRef) -> RemoteKey:
        locator = await self._locator(ref)
        await locator.scope(ref)  # from then on the locator knows this machine's token
        pinned = locator.recalled(ref)
        here = await self._here_already(ref, pinned, self._fresh)
        if here is not None:
            return here
        try:
            located = await self._asked(ref)
        except (FetchError, AnotherVersionError) as error:
            away = isinstance(error, FetchError)
            if away and not error.retryable and not self._offline:
                raise
            here = await self._here_already(ref, pinned, inf)
            if here is None and away:
                here = await self._last_known(ref, locator)
            if here is None:
                raise
            return here
        key = self._remembered(ref, RemoteKey(located.source, (), located.version), located)
        await self._note(ref, located)
        return key

    async def _here_already(
        self, ref: AdapterRef, pinned: tuple[str, str, str] | None, within: float
    ) -> RemoteKey | None:
        """Return the key of a pinned revision, if the cache has it for this caller."""
        if pinned is None or not await self._may_have(ref, *pinned, within):
            return None
        return self._remembered(ref, RemoteKey(pinned[0], (), pinned[1]), None)

    async def _asked(self, ref: AdapterRef) -> LocatedAdapter:
        if self._offline:
            raise FetchError(
                f"it is not in the cache{_for_whom(ref)}, and the loader is offline; fetch it"
                " before, or set LoaderConfig(offline=False)",
                retryable=False,
            )
        return await (await self._locator(ref)).locate(ref)

    async def _locator(self, ref: AdapterRef) -> Backend:
        kind = ref.source or ""
        if kind not in self._here:
            self._here[kind] = await self._workers.run(lambda: self._locators(kind))
        return self._here[kind]

    def _remembered(
        self, ref: AdapterRef, key: RemoteKey, located: LocatedAdapter | None
    ) -> RemoteKey:
        self._known.remember(ref, key, located)
        return key

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

    async def _last_known(self, ref: AdapterRef, locator: Backend) -> RemoteKey | None:
        """Return what the source last named, if it is here and the caller accepts stale ones."""
        if not ref.allow_stale and not self._offline:
            return None
        scope = await locator.scope(ref)
        request = str(ResolutionRequest.of(ref, scope))
        found = await self._workers.run(
            lambda: self._caches(ref.source or "").last_version(request)
        )
        if found is None:
            return None
        source, version = found
        if not await self._may_have(ref, source, version, scope, inf):
            return None
        key = RemoteKey(source, (), version, stale=True)
        self._known.remember(ref, key, None)
        return key

    async def _note(self, ref: AdapterRef, located: LocatedAdapter) -> None:
        """Note the answer for when the source cannot be asked. A failure is not the caller's."""
        request = str(ResolutionRequest.of(ref, located.scope))
        if self._noted.get(request) == located.version:
            return
        answer = (located.source, located.version)
        try:
            await self._workers.run(
                lambda: self._caches(ref.source or "").note_version(request, *answer)
            )
        except (CapacityError, FetchError):
            return  # a cached adapter needs no room; a download reports the failure itself
        if len(self._noted) >= _MAX_NOTED:
            self._noted.clear()
        self._noted[request] = located.version


def _for_whom(ref: AdapterRef) -> str:
    """Return the same text whether it is there or not: the caller may be a stranger."""
    if ref.source != "hub" or ref.token is not None or ref.use_token:
        return ""
    return (
        " for callers without a token (on a machine that has one, what other tools stored there is"
        " for ids with use_token=True)"
    )


_MAX_NOTED = 65_536

PUBLIC = ""
"""The scope of who has no token."""
