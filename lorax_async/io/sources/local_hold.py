"""Holding a local adapter's weights in host memory. Blocks."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from lorax_async.adapter import AdapterKey
from lorax_async.io.mapped import MappedFile
from lorax_async.io.sources.checked_open import FileReader, translated
from lorax_async.io.sources.local_folder import is_inside, lies_in, real_paths

PIECE_BYTES = 8 << 20
"""Populated in one go: milliseconds from a good disk."""


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """The `Hold` of a file that may change: the kernel was asked to read it, and that is all."""

    nbytes: int = 0
    locked: bool = False

    def close(self) -> None:
        """Nothing is held."""


class LocalHold:
    """The `Hold` of files that do not change: a map of all of each.

    Whoever makes it calls `populate` with each of `starts`, which count the files' bytes one after
    the other, then `settle`. It owns the readers; the descriptors are open until it is settled or
    closed. `close` may be called from another thread while one of the others runs, and takes effect
    after it.
    """

    def __init__(self, readers: Sequence[FileReader]) -> None:
        *self._firsts, self.nbytes = accumulate((each.nbytes for each in readers), initial=0)
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
        return all(each.locked for each in self._maps)

    def populate(self, start: int) -> None:
        """Bring the piece that begins there. `FetchError` if it cannot be read."""
        n = bisect_right(self._firsts, start) - 1
        start -= self._firsts[n]
        try:
            self._maps[n].populate(start, start + PIECE_BYTES)
        except OSError as error:
            raise translated(error, self._readers[n].name) from error

    def settle(self) -> None:
        """All is here: is it still what was opened? `IntegrityError` if not."""
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
    """Do the adapter's folder and the files that were opened lie in roots that do not change?"""
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
) -> LocalHold | ReadAhead:
    """Map the files if they can be held, else start reading ahead.

    Closes the readers, but for those that a hold needs until it is settled.
    """
    try:
        if can_hold(readers, key, immutable):
            return LocalHold(readers)
        for reader in readers:
            reader.read_ahead()
    except BaseException:
        close_all(readers)
        raise
    close_all(readers)
    return ReadAhead()


class Closable(Protocol):
    def close(self) -> None: ...


def close_all(several: Iterable[Closable]) -> None:
    for each in several:
        each.close()
