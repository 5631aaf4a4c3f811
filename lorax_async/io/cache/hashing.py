"""Hashing a file on. The interpreter's lock is free meanwhile."""

from __future__ import annotations

from lorax_async.core.file_digest import FileHash
from lorax_async.errors import IntegrityError
from lorax_async.io.sources.checked_open import fill

_PIECE_BYTES = 1 << 20


def hash_on(fd: int, found: FileHash, stop: int, name: str) -> None:
    """Feed it the bytes up to `stop`. Raises `OSError`, `IntegrityError` if there are fewer."""
    buffer = memoryview(bytearray(min(_PIECE_BYTES, max(0, stop - found.done))))
    while found.done < stop:
        piece = buffer[: stop - found.done]
        if not fill(fd, [piece], found.done):
            raise IntegrityError(f"{name} in the disk cache ends before byte {stop:,}")
        found.feed(piece)
