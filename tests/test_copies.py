"""Copies between the loop and the I/O threads: none is lost, and the loop is woken in time."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common import until
from lorax_async.adapter import AdapterKey
from lorax_async.core.arena import Extent
from lorax_async.core.commands import Copy
from lorax_async.core.life import Grant
from lorax_async.core.moves import GroupPlan
from lorax_async.core.transfer_plan import TransferPlan
from lorax_async.events import SlotId
from lorax_async.io.ports import CopyTicket
from lorax_async.io.transfer import GroupCopy, Moved
from lorax_async.runtime.copies import Copies, CopyOutcome
from lorax_async.runtime.tenancy import Tenancy

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

KEY = AdapterKey("somewhere", ())
GROUPS = 4
GRANT = Grant(SlotId(0, 1), tuple(Extent(64 * n, 64) for n in range(GROUPS)))


_Part: Any = SimpleNamespace
"""Of the loader, as far as copies know it."""


class Copying:
    """Copies of one adapter of four groups, which end when the test says so.

    No more than `low_water` may be left when the loop is woken.
    """

    def __init__(self, low_water: int = 0) -> None:
        self.heard: list[int] = []
        self.wiped: list[AdapterKey] = []
        self.tickets: list[CopyTicket] = [Future() for _ in range(GROUPS)]
        self.asked: list[int] = []
        self.may_run = threading.Event()
        self.may_run.set()
        plan = TransferPlan(
            tuple(GroupPlan(n, 64, (), (), (), (), ()) for n in range(GROUPS)), "F32", 4, 256, 300
        )
        tenancy = Tenancy(KEY, GRANT, plan, GROUPS)
        self.copies = Copies(
            _Part(reader=lambda key: None),
            _Part(tenancy=lambda key: tenancy),
            _Part(run=self._run),
            self._hear,
            self.wiped.append,
            threads=2,
            low_water=low_water,
            images=torch.empty(0, dtype=torch.uint8),
        )

    def _run(self, copy: GroupCopy) -> Moved:
        self.may_run.wait(10)
        group = copy.group.layer
        self.asked.append(group)
        return Moved(self.tickets[group], self.tickets[group], 0.0)

    def _hear(self, outcome: CopyOutcome) -> None:
        self.heard.append(outcome.command.group)

    async def start(self, *groups: int) -> None:
        for group in groups:
            self.copies.start(Copy(KEY, GRANT, group))
        await until(lambda: set(groups) <= set(self.asked))
        await asyncio.sleep(0.01)

    def end(self, *groups: int) -> list[threading.Thread]:
        """Each in a thread of its own, as a device does it."""
        threads = [
            threading.Thread(target=self.tickets[group].set_result, args=(None,))
            for group in groups
        ]
        for thread in threads:
            thread.start()
        return threads

    async def stop(self) -> None:
        self.copies.stop()
        await asyncio.to_thread(self.copies.join)


async def test_a_copy_is_heard_of_once_it_is_done() -> None:
    copying = Copying()
    await copying.start(2)
    assert not copying.heard
    copying.end(2)
    await until(lambda: copying.heard == [2])
    await copying.stop()


async def test_no_outcome_is_left_behind() -> None:
    """The first is about to be left while the second ends: whoever is the last wakes the loop."""
    copying, drained = Copying(), threading.Event()
    leave = copying.copies._inbox.leave

    def leave_slowly(outcome: CopyOutcome) -> None:
        if outcome.command.group == 0:
            drained.wait(0.1)
        leave(outcome)

    copying.copies._inbox.leave = leave_slowly  # type: ignore[assignment,method-assign]
    await copying.start(0, 1)
    copying.end(0)
    await asyncio.sleep(0.01)
    copying.end(1)

    def are_heard() -> bool:
        if copying.heard:
            drained.set()
        return sorted(copying.heard) == [0, 1]

    await until(are_heard)
    await copying.stop()


class SlowInt(int):
    """While it is counted up or down, others have their turn; up takes longer."""

    def __add__(self, other: int) -> SlowInt:
        time.sleep(0.06)
        return SlowInt(int(self) + other)

    def __sub__(self, other: int) -> SlowInt:
        time.sleep(0.03)
        return SlowInt(int(self) - other)


async def test_copies_that_end_at_the_same_moment_are_both_counted() -> None:
    copying = Copying()
    await copying.start(0, 1)
    copying.copies._under_way = SlowInt(2)
    copying.end(0, 1)
    await until(lambda: sorted(copying.heard) == [0, 1])
    await copying.stop()


async def test_one_that_begins_while_another_ends_is_counted() -> None:
    copying = Copying()
    await copying.start(0)
    copying.copies._under_way = SlowInt(1)
    (ending,) = copying.end(0)
    await copying.start(1)
    ending.join()
    copying.end(1)
    await until(lambda: copying.heard == [0, 1])
    await copying.stop()


async def test_the_end_waits_for_copies_that_were_begun() -> None:
    copying = Copying()
    copying.may_run.clear()
    copying.copies.start(Copy(KEY, GRANT, 3))
    stopping = asyncio.create_task(copying.stop())
    await asyncio.sleep(0.03)
    assert not stopping.done()
    copying.may_run.set()
    await stopping
    assert copying.asked == [3]
    copying.end(3)
    await until(lambda: copying.heard == [3])
