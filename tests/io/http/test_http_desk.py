"""Who may begin which piece, and when; by a clock that stands until it is set."""

from __future__ import annotations

import pytest
from fetching import MemorySink, target

from lorax_async.core.arrivals import Arrivals
from lorax_async.core.retries import Retries
from lorax_async.errors import FetchError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.desk import Desk, Job, Piece
from lorax_async.io.http.download import Download
from lorax_async.io.http.engine import FOREGROUND, PREFETCH
from lorax_async.io.http.exchange import Exchange
from lorax_async.io.http.failures import SetbackError
from lorax_async.io.http.links import Links
from lorax_async.io.http.network import RealNetwork
from lorax_async.io.http.pool import Pool
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.http.target import Answer, Known
from lorax_async.tracing.recorder import Tracer

LARGE = 100 << 20
STUCK = 2.0


class Pieces(Job[None]):
    """So many pieces of 10 bytes."""

    def __init__(self, desk: Desk, count: int, urgency: int = FOREGROUND) -> None:
        super().__init__(desk, urgency, deadline=1_000.0)
        self.pending = [Piece(n, 10 * n, 10 * n + 10) for n in range(count)]
        desk.jobs.append(self)

    def work(self, piece: Piece, attempt: Attempt, buffer: memoryview) -> None:
        raise AssertionError("nobody works here")

    def settle(self, piece: Piece) -> None:
        self.over = not self.pending and not self.running


class AtOrigin(Pieces):
    """The same, each from its own origin."""

    def __init__(self, desk: Desk, count: int, origin: str, urgency: int = FOREGROUND) -> None:
        super().__init__(desk, count, urgency)
        self._origin = origin

    @property
    def origin(self) -> str:
        return self._origin


class Office:
    """A desk, the time, and threads that only say what they would do."""

    def __init__(self, connections: int = 4) -> None:
        self.now = 0.0
        retries = Retries(attempts=10, base=0.0, most=0.0, obeyed=60.0)
        self.desk = Desk(connections, retries, lambda: self.now, lambda: 0.0, STUCK)

    def begun(self) -> tuple[Job[None], Piece, Attempt]:
        """A free thread has something to do."""
        with self.desk.changed:
            found = self.desk.next()
        assert found is not None
        return found

    def all_begun(self) -> list[tuple[Job[None], Piece, Attempt]]:
        """As many threads as there may be."""
        found = []
        with self.desk.changed:
            while (task := self.desk.next()) is not None:
                found.append(task)
        return found

    def looked(self) -> None:
        """As the clock does every 50 ms."""
        with self.desk.changed:
            self.desk.reclaim()


def setback(seconds: float | None = None, *, crowded: bool = False) -> SetbackError:
    return SetbackError(FetchError("later"), retry_after=seconds, crowded=crowded)


def test_a_piece_that_waits_keeps_no_other() -> None:
    office = Office()
    job = Pieces(office.desk, 2)
    _, first, attempt = office.begun()
    job.left(attempt, setback(10.0))
    assert [piece.order for _, piece, _ in office.all_begun()] == [1]
    office.now = 9.9
    assert office.all_begun() == []
    office.now = 10.0
    assert [piece for _, piece, _ in office.all_begun()] == [first]


def test_who_waits_for_an_outcome_cannot_take_it_away() -> None:
    """As asyncio does when the task that waits is cancelled."""
    office = Office()
    job = Pieces(office.desk, 1)
    assert not job.done.cancel()
    job.cancel(FetchError("enough"))
    assert job.done.exception(0) is not None


def test_what_has_ended_ends_once() -> None:
    job = Pieces(Office().desk, 1)
    job.cancel(FetchError("enough"))
    job.cancel(FetchError("more than that"))
    assert str(job.done.exception(0)) == str(FetchError("enough"))


def test_who_waits_leaves_its_share_to_others() -> None:
    office = Office()
    job = Pieces(office.desk, 4)
    for _, _, attempt in office.all_begun():
        job.left(attempt, setback(10.0))
    other = Pieces(office.desk, 4)
    assert [task[0] for task in office.all_begun()] == [other] * 4


def test_earlier_pieces_go_first_also_when_they_come_back() -> None:
    office = Office(connections=1)
    job = Pieces(office.desk, 3)
    _, _, attempt = office.begun()
    job.left(attempt, setback())
    _, piece, attempt = office.begun()
    assert piece.order == 0


def test_who_is_turned_away_does_not_come_back_with_another_piece() -> None:
    """Until the time that the source has named is over, and then with fewer."""
    office = Office()
    job = Pieces(office.desk, 9)
    running = [attempt for _, _, attempt in office.all_begun()]
    assert len(running) == 4
    for attempt in running:
        job.left(attempt, setback(10.0, crowded=True))
    office.now = 9.9
    assert office.all_begun() == []
    assert office.desk.wanted() == 0
    office.now = 10.0
    assert len(office.all_begun()) == 1


def test_of_two_times_the_later_is_waited_for() -> None:
    office = Office()
    job = Pieces(office.desk, 9)
    for (_, _, attempt), seconds in zip(office.all_begun(), (1.0, 10.0, 1.0, 1.0), strict=True):
        job.left(attempt, setback(seconds, crowded=True))
    office.now = 9.9
    assert office.all_begun() == []
    office.now = 10.0
    assert len(office.all_begun()) == 1


def test_as_many_as_were_served_come_back() -> None:
    office = Office()
    job = Pieces(office.desk, 9)
    _, _, attempt = office.all_begun()[0]
    job.left(attempt, setback(crowded=True))
    assert office.all_begun() == []
    assert len(job.running) == 3


def test_who_brings_something_is_not_stuck() -> None:
    """Of four that have all connections the one that brings nothing for two seconds makes way."""
    office = Office()
    slow = Pieces(office.desk, 4, PREFETCH)
    attempts = [attempt for _, _, attempt in office.all_begun()]
    Pieces(office.desk, 1)

    def ended() -> list[bool]:
        with office.desk.changed:
            office.desk.reclaim()
        return [attempt._ended for attempt in attempts]

    assert ended() == [False] * 4
    for office.now in (STUCK * 0.9, STUCK * 1.8):
        for attempt in attempts[1:]:
            slow.running[attempt].came += 1
        if office.now < STUCK:
            assert ended() == [False] * 4
    assert ended() == [True, False, False, False]


# -- origins --------------------------------------------------------------------------------------


ANSWER = 64 << 10


def counts(office: Office, *jobs: Job[None]) -> list[int]:
    """How many threads each job has, once those that were ended have left and looked again."""
    for job in jobs:
        for attempt in [each for each in job.running if each.ended]:
            job.left(attempt, None)
    free = office.desk.connections - sum(len(job.running) for job in jobs)
    for _ in range(free):
        with office.desk.changed:
            if office.desk.next() is None:
                break
    return [len(job.running) for job in jobs]


def test_another_origin_has_its_share_at_once() -> None:
    """One that has all connections and sends nothing gives up half of them, and no more."""
    office = Office()
    first = AtOrigin(office.desk, 9, "a")
    oldest, *_ = [attempt for _, _, attempt in office.all_begun()]
    office.now = 0.1
    second = AtOrigin(office.desk, 9, "b")
    office.looked()
    office.looked()
    assert counts(office, first, second) == [2, 2]
    assert oldest in first.running
    office.now = 0.15
    third = AtOrigin(office.desk, 9, "c")
    office.now = 0.22
    office.looked()
    assert counts(office, first, second, third) == [2, 1, 1]


def test_an_origin_alone_has_all() -> None:
    office = Office()
    jobs = [AtOrigin(office.desk, 1, "a") for _ in range(9)]
    assert len(office.all_begun()) == 4
    office.now = 1.0
    office.looked()
    assert sum(counts(office, *jobs)) == 4
    assert not any(attempt.ended for job in jobs for attempt in job.running)


def test_an_origin_that_stalls_keeps_one_connection() -> None:
    """Whoever sends something has the others, for as long as it has a use for them."""
    office = Office()
    stalled = AtOrigin(office.desk, 9, "a")
    office.all_begun()
    for office.now in (0.1, 0.2, 0.3):
        office.looked()
    healthy = AtOrigin(office.desk, 9, "b", PREFETCH)
    office.looked()
    assert counts(office, stalled, healthy) == [1, 3], "a hint, too: it sends something"
    for attempt in list(healthy.running):
        healthy.running[attempt].came += ANSWER
        healthy.left(attempt, None)
    healthy.pending.clear()
    assert counts(office, stalled, healthy) == [4, 0]


def test_what_a_stalled_origin_began_a_moment_ago_is_ended_too() -> None:
    office = Office()
    stalled = AtOrigin(office.desk, 9, "a")
    office.all_begun()
    office.now = 0.3
    office.looked()
    healthy = AtOrigin(office.desk, 2, "b")
    office.looked()
    assert counts(office, stalled, healthy) == [2, 2]
    healthy.pending.clear()
    for attempt in list(healthy.running):
        healthy.left(attempt, None)
    healthy.over = False
    assert counts(office, stalled, healthy) == [4, 0]
    healthy.pending = [Piece(n, n, n + 1) for n in range(9)]
    office.looked()
    assert counts(office, stalled, healthy) == [1, 3]


def test_an_origin_that_answers_is_not_stalled() -> None:
    """Neither while it sends nor, after its last answer, when it is asked again."""
    office = Office()
    first = AtOrigin(office.desk, 4, "a")
    attempts = [attempt for _, _, attempt in office.all_begun()]
    for office.now in (0.2, 0.4, 0.6):
        first.running[attempts[0]].came += ANSWER
        office.looked()
    for attempt in attempts:
        first.left(attempt, None)
    office.now = 1_000.0
    again = AtOrigin(office.desk, 9, "a")
    office.all_begun()
    office.now += 0.1
    other = AtOrigin(office.desk, 9, "b")
    office.looked()
    assert counts(office, again, other) == [2, 2]


def test_an_origin_that_takes_its_time_is_not_stalled() -> None:
    """It was seen to pause for half a second: so long it may again."""
    office = Office()
    slow = AtOrigin(office.desk, 9, "a")
    attempts = [attempt for _, _, attempt in office.all_begun()]
    office.now = 0.5
    for attempt in attempts:
        slow.running[attempt].came += ANSWER
    office.looked()
    office.now = 1.0
    other = AtOrigin(office.desk, 9, "b")
    office.looked()
    assert counts(office, slow, other) == [2, 2]


def test_an_origin_is_stalled_whoever_waits_for_it() -> None:
    """Callers that leave sooner than it is noticed do not make it a healthy one."""
    office = Office()
    for _ in range(4):
        job = AtOrigin(office.desk, 1, "a")
        office.all_begun()
        office.now += 0.1
        job.cancel(FetchError("enough"))
        for attempt in list(job.running):
            job.left(attempt, None)
        office.desk.finish(job)
    stalled = AtOrigin(office.desk, 9, "a")
    office.all_begun()
    office.now += 0.06
    healthy = AtOrigin(office.desk, 9, "b")
    office.looked()
    assert counts(office, stalled, healthy) == [1, 3]


def test_a_few_bytes_do_not_make_an_origin_a_healthy_one() -> None:
    """Each new request brings a thousand, and then nothing."""
    office = Office()
    stalled = AtOrigin(office.desk, 9, "a")
    for _ in range(8):
        for job, _, attempt in office.all_begun():
            job.running[attempt].came += 1_000
        office.now += 0.05
        office.looked()
        oldest = next(iter(stalled.running))
        oldest.end()
        stalled.left(oldest, None)
    healthy = AtOrigin(office.desk, 9, "b")
    office.looked()
    assert counts(office, stalled, healthy) == [1, 3]


def test_small_answers_do_not_make_an_origin_a_healthy_one() -> None:
    """It sends configs at once, and of the weights nothing."""
    office = Office()
    stalled = AtOrigin(office.desk, 9, "a")
    office.all_begun()
    office.now = 0.3
    office.looked()
    config = AtOrigin(office.desk, 1, "a")
    healthy = AtOrigin(office.desk, 1, "b")
    office.looked()
    assert counts(office, stalled, config, healthy)[2] == 1
    for job in (config, healthy):
        for attempt in list(job.running):
            job.running[attempt].at = job.running[attempt].stop
            job.left(attempt, None)
    healthy.pending = [Piece(n, n, n + 1) for n in range(9)]
    healthy.over = False
    office.now = 0.4
    office.looked()
    assert counts(office, stalled, config, healthy)[2] == 3


def test_where_a_redirect_leads_counts() -> None:
    """Who waits at another origin takes nothing from those that the first one may have."""
    office = Office()
    led_on = AtOrigin(office.desk, 9, "hub")
    for _, _, attempt in office.all_begun():
        attempt.origin = "stalls"
    office.looked()
    office.now = 0.3
    office.looked()
    another = AtOrigin(office.desk, 2, "hub")
    led_on.pending.clear()
    office.looked()
    assert counts(office, led_on, another) == [2, 2]


@pytest.mark.parametrize("origin", ["a", "b"])
def test_a_new_request_goes_first_where_there_is_room_for_both(origin: str) -> None:
    office = Office(connections=2)
    old = AtOrigin(office.desk, 1, "a")
    ((_, _, attempt),) = office.all_begun()
    old.left(attempt, setback())
    new = AtOrigin(office.desk, 1, origin)
    assert [task[0] for task in office.all_begun()] == [new, old]


@pytest.mark.parametrize("origin", ["a", "b"])
def test_a_new_request_overtakes_retries(origin: str) -> None:
    """At its own origin, and at another one."""
    office = Office(connections=1)
    old = AtOrigin(office.desk, 1, "a")
    ((_, _, attempt),) = office.all_begun()
    old.left(attempt, setback())
    new = AtOrigin(office.desk, 1, origin)
    assert [task[0] for task in office.all_begun()] == [new]
    urgent = AtOrigin(office.desk, 1, "c")
    hint = AtOrigin(office.desk, 1, "c", PREFETCH)
    new.left(next(iter(new.running)), setback())
    office.now = 1.0
    order = []
    for _ in range(4):
        job, _, attempt = office.begun()
        order.append(job)
        job.running[attempt].at = job.running[attempt].stop
        job.left(attempt, None)
    assert order[0] is urgent
    assert order[3] is hint


# -- downloads ------------------------------------------------------------------------------------


def download(office: Office, count: int) -> Download:
    """Of so many large pieces, from a source whose connections bring 1 MB/s each."""
    settings = HttpSettings(proxies={})
    links = Links()
    pool = Pool(settings, RealNetwork(), office.desk.clock, Tracer())
    place = target("http://127.0.0.1:1/weights")
    links.answered(place.url.origin, 0.01)
    links.moved(place.url.origin, 1e6)
    spans = [(n * LARGE, n * LARGE + LARGE) for n in range(count)]
    job = Download(
        office.desk,
        Exchange(settings, pool, links, office.desk.clock, Tracer()),
        links,
        Answer(place, place.place, Known(), {}, b"", ranges=True),
        [(span,) for span in spans],
        Arrivals([spans]),
        MemorySink(),
        lambda _: None,
        least=1 << 20,
        urgency=FOREGROUND,
        deadline=1_000.0,
        wall=office.desk.clock,
    )
    office.desk.jobs.append(job)
    return job


def test_what_is_being_read_is_not_given_to_another() -> None:
    office = Office(connections=2)
    download(office, 1)
    _, piece, _ = office.begun()
    piece.rate, piece.claimed = 1e6, LARGE - (4 << 20)
    _, rest, _ = office.begun()
    assert piece.claimed <= piece.stop == rest.at < rest.stop == LARGE


def test_who_is_turned_away_does_not_come_back_with_a_part_of_what_another_brings() -> None:
    office = Office(connections=3)
    job = download(office, 3)
    (_, _, first), (_, _, second), (_, third, _) = office.all_begun()
    third.rate = 1e6
    job.left(first, setback(10.0, crowded=True))
    job.running[second].at = job.running[second].stop
    job.left(second, None)
    assert job.limit > len(job.running) == 1
    assert office.all_begun() == []
    office.now = 10.0
    assert len(office.all_begun()) == 1


def as_stream(job: Download, piece: Piece, attempt: Attempt) -> None:
    """The source has answered with all of the file."""
    assert job._as_stream(piece, attempt) is job.running[attempt]


def test_a_source_that_sends_all_or_nothing_is_not_asked_again_before_the_time_it_named() -> None:
    """Neither for what it turned away nor for what broke off."""
    office = Office(connections=2)
    job = download(office, 2)
    (_, _, first), (_, piece, second) = office.all_begun()
    job.left(first, setback(10.0, crowded=True))
    as_stream(job, piece, second)
    job.left(second, setback(5.0))
    office.now = 9.9
    assert office.all_begun() == []
    office.now = 10.0
    ((_, _, third),) = office.all_begun()
    job.left(third, setback(5.0))
    office.now = 14.9
    assert office.all_begun() == []
    office.now = 15.0
    assert len(office.all_begun()) == 1


def test_nothing_is_asked_for_beside_all() -> None:
    """Not even a part of what another thread has not handed back yet."""
    office = Office(connections=3)
    job = download(office, 2)
    (_, slow, _), (_, piece, second) = office.all_begun()
    slow.rate = 1e6
    as_stream(job, piece, second)
    assert office.all_begun() == []
