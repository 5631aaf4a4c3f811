"""The adapters without a slot: which of them to load or to prefetch next."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count, islice
from operator import itemgetter

from lorax_async.errors import AdapterTimeoutError, InternalError, LoraxError
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.acquire import Prefetch
from lorax_async.runtime.placement import TierName
from lorax_async.scheduler.requests import AdapterQueue, Clock, Ticket, TimerHandle, Urgency
from lorax_async.types import MAX_SECONDS, AdapterKey, Ref


@dataclass(frozen=True, slots=True)
class LookAhead:
    """How many queued adapters to load or prefetch.

    `loads` adapters load in the foreground; with prefetched ones at most `slots` are on the device;
    `hints` more are prefetched into host memory.
    """

    loads: int
    slots: int
    hints: int

    def targets(self, slots_held: int) -> list[TierName | None]:
        """Return where to prefetch each of the first queued adapters; None is to load it.

        Others hold `slots_held` slots.
        """
        spare = max(0, self.slots - slots_held - self.loads)
        tiers: list[tuple[TierName | None, int]]
        tiers = [(None, self.loads), ("device", spare), ("host", self.hints)]
        return [tier for tier, count in tiers for _ in range(count)]


async def resolve_queue(
    loader: AdapterLoader, queue: AdapterQueue, ref: Ref
) -> tuple[AdapterKey, list[Ticket]]:
    """Return the version that requests of the queue mean, and those that entered too late for it.

    An answer counts for all that entered before it was asked for, and for others as long as the
    loader reuses it.
    """
    while True:
        last = max((ticket.order[1] for ticket in queue.tickets), default=0)
        key = await loader.resolve(ref, timeout=MAX_SECONDS)
        if loader.current_key(ref) == key:
            return key, []
        late = [ticket for ticket in queue.tickets if ticket.order[1] > last]
        if not late or len(late) < len(queue.tickets):
            return key, late


@dataclass(slots=True, eq=False)
class LoadTask:
    """The load of one adapter without a slot.

    `place` is its sort key in the queue. `needs_file` marks an adapter that lost a slot in which no
    layer arrived: fetch its file before it gets a slot again. `failure` is the version that failed
    in its slot, with the error: load it again only if its files have changed.
    """

    queue: AdapterQueue
    place: tuple[Urgency, int]
    needs_file: bool
    failure: tuple[AdapterKey, LoraxError] | None
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    since: float = 0.0
    priority: int = 0
    preempts: bool = False
    hints: dict[TierName, Prefetch] = field(default_factory=dict)


@dataclass(eq=False)
class LoadQueue:
    """The adapters without a slot, by urgency.

    The first ones are loaded in the foreground, the next ones prefetched. An adapter that has been
    loading for `patience` seconds no longer counts among the first, so that an unresponsive source
    does not hold up the others. `granted` and `failed` report the end of a load; `slots_held`
    returns the number of adapters with slots.
    """

    loader: AdapterLoader
    ahead: LookAhead
    patience: float
    clock: Clock
    slots_held: Callable[[], int]
    granted: Callable[[AdapterQueue, AdapterHandle, list[Ticket]], None]
    failed: Callable[[AdapterQueue, LoraxError], None]

    def __post_init__(self) -> None:
        self._queue: list[tuple[tuple[Urgency, int], LoadTask]] = []
        self._load_tasks: dict[AdapterQueue, LoadTask] = {}
        self._numbers = count()
        self._last_held = self.clock.time()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alarm: TimerHandle | None = None
        self._look_scheduled = False

    def __len__(self) -> int:
        return len(self._queue)

    def add(
        self,
        queue: AdapterQueue,
        *,
        needs_file: bool = False,
        failure: tuple[AdapterKey, LoraxError] | None = None,
    ) -> None:
        """Add an adapter; with `needs_file`, fetch its file before it gets a slot."""
        place = queue.urgency, next(self._numbers)
        load_task = LoadTask(queue, place, needs_file, failure)
        self._load_tasks[queue] = load_task
        insort(self._queue, (load_task.place, load_task))
        if failure is not None:
            self._start_load(load_task)
        if needs_file:
            self._hint(load_task, "disk")
        self.schedule_look()

    def update(self, queue: AdapterQueue) -> None:
        """Follow a change of the adapter's urgency or priority."""
        load_task = self._load_tasks.get(queue)
        if load_task is None:
            return
        if load_task.place[0] != queue.urgency:
            self._take_out(load_task)
            load_task.place = (queue.urgency, load_task.place[1])
            insort(self._queue, (load_task.place, load_task))
            self.schedule_look()
        if load_task.tasks and queue.priority > load_task.priority:
            self._start_load(load_task)  # beside the load of lower priority

    def remove(self, queue: AdapterQueue) -> None:
        """Remove an adapter and cancel its loads. Idempotent."""
        load_task = self._load_tasks.pop(queue, None)
        if load_task is None:
            return
        self._take_out(load_task)
        for task in load_task.tasks:
            task.cancel()
        for hint in load_task.hints.values():
            hint.cancel()
        self.schedule_look()

    def count_overdue(self, is_overdue: Callable[[Ticket], bool], limit: int) -> int:
        """Return how many adapters, at most `limit`, are overdue and lack nothing but a slot."""
        overdue = 0
        for _, load_task in self._queue:
            if overdue >= limit:
                break
            queue = load_task.queue
            if is_overdue(queue.tickets[0]):
                overdue += self._waits_for_slot(queue)
            elif not queue.begun:
                break  # nor are those that follow
        return overdue

    def _waits_for_slot(self, queue: AdapterQueue) -> bool:
        """Return whether its files are here and it has no slot."""
        assert queue.ref is not None
        found = self.loader.placement().find(queue.version or queue.ref)
        return found is not None and found.slot is None

    def _take_out(self, load_task: LoadTask) -> None:
        del self._queue[bisect_left(self._queue, load_task.place, key=itemgetter(0))]

    async def close(self) -> None:
        """Wait for the cancelled loads. The queue must be empty."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def note_release(self) -> None:
        """Look again: one of the adapters has released its slot."""
        self._last_held = self.clock.time()
        self.schedule_look()

    # -- looking ahead -----------------------------------------------------------------------------

    def schedule_look(self) -> None:
        """Call `_look` once for all changes in one turn of the loop."""
        if not self._look_scheduled:
            self._look_scheduled = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Load or prefetch the first adapters of the queue."""
        self._look_scheduled = False
        now = self.clock.time()
        targets = self.ahead.targets(self.slots_held())
        counting = (load_task for _, load_task in self._queue if self._counts(load_task, now))
        first = list(islice(counting, len(targets)))
        for load_task, tier in zip(first, targets, strict=False):
            if load_task.tasks:
                continue
            if tier is None:
                self._start_load(load_task)
            else:
                self._hint(load_task, tier)
        self._preempt_others(now)
        # Look again when the oldest of these loads exceeds `patience`.
        dues = [load_task.since + self.patience for load_task in first if load_task.tasks]
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = None
        if dues:
            due = min((due for due in dues if due > now), default=now + self.patience)
            self._alarm = self.clock.call_at(due, self._look)

    def _preempt_others(self, now: float) -> None:
        """Let late loads take slots from other users of the loader.

        Only if none of these adapters has had a slot for as long: the scheduler has none to give.
        """
        if self.slots_held() or now < self._last_held + self.patience:
            return
        for _, load_task in self._queue:
            late = load_task.tasks and now >= load_task.since + self.patience
            if late and not load_task.preempts:
                load_task.preempts = True
                self._start_load(load_task)

    def _counts(self, load_task: LoadTask, now: float) -> bool:
        """Return whether it counts among the first: not if its source is unresponsive."""
        late = load_task.tasks and now >= load_task.since + self.patience
        if late and not self._waits_for_slot(load_task.queue):
            return False
        return not load_task.needs_file

    # -- loads and hints ---------------------------------------------------------------------------

    def _start_load(self, load_task: LoadTask) -> None:
        if not load_task.tasks:
            load_task.since = self.clock.time()
        load_task.priority = load_task.queue.priority
        task = asyncio.get_running_loop().create_task(self._load(load_task), name="lorax load")
        load_task.tasks.add(task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, load_task: LoadTask) -> None:
        """Wait for a slot, without a timeout: requests have deadlines of their own."""
        ref = load_task.queue.ref
        assert ref is not None
        try:
            if load_task.failure is not None:
                key, failure = load_task.failure
                if await self.loader.resolve(ref, timeout=MAX_SECONDS) == key:
                    self._fail(load_task, failure)
                    return
            handle, late = await self._stream(load_task, ref)
        except LoraxError as error:
            self._fail(load_task, error)
        except Exception as problem:  # noqa: BLE001 - the requests raise it
            fault = InternalError(f"a load failed: {problem!r}", id=load_task.queue.id)
            fault.__cause__ = problem
            self._fail(load_task, fault)
        else:
            if self._load_tasks.get(load_task.queue) is load_task:
                self.granted(load_task.queue, handle, late)
            else:
                handle.release()

    async def _stream(self, load_task: LoadTask, ref: Ref) -> tuple[AdapterHandle, list[Ticket]]:
        """Return a handle of the version that the queue's requests are computed with.

        Requests may have entered while the load waited for a slot, longer than the look at the
        version counts. Those that entered too late for the last look are returned too.
        """
        queue, loader = load_task.queue, self.loader
        version = queue.version if queue.has_started else None
        target: Ref = ref if version is None else version
        priority, preempt = load_task.priority, load_task.preempts
        while True:
            lease = loader.stream(target, timeout=MAX_SECONDS, priority=priority, preempt=preempt)
            async with lease as streaming:
                key, late = streaming.key, list[Ticket]()
                if version is None and loader.current_key(ref) != key:
                    key, late = await resolve_queue(loader, queue, ref)
                if key == streaming.key:
                    return streaming.clone(), late

    def _fail(self, load_task: LoadTask, error: LoraxError) -> None:
        if self._load_tasks.get(load_task.queue) is load_task:
            self.failed(load_task.queue, error)

    def _hint(self, load_task: LoadTask, tier: TierName) -> None:
        if tier in load_task.hints or (tier == "host" and not self.loader.config.host_bytes):
            return
        ref = load_task.queue.ref
        assert ref is not None
        try:
            hint = self.loader.prefetch(ref, tier=tier, priority=load_task.queue.priority)
        except LoraxError as error:
            self._fail(load_task, error)
            return
        load_task.hints[tier] = hint
        if tier != "host":
            hint.task.add_done_callback(lambda _: self._hinted(load_task, hint))

    def _hinted(self, load_task: LoadTask, hint: Prefetch) -> None:
        """Start the load when a prefetch ends, for the slot or for its error.

        An adapter that needs its file fails with the prefetch, except for a timeout: requests have
        deadlines of their own.
        """
        if self._load_tasks.get(load_task.queue) is not load_task:
            return
        for error in hint.errors.values():
            if load_task.needs_file and not isinstance(error, AdapterTimeoutError):
                self._fail(load_task, error)
                return
        load_task.needs_file = False
        if not load_task.tasks:
            self._start_load(load_task)
