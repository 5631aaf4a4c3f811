"""Adapters on the hub, through huggingface_hub, and those in its standard cache.

huggingface_hub's errors contain URLs, headers and responses, which may be secret, so none is
chained to ours. It is imported where it is used, for that takes long.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import re
import socket
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from lorax_async.cache.base import CacheKey, FileRecord, record_of
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
    InternalError,
    InvalidAdapterIdError,
    LoraxError,
    shorten,
)
from lorax_async.files import (
    FileReader,
    code_of,
    hash_on,
    is_settled,
    locate,
    open_same,
    to_adapter_error,
)
from lorax_async.formats.digests import Digest, FileHash
from lorax_async.formats.peft_names import (
    CONFIG_FILE,
    FOREIGN_FILES,
    INDEX_FILE,
    PICKLE_FILE,
    PICKLE_PROBLEM,
    WEIGHTS_FILE,
    foreign_file_error,
    split_weights_error,
)
from lorax_async.http.failures import (
    DENIED,
    MISSING,
    RETRYABLE,
    RetryableError,
    RetryPolicy,
    io_error,
    lookup_error,
    retry_after_of,
)
from lorax_async.http.target import Target
from lorax_async.ids import Allow, HubRepository, parse_revision
from lorax_async.lru import remember
from lorax_async.remote.base import AllowRules, LocatedAdapter, RemoteFile, require_token
from lorax_async.types import AdapterRef, FileIdentity
from lorax_async.urls import InvalidUrlError, Url, parse_folder_url, parse_url

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

RETRIES = RetryPolicy(attempts=3, base=0.25, most=4.0)

_MAIN = "main"
_BASE_CONFIG = "config.json"
_BEARER = "Bearer "
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
HUB_REMEDY = (
    "give a token that may read it (or log in on this machine, hf auth login, and let its token be"
    " used: use_token=True)"
)
"""What callers of the API do; plug-ins for engines put their settings in its place."""

T = TypeVar("T")


def is_commit(text: str) -> bool:
    return _COMMIT.fullmatch(text) is not None


def digest_of_etag(etag: str | None) -> Digest | None:
    """Return the digest that an ETag of the hub (without quotes) or a blob's name stands for.

    It is the sha256 of a large file, and git's blob id of another. None if it is neither, as a
    mirror's ETag may be.
    """
    if etag is not None and _SHA256.fullmatch(etag):
        return Digest("sha256", etag)
    return Digest("git-sha1", etag) if etag is not None and is_commit(etag) else None


@dataclass(frozen=True, slots=True)
class FileQuery:
    """A query about one file on the hub."""

    source: str
    name: str
    revision: str
    token: str | None = field(repr=False)

    def url(self, endpoint: str | None) -> Url:
        """Return the file's URL. Raise `InvalidAdapterIdError`."""
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 (slow)

        try:
            text = hf_hub_url(self.source, self.name, revision=self.revision, endpoint=endpoint)
            return parse_url(text)
        except ValueError:
            raise InvalidAdapterIdError(
                f"the hub has no such ids or revisions as {shorten(self.source, 200)!r} at"
                f" {shorten(self.revision, 200)!r}"
            ) from None


@dataclass(frozen=True, slots=True)
class HubAnswer:
    """The file of a query, and its commit; `file` is None if the commit, if any, lacks it.

    `redirected` is False if the requested URL answered itself.
    """

    commit: str | None
    file: RemoteFile | None = None
    redirected: bool = False


class HubBackend:
    """The `Backend` of adapters on the hub; a revision is any name of git's.

    A reference without a token is resolved without one, unless `ref.use_token` or an entry of
    `allow` lends this machine's own (`HF_TOKEN`, `hf auth login`) and huggingface_hub may use that.
    An entry lends it to the ids that it covers, if the repository that answers is covered too: the
    hub redirects from ids that were moved. An empty token is a `UsageError`.

    Parameters
    ----------
    endpoint
        The hub's URL. huggingface_hub queries it, and follows redirects to that origin and the
        hub's own only; the operator vouches for its address.
    threads
        Run huggingface_hub, two calls per adapter at once. A call outlives its cancelled caller.
    timeout
        Seconds to connect, and to wait for the next byte of a response.
    convert_bin
        Locate `PICKLE_FILE` where there are no other weights.
    """

    def __init__(
        self,
        *,
        endpoint: Url,
        threads: Executor,
        allow: Sequence[Allow] = (),
        timeout: float = 10.0,
        retries: RetryPolicy = RETRIES,
        convert_bin: bool = False,
    ) -> None:
        self._endpoint = endpoint.text.rstrip("/")
        self._rules = AllowRules(allow, named=(endpoint.origin,))
        self._lending = tuple(entry for entry in allow if entry.use_token)
        self._threads = threads
        self._timeout = timeout
        self._retries = retries
        self._convert_bin = convert_bin

    def is_version(self, revision: str) -> bool:
        return is_commit(revision)

    async def scope(self, location: HubRepository, ref: AdapterRef) -> str:
        return self._scope(await self._token(location, ref))

    def own_scope(self) -> str | None:
        """Return the scope of this machine's own token; "" if it has none.

        None if its token cannot be read, or must not be sent. Blocks.
        """
        from huggingface_hub import get_token  # noqa: PLC0415 (slow)

        try:
            own = machine_token()
            kept = own is None and get_token() is not None
        except LoraxError:
            return None
        except _token_errors():
            return None
        return None if kept else self._scope(own)

    async def locate(self, location: HubRepository, ref: AdapterRef) -> LocatedAdapter:
        token = await self._token(location, ref)
        query = FileQuery(location.text, CONFIG_FILE, ref.revision or _MAIN, token)
        config, weights = await self._answers(query, replace(query, name=WEIGHTS_FILE))
        if config.file is None or config.commit is None:
            foreign = await self._foreign_weights(query)
            raise foreign or _lacking(query, f"no {CONFIG_FILE}: it is not a PEFT adapter")
        pinned = replace(query, revision=config.commit)
        is_lent = ref.token is None and not ref.use_token and token is not None
        if config.redirected and is_lent:
            await self._require_covered(pinned)
        if weights.commit != config.commit:  # a branch moved between the two answers
            (weights,) = await self._answers(replace(pinned, name=WEIGHTS_FILE))
        files = config.file, weights.file or await self._pickle(pinned)
        return LocatedAdapter(location.text, config.commit, self._scope(token), files)

    async def find_files(
        self, location: HubRepository, ref: AdapterRef, names: Sequence[str]
    ) -> list[RemoteFile]:
        token = await self._token(location, ref)
        query = FileQuery(location.text, names[0], ref.revision or _MAIN, token)
        answers = await self._answers(*(replace(query, name=name) for name in names))
        return [answer.file for answer in answers if answer.file is not None]

    async def _pickle(self, pinned: FileQuery) -> RemoteFile:
        """Return the pickle of a commit without other weights, or raise what it has instead."""
        names = INDEX_FILE, PICKLE_FILE
        index, pickle = await self._answers(*(replace(pinned, name=name) for name in names))
        if index.file is not None:
            raise split_weights_error(f"{pinned.source!r} at {pinned.revision!r}")
        if pickle.file is not None and self._convert_bin:
            return pickle.file
        if pickle.file is not None:
            raise _lacking(pinned, f"its weights as {PICKLE_FILE} only, {PICKLE_PROBLEM}")
        raise await self._foreign_weights(pinned) or _lacking(pinned, f"no {WEIGHTS_FILE}")

    async def _foreign_weights(self, query: FileQuery) -> AdapterError | None:
        """Return the error for a commit with another program's weights; None for any other."""
        answers = await self._answers(*(replace(query, name=name) for name in FOREIGN_FILES))
        for name, answer in zip(FOREIGN_FILES, answers, strict=True):
            if answer.file is not None:
                return foreign_file_error(f"{query.source!r} at {query.revision!r}", name)
        return None

    async def _token(self, location: HubRepository, ref: AdapterRef) -> str | None:
        """Return the token to send."""
        token = require_token(ref.token)
        if ref.use_token or (token is None and self._lends_to(location)):
            (token,) = await self._call(machine_token)
        return token

    def _lends_to(self, location: HubRepository) -> bool:
        """Return whether an entry of `allow` lends this machine's own token to an id."""
        return any(entry.covers(location) for entry in self._lending)

    def _scope(self, token: str | None) -> str:
        if token is None:
            return ""
        # Neither an endpoint nor a token has spaces.
        return hashlib.sha256(f"{self._endpoint} {token}".encode()).hexdigest()

    async def _require_covered(self, pinned: FileQuery) -> None:
        """Raise `AccessDeniedError` if no entry lends the token to the commit's repository.

        This covers the weights, which are of the same commit.
        """
        (name,) = await self._call(partial(self._query_repository, pinned))
        if not self._lends_to(HubRepository("hub", "", None, f"{name}/")):
            # The new id may be a secret of the operator's: leave it out.
            raise AccessDeniedError(
                f"the hub has moved {pinned.source!r} to a repository to which the token of this"
                " machine is not lent; use the new id, if it is allowed, or have it allowed",
                stage="resolve",
            )

    async def _answers(self, *queries: FileQuery) -> list[HubAnswer]:
        answers = await self._call(*(partial(self._query_file, query) for query in queries))
        for query, answer in zip(queries, answers, strict=True):
            if is_commit(query.revision) and answer.commit not in {None, query.revision}:
                raise IntegrityError(
                    f"the hub answered about another commit of {query.source!r} than the requested"
                    " one",
                    stage="resolve",
                )
        return answers

    async def _call(self, *calls: Callable[[], T]) -> list[T]:
        """Call all in threads at once, and again those whose failure may pass.

        Errors are of the stage "resolve".
        """
        results: dict[int, T] = {}
        for failed in count(1):
            futures = {
                number: asyncio.wrap_future(self._threads.submit(call))
                for number, call in enumerate(calls)
                if number not in results
            }
            try:
                await asyncio.wait(futures.values())
            finally:
                for future in futures.values():
                    future.cancel()
            problems = []
            for number, future in futures.items():
                try:
                    results[number] = future.result()
                except LoraxError as error:
                    problems.append(error)
            if not problems:
                break
            # Report first a failure that no retry would mend.
            problem = min(problems, key=lambda problem: problem.retryable)
            wait = self._retries.wait(failed, random.random(), problem.retry_after)  # noqa: S311
            if not problem.retryable or wait is None:
                raise problem.located(stage="resolve")
            await asyncio.sleep(wait)
        return [results[number] for number in range(len(calls))]

    def _query_file(self, query: FileQuery) -> HubAnswer:
        """Query the hub about one file. Blocks."""
        from huggingface_hub import get_hf_file_metadata  # noqa: PLC0415 (slow)
        from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError  # noqa: PLC0415

        url = query.url(self._endpoint)
        token, timeout, endpoint = query.token or False, self._timeout, self._endpoint
        try:
            found = get_hf_file_metadata(url.text, token=token, timeout=timeout, endpoint=endpoint)
        except _request_errors() as error:
            response = error.response if isinstance(error, HfHubHTTPError) else None
            # Without a code it is a mirror, or a server of files.
            if response is not None and (
                isinstance(error, RemoteEntryNotFoundError)
                or (response.status_code in MISSING and "X-Error-Code" not in response.headers)
            ):
                named = response.headers.get("X-Repo-Commit", "")
                return HubAnswer(named if is_commit(named) else None)
            raise problem_of(error, query, url) from None
        commit = found.commit_hash
        if commit is None or not is_commit(commit):
            raise FetchError(
                f"{url} names no commit in its responses: it is not a hub; check the endpoint",
                retryable=False,
            )
        headers = {} if query.token is None else {"Authorization": f"{_BEARER}{query.token}"}
        own = replace(query, revision=commit).url(self._endpoint)
        location = _stable_location(found.location, url, own, commit)
        target = Target(own, f"{query.source}/{query.name}", headers, self._rules, location)
        nbytes = None if found.size is None or found.size < 0 else found.size
        file = RemoteFile(query.name, target, nbytes, digest_of_etag(found.etag))
        return HubAnswer(commit, file, found.location != url.text)

    def _query_repository(self, query: FileQuery) -> str:
        """Return the id of the repository that answers to `query.source` and has its commit.

        A moved repository has another id. Blocks.
        """
        from huggingface_hub import HfApi  # noqa: PLC0415 (slow)

        try:
            info = HfApi(endpoint=self._endpoint).model_info(
                query.source,
                revision=query.revision,
                timeout=self._timeout,
                token=query.token or False,
            )
        except _request_errors() as error:
            raise problem_of(error, query, query.url(self._endpoint)) from None
        except (TypeError, KeyError, AttributeError):
            info = None
        if info is None or not isinstance(info.id, str) or info.sha != query.revision:
            raise AccessDeniedError(
                f"the hub does not say which repository answers for {query.source!r}, so the token"
                " of this machine is not lent to it; name the repository by its own id"
            )
        return info.id


def _stable_location(text: str, requested: Url, own: Url, commit: str) -> Url | None:
    """Return where a redirect led, if it is bound to the commit and the downloader can request it.

    A redirect to another name on the hub, as after a rename, may lead elsewhere later.
    """
    try:
        location = parse_url(text)
    except InvalidUrlError:
        return None
    is_name = location.origin == own.origin or "/resolve/" in location.target
    stays = not is_name or commit in location.target
    return location if stays and location not in {requested, own} else None


def _lacking(query: FileQuery, what: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"{query.source!r} at {query.revision!r} has {what}")


def parse_endpoint(endpoint: str | None) -> Url:
    """Parse a hub's URL, by default that of huggingface_hub. Raise `ConfigError`."""
    from huggingface_hub import constants  # noqa: PLC0415 (slow)

    try:
        return parse_folder_url(endpoint or constants.ENDPOINT)
    except InvalidUrlError as error:
        raise ConfigError(f"the hub's endpoint is not a URL: {error}") from None


def _request_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises for a request."""
    import httpx2  # noqa: PLC0415 (slow)

    return httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError


def _token_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises while it reads or renews this machine's token."""
    from huggingface_hub.errors import DeviceCodeError, OIDCError  # noqa: PLC0415 (slow)

    return OIDCError, DeviceCodeError, *_request_errors()


def machine_token() -> str | None:
    """Return the token that huggingface_hub sends by default. May renew it over the network."""
    # Documented but not declared: the module imports it lazily.
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    try:
        header = build_hf_headers().get("authorization", "")
    except _token_errors() as error:
        raise AccessDeniedError(
            f"this machine's own token of the hub cannot be read ({type(error).__name__}); log in"
            " again (hf auth login), or pass a token"
        ) from None
    return require_token(header.removeprefix(_BEARER) or None)


def problem_of(error: Exception, query: FileQuery, url: Url) -> AdapterError:
    """Return our error for one of huggingface_hub or its HTTP client."""
    from huggingface_hub.errors import (  # noqa: PLC0415 (slow)
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if not isinstance(error, HfHubHTTPError):
        return _failure(error, url)
    source, status = query.source, error.response.status_code
    if isinstance(error, RevisionNotFoundError):
        revision = shorten(query.revision, 200)
        return AdapterNotFoundError(f"{source!r} on {url} has no revision {revision!r}")
    if isinstance(error, GatedRepoError):
        return AccessDeniedError(
            f"{source!r} on {url} is gated: accept its conditions there, and {HUB_REMEDY}"
        )
    if isinstance(error, RepositoryNotFoundError):
        if query.token is None and status == 401:
            return AccessDeniedError(
                f"{url} shows no {source!r} without a token: check the id, or if it is"
                f" private {HUB_REMEDY}"
            )
        if status not in {401, 403}:
            return AdapterNotFoundError(f"{url} has no {source!r}, or none that the token may see")
    if status in DENIED:
        token = "without a token" if query.token is None else "with this token"
        return AccessDeniedError(
            f"{url} refuses {source!r} {token} (status {status}); {HUB_REMEDY}"
        )
    problem = f"{query.name} of {source!r} at {url}: status {status}"
    if status not in RETRYABLE:
        problem += ", which does not answer the request"
        return FetchError(problem, retryable=False)
    return FetchError(problem, retry_after=_retry_after(error))


def download_base(
    id: str,
    files: Sequence[str] = (_BASE_CONFIG,),
    *,
    revision: str | None,
    token: str | None,
    endpoint: str | None,
    offline: bool,
) -> str:
    """Return a folder with a base model's files, in huggingface_hub's own cache. Blocks.

    `files` are patterns of names. Without a token, huggingface_hub uses this machine's own. Raise
    `ConfigError`, or `UsageError` for a malformed token.
    """
    from huggingface_hub import hf_hub_download, snapshot_download  # noqa: PLC0415 (slow)
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    require_token(token)
    where = parse_endpoint(endpoint)
    options: dict[str, Any] = {"revision": revision, "token": token, "endpoint": endpoint}
    options["local_files_only"] = offline
    no_folder = f"there is no folder {id!r}, and on the hub: "
    try:
        folder: str = os.path.dirname(hf_hub_download(id, _BASE_CONFIG, **options))
        if tuple(files) != (_BASE_CONFIG,):
            folder = snapshot_download(id, allow_patterns=list(files), **options)
    except HFValidationError:
        raise ConfigError(f"{shorten(id, 200)!r} is neither a folder nor a hub id") from None
    except LocalEntryNotFoundError as error:
        if offline:
            problem = f"{_BASE_CONFIG} of {id!r} is not in the standard hub cache, and offline=True"
            raise ConfigError(f"{no_folder}{problem}") from None
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else None
        problem = "no answer" if cause is None else _failure(cause, where).problem
        raise ConfigError(f"{no_folder}{problem}", retryable=True) from None
    except _request_errors() as error:
        query = FileQuery(id, _BASE_CONFIG, revision or _MAIN, token)
        raise ConfigError(f"{no_folder}{problem_of(error, query, where).problem}") from None
    return folder


def _retry_after(error: HfHubHTTPError) -> float | None:
    """Return seconds by `Retry-After`, or by the hub's own rate limit fields."""
    # Documented but not declared: the module imports it lazily.
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]  # noqa: PLC0415

    fields = error.response.headers
    after = retry_after_of(fields.get("retry-after", ""), time.time())
    if after is None and error.response.status_code == 429:
        limit = parse_ratelimit_headers(fields)
        if limit is not None and limit.remaining == 0:
            return float(limit.reset_in_seconds)
    return after


def _failure(error: Exception, url: Url) -> AdapterError:
    """Map a request without a response."""
    import httpx2  # noqa: PLC0415 (slow)
    from huggingface_hub.errors import OfflineModeIsEnabled  # noqa: PLC0415

    if isinstance(error, OfflineModeIsEnabled):
        return FetchError(
            "huggingface_hub is set to be offline (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)",
            retryable=False,
        )
    if isinstance(error, httpx2.TimeoutException):
        return FetchTimeoutError(f"{url} did not answer in time")
    system = next((cause for cause in _causes(error) if isinstance(cause, OSError)), None)
    if isinstance(system, socket.gaierror):
        mapped = lookup_error(system, url.origin.host)
    elif system is not None:
        mapped = io_error(system, str(url))
    else:
        what = type(error).__name__
        retryable = isinstance(error, httpx2.TransportError)
        mapped = FetchError(f"the request to {url} failed ({what})", retryable=retryable)
    return mapped.error if isinstance(mapped, RetryableError) else mapped


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_MAX_REMEMBERED = 65_536
"""Accesses, and verified blobs, that a process remembers."""

_ABSENT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    errno.EINVAL,  # reading a link of a file that is not one
    *(errno.EACCES, errno.EPERM),  # a file that this process may not read counts as absent
}
_LINK = re.compile(r"\.\./\.\./blobs/(?P<blob>[0-9a-z-]{40,80})")
_SHARED = re.compile(r"/blobs/(?P<first>[0-9a-f]{2})/(?P=first)[0-9a-f]{62}")


ExpectedBlob = tuple[FileIdentity, Digest]
"""A file, and the digest that its name promises: links of several names may lead to one file."""


class HubFile(NamedTuple):
    """One file of a commit: the blob at `path`, a real path."""

    path: str
    identity: FileIdentity
    record: FileRecord

    @property
    def expected(self) -> ExpectedBlob:
        return self.identity, self.record.digest

    def open(self) -> int:
        return open_same(self.path, self.identity, self.record.name)

    def is_intact(self) -> bool:
        """Hash all of it and compare the digest with the blob's name."""
        name, nbytes = self.record.name, self.identity.size
        file_hash = FileHash(self.record.digest.kind, nbytes)
        try:
            fd = self.open()
            try:
                hash_on(fd, file_hash, nbytes, name)
            finally:
                os.close(fd)
        except IntegrityError:
            return False
        except OSError as error:
            raise to_adapter_error(error, name) from error
        return file_hash.digest() == self.record.digest


class HubEntry:
    """The `CacheEntry` of a commit. It cannot prevent removal; readers notice one."""

    mappable = False

    def __init__(
        self, cache: StandardHubCache, key: CacheKey, folder: str, files: Sequence[HubFile]
    ) -> None:
        self.record = record_of(key, tuple(file.record for file in files))
        self.folder = folder
        self._cache = cache
        self._files = {file.record.name: file for file in files}
        self.identities: Mapping[str, FileIdentity] = {
            file.record.name: file.identity for file in files
        }
        self.is_verified = all(file.expected in cache.verified_blobs for file in files)

    def reader(self, name: str) -> FileReader:
        file = self._files.get(name)
        if file is None:
            raise InternalError(f"the hub cache's entry has no {name}")
        return FileReader(file.open, file.identity, name)

    def last_access(self, scope: str) -> float | None:
        """See `CacheEntry`. Other tools stored the entry with this machine's token, if it has one.

        Such an entry may be private: callers without a token do not get it.
        """
        since = self._cache.accesses.get((self.record.name, scope))
        if since is None and scope == self._cache.own_scope():
            since = max(file.mtime_ns for file in self.record.files) / 1e9
        return None if since is None else max(0.0, time.time() - since)

    def record_access(self, scope: str) -> None:
        remember(self._cache.accesses, (self.record.name, scope), time.time(), _MAX_REMEMBERED)

    def close(self) -> None:
        """Nothing is open."""


class StandardHubCache:
    """The standard hub cache in a folder, which need not exist; None is `HF_HUB_CACHE`. Blocks.

    `own_scope` returns the scope of this machine's own token, "" if it has none.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, own_scope: Callable[[], str | None]
    ) -> None:
        self.own_scope = own_scope
        self.accesses: OrderedDict[tuple[str, str], float] = OrderedDict()
        """When a source last let a scope have an entry; kept as long as this object."""
        self.verified_blobs: OrderedDict[ExpectedBlob, None] = OrderedDict()
        """Files that were hashed, and had their digests; kept as long."""
        self._path = None if path is None else os.path.abspath(os.fspath(path))
        self._corrupt_blobs: set[ExpectedBlob] = set()

    def open(self, key: CacheKey, *, check: bool = False) -> HubEntry | None:
        """Return the entry; None if it is not there, not whole, or (by `check`) has other bytes.

        Wrong bytes are remembered: no later call returns them.
        """
        is_ours = is_commit(key.version) and "://" not in key.source
        config = self._config(key.source, key.version) if is_ours else None
        if config is None:
            return None
        folder = os.path.dirname(config)
        try:
            found = [self._file(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        except OSError as error:
            _require_absent(error)
            return None
        files = [
            file for file in found if file is not None and file.expected not in self._corrupt_blobs
        ]
        if len(files) != len(found):
            return None
        since_ns = time.time_ns()
        corrupt = [file.expected for file in files if check and not file.is_intact()]
        self._corrupt_blobs.update(corrupt)
        if corrupt:
            return None
        for file in files if check else ():
            if is_settled(file.identity, since_ns):
                remember(self.verified_blobs, file.expected, None, _MAX_REMEMBERED)
        return HubEntry(self, key, folder, files)

    def last_version(self, question: str) -> tuple[str, str] | None:
        """Return the commit that other tools recorded for a `question_of` a ref."""
        kind, source, revision, *_ = question.split("\n")
        commit = self.commit_of(source, revision or _MAIN) if kind == "hub" else None
        return None if commit is None else (source, commit)

    def commit_of(self, source: str, revision: str) -> str | None:
        """Return the commit that a revision was when its config was stored; None if it was not."""
        if is_commit(revision):
            return revision
        try:
            parse_revision(revision)  # as a path it leads nowhere else
        except InvalidAdapterIdError:
            return None
        config = self._config(source, revision)
        commit = "" if config is None else os.path.basename(os.path.dirname(config))
        return commit if is_commit(commit) else None

    def _config(self, source: str, revision: str) -> str | None:
        """Return the path of a repository's config in a snapshot."""
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (slow)

        try:
            path = try_to_load_from_cache(
                source, CONFIG_FILE, cache_dir=self._path, revision=revision
            )
        except ValueError:  # not an id of the hub, or a ref whose file is not text
            return None
        except OSError as error:
            _require_absent(error)
            return None
        return os.path.abspath(path) if isinstance(path, str) else None

    def _file(self, folder: str, name: str) -> HubFile | None:
        """Return the blob of a snapshot's link; None if it is refused. Raise `OSError`."""
        path = os.path.join(folder, name)
        link = _LINK.fullmatch(os.readlink(path))
        digest = None if link is None else digest_of_etag(link["blob"])
        if link is None or digest is None:
            return None
        with locate(path) as file:
            blob = file.real_path
            # The operator may have put the cache or a repository elsewhere, by a link.
            repo = os.path.dirname(os.path.dirname(folder))
            own = f"{os.path.realpath(repo)}/blobs/{link['blob']}"
            cache = os.path.realpath(os.path.dirname(repo))
            shared = blob.startswith(cache) and _SHARED.fullmatch(blob, len(cache))
            if not (blob == own or shared) or not stat.S_ISREG(file.status.st_mode):
                return None
            os.close(file.open())  # may this process read it?
            record = FileRecord(name, file.identity.size, file.identity.mtime_ns, digest)
            return HubFile(blob, file.identity, record)


def _require_absent(error: OSError) -> None:
    """Raise `FetchError` unless the error says that a file is not there."""
    if error.errno not in _ABSENT:
        raise FetchError(f"the hub cache cannot be read ({code_of(error)})") from error
