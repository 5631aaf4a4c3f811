"""Read a local adapter's weights, in one file or several, and hold them in host memory."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from lorax_async.concurrency import close_all
from lorax_async.config import Limits
from lorax_async.errors import AdapterFormatError, FetchError, IntegrityError
from lorax_async.files import FileReader, Reader, changed, open_same, require_same, translated
from lorax_async.formats.safetensors import Header, header_size, parse_header
from lorax_async.formats.spans import ByteSpan
from lorax_async.formats.split_weights import INDEX, FileHead, SplitPlan, plan_split, split_name
from lorax_async.host_memory import MappedFile
from lorax_async.ids.parsing import LocalPlace
from lorax_async.sources.local_folder import (
    CONFIG,
    WEIGHTS,
    find_adapter,
    is_inside,
    lies_in,
    read_index,
    real_paths,
)
from lorax_async.types import AdapterKey, FileIdentity

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
            raise translated(error, self._readers[n].name) from error

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
        raise translated(error, reader.name) from error
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
        self.files = files
        """None until the files are opened."""
        self._opener = opener
        self._lock = Lock()
        self._opening = Lock()
        self._users = 0
        self._closed = False

    @property
    def nbytes(self) -> int:
        with self._held() as files:
            return files.plan.nbytes

    def read_into(self, buffers: Sequence[memoryview], offset: int) -> None:
        stop = offset + sum(buffer.nbytes for buffer in buffers)
        with self._held() as files:
            pieces = _pieces(files.plan, ByteSpan(offset, stop))
            if len(pieces) == 1 and pieces[0][0]:
                number, span = pieces[0]
                files.readers[number - 1].read_into(buffers, span.start)
            else:
                _fill(files, pieces, _SplitTargets(buffers))

    def read_rows(self, buffer: memoryview, offset: int, rows: int, pitch: int) -> None:
        size = buffer.nbytes // rows
        span = ByteSpan(offset, offset + size, rows, pitch if rows > 1 else 0)
        with self._held() as files:
            _fill(files, _pieces(files.plan, span), _SplitTargets([buffer]))

    def close(self) -> None:
        """Close the files now, or after the last read in progress."""
        with self._lock:
            unused = not self._closed and not self._users
            self._closed = True
        if unused:
            self._end()

    @contextmanager
    def _held(self) -> Iterator[SplitFiles]:
        """Keep the files open; the first read opens them. Raise `FetchError` once it is closed."""
        self._enter()
        try:
            with self._opening:
                if self.files is None:
                    assert self._opener is not None
                    self.files = self._opener()
            yield self.files
        finally:
            with self._lock:
                self._users -= 1
                last = self._closed and not self._users
            if last:
                self._end()

    def _enter(self) -> None:
        with self._lock:
            if self._closed:
                raise FetchError("the weights were closed before they were read")
            self._users += 1

    def _end(self) -> None:
        if self.files is not None:
            self.files.close()


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
        raise changed(INDEX)
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
