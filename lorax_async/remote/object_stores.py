"""The backend of object stores: obstore looks and signs, our range downloader fetches."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

from lorax_async.cache.base import digest_of
from lorax_async.concurrency import FairThreads
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    ConfigError,
    FetchError,
    FetchTimeoutError,
    LoraxError,
    UsageError,
    install_command,
)
from lorax_async.formats.peft_names import (
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_FILE,
    PICKLE_PROBLEM,
    WEIGHTS_FILE,
    split_weights_error,
)
from lorax_async.http.failures import DENIED, RETRYABLE
from lorax_async.http.target import Target
from lorax_async.ids import Allow, StoreFolder
from lorax_async.remote.base import AllowRules, AnotherVersionError, LocatedAdapter, RemoteFile
from lorax_async.types import AdapterRef
from lorax_async.urls import InvalidUrlError, parse_url

if TYPE_CHECKING:
    from obstore.store import AzureAccessKey, AzureStore, GCSStore, RetryConfig, S3Store

    Store = AzureStore | GCSStore | S3Store

T = TypeVar("T")

BUCKET_CALLS = 8
"""Calls at a time. A bucket that does not answer keeps as many threads for some 30 seconds."""

SIGNED_FOR = 3_600.0
"""Seconds for which a signed URL is valid, unless its credentials expire earlier."""

MAX_STORES = 16
"""Buckets whose connections and credentials are kept: those used last."""

_RETRIES: RetryConfig = {"max_retries": 2, "retry_timeout": timedelta(seconds=20)}
_VERSION = re.compile(r"(?:versions|etags)-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class StoredObject:
    """What a store reports of one object. `etag` has its quotes."""

    nbytes: int
    etag: str | None = field(repr=False)
    version_id: str | None


class StoreBackend:
    """The `Backend` of S3, Google Cloud Storage and Azure Blob Storage.

    Credentials, regions and endpoints are those of the process's environment and machine, as
    obstore reads them. Its maker closes it. Without obstore, calls raise `ConfigError`.

    `executor` runs obstore's calls, which block: two at a time for one adapter, `BUCKET_CALLS` for
    one bucket. A call outlives its cancelled caller. URLs are signed for `signed_for` seconds.
    Their origin, which the environment names, is always allowed; `allow` is for redirects. With
    `convert_bin`, `PICKLE_FILE` is located where there are no other weights.
    """

    def __init__(
        self,
        executor: Executor,
        allow: Sequence[Allow] = (),
        *,
        signed_for: float = SIGNED_FOR,
        convert_bin: bool = False,
    ) -> None:
        self._convert_bin = convert_bin
        self._threads = FairThreads(executor, BUCKET_CALLS)
        self._allow = allow
        self._signed_for = signed_for
        self._store = lru_cache(MAX_STORES)(_make_store)

    def is_version(self, revision: str) -> bool:
        """See `Backend`. Not so for a versionId or an ETag: the store has to be asked."""
        return _VERSION.fullmatch(revision) is not None

    async def scope(self, folder: StoreFolder, ref: AdapterRef) -> str:
        """See `Backend`: "environment", or "" for anonymous requests.

        Raise `UsageError` for a token.
        """
        if ref.token is not None:
            raise UsageError(
                "requests to object stores use the credentials of the environment; leave token out"
            )
        return "" if _skips_signature(folder.scheme) else "environment"

    async def locate(self, folder: StoreFolder, ref: AdapterRef) -> LocatedAdapter:
        """Return the present version, with URLs of its files signed now.

        A revision is a version that a handle reported, or the versionId or ETag of the weights.
        Only the present version can be fetched, for signed URLs name none; another one raises
        `AnotherVersionError`.
        """
        scope = await self.scope(folder, ref)
        config, found = await asyncio.gather(
            self._call(folder, partial(self._require, folder, CONFIG_FILE)),
            self._call(folder, partial(self._require_weights, folder)),
            return_exceptions=True,
        )
        # The same fault raises the same error, whichever thread ended first.
        if isinstance(config, BaseException):
            raise config
        if isinstance(found, BaseException):
            raise found
        name, weights = found
        objects = {CONFIG_FILE: config, name: weights}
        version, files = await self._call(folder, partial(self._sign, folder, objects))
        names = {version, weights.version_id, weights.etag, (weights.etag or "").strip('"')}
        if ref.revision is not None and ref.revision not in names:
            raise AnotherVersionError(
                f"{folder.text} is not, or is no longer, what the revision names; now it is"
                f" {version}, and only that can be fetched"
            )
        return LocatedAdapter(folder.text, version, scope, files)

    async def find_files(
        self, folder: StoreFolder, ref: AdapterRef, names: Sequence[str]
    ) -> list[RemoteFile]:
        await self.scope(folder, ref)
        answers = await asyncio.gather(
            *(self._call(folder, partial(self._require, folder, name)) for name in names),
            return_exceptions=True,
        )
        objects = dict[str, StoredObject]()
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, StoredObject):
                objects[name] = answer
            elif not isinstance(answer, AdapterNotFoundError | AccessDeniedError):
                raise answer  # S3 denies access to missing objects too: see `_require_weights`
        return await self._call(folder, partial(self._locations, folder, objects))

    def close(self) -> None:
        """Drop connections and credentials; the next use makes them again. Idempotent."""
        self._store.cache_clear()

    async def _call(self, folder: StoreFolder, work: Callable[[], T]) -> T:
        """Call in a thread: obstore's coroutines crash a process that exits soon after them."""
        bucket = folder.scheme, folder.host
        return await asyncio.wrap_future(
            self._threads.submit(bucket, partial(_mapped, work, folder))
        )

    def _require(self, folder: StoreFolder, name: str) -> StoredObject:
        """Return the metadata of one file of the folder."""
        import obstore  # noqa: PLC0415 (an extra)

        try:
            meta = obstore.head(self._store(folder.scheme, folder.host), f"{folder.path}{name}")
        except FileNotFoundError:
            meta = None
        if meta is None:  # not chained to obstore's error
            raise AdapterNotFoundError(f"there is no {name} in {folder.text}, or no such bucket")
        return StoredObject(meta["size"], meta["e_tag"], meta["version"])

    def _require_weights(self, folder: StoreFolder) -> tuple[str, StoredObject]:
        """Return the name and the metadata of the weights."""
        try:
            return WEIGHTS_FILE, _mapped(partial(self._require, folder, WEIGHTS_FILE), folder)
        except (AdapterNotFoundError, AccessDeniedError):
            # S3 denies access to missing objects too, if the caller may not list the bucket.
            with suppress(AdapterNotFoundError, AccessDeniedError):
                _mapped(partial(self._require, folder, INDEX_FILE), folder)
                raise split_weights_error(folder.text) from None
            try:
                pickle = _mapped(partial(self._require, folder, PICKLE_FILE), folder)
            except (AdapterNotFoundError, AccessDeniedError):
                pickle = None
            if pickle is None:
                raise
            if self._convert_bin:
                return PICKLE_FILE, pickle
            what = f"{folder.text} has its weights as {PICKLE_FILE} only, {PICKLE_PROBLEM}"
            raise AdapterNotFoundError(what, stage="resolve") from None

    def _sign(
        self, folder: StoreFolder, objects: Mapping[str, StoredObject]
    ) -> tuple[str, tuple[RemoteFile, RemoteFile]]:
        """Return the version of an adapter and its files, with signed URLs."""
        for name, stored in objects.items():
            if stored.etag is None or stored.etag.startswith("W/"):
                raise FetchError(
                    f"the store has no strong ETag for {name} in {folder.text}, so its"
                    " version cannot be identified",
                    retryable=False,
                    stage="resolve",
                )
        files = self._locations(folder, objects)
        versioned = all(stored.version_id is not None for stored in objects.values())
        # Two stores may have buckets of the same name.
        url = files[0].target.url.text.partition("?")[0]
        version = version_of(
            "versions" if versioned else "etags", [url, *_words(*objects.values())]
        )
        return version, (files[0], files[1])

    def _locations(
        self, folder: StoreFolder, objects: Mapping[str, StoredObject]
    ) -> list[RemoteFile]:
        """Return files with signed URLs."""
        import obstore  # noqa: PLC0415

        if not objects:
            return []
        paths = [f"{folder.path}{name}" for name in objects]
        signed: Sequence[str] | None = unsigned_urls(folder, paths)
        if signed is None:
            valid = timedelta(seconds=self._signed_for)
            store = self._store(folder.scheme, folder.host)
            signed = obstore.sign(store, "GET", paths, valid)
        return [
            self._file(folder, text, name, stored)
            for text, (name, stored) in zip(signed, objects.items(), strict=True)
        ]

    def _file(self, folder: StoreFolder, text: str, name: str, stored: StoredObject) -> RemoteFile:
        """Return a file by its URL."""
        try:
            url = parse_url(text)
        except InvalidUrlError as error:
            raise FetchError(
                f"{folder.text}: its endpoint is not a URL: {error}", retryable=False
            ) from error
        target = Target(url, name, rules=AllowRules(self._allow, named=(url.origin,)))
        return RemoteFile(name, target, nbytes=stored.nbytes, etag=stored.etag)


def _make_store(scheme: str, bucket: str) -> Store:
    from obstore import store as stores  # noqa: PLC0415

    kinds = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}
    store: Store = kinds[scheme](bucket, retry_config=_RETRIES)
    return store


def _words(*objects: StoredObject) -> list[str]:
    fields = ((stored.version_id or "", stored.etag or "", stored.nbytes) for stored in objects)
    return [str(word) for words in fields for word in words]


def version_of(kind: str, words: Iterable[str]) -> str:
    """Return the version for words that identify the files: equal words mean equal bytes."""
    return f"{kind}-{digest_of(*words)[:32]}"


_SAS = ("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN")
_TRUE = frozenset({"1", "true", "on", "yes", "y"})
_GOOGLE = "https://storage.googleapis.com"
_PREFIX = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}


def _skips_signature(scheme: str) -> bool:
    return os.environ.get(f"{_PREFIX[scheme]}_SKIP_SIGNATURE", "").lower() in _TRUE


def unsigned_urls(folder: StoreFolder, paths: Sequence[str]) -> list[str] | None:
    """Return the objects' URLs if the environment disables signing; None if they must be signed.

    It does so by `…_SKIP_SIGNATURE`, which obstore respects in requests but not in signing, and for
    Azure by a SAS token, which cannot sign but grants access as a query.
    """
    import obstore  # noqa: PLC0415
    from obstore.store import AzureStore, S3Store  # noqa: PLC0415

    sas = next((os.environ[name] for name in _SAS if os.environ.get(name)), "").lstrip("?")
    query = f"?{sas}" if folder.scheme == "az" and sas else ""
    if _skips_signature(folder.scheme):
        query = ""
    elif not query:
        return None
    if folder.scheme == "gs":
        base = os.environ.get("GOOGLE_BASE_URL", _GOOGLE).rstrip("/")
        return [f"{base}/{folder.host}/{quote(path)}" for path in paths]
    store = (
        S3Store(folder.host, config={"access_key_id": "-", "secret_access_key": "-"})
        if folder.scheme == "s3"
        else AzureStore(folder.host, skip_signature=False, credential_provider=_dummy_credential)
    )
    # As obstore makes them, without the signature by a dummy key.
    signed = obstore.sign(store, "GET", paths, timedelta(hours=1))
    return [url.partition("?")[0] + query for url in signed]


def _dummy_credential() -> AzureAccessKey:
    return {"access_key": "bm9uZQ==", "expires_at": None}


_STATUS = re.compile(r"status(?: code)?: ([1-5][0-9]{2})\b")
_HTTP_REMEDY = (
    "its endpoint is plain http; set AWS_ALLOW_HTTP, GOOGLE_ALLOW_HTTP or AZURE_ALLOW_HTTP to true"
    " if that is intended"
)
_SIGNS = (
    ("BadScheme", _HTTP_REMEDY, False),
    ("configured region", "its region is another one; set AWS_REGION", False),
    ("ertificate", "its certificate is not trusted", False),
    ("dns error", "there is no such host", True),
    ("onnection refused", "it refuses connections", True),
)
"""Words in obstore's errors that identify a cause, our text for it, and whether it may pass."""


def _mapped(call: Callable[[], T], folder: StoreFolder) -> T:
    """Return the call's result, or raise our error, unchained: theirs may contain secrets."""
    try:
        from obstore import exceptions  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"adapters in object stores need obstore; {install_command('objects')}"
        ) from error
    try:
        return call()
    except LoraxError:  # a timeout of ours is an `OSError` too
        raise
    except (exceptions.BaseError, OSError, ValueError) as error:
        kinds = (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)
        failure = _problem_of(str(error), folder.text, denied=isinstance(error, kinds))
    raise failure.located(stage="resolve")


def _problem_of(text: str, where: str, *, denied: bool) -> FetchError:
    """Return our error for the text of one of obstore's."""
    match = _STATUS.search(text)
    status = int(match[1]) if match is not None else 0
    if not denied:
        for word, meaning, retryable in _SIGNS:
            if word in text:
                return FetchError(f"{where}: {meaning}", retryable=retryable)
        if "TimedOut" in text or "timed out" in text:
            return FetchTimeoutError(f"{where}: the store did not answer in time")
    if denied or status in DENIED:
        return AccessDeniedError(
            f"{where}: the environment's credentials may not have it, or are wrong"
        )
    if status:
        return FetchError(f"{where}: status {status}", retryable=status in RETRYABLE)
    return FetchError(
        f"{where}: the request to the store failed; are there credentials in the environment?"
    )
