"""What an engine computes in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lorax_async.core.batch_plan import BatchPlan, Place, Tenant, plan_batch, require_current
from lorax_async.core.pace import Pace
from lorax_async.errors import HandleClosedError
from lorax_async.handle import AdapterHandle
from lorax_async.scheduling.guests import Guest
from lorax_async.scheduling.requests import Ticket


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
    place: Place
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
    guests: tuple[Guest, ...]
    tenants: Mapping[int, Tenant]
    others_wait: bool = False
    completed: bool = False
    preempted: tuple[Ticket, ...] = ()

    @property
    def tokens(self) -> int:
        return self.plan.segments.tokens

    @property
    def handles(self) -> tuple[AdapterHandle | None, ...]:
        """Of each row, as `engines.transformers.Attached.batch` takes them."""
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
        require_current([row.place for row in self.rows], self.tenants)


def make_batch(
    picked: Sequence[tuple[Guest, Ticket, int]],
    tenants: Mapping[int, Tenant],
    pace: Pace,
    now: float,
) -> Batch:
    """Of rows that were picked, with the tokens of each; raises `HandleClosedError` as `check`."""
    lengths = [tokens for _, _, tokens in picked]
    plan = plan_batch([guest.place for guest, _, _ in picked], lengths, tenants)
    rows = []
    for number in plan.order:
        guest, ticket, tokens = picked[number]
        position, wants = ticket.progress.position, ticket.progress.wants
        rows.append(BatchRow(ticket, guest.handle, guest.place, position, tokens, tokens == wants))
    guests = tuple({guest: None for guest, _, _ in picked})
    return Batch(
        rows=tuple(rows),
        plan=replace(plan, order=tuple(range(len(rows)))),
        seconds=pace.predict(plan.segments.tokens),
        streaming=tuple(each.handle for each in guests if each.handle and not each.is_ready),
        began=now,
        guests=guests,
        tenants=tenants,
    )
