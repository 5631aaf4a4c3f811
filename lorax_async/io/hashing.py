"""Hashing files: by a reader, or on by a descriptor."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from hashlib import sha256

from lorax_async.core.file_digest import FileHash
from lorax_async.errors import FetchError, IntegrityError
from lorax_async.io.ports import Demand, Reader
from lorax_async.io.sources.checked_open import fill

PIECE_BYTES = 4 << 20
"""Read and hashed at once: milliseconds, after which others have the thread."""


async def sha256_of(reader: Reader, threads: Executor, demand: Demand | None = None) -> str:
    """In lower-case hexadecimal. Raises what the reader does, and `FetchError` if `demand` ends."""
    loop, found = asyncio.get_running_loop(), sha256()
    buffer = memoryview(bytearray(min(PIECE_BYTES, reader.nbytes)))

    def feed(start: int) -> None:
        """In a thread, which has the buffer to itself even after a cancellation."""
        piece = buffer[: reader.nbytes - start]
        reader.read_into([piece], start)
        found.update(piece)

    for start in range(0, reader.nbytes, PIECE_BYTES):
        if demand is not None and demand.ended:
            raise FetchError("nobody waits for the adapter any more")
        await loop.run_in_executor(threads, feed, start)
    return found.hexdigest()


def hash_on(fd: int, found: FileHash, stop: int, name: str) -> None:
    """Hash on up to `stop`. Raise `OSError`, or `IntegrityError` if the file ends before."""
    buffer = memoryview(bytearray(min(1 << 20, max(0, stop - found.done))))
    while found.done < stop:
        piece = buffer[: stop - found.done]
        if not fill(fd, [piece], found.done):
            raise IntegrityError(f"{name} in the cache ends before byte {stop:,}")
        found.feed(piece)
