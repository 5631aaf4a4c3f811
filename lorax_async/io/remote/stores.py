"""Adapters in object stores: obstore asks and signs, the bytes come through our own engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from lorax_async.adapter import AdapterRef
from lorax_async.core.cache_names import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
)
from lorax_async.io.http.settings import Address, Rules
from lorax_async.io.http.target import Target
from lorax_async.io.http.urls import Origin, Url
from lorax_async.io.remote.buckets import Buckets, StoredObject
from lorax_async.io.remote.ports import AnotherVersionError, Located, RemoteFile
from lorax_async.io.remote.store_environment import scope_of
from lorax_async.io.remote.store_ids import (
    Folder,
    digest_of,
    folder_of,
    is_version,
    version_of,
)
from lorax_async.io.remote.workers import FairThreads

BUCKET_CALLS = 8
"""At a time: one that does not answer keeps as many threads, each for some 30 seconds."""

SIGNED_FOR = 3_600.0
"""Seconds for which a URL opens an object, unless the credentials behind it end earlier."""

_SHARD = re.compile(r"adapter_model-[0-9]{5}-of-[0-9]{5}\.safetensors")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


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


class StoreLocator:
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

    async def locate(self, ref: AdapterRef) -> Located:
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

    async def shards(self, located: Located, roles: Sequence[FileRole]) -> tuple[RemoteFile, ...]:
        """Of the same version: `IntegrityError`, if one of them was replaced since `locate`."""
        folder = folder_of(AdapterRef(located.source))
        return await self._call(folder, self._shards, located, roles)

    def close(self) -> None:
        """Let connections and credentials go; they are remade if it is used again. Idempotent."""
        self._buckets.close()

    def _config(self, folder: Folder) -> StoredObject:
        found = self._buckets.head(folder, CONFIG_FILE.file_name)
        if found is None:
            raise AdapterNotFoundError(
                f"there is no {CONFIG_FILE.file_name} in {folder}, or no such bucket"
            )
        return found

    def _weights(self, folder: Folder) -> tuple[FileRole, StoredObject]:
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
        folder: Folder,
        config: StoredObject,
        role: FileRole,
        weights: StoredObject,
    ) -> Located:
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
        return Located(str(folder), version, scope_of(folder.scheme), files)

    def _shards(self, located: Located, roles: Sequence[FileRole]) -> tuple[RemoteFile, ...]:
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

    def _shards_of(self, folder: Folder) -> dict[str, StoredObject]:
        found = self._buckets.files(folder)
        return {name: found[name] for name in sorted(found) if _SHARD.fullmatch(name)}

    def _files(
        self, folder: Folder, found: Sequence[tuple[FileRole, str, StoredObject]]
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
        folder: Folder,
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
