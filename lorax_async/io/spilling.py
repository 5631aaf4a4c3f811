"""Room in memory for tensors that are given: others make it, by going on in the disk cache."""

from __future__ import annotations

import asyncio
import logging
import resource
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from math import inf

from lorax_async.adapter import TensorsKey
from lorax_async.errors import CapacityError, LoraxError
from lorax_async.io.cache.ports import Cache, CacheEntry
from lorax_async.io.host_copies import Claim, HostCopies, HostCopy
from lorax_async.io.ports import Demand, Reader
from lorax_async.io.remote.workers import outcome
from lorax_async.io.spilled import Spilled, entry_key, written

_logger = logging.getLogger("lorax_async")


class Spilling:
    """Claims memory in `copies`, and spills what was used longest ago where there is too little.

    Claims are granted in the order in which they came, and one copy is spilled at a time, in a
    thread of its own. `cache` gives the disk cache; it blocks.
    """

    def __init__(self, copies: HostCopies, cache: Callable[[], Cache]) -> None:
        self.count = 0
        """Copies that were spilled so far."""
        self._copies = copies
        self._cache = cache
        self._threads = ThreadPoolExecutor(1, "lorax-spill")
        self._order = asyncio.Lock()
        self._held = 0
        self._left: deque[TensorsKey] = deque()

    async def claim(self, nbytes: int, check_open: Callable[[], None]) -> Claim:
        """Room for one more. What is read or copied now is waited for; the others make room.

        Raises `CapacityError` if they cannot: they stay in memory then. `check_open` raises once
        nothing may begin.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits any more
                loop.call_soon_threadsafe(changed.set)

        attempts = _Attempts()
        async with self._order:
            with self._copies.watched(tell):
                while True:
                    check_open()
                    changed.clear()
                    try:
                        return self._copies.claim(nbytes)
                    except CapacityError as full:
                        victim = self._victim(nbytes, attempts, full)
                    if victim is None:
                        await changed.wait()
                    else:
                        await self._spill(victim, attempts)

    def close(self) -> None:
        """Wait until nothing is written, and what was dropped is removed. Blocks.

        All is to be dropped before, and no reader open.
        """
        self._threads.shutdown()
        self._remove_left()

    def _victim(self, nbytes: int, attempts: _Attempts, full: CapacityError) -> HostCopy | None:
        """Who goes next; None if those have to be waited for that are used now."""
        if not full.retryable:
            raise full
        idle = self._copies.idle
        for copy, size in idle.items():
            if size < attempts.below:
                return copy
        if attempts.problem and sum(idle.values()) + nbytes > self._copies.nbytes:
            problem = f"{full.problem}; nor can others make room on the disk: {attempts.problem}"
            raise CapacityError(problem, stage="fetch")
        return None

    async def _spill(self, copy: HostCopy, attempts: _Attempts) -> None:
        """On a cancellation it is told to end, and not waited for: it ends one way or the other."""
        memory = copy.in_memory
        assert memory is not None
        nbytes = memory.nbytes
        del memory  # the thread shall be the last to have it: to free so much takes a while
        demand = copy.moving = Demand()
        # With a reader, so that it is not idle.
        writing = self._threads.submit(self._write, copy, copy.open(), demand)
        try:
            error = await outcome(writing)
        except asyncio.CancelledError:
            demand.end()
            raise
        if error is not None and not demand.ended:
            attempts.failed(error, nbytes)

    def _write(self, copy: HostCopy, reader: Reader, demand: Demand) -> LoraxError | None:
        """In the thread. Why it stays in memory, if it does."""
        memory = copy.in_memory
        assert memory is not None
        try:
            self._require_descriptors()
            entry = written(self._cache(), memory.file, demand)
            self._move(copy, entry)
        except LoraxError as error:
            bare = error.located()
            bare.__cause__ = None  # its frames hold the bytes
            return bare
        finally:
            reader.close()
        return None

    def _move(self, copy: HostCopy, entry: CacheEntry) -> None:
        self._held += 1
        self.count += 1
        copy.move(Spilled(entry, partial(self._ended, copy.key)))

    def _ended(self, key: TensorsKey) -> None:
        """Its entry was closed, in whichever thread."""
        self._left.append(key)
        with suppress(RuntimeError):  # `close` is under way, and removes what is left
            self._threads.submit(self._remove_left)

    def _remove_left(self) -> None:
        """In the thread. What another loader has too is left to that."""
        while self._left:
            self._held -= 1
            try:
                self._cache().remove(entry_key(self._left.popleft()))
            except Exception:
                _logger.exception("what was spilled to the disk cache is left there")

    def _require_descriptors(self) -> None:
        """An entry that is held is an open file; others need some, too."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if most != resource.RLIM_INFINITY and self._held >= most // 4:
            raise CapacityError(
                f"{self._held:,} of them are there, each of which takes one of the {most:,} files"
                " that this process may open; raise its RLIMIT_NOFILE (ulimit -n)"
            )


class _Attempts:
    """What one claim has tried in vain: what may be spilled still is smaller than `below`."""

    def __init__(self) -> None:
        self.below: float = inf
        self.problem = ""

    def failed(self, error: LoraxError, nbytes: int) -> None:
        """For less there may be room; what fails otherwise fails with all."""
        self.problem = error.problem
        self.below = min(self.below, nbytes) if isinstance(error, CapacityError) else 0
