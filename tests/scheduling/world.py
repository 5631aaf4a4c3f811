"""A loader on a watched device, a scheduler, and those who want sequences of it; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

from contention.adapters import LARGEST, LAYOUT
from contention.observer import ObservedDevice
from lorax_async import (
    AdapterLoader,
    AdapterScheduler,
    AdapterTimeoutError,
    FetchError,
    LoaderConfig,
    LoraxError,
    Request,
    Ticket,
)
from lorax_async.adapter import AdapterId
from lorax_async.core.transitions import SlotState
from lorax_async.testing import SimulatedDevice
from scheduling.clock import VirtualClock
from scheduling.link import TOLD, Conduct, TimedSource

LEVEL = 0.02
"""`starvation_age`: of the scheduler in virtual seconds, of the loader in real ones."""

TIMEOUT = 60.0
BOUND = 30.0
"""Nobody waits longer whose adapter comes: more than all passes and loads of a plan take."""

MISSING = "x"
"""An id that nobody has."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Settings that one example plays in, and how the adapters come."""

    loop: str
    slots: int
    max_tokens: int
    max_sequences: int
    max_begun: int | None
    loads: int | None
    conducts: Mapping[str, Conduct]
    engines: int = 1
    """Batches that are under way at a time."""
    seconds: float = 0.01
    """Of a pass, however many rows it has."""

    def fate(self, id: str | None) -> str:
        if id is None:
            return "comes"
        return "fails" if id == MISSING else self.conducts[id].fate


@dataclass(slots=True, eq=False)
class Wanted:
    """One request: what was asked for, when, and whether it was cancelled on purpose."""

    ticket: Ticket
    at: float
    cancelled: bool = False
    ended: float | None = None
    tokens: list[int] = field(default_factory=list)
    """Positions that were computed since its last restart."""


class World:
    """Everything of one example; collects, as `device.faults`, what was not right."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.clock = VirtualClock()
        self.source = TimedSource(self.clock, scene.conducts)
        nbytes = LARGEST * scene.slots
        simulated = SimulatedDevice(LAYOUT, dtype="BF16", nbytes=nbytes, slots=scene.slots)
        self.device = ObservedDevice(
            simulated,
            nbytes=nbytes,
            budgets=[1 << 16],
            expected=lambda key: self.source.versions[key].weights,
            leased=lambda _: False,
        )
        config = LoaderConfig(
            device_bytes=nbytes,
            host_bytes=1 << 20,
            staging_bytes=1 << 16,
            max_slots=scene.slots,
            io_threads=2,
            timeout=TIMEOUT,
            starvation_age=LEVEL,
        )
        self.loader = AdapterLoader(LAYOUT, config, source=self.source, device=self.device)
        self.wanted: list[Wanted] = []
        self.news: set[asyncio.Future[None]] = set()

    async def open(self) -> None:
        await self.loader.__aenter__()
        self.loader.subscribe(self.device.heard)
        self.loader.subscribe(lambda _: self.tell())
        scene = self.scene
        self.scheduler = AdapterScheduler(
            self.loader, max_begun=scene.max_begun, loads=scene.loads, clock=self.clock
        )

    def blame(self, holds: object, fault: str) -> None:
        self.device.blame(holds, fault)

    def require_no_faults(self) -> None:
        assert not self.device.faults, self.device.faults[:5]

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Wanted:
        wanted = Wanted(self.scheduler.submit(request), self.clock.now)
        self.wanted.append(wanted)
        self.tell()
        return wanted

    def cancel(self, which: int) -> None:
        going = [each for each in self.wanted if not each.ticket.done]
        if going:
            going[which % len(going)].cancelled = True
            self.blame(going[which % len(going)].ticket.cancel(), "it could not be cancelled")
            self.tell()

    def note_ends(self) -> None:
        for each in self.wanted:
            if each.ticket.done and each.ended is None:
                each.ended = self.clock.now

    def judge(self, each: Wanted) -> None:
        """Whether what came of it is what had to."""
        ticket, request = each.ticket, each.ticket.request
        assert request.adapter_id is None or isinstance(request.adapter_id, str)
        fate, error = self.scene.fate(request.adapter_id), ticket.error
        hurried = request.deadline is not None
        self.blame(ticket.done, f"it never ended: {ticket}")
        if each.cancelled:
            self.blame(ticket.cancelled, "it was cancelled, and is not")
        elif error is None:
            self.blame(fate == "comes", f"it is finished without its adapter: {ticket}")
            self.blame(ticket.generated == request.max_new_tokens, "it is too short")
            wanted = list(range(request.prompt_tokens + request.max_new_tokens - 1))
            self.blame(each.tokens == wanted, f"not each position once: {each.tokens}")
            late = each.ended is None or each.ended - each.at > BOUND
            self.blame(not late, f"it waited too long, until {each.ended}: {ticket}")
        else:
            self.blame(error.id == request.adapter_id, "an error of another adapter")
            self.blame(self._is_provoked(error, fate, hurried=hurried), f"{ticket}: {error!r}")

    def _is_provoked(self, error: LoraxError, fate: str, *, hurried: bool) -> bool:
        if isinstance(error, AdapterTimeoutError):
            return hurried or fate == "stalls"
        told = isinstance(error, FetchError) and TOLD in str(error)
        return fate == "fails" and (told or error.id == MISSING)

    # -- waiting -----------------------------------------------------------------------------------

    def tell(self) -> None:
        """Something has changed that a pass may wait for."""
        for future in self.news:
            if not future.done():
                future.set_result(None)

    async def until_news(self, seconds: float) -> None:
        """Or until so much virtual time has passed."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.news.add(future)
        alarm = self.clock.call_at(self.clock.now + seconds, self.tell)
        try:
            await future
        finally:
            self.news.discard(future)
            alarm.cancel()

    def is_ready(self, id: AdapterId | None) -> bool:
        """Whether the scheduler has a slot for the adapter, all of which is there and stays."""
        where = None if id is None else self.loader.whereabouts(id)
        return id is None or (where is not None and where.state == "resident" and where.leases > 0)

    async def settle(self) -> None:
        """Until everything has happened that does not wait for time to pass."""
        # Nothing public says that a thread still reads bytes for a copy: the one look inside.
        lives = self.loader._machinery.driver.lifecycle.lives  # noqa: SLF001
        quiet = 0
        while quiet < 3:
            for _ in range(6):
                await asyncio.sleep(0)
            busy = any(
                life.copying or (life.slot is SlotState.DRAINING and not life.leases + life.uses)
                for life in lives.values()
            )
            quiet = 0 if busy else quiet + 1
            if busy:
                await asyncio.sleep(0.0002)
