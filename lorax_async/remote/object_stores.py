"""The backend of object stores: obstore lists and signs, our range engine fetches."""

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
from lorax_async.ids import STORES, parse_ref, parse_store
from lorax_async.remote.base import AnotherVersionError, LocatedAdapter, RemoteFile
from lorax_async.types import AdapterRef
from lorax_async.urls import InvalidUrlError, Origin, Url, parse_url

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import AzureAccessKey, AzureStore, GCSStore, RetryConfig, S3Store


if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import AzureAccessKey, AzureStore, GCSStore, RetryConfig, S3Store

    Store = AzureStore | GCSStore | S3Store

Scheme = Literal["s3", "gs", "az"]

_VERSION = re.compile(r"(?:versions|etags)-[0-9a-f]{32}(?:-[0-9a-f]{32})?")


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A folder in a bucket (az: a container); `prefix` is empty, or ends with a slash."""

    scheme: Scheme
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"


def folder_of(ref: AdapterRef) -> StoreFolder:
    """Return the folder that `ref` names.

    Raise `InvalidAdapterIdError` if it names none, `UsageError` if it has a token.
    """
    parsed_ref = parse_ref(ref)
    if parsed_ref.source not in STORES:
        raise InvalidAdapterIdError(f"it is in no object store, but in {parsed_ref.source}")
    if ref.token is not None:
        raise UsageError(
            "requests to object stores use the credentials of the environment; leave token out"
        )
    place = parse_store(parsed_ref.source, parsed_ref.text.partition("://")[2])
    return StoreFolder(cast("Scheme", place.scheme), place.bucket, place.prefix)


def is_version(text: str) -> bool:
    """Return whether `version_of` made the text, so that it names its bytes."""
    return _VERSION.fullmatch(text) is not None


def version_of(kind: Literal["versions", "etags"], words: Iterable[str]) -> str:
    """Return the version for words that identify the files: equal words mean equal bytes."""
    return f"{kind}-{digest_of(words)}"


def digest_of(words: Iterable[str]) -> str:
    """Return a digest of the words in this order: 32 hexadecimal digits."""
    words_hash = hashlib.sha256()
    for word in words:
        data = word.encode("utf-8", "surrogatepass")
        # With lengths, different lists of words are different bytes.
        words_hash.update(len(data).to_bytes(8, "big") + data)
    return words_hash.hexdigest()[:32]


_SAS = ("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN")
_TRUE = frozenset({"1", "true", "on", "yes", "y"})

_GOOGLE = "https://storage.googleapis.com"
_PREFIX: dict[Scheme, str] = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}
_IDENTITY: dict[Scheme, tuple[str, ...]] = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_ROLE_ARN"),
    "gs": (
        *("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"),
        *("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_APPLICATION_CREDENTIALS"),
    ),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_CLIENT_ID", "AZURE_STORAGE_CLIENT_ID", *_SAS),
}
"""Variables that identify an authority. Only a digest of their values is kept."""


def scope_of(scheme: Scheme) -> str:
    """Return the authority of requests: a digest of the variables; "" for anonymous requests."""
    if _skips_signature(scheme):
        return ""
    variables = [f"{name}={os.environ[name]}" for name in _IDENTITY[scheme] if os.environ.get(name)]
    if not variables:  # the machine's own identity
        return "environment"
    return f"environment-{digest_of(variables)}"


def unsigned_urls(folder: StoreFolder, paths: Sequence[str]) -> list[str] | None:
    """Return the objects' URLs if the environment disables signing; None if they must be signed.

    It does so by `…_SKIP_SIGNATURE`, which obstore respects in requests but not in signing, and for
    Azure by a SAS token, which cannot sign but grants access as a query.
    """
    if _skips_signature(folder.scheme):
        return _bare_urls(folder, paths)
    sas = next((os.environ[name] for name in _SAS if os.environ.get(name)), "").lstrip("?")
    if folder.scheme == "az" and sas:
        return [f"{url}?{sas}" for url in _bare_urls(folder, paths)]
    return None


def _skips_signature(scheme: Scheme) -> bool:
    return os.environ.get(f"{_PREFIX[scheme]}_SKIP_SIGNATURE", "").lower() in _TRUE


def _bare_urls(folder: StoreFolder, paths: Sequence[str]) -> list[str]:
    """Return URLs as obstore makes them, without the signature by a dummy key."""
    import obstore  # noqa: PLC0415 - an extra, needed here alone
    from obstore.store import AzureStore, S3Store  # noqa: PLC0415

    if folder.scheme == "gs":
        base = os.environ.get("GOOGLE_BASE_URL", _GOOGLE).rstrip("/")
        return [f"{base}/{folder.bucket}/{quote(path)}" for path in paths]
    store = (
        S3Store(folder.bucket, config={"access_key_id": "-", "secret_access_key": "-"})
        if folder.scheme == "s3"
        else AzureStore(folder.bucket, skip_signature=False, credential_provider=_dummy_credential)
    )
    signed = obstore.sign(store, "GET", paths, timedelta(hours=1))
    return [url.partition("?")[0] for url in signed]


def _dummy_credential() -> AzureAccessKey:
    return {"access_key": "bm9uZQ==", "expires_at": None}


_STATUS = re.compile(r"status(?: code)?: ([1-5][0-9]{2})\b")
_AGAIN = frozenset({408, 425, 429})
_DENIED = frozenset({401, 403})


@dataclass(frozen=True, slots=True)
class _ErrorSign:
    """A word in an error text that identifies its cause, and our text for it."""

    word: str
    text: str
    retryable: bool


_SIGNS = (
    _ErrorSign(
        "BadScheme",
        "its endpoint is plain http; set AWS_ALLOW_HTTP, GOOGLE_ALLOW_HTTP or AZURE_ALLOW_HTTP to"
        " true if that is intended",
        retryable=False,
    ),
    _ErrorSign("configured region", "its region is another one; set AWS_REGION", retryable=False),
    _ErrorSign("ertificate", "its certificate is not trusted", retryable=False),
    _ErrorSign("dns error", "there is no such host", retryable=True),
    _ErrorSign("onnection refused", "it refuses connections", retryable=True),
)


def mapped(error: Exception, what: str) -> FetchError:
    """Return our error for any of obstore's except that an object is missing."""
    from obstore import exceptions  # noqa: PLC0415 - an extra, needed here alone

    denied = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
    if isinstance(error, denied):
        return _denied_error(what)
    text = str(error)
    for sign in _SIGNS:
        if sign.word in text:
            return FetchError(f"{what}: {sign.text}", retryable=sign.retryable, stage="resolve")
    if "TimedOut" in text or "timed out" in text:
        return FetchTimeoutError(f"{what}: the store did not answer in time", stage="resolve")
    return _by_status(_STATUS.search(text), what)


def _by_status(match: re.Match[str] | None, what: str) -> FetchError:
    if match is None:
        problem = "the request to the store failed; are there credentials in the environment?"
        return FetchError(f"{what}: {problem}", stage="resolve")
    status = int(match[1])
    if status in _DENIED:
        return _denied_error(what)
    retryable = status >= 500 or status in _AGAIN
    return FetchError(f"{what}: status {status}", retryable=retryable, stage="resolve")


def _denied_error(what: str) -> AccessDeniedError:
    return AccessDeniedError(
        f"{what}: the environment's credentials may not have it, or are wrong", stage="resolve"
    )


_MAX_STORES = 16
_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a store reports of one object. `etag` has its quotes."""

    nbytes: int
    etag: str | None = field(repr=False)
    version_id: str | None


class Buckets:
    """Queries object stores with the credentials and endpoints of the environment.

    All methods but `close` block, and any thread may call them. They raise `ConfigError` without
    obstore, and the `FetchError`s of `mapped`. Connections and credentials of the 16 buckets used
    last are kept.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._stores: OrderedDict[tuple[Scheme, str], Store] = OrderedDict()

    def head(self, folder: StoreFolder, name: str) -> StoredObject | None:
        """Return the metadata of one file of the folder; None if it is missing."""

        def query() -> ObjectMeta | None:
            import obstore  # noqa: PLC0415 - an extra, needed here alone

            try:
                return obstore.head(self._store(folder), f"{folder.prefix}{name}")
            except FileNotFoundError:
                return None

        metadata = _mapping(query, folder)
        return None if metadata is None else _object_of(metadata)

    def files(self, folder: StoreFolder) -> dict[str, StoredObject]:
        """Return the folder's files by name, without folders below it."""

        def query() -> Sequence[ObjectMeta]:
            import obstore  # noqa: PLC0415

            listing = obstore.list_with_delimiter(self._store(folder), folder.prefix or None)
            return listing["objects"]

        return {
            meta["path"].rpartition("/")[2]: _object_of(meta) for meta in _mapping(query, folder)
        }

    def urls(self, folder: StoreFolder, names: Sequence[str], seconds: float) -> list[Url]:
        """Return a URL for each file, valid for this many seconds."""
        paths = [f"{folder.prefix}{name}" for name in names]

        def sign() -> Sequence[str]:
            import obstore  # noqa: PLC0415

            unsigned = unsigned_urls(folder, paths)
            if unsigned is not None:
                return unsigned
            return obstore.sign(self._store(folder), "GET", paths, timedelta(seconds=seconds))

        return [_parsed(text, folder) for text in _mapping(sign, folder)]

    def close(self) -> None:
        """Drop connections and credentials. Idempotent."""
        with self._lock:
            self._stores.clear()

    def _store(self, folder: StoreFolder) -> Store:
        key = folder.scheme, folder.bucket
        with self._lock:
            store = self._stores.get(key)
            if store is None:
                store = self._stores[key] = _open_store(*key)
            self._stores.move_to_end(key)
            if len(self._stores) > _MAX_STORES:
                self._stores.popitem(last=False)
        return store


def _open_store(scheme: Scheme, bucket: str) -> Store:
    from obstore import store  # noqa: PLC0415

    if scheme == "s3":
        return store.S3Store(bucket, retry_config=_RETRIES)
    if scheme == "gs":
        return store.GCSStore(bucket, retry_config=_RETRIES)
    return store.AzureStore(bucket, retry_config=_RETRIES)


def _mapping(call: Callable[[], Result], folder: StoreFolder) -> Result:
    """Return the call's result, or raise our error, unchained: theirs may contain secrets."""
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


def _object_of(meta: ObjectMeta) -> StoredObject:
    etag = meta["e_tag"]
    if etag is not None and not etag.endswith('"'):
        etag = f'"{etag}"'  # Azure's listings leave the quotes out
    return StoredObject(meta["size"], etag, meta["version"])


def _parsed(text: str, folder: StoreFolder) -> Url:
    try:
        return parse_url(text)
    except InvalidUrlError as error:
        raise FetchError(f"{folder}: its endpoint is no URL: {error}", retryable=False) from error


BUCKET_CALLS = 8
"""Calls at a time. A bucket that does not answer keeps as many threads for some 30 seconds."""

SIGNED_FOR = 3_600.0
"""Seconds for which a signed URL is valid, unless its credentials expire earlier."""

_SHARD = re.compile(r"adapter_model-[0-9]{5}-of-[0-9]{5}\.safetensors")
Parameters = ParamSpec("Parameters")


@dataclass(frozen=True, slots=True)
class OriginAllowed:
    """The `Rules` that allow what `inner` allows, and one origin at any address.

    The origin is that of a signed URL, which the operator's environment names.
    """

    origin: Origin
    inner: Rules

    def allows(self, url: Url, hop: int) -> bool:
        return url.origin == self.origin or self.inner.allows(url, hop)

    def allows_address(self, url: Url, address: Address) -> bool:
        return url.origin == self.origin or self.inner.allows_address(url, address)


class StoreBackend:
    """The `Backend` of S3, Google Cloud Storage and Azure Blob Storage.

    Credentials, regions and endpoints are those of the process's environment and machine, as
    obstore reads them. Its maker closes it.

    Parameters
    ----------
    executor
        Runs obstore's calls, which block: two at a time for one adapter, `BUCKET_CALLS` for one
        bucket. A call outlives its cancelled caller.
    rules
        Where redirects may lead. The origin of a signed URL itself is allowed.
    signed_for
        Seconds for which a signed URL is valid.
    """

    def __init__(self, executor: Executor, rules: Rules, *, signed_for: float = SIGNED_FOR) -> None:
        self._threads = FairThreads(executor, BUCKET_CALLS)
        self._rules = rules
        self._signed_for = signed_for
        self._buckets = Buckets()

    def pinned_version(self, ref: AdapterRef) -> tuple[str, str, str] | None:
        """See `Backend`. A versionId or an ETag is no version: the store has to be asked.

        Raise as `folder_of` does.
        """
        folder = folder_of(ref)
        if ref.revision is None or not is_version(ref.revision):
            return None
        return str(folder), ref.revision, scope_of(folder.scheme)

    async def scope(self, ref: AdapterRef) -> str:
        return scope_of(folder_of(ref).scheme)

    async def locate(self, ref: AdapterRef) -> LocatedAdapter:
        """Return the present version, with URLs of its files signed now.

        A revision is a version that a handle reported, or the versionId or ETag of the weights (or
        of their index). Only the present version can be fetched, for signed URLs name none; another
        one raises `AnotherVersionError`.
        """
        folder = folder_of(ref)
        config, weights = await asyncio.gather(
            self._call(folder, self._config, folder),
            self._call(folder, self._weights, folder),
            return_exceptions=True,
        )
        # The same fault raises the same error, whichever thread ended first.
        if isinstance(config, BaseException):
            raise config
        if isinstance(weights, BaseException):
            raise weights
        return await self._call(folder, self._locate, ref, folder, config, *weights)

    async def shards(
        self, located: LocatedAdapter, roles: Sequence[FileRole]
    ) -> tuple[RemoteFile, ...]:
        """See `Backend`. Raise `IntegrityError` if a file was replaced since `locate`."""
        folder = folder_of(AdapterRef(located.source))
        return await self._call(folder, self._shards, located, roles)

    def close(self) -> None:
        """Drop connections and credentials; the next use makes them again. Idempotent."""
        self._buckets.close()

    def _config(self, folder: StoreFolder) -> StoredObject:
        config = self._buckets.head(folder, CONFIG_FILE.file_name)
        if config is None:
            raise AdapterNotFoundError(
                f"there is no {CONFIG_FILE.file_name} in {folder}, or no such bucket"
            )
        return config

    def _weights(self, folder: StoreFolder) -> tuple[FileRole, StoredObject]:
        denied: AccessDeniedError | None = None
        try:
            weights = self._buckets.head(folder, WEIGHTS_FILE.file_name)
        except AccessDeniedError as error:
            # S3 denies access to missing objects too, if the caller may not list the bucket.
            weights, denied = None, error
        if weights is not None:
            return WEIGHTS_FILE, weights
        index = self._buckets.head(folder, INDEX_FILE.file_name)
        if index is not None:
            return INDEX_FILE, index
        raise denied or AdapterNotFoundError(
            f"there is neither {WEIGHTS_FILE.file_name} nor {INDEX_FILE.file_name} in {folder}"
        )

    def _locate(
        self,
        ref: AdapterRef,
        folder: StoreFolder,
        config: StoredObject,
        role: FileRole,
        weights: StoredObject,
    ) -> LocatedAdapter:
        objects = [(CONFIG_FILE, CONFIG_FILE.file_name, config), (role, role.file_name, weights)]
        files = self._files(folder, objects)
        url = files[0].target.url.text.partition("?")[0]
        version = _version(url, config, weights)
        if role == INDEX_FILE:
            version += f"-{_digest_of_shards(self._shards_of(folder))}"
        names = {version, weights.version_id, weights.etag, (weights.etag or "").strip('"')}
        if ref.revision is not None and ref.revision not in names:
            raise AnotherVersionError(
                f"{folder} is not, or is no longer, what the revision names; now it is {version},"
                " and only that can be fetched"
            )
        return LocatedAdapter(str(folder), version, scope_of(folder.scheme), files)

    def _shards(self, located: LocatedAdapter, roles: Sequence[FileRole]) -> tuple[RemoteFile, ...]:
        folder = folder_of(AdapterRef(located.source))
        shards = self._shards_of(folder)
        if not located.version.endswith(f"-{_digest_of_shards(shards)}"):
            raise IntegrityError(f"shards in {folder} were replaced while they were located")
        objects = []
        for role in roles:
            name = f"adapter_model-{role.number:05d}-of-{len(roles):05d}.safetensors"
            if name not in shards:
                raise AdapterNotFoundError(f"there is no {name} in {folder}, which its index names")
            objects.append((role, name, shards[name]))
        return self._files(folder, objects)

    def _shards_of(self, folder: StoreFolder) -> dict[str, StoredObject]:
        files = self._buckets.files(folder)
        return {name: files[name] for name in sorted(files) if _SHARD.fullmatch(name)}

    def _files(
        self, folder: StoreFolder, objects: Sequence[tuple[FileRole, str, StoredObject]]
    ) -> tuple[RemoteFile, ...]:
        for _, name, stored in objects:
            if stored.etag is None or stored.etag.startswith("W/"):
                raise FetchError(
                    f"the store has no strong ETag for {name} in {folder}, so its version"
                    " cannot be identified",
                    retryable=False,
                    stage="resolve",
                )
        urls = self._buckets.urls(folder, [name for _, name, _ in objects], self._signed_for)
        return tuple(
            RemoteFile(
                role,
                Target(url, role.file_name, rules=OriginAllowed(url.origin, self._rules)),
                nbytes=stored.nbytes,
                etag=stored.etag,
            )
            for (role, _, stored), url in zip(objects, urls, strict=True)
        )

    async def _call(
        self,
        folder: StoreFolder,
        call: Callable[Parameters, Result],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Result:
        """Call in a thread: obstore's coroutines crash a process that exits soon after them."""
        work = partial(call, *args, **kwargs)
        return await asyncio.wrap_future(self._threads.submit((folder.scheme, folder.bucket), work))


def _version(url: str, config: StoredObject, weights: StoredObject) -> str:
    """Return the version. `url` is the config's: two stores may have buckets of the same name."""
    both = config, weights
    versioned = all(stored.version_id is not None for stored in both)
    return version_of("versions" if versioned else "etags", [url, *_words(both)])


def _digest_of_shards(shards: Mapping[str, StoredObject]) -> str:
    # Listings have no versionIds.
    return digest_of([*shards, *_words(shards.values())])


def _words(objects: Iterable[StoredObject]) -> Iterator[str]:
    for stored in objects:
        yield from (stored.version_id or "", stored.etag or "", str(stored.nbytes))
