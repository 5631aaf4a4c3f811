"""Where a loader belongs: to one event loop of one process."""

from __future__ import annotations

import asyncio
import os

from lorax_async.errors import UsageError
from lorax_async.io.inbox import running_loop


class Home:
    """Remembers the loop that entered, and refuses all others."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self._ready = False
        self._pid = os.getpid()

    def enter(self) -> None:
        if self.loop is not None:
            raise UsageError("the loader was entered before; make a new one")
        self.loop = asyncio.get_running_loop()

    def settle(self) -> None:
        """Everything is there: from here on it may be used."""
        self._ready = True

    def leave(self) -> None:
        """Entering came to nothing."""
        self.loop = None

    def check(self) -> asyncio.AbstractEventLoop:
        """The loop, if this is the one. Raises `UsageError`."""
        if self.loop is None or not self._ready:
            raise UsageError("enter the loader first: `async with AdapterLoader(…) as loader`")
        if os.getpid() != self._pid:
            raise UsageError("the loader belongs to the process that made it; make one per process")
        if running_loop() is not self.loop:
            raise UsageError(
                "the loader belongs to the event loop that entered it; "
                "from a thread use asyncio.run_coroutine_threadsafe"
            )
        return self.loop
