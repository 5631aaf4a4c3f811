"""Adapters in object stores: obstore lists and signs, our range engine fetches."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Literal, ParamSpec, TypeVar, cast
from urllib.parse import quote

from lorax_async.concurrency import FairThreads
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
    InvalidAdapterIdError,
    UsageError,
)
from lorax_async.formats.split_weights import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.http.settings import Address, Rules
from lorax_async.http.target import Target
from lorax_async.http.urls import InvalidUrlError, Origin, Url, parse_url
from lorax_async.ids.grammar import STORES, parse_store
from lorax_async.ids.parsing import parsed
from lorax_async.remote.base import AnotherVersionError, LocatedAdapter, RemoteFile
from lorax_async.types import AdapterRef

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import AzureAccessKey, AzureStore, GCSStore, RetryConfig, S3Store


Scheme = Literal["s3", "gs", "az"]

_VERSION = re.compile(r"(?:versions|etags)-[0-9a-f]{32}(?:-[0-9a-f]{32})?")


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A folder of a bucket (az: of a container); `prefix` is empty, or ends with a slash."""

    scheme: Scheme
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"


def folder_of(ref: AdapterRef) -> StoreFolder:
    """Raises `InvalidAdapterIdError` for what names none, `UsageError` for one with a token."""
    found = parsed(ref)
    if found.source not in STORES:
        raise InvalidAdapterIdError(f"it is in no object store, but in {found.source}")
    if ref.token is not None:
        raise UsageError(
            "object stores are asked with the credentials of the environment; leave token out"
        )
    place = parse_store(found.source, found.text.partition("://")[2])
    return StoreFolder(cast("Scheme", place.scheme), place.bucket, place.prefix)


def is_version(text: str) -> bool:
    """Whether it is one that `version_of` made, and so says by itself which bytes it is."""
    return _VERSION.fullmatch(text) is not None


def version_of(kind: Literal["versions", "etags"], words: Iterable[str]) -> str:
    """The version of an adapter, of what tells its files apart: the same words, the same bytes."""
    return f"{kind}-{digest_of(words)}"


def digest_of(words: Iterable[str]) -> str:
    """Of the words in this order: 32 hexadecimal digits."""
    found = hashlib.sha256()
    for word in words:
        data = word.encode("utf-8", "surrogatepass")
        # Lengths first: no two lists of words are one string of bytes.
        found.update(len(data).to_bytes(8, "big") + data)
    return found.hexdigest()[:32]


_SAS = ("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN")
_YES = frozenset({"1", "true", "on", "yes", "y"})

_GOOGLE = "https://storage.googleapis.com"
_PREFIX: dict[Scheme, str] = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_WHO: dict[Scheme, tuple[str, ...]] = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_ROLE_ARN"),
    "gs": (
        *("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"),
        *("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
    ),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_CLIENT_ID", "AZURE_STORAGE_CLIENT_ID", *_SAS),
}
"""What tells one authority from another. Of a secret among them, only a digest is ever kept."""


def scope_of(scheme: Scheme) -> str:
    """On whose authority a store is asked: a digest of what names it; "" where on nobody's."""
    if _skips_signature(scheme):
        return ""
    who = [f"{name}={os.environ[name]}" for name in _WHO[scheme] if os.environ.get(name)]
    if not who:  # it is the machine's
        return "environment"
    return f"environment-{digest_of(who)}"


def unsigned_urls(folder: StoreFolder, paths: Sequence[str]) -> list[str] | None:
    """URLs of objects, where the environment says that nothing is to be signed.

    So it does by `…_SKIP_SIGNATURE`, which obstore heeds in requests but not in signing, and for
    Azure by a SAS token, which can sign nothing but itself opens URLs. None: they are to be signed.
    """
    if _skips_signature(folder.scheme):
        return _bare_urls(folder, paths)
    sas = next((os.environ[name] for name in _SAS if os.environ.get(name)), "").lstrip("?")
    if folder.scheme == "az" and sas:
        return [f"{url}?{sas}" for url in _bare_urls(folder, paths)]
    return None


def _skips_signature(scheme: Scheme) -> bool:
    return os.environ.get(f"{_PREFIX[scheme]}_SKIP_SIGNATURE", "").lower() in _YES


def _bare_urls(folder: StoreFolder, paths: Sequence[str]) -> list[str]:
    """As obstore makes them, without what nobody's key has signed."""
    import obstore  # noqa: PLC0415 - an extra, needed here alone
    from obstore.store import AzureStore, S3Store  # noqa: PLC0415

    if folder.scheme == "gs":
        base = os.environ.get("GOOGLE_BASE_URL", _GOOGLE).rstrip("/")
        return [f"{base}/{folder.bucket}/{quote(path)}" for path in paths]
    store = (
        S3Store(folder.bucket, config={"access_key_id": "-", "secret_access_key": "-"})
        if folder.scheme == "s3"
        else AzureStore(folder.bucket, skip_signature=False, credential_provider=_nobody)
    )
    signed = obstore.sign(store, "GET", paths, timedelta(hours=1))
    return [url.partition("?")[0] for url in signed]


def _nobody() -> AzureAccessKey:
    return {"access_key": "bm9uZQ==", "expires_at": None}


_STATUS = re.compile(r"status(?: code)?: ([1-5][0-9]{2})\b")
_AGAIN = frozenset({408, 425, 429})
_DENIED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class _ErrorSign:
    """A word by which a cause is known, and what is said instead."""

    word: str
    says: str
    retryable: bool


_SIGNS = (
    _ErrorSign(
        "BadScheme",
        "its endpoint is plain http; set AWS_ALLOW_HTTP, GOOGLE_ALLOW_HTTP or AZURE_ALLOW_HTTP to"
        " true, if that is meant",
        retryable=False,
    ),
    _ErrorSign("configured region", "its region is another one; set AWS_REGION", retryable=False),
    _ErrorSign("ertificate", "its certificate is not trusted", retryable=False),
    _ErrorSign("dns error", "there is no such host", retryable=True),
    _ErrorSign("onnection refused", "it refuses connections", retryable=True),
)


def mapped(error: Exception, what: str) -> FetchError:
    """What is raised for any error of obstore but that nothing was found."""
    from obstore import exceptions  # noqa: PLC0415 - an extra, needed here alone

    denied = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
    if isinstance(error, denied):
        return _denied(what)
    text = str(error)
    for sign in _SIGNS:
        if sign.word in text:
            return FetchError(f"{what}: {sign.says}", retryable=sign.retryable, stage="resolve")
    if "TimedOut" in text or "timed out" in text:
        return FetchTimeoutError(f"{what}: the store did not answer in time", stage="resolve")
    return _by_status(_STATUS.search(text), what)


def _by_status(found: re.Match[str] | None, what: str) -> FetchError:
    if found is None:
        kind = "the store could not be asked; are there credentials in the environment?"
        return FetchError(f"{what}: {kind}", stage="resolve")
    status = int(found[1])
    if status in _DENIED:
        return _denied(what)
    retryable = status >= 500 or status in _AGAIN
    return FetchError(f"{what}: status {status}", retryable=retryable, stage="resolve")


def _denied(what: str) -> AccessDeniedError:
    return AccessDeniedError(
        f"{what}: the environment's credentials may not have it, or are wrong", stage="resolve"
    )


if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import AzureStore, GCSStore, RetryConfig, S3Store

    Store = AzureStore | GCSStore | S3Store

_MOST_STORES = 16
_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a store says of one object. `etag` has its quotes."""

    nbytes: int
    etag: str | None = field(repr=False)
    version_id: str | None


class Buckets:
    """Asks object stores, with the credentials and endpoints of the environment.

    Methods but `close` block; they may be called from several threads. Raise `ConfigError` without
    obstore, and the `FetchError`s of `mapped`. A bucket's connections and credentials are kept, of
    16 buckets at most.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._stores: OrderedDict[tuple[Scheme, str], Store] = OrderedDict()

    def head(self, folder: StoreFolder, name: str) -> StoredObject | None:
        """What is said of one file of the folder; None if there is none."""

        def ask() -> ObjectMeta | None:
            import obstore  # noqa: PLC0415 - an extra, needed here alone

            try:
                return obstore.head(self._store(folder), f"{folder.prefix}{name}")
            except FileNotFoundError:
                return None

        found = _mapping(ask, folder)
        return None if found is None else _stored(found)

    def files(self, folder: StoreFolder) -> dict[str, StoredObject]:
        """What lies in the folder, by name; not what lies in folders below it."""

        def ask() -> Sequence[ObjectMeta]:
            import obstore  # noqa: PLC0415

            listed = obstore.list_with_delimiter(self._store(folder), folder.prefix or None)
            return listed["objects"]

        return {meta["path"].rpartition("/")[2]: _stored(meta) for meta in _mapping(ask, folder)}

    def urls(self, folder: StoreFolder, names: Sequence[str], seconds: float) -> list[Url]:
        """A URL for each file, with which it may be read for so long."""
        paths = [f"{folder.prefix}{name}" for name in names]

        def sign() -> Sequence[str]:
            import obstore  # noqa: PLC0415

            unsigned = unsigned_urls(folder, paths)
            if unsigned is not None:
                return unsigned
            return obstore.sign(self._store(folder), "GET", paths, timedelta(seconds=seconds))

        return [_parsed(text, folder) for text in _mapping(sign, folder)]

    def close(self) -> None:
        """Let connections and credentials go. Idempotent."""
        with self._lock:
            self._stores.clear()

    def _store(self, folder: StoreFolder) -> Store:
        key = folder.scheme, folder.bucket
        with self._lock:
            store = self._stores.get(key)
            if store is None:
                store = self._stores[key] = _opened(*key)
            self._stores.move_to_end(key)
            if len(self._stores) > _MOST_STORES:
                self._stores.popitem(last=False)
        return store


def _opened(scheme: Scheme, bucket: str) -> Store:
    from obstore import store  # noqa: PLC0415

    if scheme == "s3":
        return store.S3Store(bucket, retry_config=_RETRIES)
    if scheme == "gs":
        return store.GCSStore(bucket, retry_config=_RETRIES)
    return store.AzureStore(bucket, retry_config=_RETRIES)


def _mapping(call: Callable[[], Result], folder: StoreFolder) -> Result:
    """What the call returns. Its error is not chained to ours: it may hold what is secret."""
    try:
        from obstore.exceptions import BaseError  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            "adapters in object stores need obstore: pip install 'lorax-async[objects]'"
        ) from error
    try:
        return call()
    except (BaseError, OSError, ValueError) as error:
        failure = mapped(error, str(folder))
    raise failure


def _stored(meta: ObjectMeta) -> StoredObject:
    etag = meta["e_tag"]
    if etag is not None and not etag.endswith('"'):
        etag = f'"{etag}"'  # listings of Azure have it without
    return StoredObject(meta["size"], etag, meta["version"])


def _parsed(text: str, folder: StoreFolder) -> Url:
    try:
        return parse_url(text)
    except InvalidUrlError as error:
        raise FetchError(f"{folder}: its endpoint is none: {error}", retryable=False) from error


BUCKET_CALLS = 8
"""At a time: one that does not answer keeps as many threads, each for some 30 seconds."""

SIGNED_FOR = 3_600.0
"""Seconds for which a URL opens an object, unless the credentials behind it end earlier."""

_SHARD = re.compile(r"adapter_model-[0-9]{5}-of-[0-9]{5}\.safetensors")
Parameters = ParamSpec("Parameters")


@dataclass(frozen=True, slots=True)
class OriginAllowed:
    """Allows what `inner` allows, and one origin, at whichever address.

    That of a signed URL: the operator's environment names it, as it does for obstore itself.
    """

    origin: Origin
    inner: Rules

    def allows(self, url: Url, hop: int) -> bool:
        return url.origin == self.origin or self.inner.allows(url, hop)

    def allows_address(self, url: Url, address: Address) -> bool:
        return url.origin == self.origin or self.inner.allows_address(url, address)


class StoreBackend:
    """Finds adapters in S3, Google Cloud Storage and Azure Blob Storage.

    Credentials, regions and endpoints are those of the process's environment and machine, as
    obstore reads them. Whoever made it closes it.

    Parameters
    ----------
    executor
        Runs obstore's calls, which block; two at a time for one adapter, `BUCKET_CALLS` for one
        bucket. A call whose caller has left ends by itself.
    rules
        Where redirects may go. The origin of a signed URL itself is allowed.
    signed_for
        Seconds for which a signed URL is good.
    """

    def __init__(self, executor: Executor, rules: Rules, *, signed_for: float = SIGNED_FOR) -> None:
        self._threads = FairThreads(executor, BUCKET_CALLS)
        self._rules = rules
        self._signed_for = signed_for
        self._buckets = Buckets()

    def recalled(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """Where the revision is a version that a handle told; ETags and versionIds are asked for.

        Raises as `folder_of` does.
        """
        folder = folder_of(ref)
        if ref.revision is None or not is_version(ref.revision):
            return None
        return str(folder), ref.revision, scope_of(folder.scheme)

    async def scope(self, ref: AdapterRef) -> str:
        return scope_of(folder_of(ref).scheme)

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        """The present version, and URLs of its files, signed now.

        A revision is the version that a handle told, or the versionId or ETag of the weights (of
        the index, where they are several files). Only the present one can be had: signed URLs name
        no version. Another one is an `AdapterNotFoundError`.
        """
        folder = folder_of(ref)
        config, weights = await asyncio.gather(
            self._call(folder, self._config, folder),
            self._call(folder, self._weights, folder),
            return_exceptions=True,
        )
        # In this order: the same error for the same fault, whichever thread was the first.
        if isinstance(config, BaseException):
            raise config
        if isinstance(weights, BaseException):
            raise weights
        return await self._call(folder, self._located, ref, folder, config, *weights)

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """Of the same version: `IntegrityError`, if one of them was replaced since `locate`."""
        folder = folder_of(AdapterRef(located.source))
        return await self._call(folder, self._shards, located, roles)

    def close(self) -> None:
        """Let connections and credentials go; they are remade if it is used again. Idempotent."""
        self._buckets.close()

    def _config(self, folder: StoreFolder) -> StoredObject:
        found = self._buckets.head(folder, CONFIG_FILE.file_name)
        if found is None:
            raise AdapterNotFoundError(
                f"there is no {CONFIG_FILE.file_name} in {folder}, or no such bucket"
            )
        return found

    def _weights(self, folder: StoreFolder) -> tuple[FileRole, StoredObject]:
        denied: AccessDeniedError | None = None
        try:
            found = self._buckets.head(folder, WEIGHTS_FILE.file_name)
        except AccessDeniedError as error:
            # S3 says so, too, of what is not there, to those who may not list the bucket.
            found, denied = None, error
        if found is not None:
            return WEIGHTS_FILE, found
        found = self._buckets.head(folder, INDEX_FILE.file_name)
        if found is not None:
            return INDEX_FILE, found
        raise denied or AdapterNotFoundError(
            f"there is neither {WEIGHTS_FILE.file_name} nor {INDEX_FILE.file_name} in {folder}"
        )

    def _located(
        self,
        ref: AdapterRef,
        folder: StoreFolder,
        config: StoredObject,
        role: FileRole,
        weights: StoredObject,
    ) -> LocatedAdapter:
        found = [(CONFIG_FILE, CONFIG_FILE.file_name, config), (role, role.file_name, weights)]
        files = self._files(folder, found)
        place = files[0].target.url.text.partition("?")[0]
        version = _version(place, config, weights)
        if role == INDEX_FILE:
            version += f"-{_digest_of_shards(self._shards_of(folder))}"
        asked_for = {version, weights.version_id, weights.etag, (weights.etag or "").strip('"')}
        if ref.revision is not None and ref.revision not in asked_for:
            raise AnotherVersionError(
                f"{folder} is not what the revision names any more, or never was; now it is"
                f" {version}, and only that can be had"
            )
        return LocatedAdapter(str(folder), version, scope_of(folder.scheme), files)

    def _shards(self, located: LocatedAdapter, roles: Sequence[FileRole]) -> tuple[RemoteFile, ...]:
        folder = folder_of(AdapterRef(located.source))
        found = self._shards_of(folder)
        if not located.version.endswith(f"-{_digest_of_shards(found)}"):
            raise IntegrityError(f"shards in {folder} were replaced while they were asked for")
        wanted = []
        for role in roles:
            name = f"adapter_model-{role.number:05d}-of-{len(roles):05d}.safetensors"
            if name not in found:
                raise AdapterNotFoundError(f"there is no {name} in {folder}, which its index names")
            wanted.append((role, name, found[name]))
        return self._files(folder, wanted)

    def _shards_of(self, folder: StoreFolder) -> dict[str, StoredObject]:
        found = self._buckets.files(folder)
        return {name: found[name] for name in sorted(found) if _SHARD.fullmatch(name)}

    def _files(
        self, folder: StoreFolder, found: Sequence[tuple[FileRole, str, StoredObject]]
    ) -> tuple[RemoteFile, ...]:
        for _, name, stored in found:
            if stored.etag is None or stored.etag.startswith("W/"):
                raise FetchError(
                    f"the store has no strong ETag for {name} in {folder}, by which its bytes"
                    " could be told from others",
                    retryable=False,
                    stage="resolve",
                )
        urls = self._buckets.urls(folder, [name for _, name, _ in found], self._signed_for)
        return tuple(
            RemoteFile(
                role,
                Target(url, role.file_name, rules=OriginAllowed(url.origin, self._rules)),
                nbytes=stored.nbytes,
                etag=stored.etag,
            )
            for (role, _, stored), url in zip(found, urls, strict=True)
        )

    async def _call(
        self,
        folder: StoreFolder,
        call: Callable[Parameters, Result],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Result:
        """In a thread: obstore's own coroutines end the process, if it exits soon after them."""
        work = partial(call, *args, **kwargs)
        return await asyncio.wrap_future(self._threads.submit((folder.scheme, folder.bucket), work))


def _version(place: str, config: StoredObject, weights: StoredObject) -> str:
    """`place` is one of the URLs: two stores may have buckets of one name."""
    both = config, weights
    versioned = all(stored.version_id is not None for stored in both)
    return version_of("versions" if versioned else "etags", [place, *_words(both)])


def _digest_of_shards(shards: Mapping[str, StoredObject]) -> str:
    # Listings tell no versionIds.
    return digest_of([*shards, *_words(shards.values())])


def _words(several: Iterable[StoredObject]) -> Iterator[str]:
    for stored in several:
        yield from (stored.version_id or "", stored.etag or "", str(stored.nbytes))
