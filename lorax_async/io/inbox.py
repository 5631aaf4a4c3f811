"""How I/O threads tell the event loop what happened: many outcomes, one wake-up."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that the calling thread runs, if it runs one."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class Inbox(Generic[T]):
    """Carries items from any thread to `handle`, called on the loop in the order of arrival.

    Waking a loop costs more than a small copy, so that whatever arrives until the loop gets round
    to it shares one wake-up.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, handle: Callable[[T], None]) -> None:
        self._loop = loop
        self._handle = handle
        self._items: deque[T] = deque()
        self._awake = False

    def put(self, item: T) -> None:
        """From any thread. Without effect once the loop is closed: nobody listens any more."""
        self.leave(item)
        self.wake()

    def leave(self, item: T) -> None:
        """From any thread: as `put`, for the next `wake`, which somebody must call after this."""
        self._items.append(item)

    def wake(self) -> None:
        """From any thread: let the loop handle what was left."""
        # The flag is cleared before the items are taken: what was left while it is set is seen.
        if self._awake:
            return
        self._awake = True
        try:
            self._loop.call_soon_threadsafe(self._drain)
        except RuntimeError:
            self._awake = False
            self._items.clear()

    def _drain(self) -> None:
        self._awake = False
        self.take()

    def take(self) -> None:
        """On the loop: handle what has arrived so far."""
        try:
            while self._items:
                self._handle(self._items.popleft())
        finally:
            if self._items:  # `handle` raised: the items behind must not wait for another one
                self._loop.call_soon(self._drain)
