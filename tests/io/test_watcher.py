"""A watcher's end: behind every ticket, whoever brings one at the same moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from common import our_threads
from lorax_async.errors import InternalError, LoraxError, UsageError
from lorax_async.io.devices.watcher import EventTicket, Watcher


class SetEvent:
    """Done when it is set."""

    def __init__(self) -> None:
        self.is_set = threading.Event()

    def record(self, stream: torch.Stream) -> None: ...
    def wait(self, stream: torch.Stream) -> None: ...

    def synchronize(self) -> None:
        assert self.is_set.wait(10)


def failed(error: RuntimeError) -> LoraxError:
    return InternalError(str(error))


@pytest.fixture
def watcher() -> Watcher:
    made = Watcher("lorax-watch-test", failed)
    made.start()
    return made


def test_its_end_waits_for_all_events(watcher: Watcher) -> None:
    events = [SetEvent() for _ in range(3)]
    tickets = [EventTicket(None, event) for event in events]
    for ticket in tickets:
        watcher.watch(ticket)
    with ThreadPoolExecutor(1) as threads:
        ending = threads.submit(watcher.end)
        for event, ticket in zip(events, tickets, strict=True):
            with pytest.raises(TimeoutError):
                ending.result(0.02)
            assert not ticket.done()
            event.is_set.set()
            ticket.result(10)
        ending.result(10)
    assert not our_threads()
    with pytest.raises(UsageError, match="closed"):
        watcher.watch(EventTicket(None, SetEvent()))


class Interrupted:
    """A queue in which somebody acts just before an item of this kind is put."""

    def __init__(self, queue: Any, kind: type, act: Callable[[], None]) -> None:
        self._queue, self._kind, self._act = queue, kind, act
        self.get = queue.get

    def put(self, item: object) -> None:
        if isinstance(item, self._kind):
            self._act()
        self._queue.put(item)


def test_no_ticket_is_lost_behind_its_end(watcher: Watcher) -> None:
    """It was taken, and so it is finished, although the end is asked for before it is put."""
    ticket, ending = EventTicket(None, SetEvent()), threading.Thread(target=watcher.end)
    ticket.event.is_set.set()  # type: ignore[attr-defined]

    def end() -> None:
        ending.start()
        ending.join(0.05)

    watcher._queue = Interrupted(watcher._queue, EventTicket, end)  # type: ignore[assignment]
    watcher.watch(ticket)
    assert ticket.result(5) is None
    ending.join(10)
    assert not our_threads()
