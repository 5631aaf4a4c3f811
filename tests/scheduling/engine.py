"""An engine in virtual time: layer k of a pass waits for layer k of its adapters, within a budget."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

from contention.adapters import LAYOUT
from lorax_async import (
    AdapterHandle,
    AdapterTimeoutError,
    Batch,
    BatchRow,
    HandleClosedError,
    LoraxError,
    Ticket,
)
from scheduling.world import TIMEOUT, Wanted, World

BUDGET = 0.1
"""Of a pass, that may be waited for layers."""


class Engine:
    """Computes batch after batch, and judges each.

    Attributes
    ----------
    computing
        Batches that are under way.
    passes
        Batches that were computed.
    waited
        Virtual seconds for which passes waited for layers.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.computing = 0
        self.passes = 0
        self.waited = 0.0
        self._burnt: dict[AdapterHandle, None] = {}

    async def run(self) -> None:
        scene = self.world.scene
        async for batch in self.world.scheduler.batches(scene.max_tokens, scene.max_sequences):
            for wanted in self.world.wanted:
                if wanted.ticket in batch.preempted:
                    self.world.blame(not wanted.ticket.flying, "preempted while it is computed")
                    wanted.tokens = []
            self._judge(batch)
            self.computing += 1
            again, failed = await self._compute(batch)
            self._complete(batch, again, failed)
            self.computing -= 1

    # -- what must be true of a batch --------------------------------------------------------------

    def _judge(self, batch: Batch) -> None:
        world, scene = self.world, self.world.scene
        batch.check()
        tickets = [row.ticket for row in batch.rows]
        world.blame(batch.rows, "a batch of nothing")
        world.blame(len(set(tickets)) == len(tickets), "a request is twice in a batch")
        world.blame(batch.tokens <= scene.max_tokens, "too many tokens")
        world.blame(len(batch.rows) <= scene.max_sequences, "too many rows")
        begun = [each.ticket for each in world.wanted if each.ticket.begun and not each.ticket.done]
        world.blame(len(begun) <= (scene.max_begun or len(begun)), "too many have begun")
        for row in batch.rows:
            world.blame(not row.ticket.done, "a request that has ended is computed")
            self._judge_row(row)
        bounds = [sum(row.tokens for row in batch.rows[:n]) for n in range(len(batch.rows) + 1)]
        for start, stop, slot in zip(
            batch.plan.segments.bounds,
            batch.plan.segments.bounds[1:],
            batch.plan.segments.slots,
            strict=False,
        ):
            rows = batch.rows[bounds.index(start) : bounds.index(stop)]
            world.blame({row.place.slot for row in rows} == {slot}, "a row in another's segment")
        self._judge_order(batch)

    def _judge_row(self, row: BatchRow) -> None:
        world, handle, id = self.world, row.handle, row.ticket.request.adapter_id
        if handle is None:
            world.blame(id is None, "a row without its adapter")
            return
        world.blame(handle.key.location == f"memory:{id}", "a row with another's adapter")
        world.blame(row.place == (handle.slot.index, handle.slot.generation), "another place")
        may_join = handle.resident or handle.is_ready(handle.layers[0])
        world.blame(may_join, "a row before anything of its adapter came")
        world.blame(handle.resident or handle not in self._burnt, "it waits in vain once more")

    def _judge_order(self, batch: Batch) -> None:
        """The most urgent request that could be computed is: no request waits for ever."""
        world = self.world
        begun = [t for each in world.wanted if (t := each.ticket).begun and not t.done]
        newly = sum(not row.start for row in batch.rows)
        may_begin = len(begun) - newly < (world.scene.max_begun or len(begun) + 1)
        left_out = [
            ticket.order
            for each in world.wanted
            if not (ticket := each.ticket).done and not ticket.flying
            if (ticket.begun or may_begin) and world.is_ready(ticket.request.adapter_id)
        ]
        first = min((row.ticket.order for row in batch.rows), default=None)
        if left_out and first is not None:
            world.blame(first < min(left_out), "the most urgent one was left out")

    # -- a pass ------------------------------------------------------------------------------------

    async def _compute(self, batch: Batch) -> tuple[set[Ticket], dict[Ticket, LoraxError]]:
        again, failed = set[AdapterHandle](), dict[AdapterHandle, LoraxError]()
        handles = list(dict.fromkeys(handle for handle in batch.handles if handle is not None))
        per_layer = self.world.scene.seconds / LAYOUT.num_layers
        left = BUDGET * self.world.scene.seconds
        with ExitStack() as uses:
            for handle in handles:
                try:
                    uses.enter_context(handle.use())
                except LoraxError as error:
                    failed[handle] = error
            for layer in range(LAYOUT.num_layers):
                for handle in batch.streaming:
                    if handle in again or handle in failed:
                        continue
                    before = self.world.clock.now
                    try:
                        if not await self._gate(batch, handle, layer, left):
                            again.add(handle)
                    except LoraxError as error:
                        failed[handle] = error
                    left = max(0.0, left - (self.world.clock.now - before))
                    self.waited += self.world.clock.now - before
                self._kernels([h for h in handles if h not in again and h not in failed], layer)
                await self.world.clock.sleep(per_layer)
        self.passes += 1
        rows_again = {row.ticket for row in batch.rows if row.handle in again}
        return rows_again, {
            row.ticket: failed[row.handle]
            for row in batch.rows
            if row.handle is not None and row.handle in failed
        }

    async def _gate(self, batch: Batch, handle: AdapterHandle, layer: int, budget: float) -> bool:
        """Wait for the layer; whether it came in time. Alone one waits as long as nobody minds."""
        clock, began = self.world.clock, self.world.clock.now
        others = any(row.handle is not handle for row in batch.rows)
        while not handle.is_ready(layer):
            handle.require_sound()
            alone = not others and not batch.others_wait
            left = (TIMEOUT if alone else budget) - (clock.now - began)
            if left <= 1e-9:
                if alone:
                    raise AdapterTimeoutError("it did not come", id=handle.id, stage="copy")
                return False
            # Whether others wait is looked at now and then.
            slice = max(BUDGET * self.world.scene.seconds, clock.now - began)
            await self.world.until_news(min(left, slice))
        return True

    def _kernels(self, handles: Iterable[AdapterHandle], layer: int) -> None:
        for handle in handles:
            try:
                handle.require_sound()
            except LoraxError:
                continue  # its rows fail with the batch
            self.world.blame(handle.is_ready(layer), "a kernel before its layer")
            stay = self.world.device.stays.get(handle.slot.index)
            if stay is None or stay.slot != handle.slot:
                self.world.blame(False, "a kernel on a slot that is another's")
            else:
                self.world.device.check_weights(stay, layer)

    def _complete(self, batch: Batch, again: set[Ticket], failed: dict[Ticket, LoraxError]) -> None:
        by_ticket: dict[Ticket, Wanted] = {each.ticket: each for each in self.world.wanted}
        for row in batch.rows:
            wanted = by_ticket[row.ticket]
            if row.ticket in again:
                wanted.tokens = []
                if row.handle is not None:
                    self._burnt[row.handle] = None
            elif row.ticket not in failed:
                wanted.tokens += range(row.start, row.start + row.tokens)
        self.world.scheduler.complete(batch, again=again, failed=failed)
        try:
            batch.check()
            self.world.blame(False, "a batch outlives its completion")
        except HandleClosedError:
            pass
        self.world.note_ends()
