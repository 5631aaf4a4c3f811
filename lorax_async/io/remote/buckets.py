"""obstore's calls: what a bucket says of its objects, and URLs that open them for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from lorax_async.errors import ConfigError, FetchError
from lorax_async.io.http.urls import InvalidUrlError, Url, parse_url
from lorax_async.io.remote.store_environment import unsigned_urls
from lorax_async.io.remote.store_errors import mapped
from lorax_async.io.remote.store_ids import Folder, Scheme

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

    def head(self, folder: Folder, name: str) -> StoredObject | None:
        """What is said of one file of the folder; None if there is none."""

        def ask() -> ObjectMeta | None:
            import obstore  # noqa: PLC0415 - an extra, needed here alone

            try:
                return obstore.head(self._store(folder), f"{folder.prefix}{name}")
            except FileNotFoundError:
                return None

        found = _mapping(ask, folder)
        return None if found is None else _stored(found)

    def files(self, folder: Folder) -> dict[str, StoredObject]:
        """What lies in the folder, by name; not what lies in folders below it."""

        def ask() -> Sequence[ObjectMeta]:
            import obstore  # noqa: PLC0415

            listed = obstore.list_with_delimiter(self._store(folder), folder.prefix or None)
            return listed["objects"]

        return {meta["path"].rpartition("/")[2]: _stored(meta) for meta in _mapping(ask, folder)}

    def urls(self, folder: Folder, names: Sequence[str], seconds: float) -> list[Url]:
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

    def _store(self, folder: Folder) -> Store:
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


def _mapping(call: Callable[[], Result], folder: Folder) -> Result:
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


def _parsed(text: str, folder: Folder) -> Url:
    try:
        return parse_url(text)
    except InvalidUrlError as error:
        raise FetchError(f"{folder}: its endpoint is none: {error}", retryable=False) from error
