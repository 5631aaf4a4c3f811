"""Read the folder of a local adapter: its config, its index, its weights."""

from __future__ import annotations

import errno
import os
import re
import stat
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from lorax_async.concurrency import SharedResource, close_all
from lorax_async.config import Limits
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterFormatError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
)
from lorax_async.files import (
    FilePosition,
    FileReader,
    MappedFile,
    Reader,
    changed_error,
    code_of,
    locate,
    open_same,
    require_file,
    require_same,
    to_adapter_error,
)
from lorax_async.formats.safetensors import Header, header_size, parse_header
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.split_weights import (
    INDEX,
    FileHead,
    SplitIndex,
    SplitPlan,
    parse_index,
    plan_split,
    split_name,
)
from lorax_async.ids import LocalPlace
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
            with locate(path) as folder:
                real_path = folder.real_path
                if is_inside(real_path, inside):
                    return _LocatedFolder(folder, real_path, place.trusted).key(limits, count)
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
            with locate(root) as folder:
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


class _LocatedFolder(NamedTuple):
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
            with locate(name, within=self.folder.fd) as file:
                return self._check(name, file, max_bytes)
        except OSError as error:
            if not self.trusted and self._is_link(name):
                raise AccessDeniedError(_LEAVES.format(name)) from None
            if isinstance(error, FileNotFoundError):
                return None
            raise to_adapter_error(error, name) from error

    def _check(self, name: str, file: FilePosition, max_bytes: int) -> FileIdentity:
        if not (self.trusted or self._owns(file.real_path)):
            raise AccessDeniedError(_LEAVES.format(name))
        require_file(name, file, max_bytes)
        try:
            os.close(file.open())
        except OSError as error:
            raise to_adapter_error(error, name) from error
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


PIECE_BYTES = 8 << 20
"""Bytes populated in one call: milliseconds from a good disk."""


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """The `PinnedPages` of a file that may change: the kernel was only asked to read ahead."""

    nbytes: int = 0
    locked: bool = False

    def close(self) -> None:
        """Nothing is held."""


class LocalPages:
    """The `PinnedPages` of files that do not change: a map of each.

    Call `populate` with each of `starts`, offsets into the files joined in order, then `settle`. It
    owns the readers; descriptors are open until it is settled or closed. Another thread may call
    `close` during `populate` or `settle`; it takes effect when that ends.
    """

    def __init__(self, readers: Sequence[FileReader]) -> None:
        *self._firsts, self.nbytes = accumulate((reader.nbytes for reader in readers), initial=0)
        self.starts = [
            start
            for first, reader in zip(self._firsts, readers, strict=True)
            for start in range(first, first + reader.nbytes, PIECE_BYTES)
        ]
        self._readers = readers
        self._maps: list[MappedFile] = []
        try:
            for reader in readers:
                self._maps.append(_mapped(reader))
        except BaseException:
            self.close()
            raise

    @property
    def locked(self) -> bool:
        return all(mapped.locked for mapped in self._maps)

    def populate(self, start: int) -> None:
        """Bring the piece at `start` into memory. Raise `FetchError` if it cannot be read."""
        n = bisect_right(self._firsts, start) - 1
        start -= self._firsts[n]
        try:
            self._maps[n].populate(start, start + PIECE_BYTES)
        except OSError as error:
            raise to_adapter_error(error, self._readers[n].name) from error

    def settle(self) -> None:
        """Close the files once all is populated. Raise `IntegrityError` if one has changed."""
        for reader in self._readers:
            reader.read_into([], 0)
            reader.close()

    def close(self) -> None:
        close_all(self._readers)
        close_all(self._maps)


def _mapped(reader: FileReader) -> MappedFile:
    try:
        with reader.held() as fd:
            mapped = MappedFile(fd, reader.nbytes, reader.name)
    except OSError as error:
        raise to_adapter_error(error, reader.name) from error
    mapped.lock()
    return mapped


def can_hold(readers: Sequence[FileReader], key: AdapterKey, immutable: Sequence[str]) -> bool:
    """Return whether the adapter's folder and its opened files lie in immutable roots."""
    if not immutable:
        return False
    roots = tuple(real_paths(immutable))
    paths = []
    for reader in readers:
        with reader.held() as fd:
            paths.append(os.readlink(f"/proc/self/fd/{fd}"))
    return is_inside(key.location, roots) and all(
        any(lies_in(path, root) for root in roots) for path in paths
    )


def begin_hold(
    readers: Sequence[FileReader], key: AdapterKey, immutable: Sequence[str]
) -> LocalPages | ReadAhead:
    """Map the files if they can be held, else start reading ahead.

    Close the readers, except those that a map needs until it is settled.
    """
    try:
        if can_hold(readers, key, immutable):
            return LocalPages(readers)
        for reader in readers:
            reader.read_ahead()
    except BaseException:
        close_all(readers)
        raise
    close_all(readers)
    return ReadAhead()


@dataclass(frozen=True, slots=True, eq=False)
class SplitFiles:
    """A plan, and the readers of its files in order, which this owns."""

    plan: SplitPlan
    readers: tuple[Reader, ...]

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


class SplitReader:
    """The `Reader` of weights in several files, joined with one header. It owns the files.

    Parameters
    ----------
    files
        The files, or None: then the first read calls `opener`, which may block.
    """

    def __init__(
        self, files: SplitFiles | None, opener: Callable[[], SplitFiles] | None = None
    ) -> None:
        self._files = SharedResource(
            "the adapter's weights file", SplitFiles.close, open=opener, opened=files
        )

    @property
    def files(self) -> SplitFiles | None:
        """None until the files are opened."""
        return self._files.opened

    @property
    def nbytes(self) -> int:
        with self._files.use() as files:
            return files.plan.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        with self._files.use() as files:
            pieces = _pieces(files.plan, ByteSpan(offset, stop))
            if len(pieces) == 1 and pieces[0][0]:
                number, span = pieces[0]
                files.readers[number - 1].read_into(buffers, span.start)
            else:
                _fill(files, pieces, _SplitTargets(buffers))

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        size = buffer.nbytes // rows
        span = ByteSpan(offset, offset + size, rows, pitch if rows > 1 else 0)
        with self._files.use() as files:
            _fill(files, _pieces(files.plan, span), _SplitTargets([buffer]))

    def close(self) -> None:
        """Close the files now, or after the last read in progress."""
        self._files.close()


def _pieces(plan: SplitPlan, span: ByteSpan) -> list[tuple[int, ByteSpan]]:
    if span.end > plan.nbytes:
        raise IntegrityError(f"the weights, of {plan.nbytes:,} bytes, end before byte {span.end:,}")
    return list(plan.pieces(span))


def _fill(
    files: SplitFiles, pieces: Iterable[tuple[int, ByteSpan]], targets: _SplitTargets
) -> None:
    for number, span in pieces:
        buffers = targets.take(span.nbytes)
        if not number:
            prefix = files.plan.prefix
            _copy(b"".join(prefix[start:stop] for start, stop in span.ranges()), buffers)
        elif span.rows == 1:
            files.readers[number - 1].read_into(buffers, span.start)
        else:
            (buffer,) = buffers  # of `read_rows`, which fills one
            files.readers[number - 1].read_rows(buffer, span.start, span.rows, span.pitch)


def _copy(content: bytes, buffers: Iterable[memoryview]) -> None:
    start = 0
    for buffer in buffers:
        buffer[:] = content[start : start + len(buffer)]
        start += len(buffer)


class _SplitTargets:
    """Hands out the target buffers of a read, in order."""

    def __init__(self, buffers: Sequence[memoryview]) -> None:
        self._left = deque(buffer.cast("B") for buffer in buffers if buffer.nbytes)

    def take(self, nbytes: int) -> list[memoryview]:
        """Return the buffers of the next `nbytes` bytes."""
        taken: list[memoryview] = []
        while nbytes:
            buffer = self._left.popleft()
            taken.append(buffer[:nbytes])
            if len(buffer) > nbytes:
                self._left.appendleft(buffer[nbytes:])
            nbytes -= len(taken[-1])
        return taken


PREFIX_BYTES = 128 << 10
"""Bytes of the first read of the weights: they contain the header of nearly every adapter."""


class LocalWeights(NamedTuple):
    """Open weights: the `prefix` that ends with the header, and a reader of all bytes.

    `readers` are those of the files, which `reader` owns.
    """

    prefix: bytes
    reader: Reader
    readers: tuple[FileReader, ...]


def is_split(key: AdapterKey) -> bool:
    """Return whether the weights are in several files; then `key.files[1]` is their index."""
    return len(key.files) > 2


def weight_files(key: AdapterKey) -> tuple[FileIdentity, ...]:
    """Return the files of the tensors, without config and index."""
    return key.files[2 if is_split(key) else 1 :]


def open_weights(key: AdapterKey, limits: Limits) -> LocalWeights:
    """Open the files and check their identities. Nothing stays open on an error."""
    readers = readers_of(key, known=False)
    try:
        if not is_split(key):
            return LocalWeights(read_prefix(readers[0], limits), readers[0], readers)
        files = _join(key, readers, limits)
    except BaseException:
        close_all(readers)
        raise
    return LocalWeights(files.plan.prefix, SplitReader(files), readers)


def reopened(key: AdapterKey, limits: Limits) -> Reader:
    """Return a reader of the weights, which the first read opens. Quick.

    That read checks the config too, and parses the headers of several files again.
    """
    if not is_split(key):
        return readers_of(key, known=True)[0]

    def opener() -> SplitFiles:
        readers = readers_of(key, known=True)
        try:
            return _join(key, readers, limits)
        except BaseException:
            close_all(readers)
            raise

    return SplitReader(None, opener)


def readers_of(key: AdapterKey, *, known: bool) -> tuple[FileReader, ...]:
    """Return readers of the tensors' files, which the first read opens. Quick.

    With `known`, that read checks the config and the index too, which are not read again.
    """
    files = weight_files(key)
    names = [WEIGHTS]
    if is_split(key):
        names = [split_name(number, len(files)) for number in range(1, len(files) + 1)]
    beside = tuple(zip((CONFIG, INDEX), key.files[: -len(files)], strict=False)) if known else ()
    return tuple(
        FileReader(partial(_open, key.location, name, identity, beside), identity, name)
        for name, identity in zip(names, files, strict=True)
    )


def _open(
    folder: str, name: str, identity: FileIdentity, beside: Sequence[tuple[str, FileIdentity]]
) -> int:
    for other, known in beside:
        require_same(os.path.join(folder, other), known)
    return open_same(os.path.join(folder, name), identity)


def _join(key: AdapterKey, readers: tuple[FileReader, ...], limits: Limits) -> SplitFiles:
    index = read_index(key.location, key.files[1], limits)
    if index.count != len(readers):
        raise changed_error(INDEX)
    return SplitFiles(plan_split(index, _heads(readers, limits), limits), readers)


def _heads(readers: Sequence[FileReader], limits: Limits) -> Iterator[FileHead]:
    for reader in readers:
        try:
            prefix = read_prefix(reader, limits)
        except AdapterFormatError as error:
            raise error.prefixed(f"{reader.name}: ") from None
        yield FileHead(prefix, reader.nbytes)


def read_prefix(reader: Reader, limits: Limits) -> bytes:
    """Return the beginning of the file, which ends with its header."""
    prefix = bytearray(min(PREFIX_BYTES, reader.nbytes))
    reader.read_into([memoryview(prefix)], 0)
    needed = header_size(memoryview(prefix), reader.nbytes, limits)
    more = needed - len(prefix)
    if more > 0:
        rest = bytearray(more)
        reader.read_into([memoryview(rest)], len(prefix))
        prefix += rest
    return bytes(prefix[:needed])


def read_header(folder: Path, limits: Limits) -> tuple[Header, int]:
    """Return the weights' header and size, for a folder that the program itself names.

    Raise as a load of the adapter does.
    """
    key = find_adapter(LocalPlace((os.fspath(folder),), trusted=True), (), limits)
    weights = open_weights(key, limits)
    try:
        header = parse_header(weights.prefix, weights.reader.nbytes, limits)
    finally:
        weights.reader.close()
    return header, sum(file.size for file in weight_files(key))
