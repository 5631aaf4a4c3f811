"""Prefetches: the loads of one call, and which of them fit into their tier together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Protocol

from lorax_async.errors import LoraxError
from lorax_async.lifecycle.adapter_state import GroupSizes, SlotGrant
from lorax_async.lifecycle.arena import Arena
from lorax_async.types import AdapterKey, Ref, text_of

ORDER_SECONDS = 1.0
"""Seconds for which an adapter waits until those before it in its prefetch are opened."""


class TierRoom(Protocol):
    """The room of a tier for the adapters of one prefetch."""

    @property
    def is_full(self) -> bool:
        """Whether there is no room for any adapter."""

    def claim(self, needs: GroupSizes) -> bool:
        """Claim room for an adapter; return False, without effect, if there is too little.

        Return True for one that is larger than all the room: its load says so.
        """


class SlotRoom:
    """The slots and the arena of a device, beside pinned adapters."""

    def __init__(self, slots: int, arena: Arena, pinned: Sequence[SlotGrant]) -> None:
        self._slots = slots - len(pinned)
        self._empty = arena.reserve(extent for grant in pinned for extent in grant.extents)
        self._arena = self._empty.copy()

    @property
    def is_full(self) -> bool:
        return self._slots <= 0

    def claim(self, needs: GroupSizes) -> bool:
        if not self._empty.can_allocate(needs.group_nbytes):
            return True
        if self._slots <= 0 or self._arena.allocate(needs.group_nbytes) is None:
            return False
        self._slots -= 1
        return True


class ByteRoom:
    """A budget of bytes; `count` returns those of an adapter."""

    is_full = False

    def __init__(self, nbytes: int, count: Callable[[GroupSizes], int]) -> None:
        self._nbytes = self._free = nbytes
        self._count = count

    def claim(self, needs: GroupSizes) -> bool:
        nbytes = self._count(needs)
        if nbytes > self._nbytes:
            return True
        if nbytes > self._free:
            return False
        self._free -= nbytes
        return True


class PrefetchRoom:
    """What fits into a tier together, of the adapters of one prefetch.

    `needs` returns the sizes of an opened adapter; None if its fetch has failed. Those in `kept`
    have their room.
    """

    def __init__(
        self,
        room: TierRoom,
        needs: Callable[[AdapterKey], GroupSizes | None],
        kept: Iterable[AdapterKey] = (),
    ) -> None:
        self._room = room
        self._needs = needs
        self._kept = set(kept)

    @property
    def kept(self) -> Collection[AdapterKey]:
        """The adapters that have their room, now and as it changes."""
        return self._kept

    def places(self, count: int) -> list[PrefetchPlace]:
        """Return the places of `count` adapters, each after the one before it."""
        places: list[PrefetchPlace] = []
        for _ in range(count):
            places.append(PrefetchPlace(self, places[-1] if places else None))
        return places

    def is_full_for(self, key: AdapterKey | None) -> bool:
        """Return whether there is no room for any adapter, and this one has none yet."""
        return self._room.is_full and key not in self._kept

    def claim(self, key: AdapterKey) -> bool:
        needs = self._needs(key)
        if needs is None or key in self._kept:
            return True
        if not self._room.claim(needs):
            return False
        self._kept.add(key)
        return True


class PrefetchPlace:
    """The place of one adapter in a prefetch of several: it gets room after those before it."""

    def __init__(self, room: PrefetchRoom, before: PrefetchPlace | None) -> None:
        self.left_out = False
        self.beside = room.kept
        """The adapters that must not make room for this one."""
        self._room = room
        self._before = before
        self._decided = asyncio.Event()

    def is_hopeless(self, key: AdapterKey | None) -> bool:
        """Return whether no adapter can get room any more; this one is left out then.

        `key` is the adapter's, if it is known: one that is pinned, or asked for twice, has room.
        """
        self.left_out = self._room.is_full_for(key)
        return self.left_out

    async def admit(self, key: AdapterKey) -> bool:
        """Return whether the opened adapter fits beside those before it, once that is decided."""
        if self._before is not None:
            with suppress(TimeoutError):  # one that is slow to open does not hold up the others
                async with asyncio.timeout(ORDER_SECONDS):
                    await self._before._decided.wait()  # noqa: SLF001 (its own)
        self.left_out = not self._room.claim(key)
        self.decide()
        return not self.left_out

    def decide(self, _: object = None) -> None:
        """Let the next adapter be decided; this one has got its room, or has failed."""
        self._before = None
        self._decided.set()


STARTS_PER_TURN = 8
"""Loads started in one turn of the loop: thousands of ids must not block it."""


class Prefetch:
    """The loads started by `AdapterLoader.prefetch`. They need not be awaited.

    Awaiting a prefetch waits until every adapter is at its tier, has failed, was cancelled or left
    out, and then raises the first error in the order of the ids. Cancelling the awaiting task does
    not cancel the prefetch.
    """

    def __init__(
        self,
        refs: Sequence[Ref],
        load: Callable[[Ref, PrefetchPlace | None], Coroutine[None, None, None]],
        room: PrefetchRoom | None = None,
    ) -> None:
        self._refs = refs
        self._load = load
        self._places = room.places(len(refs)) if room is not None and len(refs) > 1 else None
        self._tasks: list[asyncio.Task[None]] = []
        self._cancelled = False
        self.task = asyncio.get_running_loop().create_task(self._run(), name="lorax prefetch")
        """Done when all loads are."""

    @property
    def done(self) -> bool:
        """Whether all loads have ended."""
        started = self._cancelled or len(self._tasks) == len(self._refs)
        return started and all(task.done() for task in self._tasks)

    @property
    def errors(self) -> Mapping[str, LoraxError]:
        """The errors so far, by id."""
        errors: dict[str, LoraxError] = {}
        for ref, task in zip(self._refs, self._tasks, strict=False):
            error = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(error, LoraxError):
                errors[text_of(ref)] = error
        return MappingProxyType(errors)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The ids so far that do not fit beside those before them, in order."""
        pairs = zip(self._refs, self._places or (), strict=False)
        return tuple(text_of(ref) for ref, place in pairs if place.left_out)

    def cancel(self) -> None:
        """Cancel the loads that have not ended; other calls for the same adapters go on."""
        self._cancelled = True
        for task in self._tasks:
            task.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        for number, ref in enumerate(self._refs, 1):
            if self._cancelled:
                break
            place = None if self._places is None else self._places[number - 1]
            task = loop.create_task(self._load(ref, place), name=f"lorax prefetch {text_of(ref)}")
            task.add_done_callback(_retrieve_error)
            if place is not None:
                task.add_done_callback(place.decide)
            self._tasks.append(task)
            if number % STARTS_PER_TURN == 0:
                await asyncio.sleep(0)
        if self._tasks:
            await asyncio.wait(self._tasks)

    def __await__(self) -> Generator[object, None, None]:
        yield from asyncio.wait([self.task]).__await__()
        for error in self.errors.values():
            raise error

    def __repr__(self) -> str:
        left_out = len(self.left_out)
        done = sum(task.done() for task in self._tasks) - left_out
        more = f", {left_out} left out" if left_out else ""
        return f"<Prefetch of {len(self._refs)} adapters, {done} of them done{more}>"


def _retrieve_error(task: asyncio.Task[None]) -> None:
    """Retrieve a task's error, lest asyncio log it: a prefetch need not be awaited."""
    if not task.cancelled():
        task.exception()
