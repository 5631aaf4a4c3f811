"""Adapters on the hub, and those of them in the standard hub cache."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from lorax_async.cache.base import Cache, CacheDownload, CacheEntry, CacheKey, FileRecord, record_of
from lorax_async.concurrency import FetchControl
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    IntegrityError,
    InternalError,
    InvalidAdapterIdError,
    LoraxError,
)
from lorax_async.files import FileReader, code_of, hash_on, locate, open_same, to_adapter_error
from lorax_async.formats.digests import Digest, FileHash
from lorax_async.formats.split_weights import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.http.failures import RetryPolicy
from lorax_async.http.settings import Rules
from lorax_async.http.target import Target
from lorax_async.ids import Allow, OriginPlace, parse_revision
from lorax_async.remote.base import LocatedAdapter, RemoteFile
from lorax_async.remote.hub_calls import (
    FileInfo,
    FileQuery,
    MissingFile,
    Outcome,
    digest_of_etag,
    fetch_repository_id,
    has_stored_token,
    is_commit,
    machine_token,
    query_file,
    require_token,
    url_of,
)
from lorax_async.remote.resolution import resolution_request
from lorax_async.types import AdapterRef, FileIdentity
from lorax_async.urls import InvalidUrlError, Url, parse_url

RETRIES = RetryPolicy(attempts=3, base=0.25, most=4.0)

_MAIN = "main"
_PICKLE = "adapter_model.bin"
_BEARER = "Bearer "


@dataclass(frozen=True, slots=True)
class _MachineToken:
    """The machine's own token, if it has one."""

    token: str | None = field(repr=False)


class HubBackend:
    """The `Backend` of adapters on the hub: `ref.text` is org/name, a revision any name of git's.

    A `ref` without a token is resolved without one, unless `ref.use_token` or an entry of `allow`
    lends this machine's own (`HF_TOKEN`, `hf auth login`) and huggingface_hub may use that. An
    empty token is a `UsageError`.

    Parameters
    ----------
    endpoint
        The hub's URL.
    rules
        Where the engine may send requests for files. huggingface_hub queries the endpoint itself,
        and follows redirects to that origin and the hub's own only; the operator vouches for the
        endpoint's address.
    allow
        Entries with `use_token` lend this machine's own token to the ids that they cover, if the
        repository that answers is covered too: the hub redirects from ids that were moved.
    threads
        Run huggingface_hub, two calls per adapter at once. A call outlives its cancelled caller.
    timeout
        Seconds to connect, and to wait for the next byte of a response.
    retries, draw
        When to query again, and a draw from [0, 1).

    Raises
    ------
    ConfigError
        The endpoint is no URL.
    """

    def __init__(
        self,
        *,
        endpoint: str,
        rules: Rules,
        threads: Executor,
        allow: Sequence[Allow] = (),
        timeout: float = 10.0,
        retries: RetryPolicy = RETRIES,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._endpoint = _checked_endpoint(endpoint)
        self._rules = rules
        self._lending = tuple(entry for entry in allow if entry.use_token)
        self._threads = threads
        self._timeout = timeout
        self._retries = retries
        self._draw = draw
        self._own: _MachineToken | None = None
        """None until the first look-up."""

    async def scope(self, ref: AdapterRef) -> str:
        """See `Backend`. From then on `pinned_version` knows the machine's token."""
        return self._scope(await self._authority(ref))

    def own_scope(self) -> str | None:
        """Return the scope of this machine's own token; "" if it has none.

        None if its token cannot be read, or must not be sent. Blocks.
        """
        try:
            own = machine_token()
        except LoraxError:
            return None
        return None if own is None and has_stored_token() else self._scope(own)

    def pinned_version(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """See `Backend`; with the machine's token, None before the first `scope` or `locate`."""
        token = require_token(ref.token)
        if ref.revision is None or not is_commit(ref.revision):
            return None
        if self._uses_own(ref):
            if self._own is None:
                return None
            token = self._own.token
        return ref.text, ref.revision, self._scope(token)

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        token = await self._authority(ref)
        revision = _MAIN if ref.revision is None else ref.revision
        first = self._query(ref.text, CONFIG_FILE, revision, token)
        config, weights = await self._answers(first, replace(first, name=WEIGHTS_FILE.file_name))
        if isinstance(config, MissingFile):
            raise _lacking(first, f"no {CONFIG_FILE.file_name}: it is no adapter of PEFT")
        pinned = replace(first, revision=config.commit)
        if config.redirected and token is not None and self._is_lent(ref):
            await self._require_covered(pinned)
        role = WEIGHTS_FILE
        if weights.commit != config.commit:  # a branch moved between the two answers
            (weights,) = await self._answers(replace(pinned, name=role.file_name))
        if isinstance(weights, MissingFile):
            role = INDEX_FILE
            weights = await self._index(pinned)
        files = (
            self._file(CONFIG_FILE, first, config),
            self._file(role, replace(first, name=role.file_name), weights),
        )
        return LocatedAdapter(ref.text, config.commit, self._scope(token), files)

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """Return all shards of the weights, numbered from 1: their names say how many there are."""
        if [role.number for role in roles] != list(range(1, len(roles) + 1)):
            raise InternalError("the shards of an adapter must be located all at once")
        header = located.files[0].target.headers.get("Authorization")
        token = None if header is None else header.removeprefix(_BEARER)
        queries = [self._query(located.source, role, located.version, token) for role in roles]
        files = []
        for role, query, info in zip(roles, queries, await self._answers(*queries), strict=True):
            if isinstance(info, MissingFile):
                raise _lacking(query, f"no {query.name}, which its index names")
            files.append(self._file(role, query, info))
        return tuple(files)

    async def _index(self, pinned: FileQuery) -> FileInfo:
        """Return the index of a repository whose weights are not in one file."""
        (index,) = await self._answers(replace(pinned, name=INDEX_FILE.file_name))
        if isinstance(index, FileInfo):
            return index
        (pickle,) = await self._answers(replace(pinned, name=_PICKLE))
        if isinstance(pickle, FileInfo):
            raise _lacking(
                pinned,
                f"its weights as {_PICKLE} only, a pickle, which can run any code and is never"
                " loaded; save them again with safetensors (save_pretrained does by default)",
            )
        raise _lacking(pinned, f"neither {WEIGHTS_FILE.file_name} nor {INDEX_FILE.file_name}")

    async def _authority(self, ref: AdapterRef) -> str | None:
        """Return the token to send."""
        token = require_token(ref.token)
        if not self._uses_own(ref):
            return token
        own = await asyncio.wrap_future(self._threads.submit(machine_token))
        self._own = _MachineToken(own)
        return own

    def _uses_own(self, ref: AdapterRef) -> bool:
        """Return whether requests for an id send this machine's own token."""
        return ref.use_token or self._is_lent(ref)

    def _is_lent(self, ref: AdapterRef) -> bool:
        """Return whether only an entry of `allow` lends this machine's own token to an id."""
        return ref.token is None and not ref.use_token and self._lends_to(ref.text)

    def _lends_to(self, repo: str) -> bool:
        place = OriginPlace("hub", "", None, f"{repo}/")
        return any(entry.covers(place) for entry in self._lending)

    async def _require_covered(self, pinned: FileQuery) -> None:
        """Raise `AccessDeniedError` if no entry lends the token to the commit's repository.

        This covers the weights, which are of the same commit.
        """
        for failed in count(1):
            future = self._threads.submit(fetch_repository_id, pinned)
            result = await asyncio.wrap_future(future)
            if isinstance(result, str):
                covered = self._lends_to(result)
                break
            await self._wait_to_retry(result, failed)
        if not covered:
            # The new id may be a secret of the operator's: leave it out.
            raise AccessDeniedError(
                f"the hub has moved {pinned.source!r} to a repository to which the token of this"
                " machine is not lent; use the new id, if it is allowed, or have it allowed",
                stage="resolve",
            )

    async def _answers(self, *queries: FileQuery) -> list[FileInfo | MissingFile]:
        """Return all answers; query again where the failure may pass."""
        answers: dict[FileQuery, FileInfo | MissingFile] = {}
        for failed in count(1):
            left = [query for query in queries if query not in answers]
            problems = []
            for query, outcome in zip(left, await self._round(left), strict=True):
                if isinstance(outcome, LoraxError):
                    problems.append(outcome)
                else:
                    answers[query] = _of_that_commit(query, outcome)
            if not problems:
                break
            # Report first a failure that no retry would mend.
            worst = min(problems, key=lambda problem: problem.retryable)
            await self._wait_to_retry(worst, failed)
        return [answers[query] for query in queries]

    async def _wait_to_retry(self, problem: LoraxError, failed: int) -> None:
        """Wait before the next attempt after `failed` ones; raise `problem` if there is none."""
        wait = self._retries.wait(failed, self._draw(), problem.retry_after)
        if not problem.retryable or wait is None:
            raise problem
        await asyncio.sleep(wait)

    async def _round(self, queries: Sequence[FileQuery]) -> list[Outcome]:
        futures = [
            asyncio.wrap_future(self._threads.submit(query_file, query)) for query in queries
        ]
        try:
            await asyncio.wait(futures)
        finally:
            for future in futures:
                future.cancel()
        return [future.result() for future in futures]

    def _query(self, source: str, role: FileRole, revision: str, token: str | None) -> FileQuery:
        hub = (self._endpoint, token, self._rules, self._timeout)
        return FileQuery(source, role.file_name, revision, *hub)

    def _file(self, role: FileRole, query: FileQuery, info: FileInfo) -> RemoteFile:
        """Return a file of the commit. Its target is tried first where the answer redirected."""
        url = url_of(query.source, query.name, info.commit, self._endpoint)
        headers = {} if query.token is None else {"Authorization": f"{_BEARER}{query.token}"}
        location = _stable_location(url, info)
        target = Target(url, f"{query.source}/{query.name}", headers, self._rules, location)
        return RemoteFile(role, target, info.nbytes, info.expected)

    def _scope(self, token: str | None) -> str:
        if token is None:
            return ""
        # Neither an endpoint nor a token has spaces.
        return hashlib.sha256(f"{self._endpoint} {token}".encode()).hexdigest()


def _checked_endpoint(endpoint: str) -> str:
    try:
        url = parse_url(endpoint)
    except InvalidUrlError as error:
        raise ConfigError(f"the hub's endpoint is no URL: {error}") from None
    if "?" in url.target:
        raise ConfigError("the hub's endpoint must be a URL without a query")
    return url.text.rstrip("/")


def _of_that_commit(query: FileQuery, info: FileInfo | MissingFile) -> FileInfo | MissingFile:
    """Raise `IntegrityError` for an answer about another commit than the query's."""
    if is_commit(query.revision) and info.commit not in {None, query.revision}:
        raise IntegrityError(
            f"the hub answered about another commit of {query.source!r} than the requested one",
            stage="resolve",
        )
    return info


def _stable_location(url: Url, info: FileInfo) -> Url | None:
    """Return the location that a redirect led to, if it is bound to the commit.

    A redirect to another name on the hub, as after a rename, may lead elsewhere later.
    """
    location = info.location
    if location is None or location == url:
        return None
    is_name = location.origin == url.origin or "/resolve/" in location.target
    return None if is_name and info.commit not in location.target else location


def _lacking(query: FileQuery, what: str) -> AdapterNotFoundError:
    return AdapterNotFoundError(f"{query.source!r} at {query.revision!r} has {what}")


MAX_GRANTS = 65_536
_ABSENT = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    errno.EINVAL,  # reading a link that is none
    *(errno.EACCES, errno.EPERM),  # a file that this process may not read counts as absent
}
_LINK = re.compile(r"\.\./\.\./blobs/(?P<blob>[0-9a-z-]{40,80})")
_SHARED = re.compile(r"/blobs/(?P<first>[0-9a-f]{2})/(?P=first)[0-9a-f]{62}")
_SHARD = re.compile(r"adapter_model-[0-9]{5}-of-(?P<count>[0-9]{5})\.safetensors")


def standard_folder() -> str:
    """Return huggingface_hub's cache folder (`HF_HUB_CACHE`, `HF_HOME`). The first call is slow."""
    from huggingface_hub import constants  # noqa: PLC0415 (slow)

    return constants.HF_HUB_CACHE


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit: the blob at `path`, a real path."""

    role: FileRole
    path: str
    digest: Digest
    identity: FileIdentity

    @property
    def record(self) -> FileRecord:
        return FileRecord(self.role, self.identity.size, self.identity.mtime_ns, self.digest)

    def reader(self) -> FileReader:
        name = self.role.file_name
        return FileReader(partial(open_same, self.path, self.identity, name), self.identity, name)

    def is_intact(self) -> bool:
        """Hash all of it and compare the digest with the blob's name."""
        try:
            fd = open_same(self.path, self.identity, self.role.file_name)
            try:
                file_hash = FileHash(self.digest.kind, self.identity.size)
                hash_on(fd, file_hash, self.identity.size, self.role.file_name)
            finally:
                os.close(fd)
        except IntegrityError:
            return False
        except OSError as error:
            raise to_adapter_error(error, self.role.file_name) from error
        return file_hash.digest() == self.digest


class HubEntry:
    """The `CacheEntry` of a commit. It cannot prevent removal; readers notice one."""

    mappable = False

    def __init__(
        self, cache: StandardHubCache, key: CacheKey, folder: str, files: tuple[HubFile, ...]
    ) -> None:
        self.record = record_of(key, tuple(file.record for file in files))
        self.folder = folder
        self._cache = cache
        self._files = {file.role: file for file in files}

    def reader(self, role: FileRole) -> FileReader:
        file = self._files.get(role)
        if file is None:
            raise InternalError(f"the hub cache's entry has no {role.file_name}")
        return file.reader()

    def granted(self, scope: str) -> float | None:
        """See `CacheEntry`. Other tools stored the entry with this machine's token, if it has one.

        Such an entry may be private: callers without a token are not granted it.
        """
        since = self._cache.grants.get((self.record.name, scope))
        if since is None and scope == self._cache.own_scope():
            since = max(file.mtime_ns for file in self.record.files) / 1e9
        return None if since is None else max(0.0, time.time() - since)

    def grant(self, scope: str) -> None:
        grants = self._cache.grants
        grants[self.record.name, scope] = time.time()
        grants.move_to_end((self.record.name, scope))
        if len(grants) > MAX_GRANTS:
            grants.popitem(last=False)

    def close(self) -> None:
        """Nothing is open."""


class StandardHubCache:
    """The standard hub cache in a folder, which need not exist. Blocks.

    `own_scope` returns the scope of this machine's own token, "" if it has none.
    """

    def __init__(self, path: str | os.PathLike[str], own_scope: Callable[[], str | None]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self.own_scope = own_scope
        self.grants: OrderedDict[tuple[str, str], float] = OrderedDict()
        """When a source last let a scope have an entry; kept as long as this object."""
        self._wrong: set[FileIdentity] = set()

    def open(self, key: CacheKey, *, check: bool = False) -> HubEntry | None:
        """Return the entry; None if it is not there, not whole, or (by `check`) has other bytes.

        Wrong bytes are remembered: no later call returns them.
        """
        config = self._cached(key.source, key.version) if is_commit(key.version) else None
        if config is None:
            return None
        folder = os.path.dirname(config)
        files = self._files(folder)
        if not files or any(file.identity in self._wrong for file in files):
            return None
        wrong = [file.identity for file in files if check and not file.is_intact()]
        self._wrong.update(wrong)
        return None if wrong else HubEntry(self, key, folder, files)

    def commit_of(self, source: str, revision: str) -> str | None:
        """Return the commit that a revision was when its config was stored; None if it was not."""
        if is_commit(revision):
            return revision
        try:
            parse_revision(revision)  # as a path it leads nowhere else
        except InvalidAdapterIdError:
            return None
        config = self._cached(source, revision)
        commit = "" if config is None else os.path.basename(os.path.dirname(config))
        return commit if is_commit(commit) else None

    def _cached(self, source: str, revision: str) -> str | None:
        """Return the path of a repository's config in a snapshot."""
        from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 (slow)

        try:
            path = try_to_load_from_cache(
                source, CONFIG_FILE.file_name, cache_dir=self.path, revision=revision
            )
        except ValueError:  # no id of the hub, or a ref that is no text
            return None
        except OSError as error:
            _require_absent(error)
            return None
        return path if isinstance(path, str) else None

    def _files(self, folder: str) -> tuple[HubFile, ...]:
        """Return all files of the adapter in a snapshot; none if one is missing or refused."""
        try:
            files = [self._file(folder, role) for role in adapter_files(os.listdir(folder))]
        except OSError as error:
            _require_absent(error)
            return ()
        usable = tuple(file for file in files if file is not None)
        return usable if len(usable) == len(files) else ()

    def _file(self, folder: str, role: FileRole) -> HubFile | None:
        """Return the blob of a snapshot's link; None if it is refused. Raise `OSError`."""
        path = os.path.join(folder, role.file_name)
        link = _LINK.fullmatch(os.readlink(path))
        digest = None if link is None else digest_of_etag(link["blob"])
        if link is None or digest is None:
            return None
        with locate(path) as file:
            blob = file.real_path
            # The operator may have put the cache or a repository elsewhere, by a link.
            repo = os.path.realpath(os.path.dirname(os.path.dirname(folder)))
            own, cache = f"{repo}/blobs/{link['blob']}", os.path.realpath(self.path)
            shared = blob.startswith(cache) and _SHARED.fullmatch(blob, len(cache))
            if not (blob == own or shared) or not stat.S_ISREG(file.status.st_mode):
                return None
            os.close(file.open())  # may this process read it?
            return HubFile(role, blob, digest, file.identity)


class TieredCache:
    """The `Cache` that reads the standard hub cache first, then our own.

    Downloads go to our own, `disk`, whose maker closes it.
    """

    def __init__(self, hub: StandardHubCache, disk: Cache) -> None:
        self._hub = hub
        self._disk = disk

    def open(self, key: CacheKey, *, check: bool = False) -> CacheEntry | None:
        entry = self._hub.open(key, check=check)
        return self._disk.open(key, check=check) if entry is None else entry

    def try_begin(
        self, key: CacheKey, scope: str, *, alone: bool = False
    ) -> CacheEntry | CacheDownload | int:
        entry = self._hub.open(key)
        return self._disk.try_begin(key, scope, alone=alone) if entry is None else entry

    def begin(self, key: CacheKey, scope: str, control: FetchControl) -> CacheEntry | CacheDownload:
        entry = self._hub.open(key)
        return self._disk.begin(key, scope, control) if entry is None else entry

    def note_version(self, question: str, source: str, version: str) -> None:
        self._disk.note_version(question, source, version)

    def last_version(self, question: str) -> tuple[str, str] | None:
        """Return the last answer recorded, or else the commit that other tools recorded."""
        last, request = self._disk.last_version(question), resolution_request(question)
        if last is not None or request is None or request.source not in {"", "hub"}:
            return last
        commit = self._hub.commit_of(request.text, request.revision or _MAIN)
        return None if commit is None else (request.text, commit)

    def condemn(self, key: CacheKey) -> None:
        """Remove our own entry; the hub cache's files are checked by the digests that name them."""
        self._disk.condemn(key)

    def remove(self, key: CacheKey) -> bool:
        """Remove our own entry. Return False also if the hub cache has the adapter."""
        return self._disk.remove(key) and self._hub.open(key) is None

    def used(self) -> int:
        return self._disk.used()

    def close(self) -> None:
        """Do nothing: the caches' makers close them."""


def adapter_files(names: Iterable[str]) -> list[FileRole]:
    """Return which of a commit's files are its adapter; none if one is missing.

    The config comes first, then the weights, or else their index and all files that it may name.
    """
    present = set(names)
    weights = [role for role in (WEIGHTS_FILE, INDEX_FILE) if role.file_name in present]
    if CONFIG_FILE.file_name not in present or not weights:
        return []
    roles = [CONFIG_FILE, weights[0]]
    if weights[0] == INDEX_FILE:
        matches = map(_SHARD.fullmatch, present)
        counts = {int(match["count"]) for match in matches if match is not None}
        if len(counts) != 1:
            return []
        count = counts.pop()
        roles += [FileRole("weights", number, count) for number in range(1, count + 1)]
    return roles if present.issuperset(role.file_name for role in roles) else []


def _require_absent(error: OSError) -> None:
    """Raise `FetchError` unless the error says that a file is not there."""
    if error.errno not in _ABSENT:
        raise FetchError(f"the hub cache cannot be read ({code_of(error)})") from error
