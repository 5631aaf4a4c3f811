"""Adapters that requests wait for: the queue, and what is done to bring them nearer."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import islice
from operator import itemgetter

from lorax_async.adapter import AdapterKey
from lorax_async.core.urgency import LookAhead, Reach
from lorax_async.errors import AdapterTimeoutError, InternalError, LoraxError
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.prefetch import Prefetch
from lorax_async.runtime.whereabouts import TierName
from lorax_async.scheduling.clock import Alarm, Clock
from lorax_async.scheduling.guests import Guest, Urgency
from lorax_async.settings.requirements import MAX_SECONDS

_HINTS: dict[Reach, TierName] = {Reach.DEVICE: "device", Reach.HOST: "host"}


class Errand:
    """What is done for one guest that waits.

    `place` is that in the queue. It is `resting` if it had a slot in which nothing came: it is to
    have one again when its file is here. `broken` is the version that it had in its slot, and what
    was wrong with it: it is loaded once more if its files were changed.
    """

    def __init__(
        self,
        guest: Guest,
        number: int,
        *,
        resting: bool,
        broken: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        self.guest = guest
        self.broken = broken
        self.place: tuple[Urgency, int] = (guest.urgency, number)
        self.resting = resting
        self.wishes: set[asyncio.Task[None]] = set()
        self.since = 0.0
        self.priority = 0
        self.hints: dict[TierName, Prefetch] = {}


class Waiting:
    """The queue of guests without a slot.

    The first ones are loaded in the foreground, the next ones hinted. Who has been loaded for
    `patience` seconds counts no longer among the first ones, so that sources which do not answer
    hold up nobody else. `granted` and `failed` tell what came of a wish, `held` how many guests
    have slots.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        ahead: LookAhead,
        patience: float,
        clock: Clock,
        *,
        held: Callable[[], int],
        granted: Callable[[Guest, AdapterHandle], None],
        failed: Callable[[Guest, LoraxError], None],
    ) -> None:
        self._loader = loader
        self._ahead = ahead
        self._patience = patience
        self._clock = clock
        self._held = held
        self._granted = granted
        self._failed = failed
        self._line: list[tuple[tuple[Urgency, int], Errand]] = []
        self._errands: dict[Guest, Errand] = {}
        self._numbers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: Alarm | None = None
        self._looking = False

    def __len__(self) -> int:
        return len(self._line)

    def add(
        self,
        guest: Guest,
        *,
        resting: bool = False,
        broken: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        """It waits from now on; with `resting`, for its file first."""
        self._numbers += 1
        errand = Errand(guest, self._numbers, resting=resting, broken=broken)
        self._errands[guest] = errand
        insort(self._line, (errand.place, errand))
        if broken is not None:
            self._wish(errand)
        if resting:
            self._hint(errand, "disk")
        self.look_soon()

    def update(self, guest: Guest) -> None:
        """Its requests are others now."""
        errand = self._errands.get(guest)
        if errand is None:
            return
        if errand.place[0] != guest.urgency:
            self._take_out(errand)
            errand.place = (guest.urgency, errand.place[1])
            insort(self._line, (errand.place, errand))
            self.look_soon()
        if errand.wishes and guest.priority > errand.priority:
            self._wish(errand)  # beside the other one, which is older

    def remove(self, guest: Guest) -> None:
        """It waits no longer. Idempotent."""
        errand = self._errands.pop(guest, None)
        if errand is None:
            return
        self._take_out(errand)
        for task in errand.wishes:
            task.cancel()
        for hint in errand.hints.values():
            hint.cancel()
        self.look_soon()

    def _take_out(self, errand: Errand) -> None:
        del self._line[bisect_left(self._line, errand.place, key=itemgetter(0))]

    async def close(self) -> None:
        """Nobody may be waiting any more. Returns when no task is left."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    # -- looking ahead -----------------------------------------------------------------------------

    def look_soon(self) -> None:
        """Once for all that changes in one turn of the loop."""
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Bring the first ones nearer."""
        self._looking = False
        now = self._clock.time()
        reaches = self._ahead.reaches(self._held())
        counting = (errand for _, errand in self._line if self._counts(errand, now))
        near = list(islice(counting, len(reaches)))
        for errand, reach in zip(near, reaches, strict=False):
            self._reach(errand, reach)
        self._set_alarm(min((each.since for each in near if each.wishes), default=None))

    def _counts(self, errand: Errand, now: float) -> bool:
        """Whether it takes a place among the first: whose sources do not answer take none."""
        late = errand.wishes and now >= errand.since + self._patience
        return not late and not errand.resting

    def _reach(self, errand: Errand, reach: Reach) -> None:
        if errand.wishes:
            return
        if reach is Reach.LOAD:
            self._wish(errand)
        else:
            self._hint(errand, _HINTS[reach])

    def _set_alarm(self, since: float | None) -> None:
        """The first to lose patience with is the one that is loaded since then."""
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None
        if since is not None:
            self._alarm = self._clock.call_at(since + self._patience, self._look)

    # -- loads and hints ---------------------------------------------------------------------------

    def _wish(self, errand: Errand) -> None:
        if not errand.wishes:
            errand.since = self._clock.time()
        errand.priority = errand.guest.priority
        task = asyncio.get_running_loop().create_task(self._load(errand), name="lorax wish")
        errand.wishes.add(task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, errand: Errand) -> None:
        """Until it has a slot. Its requests have deadlines of their own."""
        ref, priority = errand.guest.ref, errand.priority
        assert ref is not None
        try:
            if errand.broken is not None and not await self._loader.has_changed(
                ref, *errand.broken
            ):
                self._fail(errand, errand.broken[1])
                return
            stay = self._loader.stream(ref, timeout=MAX_SECONDS, priority=priority)
            async with stay as streaming:
                handle = streaming.clone()
        except LoraxError as error:
            self._fail(errand, error)
        except Exception as problem:  # noqa: BLE001 - the requests must hear of it
            fault = InternalError(f"a load failed: {problem!r}", id=errand.guest.id)
            fault.__cause__ = problem
            self._fail(errand, fault)
        else:
            if self._errands.get(errand.guest) is errand:
                self._granted(errand.guest, handle)
            else:
                handle.release()

    def _fail(self, errand: Errand, error: LoraxError) -> None:
        if self._errands.get(errand.guest) is errand:
            self._failed(errand.guest, error)

    def _hint(self, errand: Errand, tier: TierName) -> None:
        if tier in errand.hints:
            return
        ref = errand.guest.ref
        assert ref is not None
        try:
            hint = self._loader.prefetch(ref, tier=tier, priority=errand.guest.priority)
        except LoraxError as error:
            self._fail(errand, error)
            return
        errand.hints[tier] = hint
        if tier != "host":
            hint.task.add_done_callback(lambda _: self._hinted(errand, hint))

    def _hinted(self, errand: Errand, hint: Prefetch) -> None:
        """It is there, and the slot a matter of asking; or it is time to load it.

        Who rests has no other way, and ends with it; but for time, which is its requests' own.
        """
        if self._errands.get(errand.guest) is not errand:
            return
        for error in hint.errors.values():
            if errand.resting and not isinstance(error, AdapterTimeoutError):
                self._fail(errand, error)
                return
        errand.resting = False
        if not errand.wishes:
            self._wish(errand)
