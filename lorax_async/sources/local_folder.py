"""Find an adapter's folder and check its files, by descriptors. Blocks.

No file is read except an index, which names the others.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from lorax_async.config import Limits
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
)
from lorax_async.files import (
    FilePosition,
    FileReader,
    code_of,
    located,
    open_same,
    require_file,
    translated,
)
from lorax_async.formats.split_weights import INDEX, SplitIndex, parse_index, split_name
from lorax_async.ids.parsing import LocalPlace
from lorax_async.types import AdapterKey, FileIdentity

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"

# The same text whether the folder exists or not, and without its path: it may be another tenant's.
_OUTSIDE = (
    "a str id may name a folder inside LoaderConfig.local_roots only; add a root, or pass a"
    " pathlib.Path if the id is the program's own"
)
_LEAVES = (
    "{} is a link that leads out of the adapter's folder, or nowhere; put the file itself there"
    " (links are followed for a pathlib.Path only)"
)
_SNAPSHOT = re.compile(r"(.*/models--[^/]+)/snapshots/[0-9a-f]{40}(?:/.*)?", re.DOTALL)
_BLOB = re.compile(r"/blobs/(?:[0-9a-f]{40}|[0-9a-f]{64})")


CountFiles = Callable[[str, FileIdentity, Limits], int]
"""Return the number of weights' files that an index names, by its folder and identity."""


def count_files(folder: str, identity: FileIdentity, limits: Limits) -> int:
    """Read the index and return the number of weights' files."""
    return read_index(folder, identity, limits).count


def find_adapter(
    place: LocalPlace, roots: Sequence[str], limits: Limits, count: CountFiles = count_files
) -> AdapterKey:
    """Return the key of the first of the place's folders that exists, or raise its error.

    `count` may be cached by the index's identity.
    """
    problems: list[AdapterError] = []
    inside = None if place.trusted else tuple(real_paths(roots))
    for path in place.paths:
        try:
            with located(path) as folder:
                real_path = folder.real_path
                if is_inside(real_path, inside):
                    return _AdapterFolder(folder, real_path, place.trusted).key(limits, count)
        except OSError as error:
            if inside is None or is_inside(_readable_path(path), inside):
                problems.append(_folder_problem(error))
    # A path outside the roots decides for all, whether it exists or not.
    if len(problems) == len(place.paths) > 0:
        raise problems[0]
    raise AccessDeniedError(_OUTSIDE)


def real_paths(roots: Sequence[str]) -> Iterator[str]:
    for root in roots:
        try:
            with located(root) as folder:
                yield folder.real_path
        except OSError:
            continue  # a root that does not exist has no adapters


def is_inside(real_path: str, roots: Sequence[str] | None) -> bool:
    """Return whether it is one of these real paths, or below one. True for None."""
    return roots is None or any(real_path == root or lies_in(real_path, root) for root in roots)


def lies_in(real_path: str, folder: str) -> bool:
    return real_path.startswith(folder.rstrip("/") + "/")


def _readable_path(path: str) -> str:
    """Return the real path; "" if a link on it may not be read, as in another process's /proc."""
    try:
        return os.path.realpath(path)
    except OSError:
        return ""


def _folder_problem(error: OSError) -> AdapterError:
    if isinstance(error, PermissionError):
        return AccessDeniedError(
            f"the adapter's folder may not be entered by this process ({code_of(error)}); give it"
            " permission"
        )
    if error.errno in _ABSENT:
        return AdapterNotFoundError(f"there is no such folder ({code_of(error)})")
    return FetchError(f"the adapter's folder cannot be opened ({code_of(error)})")


_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


class _AdapterFolder(NamedTuple):
    folder: FilePosition
    real_path: str
    trusted: bool

    def key(self, limits: Limits, count: CountFiles) -> AdapterKey:
        """Check the folder and its files: config and weights, or an index and several files."""
        if not stat.S_ISDIR(self.folder.status.st_mode):
            raise AdapterFormatError(
                f"the id names {self.folder.kind}; give the folder that holds {CONFIG} and"
                f" {WEIGHTS} (unpack an archive first)"
            )
        config = self._identity(CONFIG, limits.max_config_bytes)
        weights = self._identity(WEIGHTS, limits.max_adapter_bytes)
        if weights is not None:
            rest: tuple[FileIdentity, ...] = (weights,)
        elif index := self._identity(INDEX, limits.max_header_bytes):
            rest = (index, *self._split(count(self.real_path, index, limits), limits))
        else:
            raise self._incomplete(config, WEIGHTS)
        if config is None:
            raise self._incomplete(config)
        return AdapterKey(self.real_path, (config, *rest))

    def _split(self, count: int, limits: Limits) -> Iterator[FileIdentity]:
        """Yield the identities of `count` files of weights."""
        nbytes = 0
        for number in range(1, count + 1):
            name = split_name(number, count)
            file = self._identity(name, limits.max_adapter_bytes)
            if file is None:
                raise AdapterNotFoundError(
                    f"the folder has no {name}, which {INDEX} names; fetch the adapter again"
                )
            nbytes += file.size
            if nbytes > limits.max_adapter_bytes:
                raise AdapterFormatError(
                    f"the files up to {name} have {nbytes:,} bytes, over the limit of"
                    f" {limits.max_adapter_bytes:,}"
                )
            yield file

    def _identity(self, name: str, max_bytes: int) -> FileIdentity | None:
        """Return the identity of a file that may be read; None if there is none."""
        try:
            with located(name, within=self.folder.fd) as file:
                return self._check(name, file, max_bytes)
        except OSError as error:
            if not self.trusted and self._is_link(name):
                raise AccessDeniedError(_LEAVES.format(name)) from None
            if isinstance(error, FileNotFoundError):
                return None
            raise translated(error, name) from error

    def _check(self, name: str, file: FilePosition, max_bytes: int) -> FileIdentity:
        if not (self.trusted or self._owns(file.real_path)):
            raise AccessDeniedError(_LEAVES.format(name))
        require_file(name, file, max_bytes)
        try:
            os.close(file.open())
        except OSError as error:
            raise translated(error, name) from error
        return file.identity

    def _owns(self, real_path: str) -> bool:
        """Return whether it is in this folder, or a blob of the repository of this snapshot."""
        if lies_in(real_path, self.real_path):
            return True
        snapshot = _SNAPSHOT.fullmatch(self.real_path)
        if snapshot is None or not real_path.startswith(snapshot[1]):
            return False
        return _BLOB.fullmatch(real_path, len(snapshot[1])) is not None

    def _is_link(self, name: str) -> bool:
        status = self._status(name)
        return status is not None and stat.S_ISLNK(status.st_mode)

    def _status(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=self.folder.fd, follow_symlinks=False)
        except OSError:
            return None

    def _incomplete(self, config: FileIdentity | None, weights: str = "") -> AdapterError:
        """Return the error for a folder without a config, or without the file `weights`."""
        if weights and self._status(_PICKLE) is not None:
            return AdapterFormatError(
                f"the weights are {_PICKLE}, a pickle, which can run any code and is never loaded;"
                " re-save the adapter with safetensors (save_pretrained does by default)"
            )
        names = [name for name in (CONFIG if config is None else "", weights) if name]
        return AdapterNotFoundError(f"the folder has no {' and no '.join(names)}")


def read_index(folder: str, identity: FileIdentity, limits: Limits) -> SplitIndex:
    """Read the index in this folder.

    Raise `IntegrityError` if it has another identity, and as `parse_index` does.
    """
    path = os.path.join(folder, INDEX)
    content = bytearray(identity.size)
    reader = FileReader(partial(open_same, path, identity), identity, INDEX)
    try:
        reader.read_into([memoryview(content)], 0)
    finally:
        reader.close()
    return parse_index(bytes(content), limits)
