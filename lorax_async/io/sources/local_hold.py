"""Holding a local adapter's weights in host memory. Blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from lorax_async.adapter import AdapterKey
from lorax_async.io.mapped import MappedFile
from lorax_async.io.sources.checked_open import FileReader, translated
from lorax_async.io.sources.local_folder import WEIGHTS, is_inside, lies_in, real_paths

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
    """The `Hold` of a file that does not change: a map of all of it.

    Whoever makes it calls `populate` with each of `starts`, then `settle`. It owns the reader; the
    descriptor is open until it is settled or closed. `close` may be called from another thread
    while one of the others runs, and takes effect after it.
    """

    def __init__(self, reader: FileReader) -> None:
        self.nbytes = reader.nbytes
        self.starts = range(0, self.nbytes, PIECE_BYTES)
        self._reader = reader
        try:
            with reader.held() as fd:
                self._map = MappedFile(fd, self.nbytes, WEIGHTS)
        except OSError as error:
            raise translated(error, WEIGHTS) from error
        self._map.lock()

    @property
    def locked(self) -> bool:
        return self._map.locked

    def populate(self, start: int) -> None:
        """Bring the piece that begins there. `FetchError` if it cannot be read."""
        try:
            self._map.populate(start, start + PIECE_BYTES)
        except OSError as error:
            raise translated(error, WEIGHTS) from error

    def settle(self) -> None:
        """All is here: is it still what was opened? `IntegrityError` if not."""
        self._reader.read_into([], 0)
        self._reader.close()

    def close(self) -> None:
        self._reader.close()
        self._map.close()


def can_hold(reader: FileReader, key: AdapterKey, immutable: Sequence[str]) -> bool:
    """Do the adapter's folder and the file that was opened lie in roots that do not change?"""
    if not immutable:
        return False
    roots = tuple(real_paths(immutable))
    with reader.held() as fd:
        path = os.readlink(f"/proc/self/fd/{fd}")
    return is_inside(key.location, roots) and any(lies_in(path, root) for root in roots)


def begin_hold(
    reader: FileReader, key: AdapterKey, immutable: Sequence[str]
) -> LocalHold | ReadAhead:
    """Map the file if it can be held, else start reading ahead. Closes the reader on an error."""
    try:
        if can_hold(reader, key, immutable):
            return LocalHold(reader)
        reader.read_ahead()
    except BaseException:
        reader.close()
        raise
    reader.close()
    return ReadAhead()
