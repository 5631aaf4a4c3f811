"""Batches, and the model of how long a pass takes."""

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
"""The factor by which a pass's weight falls with each later one."""


class PassTimeModel:
    """Predicts the seconds of a pass from its tokens: a weighted linear fit of past passes.

    If all passes had one size, smaller ones are predicted in proportion and larger ones as equally
    long: a pass longer than predicted does no harm.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def record(self, tokens: int, seconds: float) -> None:
        """Add the duration of a pass."""
        self._weight = self._weight * DECAY + 1
        self._x = self._x * DECAY + tokens
        self._y = self._y * DECAY + seconds
        self._xx = self._xx * DECAY + tokens * tokens
        self._xy = self._xy * DECAY + tokens * seconds

    def predict(self, tokens: int) -> float | None:
        """Return the seconds of a pass of `tokens`; None before the first pass."""
        if not self._weight:
            return None
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        if spread < 1e-6 * x * x:
            return y * min(1.0, tokens / x)
        slope = max(0.0, (self._xy / self._weight - x * y) / spread)
        if slope * x > y:  # the fixed cost must not be negative
            return y * tokens / x
        return y + slope * (tokens - x)


class BatchRow(NamedTuple):
    """One sequence's part in a batch.

    Attributes
    ----------
    ticket
        The request.
    handle
        Its adapter, leased until the batch is completed; None is the base.
    place
        The adapter's slot and generation.
    start
        The position of the first token to compute; 0 for a new or restarted sequence.
    tokens
        The number of tokens to compute; the rest of a long prompt follows in later batches.
    last
        Whether the last of them generates a new token.
    """

    ticket: Ticket
    handle: AdapterHandle | None
    place: SlotRef
    start: int
    tokens: int
    last: bool


@dataclass(slots=True, eq=False)
class Batch:
    """Rows to compute together. Pass it to `AdapterScheduler.complete` afterwards.

    Attributes
    ----------
    rows
        In the order of the plan, so that the rows of one adapter are neighbours.
    plan
        Segments, tiles and rank groups for kernels. Its `order` is that of the rows: 0, 1, ….
    seconds
        The predicted duration of the pass; None before the first pass.
    streaming
        Adapters with missing layers when the batch was made. Layer k of the pass waits for layer k
        of these only.
    others_wait
        Whether ready rows wait for this batch to end, or an adapter has long waited for a slot in
        which no layers arrive. A pass all of whose rows wait for layers should give up then. Set
        for batches with `streaming` adapters; may be read in any thread.
    preempted
        Requests that lost their places to rows of this batch, or whose adapter is reloaded: forget
        their keys and values before computing the batch. They restart from their first token.

    The other fields are private to the scheduler.
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
        require_current([row.place for row in self.rows], self.lease_table)


def make_batch(
    picked: Sequence[tuple[AdapterQueue, Ticket, int]],
    lease_table: Mapping[int, SlotOccupant],
    pace: PassTimeModel,
    now: float,
) -> Batch:
    """Make a batch of rows (adapter, request, tokens); raise `HandleClosedError` as `check`."""
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
            queue.handle for queue in adapter_queues if queue.handle and not queue.is_ready
        ),
        began=now,
        adapter_queues=adapter_queues,
        lease_table=lease_table,
    )
