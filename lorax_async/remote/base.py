"""The interface of a backend, the URLs that the operator allows, and the end of a fetch."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Any, NamedTuple, Protocol, TypeVar

from lorax_async.cache.base import LeftoverError
from lorax_async.concurrency import FetchControl, outcome, wait_for_end
from lorax_async.errors import AdapterNotFoundError, FetchError, IntegrityError, UsageError
from lorax_async.formats.digests import Digest
from lorax_async.http.download_scheduler import Job
from lorax_async.http.failures import FileChangedError
from lorax_async.http.range_downloader import FOREGROUND
from lorax_async.http.settings import Address
from lorax_async.http.target import ProbeResult, Target
from lorax_async.ids import Allow, WebFolder
from lorax_async.types import AdapterRef
from lorax_async.urls import DEFAULT_PORTS, InvalidUrlError, Origin, Url, folder_path, is_address

WEAK = "weak-"
"""Prefix of a version that describes the files without naming their bytes."""


FIRST_BYTES = 256 << 10
"""Bytes of the weights in the first request, which uses one connection.

They should contain the header, or another round trip is needed: a header has 60 KB for 448 tensors,
and about 235 KB for DoRA on all seven targets of 80 layers. Bytes beyond the header arrive sooner
over all connections. Measured when a header was checked after all of them, for 84 MB over 16
connections of 20 MB/s with 10 ms: 390 ms with 64 KiB (too few to estimate the link's rate), 351
with 128, 337 with 256, 350 with 512, 385 with 1 MiB; at 5 MB/s 1.13 s with 128 and with 256 KiB,
1.18 with 512.
"""

LONGEST = 86_400.0
"""Seconds. Callers have their own deadlines, and an unwanted fetch is cancelled."""


class AnotherVersionError(AdapterNotFoundError):
    """The caller may have the adapter, but the source has another version than the pinned one."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of an adapter, as its source describes it.

    Attributes
    ----------
    name
        `CONFIG_FILE`, `WEIGHTS_FILE`, one of `TOKENIZER_FILES`, or `PICKLE_FILE` if pickles are
        converted.
    target
        Its URL, with the headers that a request needs.
    nbytes, expected, etag
        Its size, digest and strong ETag (with its quotes), where the source names them.
    answer
        The result of its probe, if the version was learnt by one.
    """

    name: str
    target: Target
    nbytes: int | None = None
    expected: Digest | None = None
    etag: str | None = field(default=None, repr=False)
    answer: ProbeResult | None = field(default=None, repr=False)

    def require_match(self, answer: ProbeResult) -> None:
        """Raise `IntegrityError` if a probe found another size or ETag than the source named."""
        size, etag = answer.validators.size, answer.validators.etag
        if None not in {self.nbytes, size} and self.nbytes != size:
            raise IntegrityError(
                f"{self.name} has {size:,} bytes, and its source named {self.nbytes:,};"
                " it was replaced meanwhile"
            )
        if self.etag is not None and self.etag != etag:
            raise IntegrityError(f"{self.name} was replaced since it was resolved")


class ReplacedError(LeftoverError):
    """The files are not all of one version, or are of another one by now: resolve again."""


class Recheck(NamedTuple):
    """How to request the files of an adapter again, and whether the answers are of the same files.

    All requests follow all first answers. So the files were there together when the last first
    answer was made, unless one was replaced and put back since.
    """

    request: Callable[[], list[Job[ProbeResult]]]
    is_same: Callable[[Sequence[ProbeResult]], bool]


class Confirmation:
    """Requests an adapter's files again, if its source may replace them between two answers.

    The requests begin when it is made.
    """

    def __init__(self, recheck: Recheck | None, on_replaced: Callable[[], object]) -> None:
        self._recheck = recheck
        self._on_replaced = on_replaced
        self._requests = [] if recheck is None else recheck.request()

    async def wait(self) -> None:
        """Raise `ReplacedError` if a file is another one now. Each later call requests anew."""
        if self._recheck is None:
            return
        requests, self._requests = self._requests or self._recheck.request(), []
        try:
            again = [await outcome(request.done) for request in requests]
            same = self._recheck.is_same(again)
        except (AdapterNotFoundError, IntegrityError):
            same = False
        finally:
            cancel_unfinished(requests)
        if not same:
            raise self._report_replaced()

    @contextmanager
    def translate_changes(self) -> Iterator[None]:
        """Raise `ReplacedError` for a `FileChangedError`, if the source may replace files."""
        try:
            yield
        except FileChangedError as error:
            if self._recheck is None:
                raise
            raise self._report_replaced() from error

    def _report_replaced(self) -> ReplacedError:
        """Call `on_replaced`, and return the error to raise."""
        self._on_replaced()
        return ReplacedError(
            "its config and weights were replaced while they were requested; load it again"
        )

    def close(self) -> None:
        """Cancel the requests that no caller waits for. Idempotent."""
        requests, self._requests = self._requests, []
        cancel_unfinished(requests)


@dataclass(frozen=True, slots=True)
class LocatedAdapter:
    """One version of an adapter, and its files.

    Attributes
    ----------
    source
        The adapter's id without its revision, in its one spelling; no secret.
    version
        The hub's commit, or a digest of the versionIds or strong ETags of its files: equal
        versions are equal bytes.
    scope
        The authority under which the source answered: a digest of the token, "" without one.
    files
        The config, then the weights.
    recheck
        If the source may replace the files between two answers.
    """

    source: str
    version: str
    scope: str
    files: tuple[RemoteFile, RemoteFile]
    recheck: Recheck | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True, eq=False)
class FetchedFile:
    """A config, or the beginning of weights: their `prefix` ends with the header."""

    file: RemoteFile
    answer: ProbeResult
    nbytes: int
    prefix: bytes


@dataclass(frozen=True, slots=True, eq=False)
class AdapterMetadata:
    """The files of an adapter as far as they are checked before any layer is fetched."""

    config: FetchedFile
    weights: FetchedFile


P_contra = TypeVar("P_contra", contravariant=True)


class Backend(Protocol[P_contra]):
    """Resolves the ids of one kind of location, and locates their files.

    Errors are those of `lorax_async.errors`, without id and story.
    """

    def is_version(self, revision: str) -> bool:
        """Return whether a revision names bytes: then the cache may serve it without a request."""

    async def scope(self, location: P_contra, ref: AdapterRef) -> str:
        """Return the authority of a request: see `LocatedAdapter`. Send no request."""

    async def locate(self, location: P_contra, ref: AdapterRef) -> LocatedAdapter:
        """Ask the source which version `ref` names now, and where its files are.

        Raise `AdapterNotFoundError` (`AnotherVersionError` if the source has only another version),
        `UnsupportedAdapterError` (`split_weights_error`), `AccessDeniedError`, or another
        `FetchError`.
        """

    async def find_files(
        self, location: P_contra, ref: AdapterRef, names: Sequence[str]
    ) -> list[RemoteFile]:
        """Return those of `names` that the folder of `ref` has beside the adapter.

        `ref.revision` is a version that `locate` returned. Raise as `locate`.
        """


_TOKEN = re.compile(r"[\x21-\x7e]+")


def require_token(token: str | None) -> str | None:
    """Return the token. Raise `UsageError` if it is malformed; an empty one does not mean None."""
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError(
            "the token is empty, or has characters that no token has; leave it out (None) to send"
            " none, or this machine's own to the hub with use_token"
        )
    return token


_PRIVATE = [
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
]
"""Private networks by RFC 1918, 6598 and 4193, without loopback and link-local addresses."""


class AllowRules:
    """The `Rules` that the operator's entries make.

    - The first request may go where an "https" or "http" entry allows it, or to a named origin.
    - A redirect may lead to any https URL as well. Only hosts of named origins, and those of
      entries below their prefixes, may have addresses that are not public.

    `named` are origins that the operator has named, allowed at any address: the endpoint of the hub
    or of a store.
    """

    def __init__(self, allow: Sequence[Allow] = (), named: Collection[Origin] = ()) -> None:
        self._entries = tuple(entry for entry in allow if entry.scheme in DEFAULT_PORTS)
        self._named = frozenset(named)
        self._covering = lru_cache(maxsize=64)(self._find_covering)

    def allows(self, url: Url, hop: int) -> bool:
        is_named = url.origin in self._named
        return (hop > 0 and url.secure) or is_named or bool(self._covering(url))

    def allows_address(self, url: Url, address: Address) -> bool:
        if url.origin in self._named:
            return True
        return any(_admits(entry, address) for entry in self._covering(url))

    def _find_covering(self, url: Url) -> list[Allow]:
        try:
            path = folder_path(url.target.partition("?")[0])[1:]
        except InvalidUrlError:
            path = ""  # it is ambiguous: no prefix covers it
        location = WebFolder(url.origin.scheme, url.origin.host, url.origin.explicit_port, path)
        return [entry for entry in self._entries if entry.covers(location)]


def _admits(entry: Allow, address: Address) -> bool:
    """Return whether the entry's host may have this address, which is not public."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    plain = mapped or address
    if entry.host == "localhost":
        return plain.is_loopback
    if is_address(entry.host):
        return plain == ip_address(entry.host)
    return entry.private and any(plain in network for network in _PRIVATE)


def unwanted_error() -> FetchError:
    return FetchError("no caller waits for the adapter any more")


def cancel_unfinished(jobs: Iterable[Job[Any]]) -> None:
    """Cancel jobs that are not done. Do not wait: their threads leave their sockets themselves."""
    for job in jobs:
        if not job.done.done():
            job.cancel(unwanted_error())


@asynccontextmanager
async def track(control: FetchControl, *jobs: Job[Any]) -> AsyncIterator[None]:
    """Give jobs the urgency of `control`, and cancel them when it ends.

    On an error or a cancellation, cancel them and wait until they are done.
    """

    def update() -> None:
        for job in jobs:
            if control.cancelled:
                job.cancel(unwanted_error())
            elif control.urgent:
                job.raise_priority(FOREGROUND)

    try:
        with control.watch(update):
            yield
    except BaseException:
        for job in jobs:
            job.cancel(unwanted_error())
        for job in jobs:
            await wait_for_end(job.done)
        raise


@asynccontextmanager
async def bind_to(control: FetchControl) -> AsyncIterator[None]:
    """Cancel the body when `control` ends, and raise `FetchError`."""
    loop = asyncio.get_running_loop()
    limit = asyncio.timeout(None)

    def update() -> None:
        if control.cancelled and not limit.expired():
            limit.reschedule(loop.time())

    try:
        async with limit:
            with control.watch(update):
                yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise unwanted_error() from None
