"""Requests of a server, their tickets, and the queue of each adapter's requests."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Callable, Generator, Hashable
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter
from time import monotonic
from typing import Protocol

from lorax_async.errors import LoraxError, Stage
from lorax_async.handle import AdapterHandle
from lorax_async.planning.batch_plan import NO_SLOT, SlotRef
from lorax_async.runtime.acquire import MAX_PRIORITY, require_priority
from lorax_async.scheduler.estimates import LoadEstimate
from lorax_async.types import (
    AdapterId,
    AdapterKey,
    Ref,
    as_ref,
    require_count,
    require_seconds,
    text_of,
)


class TimerHandle(Protocol):
    """A pending call, which `cancel` drops."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """A source of time, in seconds, and of timed calls."""

    def time(self) -> float: ...

    def call_at(self, when: float, callback: Callable[[], object], /) -> TimerHandle: ...


class LoopClock:
    """The monotonic clock with a loop's timers: a loop's own time may be in whole milliseconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def time(self) -> float:
        return monotonic()

    def call_at(self, when: float, callback: Callable[[], object], /) -> TimerHandle:
        return self._loop.call_later(max(0.0, when - monotonic()), callback)


@dataclass(frozen=True, slots=True)
class Request:
    """One sequence to generate with one adapter.

    Raise `UsageError` if a number is out of range, or `adapter_id` is not an adapter id.
    """

    adapter_id: AdapterId | None
    """As for `AdapterLoader.load`; None is the base alone."""
    prompt_tokens: int
    """The number of tokens of the prompt; at least 1."""
    max_new_tokens: int
    """The number of generated tokens after which it is finished; at least 1."""
    priority: int = 0
    """Each level counts as `LoaderConfig.starvation_age` seconds of waiting, as for loads."""
    deadline: float | None = None
    """Seconds from `submit` by which it must be in a batch; None is `LoaderConfig.timeout`."""
    client: Hashable = field(default=None, repr=False)
    """The client it is for. While others wait, a client, like an adapter, has at most a share of
    the engine's places. None: unknown."""

    def __post_init__(self) -> None:
        require_priority(self.priority)
        for name in ("prompt_tokens", "max_new_tokens"):
            require_count(name, getattr(self, name), least=1)
        if self.deadline is not None:
            require_seconds("deadline", self.deadline)
        _ = self.ref

    @property
    def ref(self) -> Ref | None:
        """`adapter_id` as an `AdapterRef` or key; None is the base."""
        return None if self.adapter_id is None else as_ref(self.adapter_id)


@dataclass(slots=True, eq=False)
class Client:
    """A client with requests. A new one starts with the fewest tokens of all clients."""

    name: Hashable
    tokens: int
    """Tokens computed for it."""
    requests: int = 0
    """The number of its requests that are not done."""
    begun: int = 0
    """The number of its requests that occupy a place of the engine."""


@dataclass(slots=True, eq=False, repr=False)
class Ticket:
    """A submitted request. Await it for the number of generated tokens, or for its error.

    After `cancel`, awaiting raises `CancelledError`. Cancelling a task that awaits the ticket does
    not cancel the request. Use it on the scheduler's loop only.
    """

    request: Request
    order: tuple[float, int]
    """Sort key: urgency, then the order of submission."""
    _future: asyncio.Future[None]
    _cancel: Callable[[Ticket], None]
    ref: Ref | None = field(init=False)
    queue: AdapterQueue = field(init=False)
    """The queue that it is in, or was in last."""
    client: Client | None = None
    overdue_end: int = 0
    """The number of ended requests from which it counts as overdue."""
    position: int = 0
    """The number of computed tokens, whose keys and values the engine has."""
    generated: int = 0
    """The number of tokens generated so far."""
    begun: bool = False
    """Whether it occupies a place of the engine, which has its keys and values."""
    in_batch: bool = False
    """Whether it is in a batch in flight."""
    alarm: TimerHandle | None = None
    error: LoraxError | None = None
    """The error that ended it, if any."""

    def __post_init__(self) -> None:
        self.ref = self.request.ref

    @property
    def done(self) -> bool:
        """Whether it is finished, failed or cancelled."""
        return self._future.done()

    @property
    def cancelled(self) -> bool:
        return self._future.cancelled()

    @property
    def wants(self) -> int:
        """The number of tokens that could be computed next."""
        return self.request.prompt_tokens + self.generated - self.position

    def advance(self, tokens: int) -> bool:
        """Count computed tokens; return whether the sequence has its `max_new_tokens`.

        Computing the last wanted token generates the next one. For the scheduler.
        """
        self.position += tokens
        if not self.wants:
            self.generated += 1
        return self.generated == self.request.max_new_tokens

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` once it is done, in the loop's next turn."""
        self._future.add_done_callback(lambda _: callback())

    def cancel(self) -> bool:
        """Compute no further token, and discard its row of a batch in flight.

        Return False if it was done already.
        """
        if self.done:
            return False
        self.disarm()
        self._future.cancel()
        self._cancel(self)
        return True

    def end(self, error: LoraxError | None = None) -> None:
        """Finish it, or fail it with `error`. For the scheduler; it must not be done."""
        self.disarm()
        self.error = error
        self._future.set_result(None)

    def disarm(self) -> None:
        """Cancel its deadline. For the scheduler."""
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None

    def __await__(self) -> Generator[object, None, int]:
        return self._wait().__await__()

    async def _wait(self) -> int:
        if not self._future.done():
            await asyncio.wait([self._future])
        if self.error is not None:
            raise self.error.located() from self.error.__cause__
        self._future.result()
        return self.generated

    def __repr__(self) -> str:
        state = (
            "cancelled" if self.cancelled
            else "failed" if self.error is not None
            else "finished" if self.done
            else "computing" if self.in_batch
            else "waiting"
        )  # fmt: skip
        return f"<Ticket of {self.request.adapter_id!r} {state} after {self.generated} tokens>"


Urgency = tuple[bool, float, int]
"""A sort key of adapters: first those with begun requests, then by the oldest request."""


@dataclass(eq=False)
class AdapterQueue:
    """The requests for one version of an adapter; `ref` None: for the base alone.

    A new queue starts with the fewest tokens of all queues, or with those of `predecessor`, the
    queue of the same ref that takes no new requests since the ref may mean another version.
    """

    ref: Ref | None
    tokens: int = 0
    """Tokens computed with it."""
    predecessor: AdapterQueue | None = None
    version: AdapterKey | None = None
    """The version of its handle, or of the last one; None before the first."""
    tickets: list[Ticket] = field(default_factory=list)
    """Requests that are not done, by urgency, including those in a batch."""
    handle: AdapterHandle | None = None
    place: SlotRef = NO_SLOT
    """The slot of `handle`."""
    batch_count: int = 0
    """The number of batches in flight with this adapter, which keep the handle."""
    arrival: LoadEstimate | None = None
    """The expected arrival of its layers while it streams."""
    may_stream: bool = True
    """Whether its rows may join a batch before the last layer is there."""
    leaving: bool = False
    """Whether the slot must be released."""
    granted_at: float = 0.0
    """When it got its slot."""
    quantum: int = 0
    """The last submission that was queued when it got its slot."""
    progress_at: float = 0.0
    """When a request ended last, or when it got its slot."""
    yields: bool = False
    """Whether only requests of its quantum may begin."""
    yielded_at: float = -inf
    """When it last gave its slot up for requests that had begun."""
    priority: int = -MAX_PRIORITY
    """The highest priority of any request so far."""
    begun: int = 0
    """The number of requests that occupy a place of the engine."""
    reloaded: bool = False
    """Whether it was reloaded because its files changed while they were read."""

    @property
    def id(self) -> str | None:
        return None if self.ref is None else text_of(self.ref)

    @property
    def is_ready(self) -> bool:
        """Whether every layer is there."""
        return self.ref is None or (self.handle is not None and self.handle.resident)

    @property
    def stage(self) -> Stage:
        """The adapter's stage, as errors name it."""
        if self.is_ready:
            return "ready"
        return "queue" if self.handle is None else "copy"

    @property
    def urgency(self) -> Urgency:
        """The urgency of the adapter; it must have a request."""
        since, number = self.tickets[0].order
        return not self.begun, since, number

    def add(self, ticket: Ticket) -> None:
        ticket.queue = self
        insort(self.tickets, ticket, key=attrgetter("order"))
        self.priority = max(self.priority, ticket.request.priority)

    @property
    def has_started(self) -> bool:
        """Whether a request has tokens that were computed with `version`."""
        return any(ticket.position or ticket.generated for ticket in self.tickets)

    @property
    def has_unbegun(self) -> bool:
        """Whether a request has not begun."""
        return len(self.tickets) > self.begun

    def waiting(self, limit: int, max_new: float) -> list[Ticket]:
        """Return the first `limit` requests in no batch; at most `max_new` that have not begun."""
        waiting = []
        for ticket in self.tickets:
            if ticket.in_batch or (max_new <= 0 and not ticket.begun):
                continue
            if self.yields and not self._is_in_turn(ticket):
                continue
            waiting.append(ticket)
            if len(waiting) == limit:
                break
            max_new -= not ticket.begun
        return waiting

    def _is_in_turn(self, ticket: Ticket) -> bool:
        """Return whether the request may be computed while the adapter yields."""
        return ticket.begun or ticket.order[1] <= self.quantum

    @property
    def has_turn(self) -> bool:
        """Whether a request may be computed before the slot is released."""
        return not self.yields or any(map(self._is_in_turn, self.tickets))
