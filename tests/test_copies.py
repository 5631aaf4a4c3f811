"""Copies between the loop and the I/O threads: none is lost, whatever ends at the same moment."""

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
from lorax_async.io.inbox import Inbox
from lorax_async.io.ports import CopyTicket
from lorax_async.io.transfer import GroupCopy, Moved
from lorax_async.runtime.copies import Copies, CopyOutcome
from lorax_async.runtime.tenancy import Tenancy

pytestmark = [pytest.mark.usefixtures("nothing_left"), pytest.mark.each_loop]

KEY = AdapterKey("somewhere", ())
GROUPS = 4
GRANT = Grant(SlotId(0, 1), tuple(Extent(64 * n, 64) for n in range(GROUPS)))
PLAN = TransferPlan(
    tuple(GroupPlan(n, 64, (), (), (), (), ()) for n in range(GROUPS)), "F32", 4, 256, 300
)


class Copying:
    """Copies of one adapter of four groups, which end when the test says so.

    The loop is woken for its last, and for the last that is under way.
    """

    def __init__(self) -> None:
        self.heard: list[int] = []
        self.tickets: list[CopyTicket] = [Future() for _ in range(GROUPS)]
        self.asked: list[int] = []
        self.tenancy = Tenancy(KEY, GRANT, PLAN, GROUPS)
        part: Any = SimpleNamespace  # of the loader, as far as copies know it
        self.copies = Copies(
            part(reader=lambda key: None),
            part(tenancy=lambda key: self.tenancy),
            part(run=self._run),
            lambda outcome: self.heard.append(outcome.command.group),
            lambda key: None,
            threads=2,
            low_water=0,
            images=torch.empty(0, dtype=torch.uint8),
        )

    def _run(self, copy: GroupCopy) -> Moved:
        group = copy.group.layer
        self.asked.append(group)
        return Moved(self.tickets[group], self.tickets[group], 0.0)

    async def start(self, *groups: int) -> None:
        for group in groups:
            self.copies.start(Copy(KEY, GRANT, group))
        await until(lambda: set(groups) <= set(self.asked))
        await asyncio.sleep(0.01)

    def end(self, *groups: int) -> None:
        """Each in a thread of its own, as a device does it."""
        for group in groups:
            threading.Thread(target=self.tickets[group].set_result, args=(None,)).start()

    async def stop(self) -> None:
        self.copies.stop()
        await asyncio.to_thread(self.copies.join)


async def test_no_outcome_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is about to be left while the second ends: whoever is the last wakes the loop."""
    copying, drained, leave = Copying(), threading.Event(), Inbox.leave

    def leave_slowly(inbox: Inbox[Any], outcome: CopyOutcome) -> None:
        if outcome.command.group == 0:
            drained.wait(0.1)
        leave(inbox, outcome)

    def are_heard() -> bool:
        if copying.heard:
            drained.set()
        return sorted(copying.heard) == [0, 1]

    monkeypatch.setattr(Inbox, "leave", leave_slowly)
    await copying.start(0, 1)
    copying.end(0)
    await asyncio.sleep(0.01)
    copying.end(1)
    await until(are_heard)
    await copying.stop()


class SlowInt(int):
    """While it is counted up, others have their turn."""

    def __add__(self, other: int) -> SlowInt:
        time.sleep(0.06)
        return SlowInt(int(self) + other)


async def test_copies_that_end_at_the_same_moment_are_both_counted() -> None:
    """They are the adapter's last two, so that the loop is woken though another is under way."""
    copying = Copying()
    copying.tenancy.copied = SlowInt(GROUPS - 2)
    await copying.start(0, 1, 2)
    copying.end(0, 1)
    await until(lambda: sorted(copying.heard) == [0, 1])
    copying.end(2)
    await until(lambda: len(copying.heard) == 3)
    await copying.stop()
