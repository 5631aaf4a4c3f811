"""Threads for what blocks on behalf of remote adapters, awaited to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """A pool of its own: who waits for a disk here holds up nobody who opens a local file."""

    def __init__(self, threads: int) -> None:
        self.threads = ThreadPoolExecutor(threads, "lorax-remote")

    async def run(self, work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
        """What `work` returns. On a cancellation it is waited for all the same, and undone."""
        future = self.threads.submit(work)
        try:
            return await outcome(future)
        except asyncio.CancelledError:
            if not future.cancel():
                await ended(future)
                if undo is not None and future.exception() is None:
                    undo(future.result())
            raise

    async def finish(self, work: Callable[[], object]) -> None:
        """Let it run to its end, however often that is cancelled: something is let go."""
        future = self.threads.submit(work)
        await ended(future)
        future.result()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Let it run, without waiting. From any thread."""
        return self.threads.submit(work)

    def close(self) -> None:
        """Wait for what was submitted. Blocks."""
        self.threads.shutdown()


async def outcome(future: Future[T]) -> T:
    """What it brings, or raises. Cancelling leaves it as it is."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not done.done():
            done.set_result(None)

    def told(_: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
            loop.call_soon_threadsafe(tell)

    future.add_done_callback(told)
    await done
    return future.result()


async def ended(future: Future[Any]) -> None:
    """Wait until it is through, whatever comes of it, and however often that is cancelled."""
    while not future.done():
        with suppress(asyncio.CancelledError, Exception):
            await outcome(future)
