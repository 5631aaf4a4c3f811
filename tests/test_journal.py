"""What a loader remembers and tells."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import FrozenInstanceError
from itertools import count

import pytest

from lorax_async.adapter import AdapterKey
from lorax_async.errors import FetchError
from lorax_async.events import (
    BytesMoved,
    Event,
    Failed,
    LayerReady,
    Leaving,
    Resident,
    SlotGranted,
    SlotId,
)
from lorax_async.runtime.journal import STORY_LENGTH, Journal

ONE, TWO = AdapterKey("one", ()), AdapterKey("two", ())
SLOT = SlotId(0, 1)


def life(key: AdapterKey, start: float = 0.0) -> list[Event]:
    """The events of a load, in order."""
    clock = count(start)
    return [
        SlotGranted(key, SLOT, 1, next(clock), nbytes=64, layers=(0, 1)),
        BytesMoved(key, SLOT, 1, next(clock), nbytes=64),
        LayerReady(key, SLOT, 1, next(clock), layer=0),
        Resident(key, SLOT, 1, next(clock)),
        Leaving(key, SLOT, 1, next(clock)),
    ]


def told(journal: Journal, events: list[Event]) -> None:
    for event in events:
        journal.tell(event)


def test_a_story_has_the_turning_points_in_order() -> None:
    """Bytes and layers are told to subscribers alone: there are hundreds of them."""
    journal = Journal()
    told(journal, life(ONE))
    told(journal, life(TWO))
    granted, _, _, resident, leaving = life(ONE)
    assert journal.story(ONE) == (granted, resident, leaving)
    assert {event.key for event in journal.story(TWO)} == {TWO}
    assert journal.story(AdapterKey("three", ())) == ()


def test_a_story_ends_with_the_last_events() -> None:
    journal = Journal()
    failures = [Failed(ONE, None, n, float(n), error=FetchError(str(n))) for n in range(50)]
    told(journal, [*failures])
    assert journal.story(ONE) == tuple(failures[-STORY_LENGTH:])


def test_a_story_that_was_given_out_does_not_grow() -> None:
    journal = Journal()
    told(journal, life(ONE)[:1])
    before = journal.story(ONE)
    told(journal, life(ONE)[1:])
    assert len(before) == 1


def test_a_forgotten_adapter_has_no_story() -> None:
    journal = Journal()
    told(journal, life(ONE) + life(TWO))
    journal.forget(ONE)
    journal.forget(ONE)
    assert journal.story(ONE) == ()
    assert journal.story(TWO) != ()


def test_every_subscriber_hears_every_event_until_it_leaves() -> None:
    journal = Journal()
    first: list[Event] = []
    second: list[Event] = []
    listening = [journal.has_subscribers]
    leave_first, leave_second = journal.subscribe(first.append), journal.subscribe(second.append)
    listening.append(journal.has_subscribers)
    told(journal, life(ONE))
    leave_first()
    leave_first()
    told(journal, life(TWO))
    leave_second()
    listening.append(journal.has_subscribers)
    told(journal, life(ONE))
    assert first == life(ONE)
    assert second == life(ONE) + life(TWO)
    assert listening == [False, True, False]


def test_the_same_callback_may_subscribe_twice() -> None:
    journal = Journal()
    heard: list[Event] = []
    leave = journal.subscribe(heard.append)
    journal.subscribe(heard.append)
    told(journal, life(ONE)[:1])
    assert len(heard) == 2
    leave()
    told(journal, life(ONE)[:1])
    assert len(heard) == 3


@pytest.mark.parametrize("error", [ValueError("mine"), asyncio.CancelledError("mine")], ids=repr)
def test_a_subscriber_that_fails_disturbs_nobody(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """A result of a cancelled future raises CancelledError, which is no Exception."""
    journal = Journal()
    heard: list[Event] = []

    def fail(event: Event) -> None:
        raise error

    journal.subscribe(fail)
    journal.subscribe(heard.append)
    with caplog.at_level(logging.ERROR, "lorax_async"):
        told(journal, life(ONE)[:1])
    assert heard == life(ONE)[:1]
    assert journal.story(ONE) == tuple(heard)
    (record,) = caplog.records
    assert record.getMessage() == "a subscriber failed on SlotGranted"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_the_end_of_the_program_is_not_held_up(error: type[BaseException]) -> None:
    journal = Journal()

    def leave_program(event: Event) -> None:
        raise error

    journal.subscribe(leave_program)
    with pytest.raises(error):
        told(journal, life(ONE)[:1])


def test_subscribers_may_come_and_go_while_it_tells() -> None:
    journal = Journal()
    heard: list[str] = []

    def once(event: Event) -> None:
        heard.append("once")
        leave()
        journal.subscribe(lambda event: heard.append("late"))

    leave = journal.subscribe(once)
    journal.subscribe(lambda event: heard.append("always"))
    told(journal, life(ONE)[:2])
    assert heard == ["once", "always", "always", "late"]


def test_a_story_told_by_a_subscriber_has_the_event_already() -> None:
    journal = Journal()
    stories: list[tuple[Event, ...]] = []
    journal.subscribe(lambda event: stories.append(journal.story(event.key)))
    told(journal, life(ONE)[:1])
    assert stories == [(life(ONE)[0],)]


def test_totals_are_sums() -> None:
    journal = Journal()
    for what, amount in (("fetches", 1), ("fetches", 1), ("bytes_moved", 640), ("bytes_moved", 6)):
        journal.count(what, amount)
    for what in ("loads", "failures", "departures", "loads", "loads"):
        journal.count(what)
    journal.spent("copy", 0.25)
    journal.spent("resolve", 1.0)
    journal.spent("copy", 0.5)
    totals = journal.statistics()
    counts = totals.fetches, totals.loads, totals.failures, totals.departures, totals.bytes_moved
    assert counts == (2, 3, 1, 1, 646)
    assert dict(totals.seconds) == {"copy": 0.75, "resolve": 1.0}


def test_a_total_of_something_unknown_is_an_error() -> None:
    with pytest.raises(KeyError):
        Journal().count("nonsense")


def test_statistics_are_a_snapshot() -> None:
    journal = Journal()
    journal.spent("copy", 1.0)
    before = journal.statistics()
    journal.count("loads")
    journal.spent("copy", 1.0)
    assert (before.loads, before.seconds["copy"]) == (0, 1.0)
    with pytest.raises(TypeError):
        before.seconds["copy"] = 2.0  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        before.loads = 5  # type: ignore[misc]
    assert journal.statistics().seconds["copy"] == 2.0


def test_who_was_forgotten_waits_from_its_next_wish() -> None:
    """Not from a check before that."""
    journal = Journal()
    journal.checked(ONE, 5.0)
    journal.forget(ONE)
    journal.granted(ONE, since=1.0, time=10.0)
    journal.checked(TWO, 5.0)
    journal.granted(TWO, since=1.0, time=10.0)
    journal.granted(TWO, since=1.0, time=10.0)
    assert journal.statistics().seconds["queue"] == 9.0 + 5.0 + 9.0
