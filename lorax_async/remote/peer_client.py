"""Takes adapters from the mirrors of a fleet into the disk cache, in place of their source."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Literal
from urllib.parse import urlencode

from lorax_async.cache.base import CacheEntry, CacheKey, scope_name
from lorax_async.cache.disk_cache import DiskDownload
from lorax_async.concurrency import FetchControl, WorkerThreads, outcome
from lorax_async.config import Limits
from lorax_async.errors import AccessDeniedError, AdapterError, ConfigError, FetchError, LoraxError
from lorax_async.formats.split_weights import FileRole
from lorax_async.formats.strict_json import JsonValue, parse_object
from lorax_async.http.failures import RetryPolicy
from lorax_async.http.range_engine import FOREGROUND, PREFETCH, RangeEngine
from lorax_async.http.settings import HttpSettings, Timeouts
from lorax_async.http.target import ProbeResult, Target
from lorax_async.peers import Peers
from lorax_async.remote.base import (
    FIRST_BYTES,
    AllowRules,
    LocatedAdapter,
    RemoteFile,
    bind_to,
    remember,
    track,
)
from lorax_async.remote.opening import (
    MAX_KEYS,
    PUBLIC,
    AdapterOpener,
    VersionResolver,
    cache_key,
    close_unused,
)
from lorax_async.remote.readers import FetchReader
from lorax_async.types import RemoteKey
from lorax_async.urls import Url, parse_url

PeerState = Literal["ready", "fetching", "elsewhere", "refused"]
"""What a member says of an adapter. "elsewhere": it cannot fetch it now; "refused": status 403."""

PROOF_FIELD = "X-Lorax-Proof"
MAX_STATE_BYTES = 4_096

_CONNECTIONS = 8
_SLOWEST = 65_536.0
"""Bytes per second of a connection; a network on which a fleet is worth it has far more."""

_REFUSED_SECONDS = 60.0
_PATIENCES = 3
"""A member's download may wait this many times longer than the member: its source may be slow."""

_SHARE = 0.5
"""Of a call's time, for all members together: the source must have its turn."""

_POLL_SECONDS, _LONGEST_POLL = 0.02, 0.25


def path_of(key: CacheKey, file_name: str = "") -> str:
    """Return the path and query at which mirrors have an entry's state, or one of its files."""
    query = urlencode({"source": key.source, "version": key.version}, errors="surrogatepass")
    return f"/v1/{key.name}/{file_name}?{query}"


class PeerClient:
    """Brings adapters from peers into the cache before they are opened. `close` blocks."""

    def __init__(
        self,
        peers: Peers,
        resolver: VersionResolver,
        workers: WorkerThreads,
        limits: Limits,
        timeout: float,
    ) -> None:
        patience = peers.patience
        settings = HttpSettings(
            connections=_CONNECTIONS,
            timeouts=Timeouts(connect=patience, read=patience, slowest=_SLOWEST, over=patience),
            retries=RetryPolicy(attempts=2, base=0.1, most=0.5),
            redirects=0,
            proxies={},
        )
        self.peers = peers
        self.limits = limits
        self._seconds = _SHARE * timeout
        self.engine = RangeEngine(settings)
        self.resolver = resolver
        self.workers = workers
        self._unjudged: OrderedDict[RemoteKey, float] = OrderedDict()
        """When adapters were taken on trust. A copy that was refused must not be taken again."""

    async def bring(self, key: RemoteKey, control: FetchControl) -> None:
        """Bring the adapter into the cache if a member has it or fetches it; else do nothing."""
        peers, tried = self.peers, list[str]()
        located = await self._locate(key, control) if peers.members else None
        if located is None or not self._may_take(key, located):
            return
        until = asyncio.get_running_loop().time() + self._seconds
        while not control.cancelled and (member := peers.choose(key.location, tried)) is not None:
            tried.append(member)
            try:
                async with asyncio.timeout_at(until):
                    if await PeerDownload(self, member, key, located).run(control):
                        return
            except AdapterError as error:
                is_refusal = isinstance(error, AccessDeniedError)
                if not control.cancelled:
                    peers.note_problem(member, error.problem, rest=not is_refusal)
                if is_refusal:
                    return
            except ConfigError:
                raise
            except LoraxError:
                return  # the cache has no room: the opener says so
            except TimeoutError:
                problem = f"it was not done after {self._seconds:g} s, all members together"
                peers.note_problem(member, problem, rest=True)
                return

    async def _locate(self, key: RemoteKey, control: FetchControl) -> LocatedAdapter | None:
        """Return where the source has it; None if the cache has it, or no member is to be asked."""
        try:
            async with bind_to(control):
                is_stored = await self.workers.run(partial(self._is_stored, key))
                if is_stored or self.peers.choose(key.location, ()) is None:
                    return None
                return await self.resolver.locate(key)
        except LoraxError:
            return None  # the opener meets it too, and knows what to do

    def _is_stored(self, key: RemoteKey) -> bool:
        entry = self.resolver.cache.open(cache_key(key))
        close_unused(entry)
        return entry is not None

    def _may_take(self, key: RemoteKey, located: LocatedAdapter) -> bool:
        """Return whether the source's digests, or the fleet's trust, can judge a peer's bytes."""
        sizes = [file.nbytes or inf if file.answer else inf for file in located.files]
        if max(sizes) <= FIRST_BYTES:
            return False  # the source has sent everything already, or does
        if all(map(is_judged, located.files)):
            return True
        now, before = time.monotonic(), self._unjudged.get(key, -inf)
        if (
            not self.peers.trust
            or now - before < _REFUSED_SECONDS
            or self.resolver.digest(key) is not None  # it judges the source's bytes
        ):
            return False
        remember(self._unjudged, key, now, MAX_KEYS)
        return True

    def close(self) -> None:
        """Cancel everything, and wait until it has ended."""
        self.engine.close()


def is_judged(file: RemoteFile) -> bool:
    """Return whether the source has named the file's digest, or sent all of it with its version."""
    return file.expected is not None or (file.role.kind != "weights" and file.answer is not None)


class PeerDownload(AdapterOpener):
    """One adapter's download from one member, as from its source.

    The files have the source's sizes and digests, and lie at the member. Nothing of a failed one
    stays: the next would trust its bytes.
    """

    resumable = False

    def __init__(
        self, client: PeerClient, member: str, key: RemoteKey, located: LocatedAdapter
    ) -> None:
        super().__init__(
            *(client.resolver, client.engine, client.workers), limits=client.limits, verify="stream"
        )
        self._peers, self._member, self._key = client.peers, member, key
        self._at_source = located
        self._headers = {"Authorization": f"Bearer {client.peers.token}"}
        if located.scope != PUBLIC:
            entry = cache_key(key).name
            proof = client.peers.proof(member, entry, scope_name(located.scope))
            self._headers[PROOF_FIELD] = proof

    async def run(self, control: FetchControl) -> bool:
        """Return whether the cache has it, or gets it from elsewhere; False to ask another member.

        Raise `AccessDeniedError` if the member refuses it, and other `AdapterError`s.
        """
        if not await self._until_ready(control):
            return False
        download = await self._workers.run(self._begin, close_unused)
        if not isinstance(download, DiskDownload):
            close_unused(download)
            return True
        try:
            file = await self._begin_fetch(self._key, download, control)
        except BaseException:
            await self._workers.finish(download.discard)
            raise
        assert isinstance(file.reader, FetchReader)
        try:
            entry = await file.reader.bring((), lambda _: None, control)
        finally:
            file.reader.close()
        self._peers.taken += 1
        self._peers.taken_bytes += entry.record.nbytes
        self._resolver.used(self._key)
        return True

    def _begin(self) -> CacheEntry | DiskDownload | int:
        """Begin the download as for the source, unless that has an interrupted one to resume."""
        result = self._attempt(self._key, self._at_source.scope, alone=False)
        if isinstance(result, DiskDownload) and result.has_leftovers:
            result.close()  # a peer that fails would cost what is here
            return 0
        if isinstance(result, DiskDownload):
            result.resumable = False
        return result

    async def _until_ready(self, control: FetchControl) -> bool:
        """Wait until the member has the adapter; False if another one has to be asked."""
        progress, pause, since = None, _POLL_SECONDS, time.monotonic()
        while True:
            answer = await self._ask(control)
            if answer.get("state") != "fetching":
                return answer.get("state") == "ready"
            if answer.get("progress") != progress:
                progress, since = answer.get("progress"), time.monotonic()
            elif time.monotonic() - since > _PATIENCES * self._peers.patience:
                raise FetchError(f"{self._member} downloads it, but nothing arrives there")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL)

    async def _ask(self, control: FetchControl) -> dict[str, JsonValue]:
        """Return the member's `PeerState`, and the progress of its download."""
        what = "a peer's answer"
        job = self._engine.probe(
            self._target("", what),
            MAX_STATE_BYTES,
            ranged=False,
            urgency=FOREGROUND if control.urgent else PREFETCH,
        )
        async with track(control, job):
            answer = await outcome(job.done)
        return parse_object(answer.start, what=what, max_bytes=MAX_STATE_BYTES)

    async def _locate(self, key: RemoteKey, control: FetchControl) -> LocatedAdapter:  # noqa: ARG002
        return replace(self._at_source, files=tuple(map(self._at_member, self._at_source.files)))

    async def _shards(
        self,
        located: LocatedAdapter,  # noqa: ARG002 - the source's own has its credentials
        roles: Sequence[FileRole],
    ) -> tuple[RemoteFile, ...]:
        files = await self._resolver.shards(self._at_source, roles)
        if not (self._peers.trust or all(map(is_judged, files))):
            raise FetchError("its source does not name the digests of all files", retryable=False)
        return tuple(map(self._at_member, files))

    async def _probe(
        self, wanted: Sequence[tuple[RemoteFile, int]], control: FetchControl
    ) -> list[ProbeResult]:
        # A digest that the member names vouches for nothing.
        return [replace(each, fields={}) for each in await super()._probe(wanted, control)]

    def _at_member(self, file: RemoteFile) -> RemoteFile:
        if file.role.kind != "weights" and file.answer is not None:
            return file
        target = self._target(file.role.file_name, file.target.name)
        return replace(file, target=target, etag=None, answer=None)

    def _target(self, file_name: str, name: str) -> Target:
        url = Url(parse_url(self._member).origin, path_of(cache_key(self._key), file_name))
        return Target(url, name, self._headers, AllowRules(named=(url.origin,)))
