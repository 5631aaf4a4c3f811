"""The standard Hugging Face cache, read through huggingface_hub, never written.

    models--org--name/refs/main     COMMIT
    models--org--name/snapshots/COMMIT/adapter_config.json -> ../../blobs/ETAG
    models--org--name/blobs/ETAG    a file, or a link to ../../blobs/XX/HASH, shared by repositories

A file is used if its link leads to a blob of its repository (or a shared one), named by the digest
of its bytes. The blob is opened by its real path and compared with the file that was checked, so
that links cannot redirect a read. Nothing in this cache is removed, mapped or counted in a budget:
other tools own it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from lorax_async.cache.base import Cache, CacheDownload, CacheEntry
from lorax_async.cache.records import CacheKey, FileRecord, record_of
from lorax_async.concurrency import FetchControl
from lorax_async.errors import FetchError, IntegrityError, InternalError, InvalidAdapterIdError
from lorax_async.files import FileReader, code_of, hash_on, located, open_same, translated
from lorax_async.formats.digests import Digest, FileHash
from lorax_async.formats.split_weights import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, FileRole
from lorax_async.ids.grammar import checked_revision
from lorax_async.remote.hub_calls import digest_of_etag, is_commit
from lorax_async.remote.resolution import resolution_request
from lorax_async.types import FileIdentity

MAX_GRANTS = 65_536

_MAIN = "main"
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
            raise translated(error, self.role.file_name) from error
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
            checked_revision(revision)  # as a path it leads nowhere else
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
        with located(path) as file:
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
