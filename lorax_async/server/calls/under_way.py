"""The requests under way: what ends them from outside, and when the last one has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from starlette.types import Receive

from lorax_async.errors import LoaderClosedError

CLOSING = "the server is closing"


class ClientGone(Exception):  # noqa: N818 - nothing failed, and nobody is told
    """There is nobody left to answer."""


async def until_gone(receive: Receive) -> None:
    """Wait until the client has hung up. Its request has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Watch:
    """Ends the block in it with an error from outside, at whatever it waits for.

    As `asyncio.timeout` does it: the block is cancelled, and the cancellation becomes the error.
    """

    def __init__(self, watches: set[Watch], receive: Receive) -> None:
        self._watches = watches
        self._receive = receive
        self._reason: Exception | None = None

    def interrupt(self, reason: Exception) -> None:
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._listening = asyncio.create_task(self._listen(), name="lorax client's presence")
        self._watches.add(self)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._listening.cancel()
        self._watches.discard(self)
        if self._reason is None:
            return
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._reason from None

    async def _listen(self) -> None:
        await until_gone(self._receive)
        self.interrupt(ClientGone())


class UnderWay:
    """Counts requests under way, and takes no more once it is closed. On one event loop."""

    def __init__(self) -> None:
        self.closing = False
        self._over = False
        self._count = 0
        self._watches: set[Watch] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        """One request. Raises `LoaderClosedError` when closing."""
        if self.closing:
            raise LoaderClosedError(CLOSING)
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    def watched(self, receive: Receive) -> Watch:
        """To be entered by a request that has read its body: ends it early where need be.

        Raises `LoaderClosedError` after `fail`.
        """
        if self._over:
            raise LoaderClosedError(CLOSING)
        return Watch(self._watches, receive)

    def close(self) -> None:
        """Take no new ones."""
        self.closing = True

    def fail(self) -> None:
        """End those under way with `LoaderClosedError`; who still reads a body, after it."""
        self._over = True
        for watch in tuple(self._watches):
            watch.interrupt(LoaderClosedError(CLOSING))

    async def ended(self, seconds: float) -> bool:
        """Wait for the last one. Whether it ended in time."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
