"""`AdapterScheduler`, which turns requests for adapters into batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple, Self

from lorax_async.errors import (
    AdapterTimeoutError,
    HandleClosedError,
    LoaderClosedError,
    LoraxError,
    UsageError,
    shorten_repr,
)
from lorax_async.handle import AdapterHandle
from lorax_async.loader import AdapterLoader
from lorax_async.planning.batch_plan import (
    BatchPlan,
    SlotOccupant,
    SlotRef,
    plan_batch,
    require_current,
)
from lorax_async.scheduler.adapter_queues import AdapterQueues
from lorax_async.scheduler.admission import BatchCapacity, BatchSelection, EngineSlots, pick
from lorax_async.scheduler.estimates import PassTimeModel
from lorax_async.scheduler.look_ahead import LookAhead
from lorax_async.scheduler.requests import AdapterQueue, Clock, LoopClock, Request, Ticket
from lorax_async.types import require_count, require_share


def urgency(since: float, priority: int, deadline: float, level: float) -> float:
    """Return a request's sort key, in seconds; lower is more urgent. It stays while it waits.

    The key is `since`, the time of arrival, less `level` seconds per level of priority. A deadline
    less than `level` seconds away (also a time) counts as if the request had arrived earlier. A
    request that arrives later by more than the difference in levels is behind: none starves.
    """
    return min(since, deadline - level) - priority * level


class BatchRow(NamedTuple):
    """One sequence's part in a batch."""

    ticket: Ticket
    handle: AdapterHandle | None
    """Its adapter, leased until the batch is completed; None is the base."""
    place: SlotRef
    """The adapter's slot and generation."""
    start: int
    """The position of the first token to compute; 0 for a new or restarted sequence."""
    tokens: int
    """The number of tokens to compute; the rest of a long prompt follows in later batches."""
    last: bool
    """Whether the last of them generates a new token."""


@dataclass(slots=True, eq=False)
class Batch:
    """Rows to compute together. Pass it to `AdapterScheduler.complete` afterwards.

    Fields without a description are private to the scheduler.
    """

    rows: tuple[BatchRow, ...]
    """In the order of the plan, so that the rows of one adapter are neighbours."""
    plan: BatchPlan
    """Segments, tiles and rank groups for kernels. Its `order` is that of the rows: 0, 1, …."""
    seconds: float | None
    """The predicted duration of the pass; None before the first pass."""
    streaming: tuple[AdapterHandle, ...]
    """Adapters with missing layers when the batch was made. Layer k of the pass waits for layer k
    of these only."""
    began: float
    adapter_queues: tuple[AdapterQueue, ...]
    occupants: Mapping[int, SlotOccupant]
    others_wait: bool = False
    """Whether ready rows wait for this batch to end, or an adapter has long waited for a slot in
    which no layers arrive. A pass all of whose rows wait for layers should give up then. Set for
    batches with `streaming` adapters; may be read in any thread."""
    completed: bool = False
    preempted: tuple[Ticket, ...] = ()
    """Requests that lost their places to rows of this batch, or whose adapter is reloaded: forget
    their keys and values before computing the batch. They restart from their first token."""

    @property
    def tokens(self) -> int:
        return self.plan.segments.tokens

    @property
    def handles(self) -> tuple[AdapterHandle | None, ...]:
        """The handle of each row, as `AttachedModel.batch` takes them."""
        return tuple(row.handle for row in self.rows)

    @property
    def budget(self) -> float:
        """Seconds for which the pass may wait for bytes that are not on this machine.

        A tenth of its predicted duration; 0 before the first pass, where a streaming adapter is
        alone in its batch.
        """
        return 0.1 * (self.seconds or 0.0)

    def check(self) -> None:
        """Raise `HandleClosedError` if a row's slot may have another occupant.

        This is so once the batch is completed or the loader closed. Call on the scheduler's loop.
        """
        if self.completed:
            raise HandleClosedError("the batch was completed; its slots may be reused")
        for row in self.rows:
            if row.handle is not None and row.handle.released:
                raise HandleClosedError("the adapter was released", id=row.handle.id)
        require_current([row.place for row in self.rows], self.occupants)


MAX_LOADS = 8
"""The default limit of adapters that load in the foreground at a time."""


class AdapterScheduler:
    """Turns requests into batches, for one engine.

    Requests whose adapter is missing delay no other. A streaming adapter joins a batch when each of
    its layers is expected before the pass reaches it. Adapters share the rows and tokens of a batch
    evenly; among equals the oldest request comes first. Use it as an async context manager.

    Parameters
    ----------
    loader
        An open loader. The scheduler belongs to its event loop; close the scheduler first.
    max_begun
        The engine's places: sequences that have begun and not ended, for which it keeps keys and
        values. None: no limit. A batch's `max_sequences` limits its rows only.
    max_share
        The share of `max_begun` that one adapter, or one client, may have while others wait; above
        0, at most 1. Requests above it are preempted (`Batch.preempted`).
    loads
        Adapters that load in the foreground at a time, in the order of the queue; None is the
        number of slots, at most 8. The next ones are prefetched onto the device while slots are
        free.
    look_ahead
        The number of further adapters to prefetch into host memory.
    clock
        For tests; None is the loop's.

    Raises
    ------
    ConfigError
        A number is out of range.
    LoaderClosedError, UsageError
        The loader is closed, or belongs to another loop.
    """

    def __init__(
        self,
        loader: AdapterLoader,
        *,
        max_begun: int | None = None,
        max_share: float = 0.5,
        loads: int | None = None,
        look_ahead: int = 8,
        clock: Clock | None = None,
    ) -> None:
        argument: object = loader
        if not isinstance(argument, AdapterLoader):
            raise UsageError(f"a scheduler takes an AdapterLoader, not {shorten_repr(loader)}")
        slots, self._level = loader.config.max_slots, loader.config.starvation_age
        loads = min(slots, MAX_LOADS) if loads is None else loads
        require_count("loads", loads, least=1)
        require_count("look_ahead", look_ahead, least=0)
        if max_begun is not None:
            require_count("max_begun", max_begun, least=1)
        require_share("max_share", max_share)
        places = EngineSlots(inf if max_begun is None else max_begun, max_share, self._level)
        self._loop = asyncio.get_running_loop()
        self._clock = LoopClock(self._loop) if clock is None else clock
        self._patience = loader.config.timeout
        self._layers = loader.layout.num_layers
        self._pace = PassTimeModel()
        self._adapter_queues = AdapterQueues(
            loader,
            self._clock,
            LookAhead(loads, slots, look_ahead),
            self._level,
            places,
            on_change=self._on_change,
            on_requeue=self._on_requeue,
            on_blocked_slot=self._on_blocked_slot,
        )
        self._submitted = 0
        self._in_flight: set[Batch] = set()
        self._change_event = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Fail all requests with `LoaderClosedError` and release all adapters.

        Batches in flight need not be completed: `AdapterHandle.use` keeps their bytes. Idempotent;
        cancelling the caller does not stop it.
        """
        self._check_loop()
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name="lorax scheduler close")
            self._on_change()
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._in_flight.clear()
        await self._adapter_queues.close(LoaderClosedError("the scheduler was closed"))

    def _check_open(self) -> None:
        self._check_loop()
        if self._closing is not None:
            raise LoaderClosedError("the scheduler was closed")

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Queue a request and start to load its adapter; the ticket raises the load's errors.

        Raise `LoaderClosedError` if the scheduler or its loader is closed.
        """
        self._check_open()
        argument: object = request
        if not isinstance(argument, Request):
            raise UsageError(f"submit takes a Request, not {shorten_repr(request)}")
        now = self._clock.time()
        seconds = self._patience if request.deadline is None else request.deadline
        self._submitted += 1
        order = urgency(now, request.priority, now + seconds, self._level), self._submitted
        ticket = Ticket(request, order, self._loop.create_future(), self._cancelled)
        self._adapter_queues.enter(ticket)
        if not ticket.done:
            self._adapter_queues.fair_times.enter(ticket)
        self._arm(ticket, seconds)
        return ticket

    def _cancelled(self, ticket: Ticket) -> None:
        self._adapter_queues.leave(ticket)
        self._on_change()  # another request may take its place

    def _arm(self, ticket: Ticket, seconds: float) -> None:
        ticket.disarm()
        when = self._clock.time() + seconds
        ticket.alarm = self._clock.call_at(when, lambda: self._too_late(ticket, seconds))

    def _on_requeue(self, ticket: Ticket) -> None:
        """Restart the deadline of a request that was in a batch when its adapter lost its slot."""
        if ticket.begun or ticket.alarm is None:
            self._arm(ticket, self._patience)

    def _too_late(self, ticket: Ticket, seconds: float) -> None:
        problem = f"it was in no batch within {seconds:g} s"
        stage = ticket.queue.stage
        self._end(ticket, AdapterTimeoutError(problem, id=ticket.queue.id, stage=stage))

    # -- batches -----------------------------------------------------------------------------------

    async def next_batch(self, max_tokens: int, max_sequences: int) -> Batch:
        """Wait for rows to compute and return them; pass the batch to `complete` afterwards.

        Several batches may be in flight; no request is in two of them. Cancelling the call loses no
        request.

        Parameters
        ----------
        max_tokens, max_sequences
            Limits of the batch; at least 1. The rest of a longer prompt follows in later batches.

        Raises
        ------
        LoaderClosedError
            Once the scheduler is closed.
        """
        require_count("max_tokens", max_tokens, least=1)
        require_count("max_sequences", max_sequences, least=1)
        await asyncio.sleep(0)  # let pending events arrive first
        while True:
            self._check_open()
            self._adapter_queues.reevaluate_all()
            self._adapter_queues.share_slots()
            now = self._clock.time()
            room = BatchCapacity(max_tokens, max_sequences, self._pace, self._layers, now)
            places = self._adapter_queues.places
            selection = pick(self._adapter_queues.slot_holders, room, places)
            if selection.rows:
                return self._batch(selection, now)
            if places.free < 1 and not self._in_flight:
                self._adapter_queues.yield_slot()
            await self._wait_for_change(selection.due)

    async def _wait_for_change(self, due: float) -> None:
        """Wait for the next change, or until the time `due`."""
        alarm = None if due == inf else self._clock.call_at(due, self._wake)
        try:
            await self._change_event.wait()
        finally:
            if alarm is not None:
                alarm.cancel()

    def _wake(self) -> None:
        """Wake all tasks that wait now."""
        self._change_event.set()
        self._change_event.clear()

    async def batches(self, max_tokens: int, max_sequences: int) -> AsyncIterator[Batch]:
        """Yield `next_batch` repeatedly until the scheduler is closed."""
        while True:
            try:
                batch = await self.next_batch(max_tokens, max_sequences)
            except LoaderClosedError:
                return
            yield batch

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError("a scheduler is used on the event loop that it was made on")

    def _on_change(self) -> None:
        """Wake `next_batch`, and set `others_wait` of streaming passes if rows are ready."""
        self._wake()
        self._flag_streaming_passes()

    def _flag_streaming_passes(self) -> None:
        streaming = [
            batch for batch in self._in_flight if batch.streaming and not batch.others_wait
        ]
        if streaming and self._adapter_queues.has_ready:
            for batch in streaming:
                batch.others_wait = True

    def _on_blocked_slot(self, queue: AdapterQueue) -> None:
        """Set `others_wait` of its batches: no layers arrive while others wait for a slot."""
        for batch in self._in_flight:
            batch.others_wait = batch.others_wait or queue in batch.adapter_queues

    def _batch(self, selection: BatchSelection, now: float) -> Batch:
        batch = make_batch(selection.rows, self._adapter_queues.slots.occupants, self._pace, now)
        for ticket in selection.preempted:
            self._adapter_queues.preempt(ticket)
        dropped, self._adapter_queues.dropped = self._adapter_queues.dropped, []
        batch.preempted = (*dropped, *selection.preempted)
        for queue, ticket, _ in selection.rows:
            ticket.in_batch = True
            ticket.disarm()
            if not ticket.begun:
                self._adapter_queues.places.take(queue, ticket)
        for queue in batch.adapter_queues:
            queue.batch_count += 1
        self._in_flight.add(batch)
        self._flag_streaming_passes()  # ready rows may not have fitted
        return batch

    def complete(
        self,
        batch: Batch,
        finished: Iterable[Ticket] = (),
        *,
        again: Iterable[Ticket] = (),
        failed: Mapping[Ticket, LoraxError] | None = None,
    ) -> Collection[Ticket]:
        """Report the results of a batch: queue the rows' next tokens and release the adapters.

        Parameters
        ----------
        finished
            Requests that generated their last token. Those with `max_new_tokens` finish anyway.
        again
            Requests without a result, whose keys and values were discarded: they restart from their
            first token once their adapter is resident.
        failed
            Requests that ended, with their errors.

        Returns
        -------
        Collection[Ticket]
            The requests whose results do not count: those in `again`, those that ended while the
            batch was computed, and those whose adapter failed its integrity check. An adapter
            whose files changed while they were read is reloaded.

        Raises
        ------
        UsageError
            The batch is not in flight, or a ticket has no row in it. Nothing is changed.
        """
        self._check_loop()
        if self._closing is not None:
            batch.completed = True
            return ()
        finished, again, failed = set(finished), set(again), dict(failed or {})
        if batch not in self._in_flight:
            raise UsageError("a batch is completed once, by the scheduler that made it")
        if not {*finished, *again, *failed} <= {row.ticket for row in batch.rows}:
            raise UsageError("tickets were named that have no row in this batch")
        batch.completed = True
        self._in_flight.remove(batch)
        self._adapter_queues.check_integrity(batch.adapter_queues)
        if not batch.streaming and not again and not failed:
            self._pace.record(batch.tokens, self._clock.time() - batch.began)
        without_result = set(again)
        late = {row.handle for row in batch.rows if row.ticket in again}
        self._adapter_queues.stop_streaming(batch.adapter_queues, late)
        for row in batch.rows:
            row.ticket.in_batch = False
            if row.ticket.done or row.ticket.queue not in batch.adapter_queues:
                without_result.add(row.ticket)
                continue
            self._adapter_queues.charge(row.ticket, row.tokens)
            self._advance(row, finished, again, failed)
        self._adapter_queues.release_batch(batch.adapter_queues)
        self._on_change()
        return without_result

    def _advance(
        self,
        row: BatchRow,
        finished: set[Ticket],
        again: set[Ticket],
        failed: Mapping[Ticket, LoraxError],
    ) -> None:
        ticket = row.ticket
        if ticket in failed:
            self._end(ticket, failed[ticket].located(id=row.handle.id if row.handle else None))
        elif ticket in again:  # its layers arrived too late to stream: wait for all of them
            ticket.position = 0
            self._adapter_queues.places.vacate(ticket)
            self._arm(ticket, self._patience)
        elif ticket.advance(row.tokens) or ticket in finished:
            self._end(ticket)

    def _end(self, ticket: Ticket, error: LoraxError | None = None) -> None:
        self._adapter_queues.leave(ticket)
        ticket.end(error)


def make_batch(
    picked: Sequence[tuple[AdapterQueue, Ticket, int]],
    occupants: Mapping[int, SlotOccupant],
    pace: PassTimeModel,
    now: float,
) -> Batch:
    """Make a batch of rows (adapter, request, tokens); raise `HandleClosedError` as `check`."""
    lengths = [tokens for _, _, tokens in picked]
    plan = plan_batch([queue.place for queue, _, _ in picked], lengths, occupants)
    rows = []
    for number in plan.order:
        queue, ticket, tokens = picked[number]
        last = tokens == ticket.wants
        rows.append(BatchRow(ticket, queue.handle, queue.place, ticket.position, tokens, last))
    adapter_queues = tuple({queue: None for queue, _, _ in picked})
    return Batch(
        rows=tuple(rows),
        plan=replace(plan, order=tuple(range(len(rows)))),
        seconds=pace.predict(plan.segments.tokens),
        streaming=tuple(
            queue.handle for queue in adapter_queues if queue.handle and not queue.is_ready
        ),
        began=now,
        adapter_queues=adapter_queues,
        occupants=occupants,
    )
