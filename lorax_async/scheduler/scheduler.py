"""`AdapterScheduler`: requests for adapters become batches, as adapters become ready."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from math import inf
from types import TracebackType
from typing import Self

from lorax_async.errors import AdapterTimeoutError, LoaderClosedError, LoraxError, UsageError
from lorax_async.loader import AdapterLoader
from lorax_async.scheduler.adapter_queue import AdapterQueue
from lorax_async.scheduler.adapter_queues import AdapterQueues, LookAhead, urgency
from lorax_async.scheduler.admission import BatchCapacity, BatchSelection, EngineSlots, pick
from lorax_async.scheduler.requests import Clock, LoopClock, Request, Ticket
from lorax_async.scheduler.step import Batch, BatchRow, PassTimeModel, make_batch
from lorax_async.validation import require_count, require_share


class ChangeEvent:
    """Wakes whoever waits, all at once; they look for themselves."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: Clock) -> None:
        self._loop = loop
        self._clock = clock
        self._idle: set[asyncio.Future[None]] = set()

    def tell(self) -> None:
        for future in self._idle:
            if not future.done():
                future.set_result(None)

    async def wait(self, due: float) -> None:
        """Until something has changed, or until then."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._idle.add(future)
        alarm = None if due == inf else self._clock.call_at(due, self.tell)
        try:
            await future
        finally:
            self._idle.discard(future)
            if alarm is not None:
                alarm.cancel()


MAX_LOADS = 8
"""Adapters that are loaded in the foreground at a time, unless said otherwise."""


class AdapterScheduler:
    """Turns requests into batches, for one engine.

    Rows of adapters that are not there wait, and nobody waits for them. An adapter whose layers are
    still coming joins when each is expected before its turn. When not all fits, adapters share rows
    and tokens evenly, and among equals the oldest request comes first.

    Parameters
    ----------
    loader
        Open; the scheduler belongs to its event loop, and is closed before it.
    max_begun
        Sequences that may have begun and not ended, for which the engine keeps keys and values.
        None: any number. A batch's `max_sequences` counts its rows only.
    max_share
        The share of `max_begun` that one adapter, and one client, has at most while others wait;
        above 0, at most 1. What it has above that is preempted (`Batch.preempted`).
    loads
        Adapters that are waited for in the foreground at a time, in the order of the queue; None is
        as many as there are slots, and 8 at most. The next ones are hinted onto the device, as far
        as slots are free.
    look_ahead
        How many more are hinted into host memory.
    clock
        For tests; None is the loop's.

    Use it as an async context manager.

    Raises `ConfigError` for a number out of range, and `LoaderClosedError` or `UsageError` if the
    loader is closed or another loop's.
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
            changed=self._changed,
            sent_back=self._sent_back,
            in_the_way=self._in_the_way,
        )
        self._submitted = 0
        self._out: set[Batch] = set()
        self._change_event = ChangeEvent(self._loop, self._clock)
        self._closing: asyncio.Task[None] | None = None

    # -- life --------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Fail all requests with `LoaderClosedError`, and give all adapters back.

        Batches under way need not be completed any more: who computes them holds the bytes by
        `AdapterHandle.use`. Idempotent; cancelling the caller does not stop it.
        """
        self._check_loop()
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name="lorax scheduler close")
            self._changed()
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._out.clear()
        await self._adapter_queues.close(LoaderClosedError("the scheduler was closed"))

    def _check_open(self) -> None:
        self._check_loop()
        if self._closing is not None:
            raise LoaderClosedError("the scheduler was closed")

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Queue a request; its adapter begins to come. What is wrong with that, the ticket raises.

        Raises `LoaderClosedError` if the scheduler was closed, or the loader of its adapter.
        """
        self._check_open()
        now = self._clock.time()
        seconds = self._patience if request.deadline is None else request.deadline
        self._submitted += 1
        order = urgency(now, request.priority, now + seconds, self._level), self._submitted
        ticket = Ticket(request, order, self._loop.create_future(), self._cancelled)
        self._adapter_queues.enter(ticket)
        self._arm(ticket, seconds)
        return ticket

    def _cancelled(self, ticket: Ticket) -> None:
        self._adapter_queues.leave(ticket)
        self._changed()  # another one may begin instead

    def _arm(self, ticket: Ticket, seconds: float) -> None:
        ticket.disarm()
        when = self._clock.time() + seconds
        ticket.alarm = self._clock.call_at(when, lambda: self._too_late(ticket, seconds))

    def _sent_back(self, ticket: Ticket) -> None:
        """It had begun, if only once, and waits for its adapter once more."""
        if ticket.begun or ticket.alarm is None:
            self._arm(ticket, self._patience)

    def _too_late(self, ticket: Ticket, seconds: float) -> None:
        adapter_queue = self._adapter_queues.guest_of(ticket)
        problem = f"it was in no batch within {seconds:g} s"
        self._end(
            ticket, AdapterTimeoutError(problem, id=adapter_queue.id, stage=adapter_queue.stage)
        )

    # -- batches -----------------------------------------------------------------------------------

    async def next_batch(self, max_tokens: int, max_sequences: int) -> Batch:
        """Wait until something can be computed; it is to be given to `complete`.

        Parameters
        ----------
        max_tokens, max_sequences
            Of the batch, at most; at least 1. What is left of a longer prompt comes later.

        Raises `LoaderClosedError` once the scheduler was closed. Several batches may be under way;
        no request is in two of them. Cancelling it loses nothing.
        """
        require_count("max_tokens", max_tokens, least=1)
        require_count("max_sequences", max_sequences, least=1)
        await asyncio.sleep(0)  # news that are on their way are heard first, whoever computes
        while True:
            self._check_open()
            self._adapter_queues.check()
            now = self._clock.time()
            room, places = BatchCapacity(max_tokens, max_sequences), self._adapter_queues.places
            picked = pick(self._adapter_queues.held, room, places, self._pace, self._layers, now)
            if picked.rows:
                return self._batch(picked, now)
            if places.free < 1 and not self._out:
                self._adapter_queues.make_way()
            await self._change_event.wait(picked.due)

    async def batches(self, max_tokens: int, max_sequences: int) -> AsyncIterator[Batch]:
        """`next_batch` again and again, until the scheduler is closed."""
        while True:
            try:
                batch = await self.next_batch(max_tokens, max_sequences)
            except LoaderClosedError:
                return
            yield batch

    def _check_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise UsageError("a scheduler is used on the event loop that it was made on")

    def _changed(self) -> None:
        """Whoever waits looks again; who waits within a pass is told if others need not."""
        self._change_event.tell()
        self._tell_passes()

    def _tell_passes(self) -> None:
        streaming = [batch for batch in self._out if batch.streaming and not batch.others_wait]
        if streaming and self._adapter_queues.has_ready:
            for batch in streaming:
                batch.others_wait = True

    def _in_the_way(self, adapter_queue: AdapterQueue) -> None:
        """Nothing comes into its slot, and others wait for one."""
        for batch in self._out:
            batch.others_wait = batch.others_wait or adapter_queue in batch.adapter_queues

    def _batch(self, picked: BatchSelection, now: float) -> Batch:
        batch = make_batch(picked.rows, self._adapter_queues.slots.lease_table, self._pace, now)
        for ticket in picked.preempted:
            self._adapter_queues.preempt(ticket)
        dropped, self._adapter_queues.dropped = self._adapter_queues.dropped, []
        batch.preempted = (*dropped, *picked.preempted)
        for adapter_queue, ticket, _ in picked.rows:
            ticket.flying = True
            ticket.disarm()
            if not ticket.begun:
                self._adapter_queues.begin(adapter_queue, ticket)
        for adapter_queue in batch.adapter_queues:
            adapter_queue.flights += 1
        self._out.add(batch)
        self._tell_passes()  # of rows that did not fit
        return batch

    def complete(
        self,
        batch: Batch,
        finished: Iterable[Ticket] = (),
        *,
        again: Iterable[Ticket] = (),
        failed: Mapping[Ticket, LoraxError] | None = None,
    ) -> Collection[Ticket]:
        """Say what came of a batch: the next token of its rows is queued, its adapters given back.

        Parameters
        ----------
        finished
            Those whose last token was among them; besides these, who has `max_new_tokens`.
        again
            Those of whom nothing came, and whose keys and values were thrown away: they are queued
            from their first token on, and join the next time when all of their adapter is there.
        failed
            Those that ended, and why.

        Returns the requests of which nothing counts: those in `again`, and those whose adapter is
        loaded once more, for its files were saved while they were read.

        Raises `UsageError`, and changes nothing, if it is no batch of this scheduler that is under
        way, or has no such rows.
        """
        self._check_loop()
        if self._closing is not None:
            batch.completed = True
            return ()
        finished, again, failed = set(finished), set(again), dict(failed or {})
        if batch not in self._out:
            raise UsageError("a batch is completed once, by the scheduler that made it")
        if not {*finished, *again, *failed} <= {row.ticket for row in batch.rows}:
            raise UsageError("tickets were named that have no row in this batch")
        batch.completed = True
        self._out.remove(batch)
        self._adapter_queues.judge(batch.adapter_queues)
        if not batch.streaming and not again and not failed:
            self._pace.note(batch.tokens, self._clock.time() - batch.began)
        void = set(again)
        for row in batch.rows:
            row.ticket.flying = False
            if row.ticket.done:
                continue
            if self._adapter_queues.guest_of(row.ticket) not in batch.adapter_queues:
                void.add(row.ticket)
                continue
            self._adapter_queues.charge(row.ticket, row.tokens)
            self._advance(row, finished, again, failed)
        self._adapter_queues.landed(batch.adapter_queues)
        self._changed()
        return void

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
        elif ticket in again:  # its rows waited in vain, and shall not do so once more
            ticket.progress.restart()
            self._adapter_queues.begin_again(ticket)
            self._arm(ticket, self._patience)
        elif ticket.progress.advance(row.tokens) or ticket in finished:
            self._end(ticket)

    def _end(self, ticket: Ticket, error: LoraxError | None = None) -> None:
        self._adapter_queues.leave(ticket)
        ticket.end(error)
