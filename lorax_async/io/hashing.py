"""The sha256 of a file of weights, through its reader."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from hashlib import sha256

from lorax_async.errors import FetchError
from lorax_async.io.ports import Demand, Reader

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
