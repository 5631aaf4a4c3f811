"""A batch of an engine's step, and how long a pass takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lorax_async.errors import HandleClosedError
from lorax_async.handle import AdapterHandle
from lorax_async.planning.batch_plan import (
    BatchPlan,
    SlotOccupant,
    SlotRef,
    plan_batch,
    require_current,
)
from lorax_async.scheduler.adapter_queue import AdapterQueue
from lorax_async.scheduler.requests import Ticket

DECAY = 0.9
"""What counts of a pass once there was another one."""


class PassTimeModel:
    """Seconds of a pass by its tokens: a line through what was seen, the latest most of all.

    Where all were of one size, smaller ones are taken to be shorter in proportion, and larger ones
    to be as long: a pass that turns out longer than was said does no harm.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens took so long."""
        self._weight = self._weight * DECAY + 1
        self._x = self._x * DECAY + tokens
        self._y = self._y * DECAY + seconds
        self._xx = self._xx * DECAY + tokens * tokens
        self._xy = self._xy * DECAY + tokens * seconds

    def predict(self, tokens: int) -> float | None:
        """Seconds; None before the first pass."""
        if not self._weight:
            return None
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        if spread < 1e-6 * x * x:
            return y * min(1.0, tokens / x)
        slope = max(0.0, (self._xy / self._weight - x * y) / spread)
        if slope * x > y:  # nothing is left for the pass itself
            return y * tokens / x
        return y + slope * (tokens - x)


class BatchRow(NamedTuple):
    """One sequence's part in a batch.

    Attributes
    ----------
    ticket
        Whose it is.
    handle
        Its adapter, leased until the batch is completed; None is the base.
    place
        The slot that the adapter has, and which of its tenants it is.
    start
        The position of the first token to be computed; 0 where nothing of it has been.
    tokens
        How many to compute; the rest of a long prompt comes in later batches.
    last
        Whether the last of them brings a new token.
    """

    ticket: Ticket
    handle: AdapterHandle | None
    place: SlotRef
    start: int
    tokens: int
    last: bool


@dataclass(slots=True, eq=False)
class Batch:
    """Rows to be computed together. Give it back with `AdapterScheduler.complete`.

    Attributes
    ----------
    rows
        In the order of the plan, so that the rows of one adapter are neighbours.
    plan
        Segments, tiles and rank groups for kernels. Its `order` is that of the rows: 0, 1, ….
    seconds
        What the pass will take by what was seen of others; None before the first.
    streaming
        Adapters of whom some layers were not there when the batch was made. Layer k of the pass
        waits for layer k of these, and of no other.
    others_wait
        Rows that wait for nothing else could be computed, were it not for this batch; or somebody
        has waited long for a slot in which nothing comes. Whoever waits for layers of a batch that
        has no other rows waits no longer then. Told of batches with `streaming` adapters, in any
        thread.
    preempted
        Requests that have lost their places, to rows of this batch or with their adapter: forget
        their keys and values before it is computed. They come again, from their first token on.

    The other fields are the scheduler's own.
    """

    rows: tuple[BatchRow, ...]
    plan: BatchPlan
    seconds: float | None
    streaming: tuple[AdapterHandle, ...]
    began: float
    adapter_queues: tuple[AdapterQueue, ...]
    lease_table: Mapping[int, SlotOccupant]
    others_wait: bool = False
    completed: bool = False
    preempted: tuple[Ticket, ...] = ()

    @property
    def tokens(self) -> int:
        return self.plan.segments.tokens

    @property
    def handles(self) -> tuple[AdapterHandle | None, ...]:
        """Of each row, as `engines.transformers.AttachedModel.batch` takes them."""
        return tuple(row.handle for row in self.rows)

    @property
    def budget(self) -> float:
        """Seconds for which the pass may wait for adapters that are not on this machine: a tenth of
        what it takes. 0 before the first pass, when who streams is alone.
        """
        return 0.1 * (self.seconds or 0.0)

    def check(self) -> None:
        """Raise `HandleClosedError` if a row's slot is not its adapter's any more.

        So it is once the batch was completed, or the loader closed. On the scheduler's loop.
        """
        if self.completed:
            raise HandleClosedError("the batch was completed; its adapters may have gone")
        for row in self.rows:
            if row.handle is not None and row.handle.released:
                raise HandleClosedError("the adapter was given back", id=row.handle.id)
        require_current([row.place for row in self.rows], self.lease_table)


def make_batch(
    picked: Sequence[tuple[AdapterQueue, Ticket, int]],
    lease_table: Mapping[int, SlotOccupant],
    pace: PassTimeModel,
    now: float,
) -> Batch:
    """Of rows that were picked, with the tokens of each; raises `HandleClosedError` as `check`."""
    lengths = [tokens for _, _, tokens in picked]
    plan = plan_batch([adapter_queue.place for adapter_queue, _, _ in picked], lengths, lease_table)
    rows = []
    for number in plan.order:
        adapter_queue, ticket, tokens = picked[number]
        position, wants = ticket.progress.position, ticket.progress.wants
        rows.append(
            BatchRow(
                ticket, adapter_queue.handle, adapter_queue.place, position, tokens, tokens == wants
            )
        )
    adapter_queues = tuple({adapter_queue: None for adapter_queue, _, _ in picked})
    return Batch(
        rows=tuple(rows),
        plan=replace(plan, order=tuple(range(len(rows)))),
        seconds=pace.predict(plan.segments.tokens),
        streaming=tuple(
            each.handle for each in adapter_queues if each.handle and not each.is_ready
        ),
        began=now,
        adapter_queues=adapter_queues,
        lease_table=lease_table,
    )
