"""Adapters in local folders: `adapter_config.json` and `adapter_model.safetensors`, nothing else.

A `pathlib.Path` comes from the embedding program and is followed wherever it leads. A `str` may
come from a request: the real path of its folder must lie in one of the operator's roots, and its
files in that folder (or, in the standard hub cache, among the blobs of that folder's repository).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lorax_async.cache.base import digest_of
from lorax_async.concurrency import FetchControl, call_in
from lorax_async.config import Limits, Root, as_local_roots
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
    InvalidAdapterIdError,
    UsageError,
    shorten,
)
from lorax_async.files import (
    FilePosition,
    FileReader,
    Reader,
    code_of,
    has_identity,
    is_local,
    locate,
    open_same,
    read_prefix,
    require_file,
    require_same,
    sha256_of,
    to_adapter_error,
)
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
from lorax_async.formats.safetensors import Header, parse_header
from lorax_async.formats.spans import ByteSpan
from lorax_async.ids import LocalFolder, parse_ref
from lorax_async.lru import remember
from lorax_async.sources.base import AdapterFile, StoredFolder
from lorax_async.types import (
    UNCHECKED,
    AdapterKey,
    AdapterRef,
    FileIdentity,
    RemoteKey,
    Verification,
    require_id_text,
)

CONFIG, WEIGHTS = CONFIG_FILE, WEIGHTS_FILE

MAX_DIGESTS = 65_536
"""Digests kept of hashed files; the oldest is dropped first."""

# The same text whether the folder exists or not, and without its path: it may be another tenant's.
OUTSIDE = (
    "a str id may name a folder inside the local_roots only; add a root, or pass a"
    " pathlib.Path if the id is the program's own"
)
"""What callers of the API do; plug-ins for engines put their settings in its place."""
_LEAVES = (
    "{} is a link that leads out of the adapter's folder, or nowhere; put the file itself there"
    " (links are followed for a pathlib.Path only)"
)
_SNAPSHOT = re.compile(r"(.*/models--[^/]+)/snapshots/[0-9a-f]{40}(?:/.*)?", re.DOTALL)
_BLOB = re.compile(r"/blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class LocalSource:
    """A `Source` of local folders.

    `roots` contain the folders of `str` ids; links are followed, anew for each id. Adapters in
    immutable roots may be mapped, whichever id names them. `threads` run the file
    system calls; two of them open config and weights side by side. With `hashes`, weights are
    hashed each time they are opened, before they are used. With `convert_bin`, a folder whose
    weights are a pickle has a `RemoteKey`, whose entry in the disk cache is made of it.
    """

    def __init__(
        self,
        *,
        roots: Sequence[Root],
        limits: Limits,
        threads: Executor,
        hashes: bool = False,
        convert_bin: bool = False,
    ) -> None:
        known = as_local_roots(roots)
        self._roots = tuple(os.fspath(root.path) for root in known)
        self._immutable = tuple(os.fspath(root.path) for root in known if root.immutable)
        self._limits = limits
        self._threads = threads
        self._hashes = hashes
        self._convert_bin = convert_bin
        self._digests: OrderedDict[FileIdentity, str] = OrderedDict()

    async def resolve(self, ref: AdapterRef) -> AdapterKey:
        location = parse_ref(ref).location
        if not isinstance(location, LocalFolder):
            raise InvalidAdapterIdError(
                "only local folders are accepted here: a pathlib.Path, or a path inside"
                " one of the local_roots, which begins with './', '../' or '/'"
            )
        find = partial(
            find_adapter, location, self._roots, self._limits, convert_bin=self._convert_bin
        )
        return await call_in(self._threads, find)

    async def open(self, key: AdapterKey, control: FetchControl) -> AdapterFile:  # noqa: ARG002 - the port's
        if len(key.files) != 2:
            raise UsageError("the key is not a local adapter's")
        work = partial(_open, key, self._limits, self._immutable)
        config, weights, cached = await call_in(self._threads, work, lambda found: found[1].close())
        return AdapterFile(config, weights.prefix, weights.reader, weights.holdable, cached=cached)

    def reopen(self, key: AdapterKey) -> Reader:
        return _reader(key, _open_known)

    async def fetch_groups(
        self,
        file: AdapterFile,
        groups: Sequence[Sequence[ByteSpan]],  # noqa: ARG002 - the port's
        arrived: Callable[[int], None],  # noqa: ARG002 - the port's
        control: FetchControl,
    ) -> Verification:
        """Return at once, or hash the file: copies read it directly, through the reader.

        No digest is promised for a local file; ours must only be the same each time.
        """
        if control.cancelled:
            raise FetchError("no caller waits for the adapter any more")
        if not self._hashes:
            return UNCHECKED
        assert isinstance(file.reader, FileReader)
        return Verification("transport", await self._digest(file.reader, control))

    async def folder(
        self,
        key: AdapterKey,
        file: AdapterFile,  # noqa: ARG002 - the port's
        control: FetchControl,  # noqa: ARG002
    ) -> StoredFolder:
        return StoredFolder(key.location, sum(file.size for file in key.files))

    async def digest(self, key: AdapterKey) -> str:
        with closing(_reader(key, _open_known)) as reader:
            return await self._digest(reader, FetchControl())

    async def _digest(self, reader: FileReader, control: FetchControl) -> str:
        """Hash the file. Raise `IntegrityError` if it had other bytes before."""
        digest = await sha256_of(reader, self._threads, control)
        if self._digests.get(reader.identity, digest) != digest:
            raise IntegrityError(
                f"{reader.name} has other bytes than before, though it was not written to: look"
                " at the disk, and save the adapter again"
            )
        remember(self._digests, reader.identity, digest, MAX_DIGESTS)
        return digest


def _open(
    key: AdapterKey, limits: Limits, immutable: Sequence[str]
) -> tuple[bytes, LocalWeights, bool]:
    """Read the config, open the weights, and look whether the page cache seems to have them.

    In one call: handing it to a thread costs as much.
    """
    config = read_checked(key.location, CONFIG, key.files[0])
    weights = open_weights(key, limits, immutable)
    try:
        return config, weights, weights.reader.is_cached()
    except BaseException:
        weights.close()
        raise


def read_checked(folder: str, name: str, identity: FileIdentity) -> bytes:
    """Return the content of a small file; raise `IntegrityError` if it has another identity."""
    content = bytearray(identity.size)
    reader = FileReader(partial(open_same, os.path.join(folder, name), identity), identity, name)
    try:
        reader.read_into([memoryview(content)], 0)
    finally:
        reader.close()
    return bytes(content)


def find_adapter(
    location: LocalFolder, roots: Sequence[str], limits: Limits, *, convert_bin: bool = False
) -> AdapterKey:
    """Return the key of a folder: the first that exists below a root if its path is relative.

    Else raise the first one's error. See `LocalSource` for `convert_bin`.
    """
    anywhere = location.trusted or location.path.startswith("/")
    paths = [location.path] if anywhere else [os.path.join(root, location.path) for root in roots]
    problems: list[AdapterError] = []
    inside = None if location.trusted else tuple(_real_paths(roots))
    for path in paths:
        try:
            with locate(path) as folder:
                real_path = folder.real_path
                if inside is None or _is_inside(real_path, inside):
                    found = _LocatedFolder(folder, real_path, location.trusted)
                    return found.key(limits, convert_bin=convert_bin)
        except OSError as error:
            real_path = ""
            with suppress(OSError):  # a link may not be read, as in another process's /proc
                real_path = os.path.realpath(path)
            if inside is None or _is_inside(real_path, inside):
                problems.append(_folder_problem(error, real_path if location.trusted else ""))
    # A path outside the roots decides for all, whether it exists or not.
    if len(problems) == len(paths) > 0:
        raise problems[0]
    raise AccessDeniedError(OUTSIDE)


_local_devices: dict[int, bool] = {}
"""Whether the file systems of files that were found are local, by `st_dev`."""


def is_unchanged(folder: str, key: AdapterKey) -> bool:
    """Return whether the folder's config and weights are the key's files.

    False if there are others, or they are not on a local file system. Two calls of stat(2), which
    the kernel answers from memory soon after `find_adapter`.
    """
    if len(key.files) != 2 or not all(_local_devices.get(file.device) for file in key.files):
        return False
    try:
        return all(
            has_identity(os.stat(f"{folder}/{name}"), identity)
            for name, identity in zip((CONFIG, WEIGHTS), key.files, strict=True)
        )
    except OSError:
        return False


def find_trusted_adapter(folder: str | Path, limits: Limits) -> AdapterKey:
    """Return the key of a folder that the program itself names. Raise as a load does."""
    path = require_id_text(os.fspath(folder), os.fsencode)
    return find_adapter(LocalFolder(path, trusted=True), (), limits)


def _real_paths(roots: Sequence[str]) -> Iterator[str]:
    for root in roots:
        with suppress(OSError), locate(root) as folder:  # a missing root has no adapters
            yield folder.real_path


def _is_inside(real_path: str, roots: Sequence[str]) -> bool:
    """Return whether it is one of these real paths, or below one."""
    return any(real_path == root or real_path.startswith(root.rstrip("/") + "/") for root in roots)


def _folder_problem(error: OSError, path: str) -> AdapterError:
    """Return our error for a folder that cannot be opened; name the path unless it is empty."""
    if isinstance(error, PermissionError):
        return AccessDeniedError(
            f"the adapter's folder may not be entered by this process ({code_of(error)}); give it"
            " permission"
        )
    if error.errno in _ABSENT:
        named = f" as {shorten(path, 500)!r}" if path else ""
        code = "" if error.errno == errno.ENOENT else f" ({code_of(error)})"
        return AdapterNotFoundError(f"there is no such folder{named}{code}")
    return FetchError(f"the adapter's folder cannot be opened ({code_of(error)})")


class _LocatedFolder(NamedTuple):
    folder: FilePosition
    real_path: str
    trusted: bool

    @property
    def _name(self) -> str:
        # Another id may come from a client, who need not know where folders lie.
        return f"the folder {shorten(self.real_path, 500)!r}" if self.trusted else "the folder"

    def key(self, limits: Limits, *, convert_bin: bool) -> AdapterKey:
        """Check the folder and its files."""
        if not stat.S_ISDIR(self.folder.status.st_mode):
            raise AdapterFormatError(
                f"the id names {self.folder.kind}; give the folder that holds {CONFIG} and"
                f" {WEIGHTS} (unpack an archive first)"
            )
        config = self._identity(CONFIG, limits.max_config_bytes)
        weights = self._identity(WEIGHTS, limits.max_adapter_bytes)
        pickle = None
        if convert_bin and weights is None and self._status(INDEX_FILE) is None:
            pickle = self._identity(PICKLE_FILE, limits.max_adapter_bytes)
        if weights is None and pickle is None:
            raise self._lacking(config)
        if config is None:
            raise AdapterNotFoundError(f"{self._name} has no {CONFIG}")
        if pickle is not None:
            version = f"bin-{digest_of(repr((config, pickle)))[:32]}"
            return RemoteKey(self.real_path, (config, pickle), version)
        assert weights is not None
        return AdapterKey(self.real_path, (config, weights))

    def _lacking(self, config: FileIdentity | None) -> AdapterError:
        """Make the error for a folder without weights."""
        if self._status(INDEX_FILE) is not None:
            return split_weights_error(self._name)
        if self._status(PICKLE_FILE) is not None:
            return AdapterFormatError(f"the weights are {PICKLE_FILE}, {PICKLE_PROBLEM}")
        for name in FOREIGN_FILES:
            if self._status(name) is not None:
                return foreign_file_error(self._name, name)
        names = f"{CONFIG} and no {WEIGHTS}" if config is None else WEIGHTS
        return AdapterNotFoundError(f"{self._name} has no {names}")

    def _identity(self, name: str, max_bytes: int) -> FileIdentity | None:
        """Return the identity of a file that may be read; None if there is none."""
        try:
            with locate(name, within=self.folder.fd) as file:
                if not (self.trusted or self._owns(file.real_path)):
                    raise AccessDeniedError(_LEAVES.format(name))
                require_file(name, file, max_bytes)
                try:
                    os.close(file.open())
                except OSError as error:
                    raise to_adapter_error(error, name) from error
                _local_devices[file.status.st_dev] = is_local(file.fd)
                return file.identity
        except OSError as error:
            status = None if self.trusted else self._status(name)
            if status is not None and stat.S_ISLNK(status.st_mode):
                raise AccessDeniedError(_LEAVES.format(name)) from None
            if isinstance(error, FileNotFoundError):
                return None
            raise to_adapter_error(error, name) from error

    def _owns(self, real_path: str) -> bool:
        """Return whether it is in this folder, or a blob of the repository of this snapshot."""
        if _is_inside(real_path, (self.real_path,)):
            return True
        snapshot = _SNAPSHOT.fullmatch(self.real_path)
        if snapshot is None or not real_path.startswith(snapshot[1]):
            return False
        return _BLOB.fullmatch(real_path, len(snapshot[1])) is not None

    def _status(self, name: str) -> os.stat_result | None:
        with suppress(OSError):
            return os.stat(name, dir_fd=self.folder.fd, follow_symlinks=False)
        return None


class LocalWeights(NamedTuple):
    """Open weights: the `prefix` that ends with the header, and a reader of all bytes.

    `holdable` is whether folder and file lie in immutable roots.
    """

    prefix: bytes
    reader: FileReader
    holdable: bool

    def close(self) -> None:
        self.reader.close()


def open_weights(key: AdapterKey, limits: Limits, immutable: Sequence[str] = ()) -> LocalWeights:
    """Open the weights and check their identity. Nothing stays open on an error."""
    reader = _reader(key, _open_weights)
    try:
        return LocalWeights(read_prefix(reader, limits), reader, _can_hold(reader, key, immutable))
    except BaseException:
        reader.close()
        raise


def _reader(key: AdapterKey, open_file: Callable[[AdapterKey], int]) -> FileReader:
    """Return a reader of the weights, which the first read opens. Quick."""
    return FileReader(partial(open_file, key), key.files[1], WEIGHTS)


def _open_weights(key: AdapterKey) -> int:
    return open_same(os.path.join(key.location, WEIGHTS), key.files[1])


def _open_known(key: AdapterKey) -> int:
    """Open the weights of a known adapter: check the config too, which is not read again."""
    require_same(os.path.join(key.location, CONFIG), key.files[0])
    return _open_weights(key)


def _can_hold(reader: FileReader, key: AdapterKey, immutable: Sequence[str]) -> bool:
    """Return whether the adapter's folder and its opened file lie in immutable roots."""
    if not immutable:
        return False
    roots = tuple(_real_paths(immutable))
    with reader.descriptor as fd:
        path = os.readlink(f"/proc/self/fd/{fd}")
    return all(_is_inside(each, roots) for each in (key.location, path))


def read_header(folder: Path, limits: Limits) -> tuple[Header, int]:
    """Return the weights' header and size, for a folder that the program itself names.

    Raise as a load of the adapter does.
    """
    key = find_trusted_adapter(folder, limits)
    weights = open_weights(key, limits)
    try:
        header = parse_header(weights.prefix, weights.reader.nbytes, limits)
    finally:
        weights.close()
    return header, key.files[1].size
