"""Which piece of which job begins when, and who may end or take a connection.

`Office` is all that knows the download scheduler's calls; its clock stands until it is set.
`test_stalled_origins.py` has the same against servers.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fault_server import meanwhile
from fetching import Anywhere, LoopbackOnly, MemorySink, target

from lorax_async.core.arrivals import Arrivals
from lorax_async.core.retries import Retries
from lorax_async.errors import FetchError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.desk import Desk, Job, Piece
from lorax_async.io.http.download import Download
from lorax_async.io.http.engine import FOREGROUND, PREFETCH
from lorax_async.io.http.exchange import Exchange
from lorax_async.io.http.failures import AbortedError, SetbackError
from lorax_async.io.http.links import Links
from lorax_async.io.http.network import RealNetwork
from lorax_async.io.http.pool import Connection, Pool
from lorax_async.io.http.settings import HttpSettings, Timeouts
from lorax_async.io.http.stream import Stream
from lorax_async.io.http.target import Answer, Known
from lorax_async.io.http.urls import parse_url
from lorax_async.io.http.wire import Wire
from lorax_async.tracing.recorder import Tracer

LARGE = 100 << 20
STUCK = 2.0
ANSWER = 64 << 10


class Pieces(Job[None]):
    """A job of `count` pieces of 10 bytes, at an origin of its own."""

    def __init__(self, desk: Desk, count: int, origin: str, urgency: int) -> None:
        super().__init__(desk, urgency, deadline=1_000.0)
        self.pending = [Piece(n, 10 * n, 10 * n + 10) for n in range(count)]
        self.name = origin
        desk.jobs.append(self)

    @property
    def origin(self) -> str:
        return self.name

    def work(self, piece: Piece, attempt: Attempt, buffer: memoryview) -> None:
        raise AssertionError("nothing is read here")

    def settle(self, piece: Piece) -> None:
        self.over = not self.pending and not self.running


class Office:
    """A scheduler, the time, and threads that only say what they would do."""

    def __init__(self, connections: int = 4) -> None:
        self.now = 0.0
        retries = Retries(attempts=10, base=0.0, most=0.0, obeyed=60.0)
        self.desk = Desk(connections, retries, lambda: self.now, lambda: 0.0, STUCK)

    def job(self, count: int, origin: str = "a", urgency: int = FOREGROUND) -> Pieces:
        return Pieces(self.desk, count, origin, urgency)

    def begin(self, most: int = 99) -> list[tuple[Job[None], Piece, Attempt]]:
        """As many tasks as there may be."""
        found: list[tuple[Job[None], Piece, Attempt]] = []
        with self.desk.changed:
            while len(found) < most and (task := self.desk.next()) is not None:
                found.append(task)
        return found

    def look(self, *moments: float) -> None:
        """As the timer thread does every 50 ms."""
        for moment in moments or (self.now,):
            self.now = moment
            with self.desk.changed:
                self.desk.reclaim()

    def counts(self, *jobs: Job[None]) -> list[int]:
        """How many threads each job has, once those that were ended have left and looked again."""
        for job in jobs:
            for attempt in [each for each in job.running if each.ended]:
                job.left(attempt, None)
        self.begin(self.desk.connections - sum(len(job.running) for job in jobs))
        return [len(job.running) for job in jobs]


def bring(job: Job[None], nbytes: int) -> None:
    for piece in job.running.values():
        piece.came += nbytes


def leave(job: Job[None]) -> None:
    """All of it is there, and nothing else wanted."""
    job.pending.clear()
    for attempt in list(job.running):
        job.running[attempt].at = job.running[attempt].stop
        job.left(attempt, None)


def setback(seconds: float | None = None, *, crowded: bool = False) -> SetbackError:
    return SetbackError(FetchError("later"), retry_after=seconds, crowded=crowded)


# -- retries ---------------------------------------------------------------------------------------


def test_two_jobs_of_one_origin_have_even_shares() -> None:
    """The second comes when the first has all connections, and has half of them in the end."""
    office = Office()
    first = office.job(9)
    attempts = [attempt for _, _, attempt in office.begin()]
    second = office.job(9)
    for attempt in attempts[:2]:
        first.running[attempt].at = first.running[attempt].stop
        first.left(attempt, None)
    assert [job for job, _, _ in office.begin()] == [second, second]
    assert office.counts(first, second) == [2, 2]


def test_a_piece_that_waits_keeps_no_other() -> None:
    office = Office()
    job = office.job(2)
    ((_, first, attempt),) = office.begin(1)
    job.left(attempt, setback(10.0))
    assert [piece.order for _, piece, _ in office.begin()] == [1]
    office.now = 9.9
    assert office.begin() == []
    office.now = 10.0
    assert [piece for _, piece, _ in office.begin()] == [first]


@pytest.mark.parametrize("named", [[10.0] * 4, [1.0, 10.0, 1.0, 1.0]])
def test_a_job_that_was_turned_away_comes_back_after_the_latest_time_named_and_with_fewer(
    named: list[float],
) -> None:
    """Not with another piece either."""
    office = Office()
    job = office.job(9)
    for (_, _, attempt), seconds in zip(office.begin(), named, strict=True):
        job.left(attempt, setback(seconds, crowded=True))
    office.now = 9.9
    assert office.begin() == []
    assert office.desk.wanted() == 0
    office.now = 10.0
    assert len(office.begin()) == 1


@pytest.mark.parametrize("origin", ["a", "b"])
def test_a_new_request_overtakes_retries(origin: str) -> None:
    """At its own origin, and at another one; where there is room for both, it goes first."""
    for connections in (1, 2):
        office = Office(connections)
        old = office.job(1)
        ((_, _, attempt),) = office.begin()
        old.left(attempt, setback())
        new = office.job(1, origin)
        assert [task[0] for task in office.begin()] == [new, old][:connections]
    office = Office(1)
    old = office.job(1)
    ((_, _, attempt),) = office.begin()
    urgent, hint = office.job(1, "c"), office.job(1, "c", PREFETCH)
    old.left(attempt, setback())
    order = []
    for office.now in (1.0, 2.0, 3.0):
        ((job, _, attempt),) = office.begin()
        order.append(job)
        leave(job)
    assert order == [urgent, old, hint]


# -- origins ---------------------------------------------------------------------------------------


def test_another_origin_has_its_share_at_once() -> None:
    """One that has all connections and sends nothing gives up half of them, and no more."""
    office = Office()
    first = office.job(9, "a")
    oldest = office.begin()[0][2]
    office.now = 0.1
    second = office.job(9, "b")
    office.look(0.1, 0.1)
    assert office.counts(first, second) == [2, 2]
    assert oldest in first.running
    office.now = 0.15
    third = office.job(9, "c")
    office.look(0.22)
    assert office.counts(first, second, third) == [2, 1, 1]


def test_an_origin_that_stalls_keeps_one_connection() -> None:
    """Another one that sends something has the others, for as long as it has a use for them.

    Those too that the first began a moment ago, when the other had none.
    """
    office = Office()
    stalled = office.job(9, "a")
    office.begin()
    office.look(0.1, 0.2, 0.3)
    healthy = office.job(9, "b", PREFETCH)
    office.look()
    assert office.counts(stalled, healthy) == [1, 3], "a hint, too: it sends something"
    bring(healthy, ANSWER)
    leave(healthy)
    assert office.counts(stalled, healthy) == [4, 0]
    another = office.job(9, "b")
    office.look()
    assert office.counts(stalled, another) == [1, 3]


def _answers(office: Office) -> None:
    """It sends something now and then, and all is there."""
    job = office.job(4)
    office.begin()
    for moment in (0.2, 0.4, 0.6):
        bring(job, ANSWER)
        office.look(moment)
    leave(job)


def _loses_its_callers(office: Office) -> None:
    """These leave sooner than it is noticed."""
    for _ in range(4):
        job = office.job(1)
        office.begin()
        office.now += 0.1
        job.cancel(FetchError("enough"))
        for attempt in list(job.running):
            job.left(attempt, None)
        office.desk.finish(job)


@pytest.mark.parametrize(
    ("past", "waited", "stalled"),
    [
        (_answers, 0.1, False),
        (_loses_its_callers, 0.06, True),
    ],
)
def test_an_origin_is_stalled_by_what_it_sent_and_not_by_who_waits(
    past: Callable[[Office], None], waited: float, stalled: bool
) -> None:
    office = Office()
    past(office)
    again = office.job(9)
    office.begin()
    office.now += waited
    other = office.job(9, "b")
    office.look()
    assert office.counts(again, other) == ([1, 3] if stalled else [2, 2])


# -- downloads -------------------------------------------------------------------------------------


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
    _, piece, _ = office.begin(1)[0]
    piece.rate, piece.claimed = 1e6, LARGE - (4 << 20)
    _, rest, _ = office.begin(1)[0]
    assert piece.claimed <= piece.stop == rest.at < rest.stop == LARGE


# -- an end at any moment --------------------------------------------------------------------------


@contextmanager
def connected() -> Iterator[tuple[Wire, socket.socket]]:
    """A wire, and the socket at its other end."""
    here, there = socket.socketpair()
    wire = Wire()
    wire.attach(here)
    with there:
        try:
            yield wire, there
        finally:
            wire.close()


def test_an_ended_attempt_gets_no_connection() -> None:
    attempt = Attempt()
    attempt.end()
    with pytest.raises(AbortedError):
        attempt.use(Wire())


def test_an_end_does_not_reach_what_was_given_back() -> None:
    here, there = socket.socketpair()
    attempt, wire = Attempt(), Wire()
    wire.attach(here)
    attempt.use(wire)
    attempt.leave()
    attempt.end()
    wire.send(b"x")
    assert there.recv(1) == b"x"
    wire.close()
    there.close()


def test_a_socket_is_not_opened_for_an_ended_attempt() -> None:
    wire = Wire()
    wire.abort()
    with socket.socket() as opened, pytest.raises(AbortedError):
        wire.attach(opened)


class Ending(Wire):
    """While it is ended somebody gives it back."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__()
        self.attempt = attempt
        self.left = False

    def give_back(self) -> None:
        self.attempt.leave()
        self.left = True

    def abort(self) -> None:
        self.leaving = meanwhile(self.give_back)
        self.in_time = not self.left


def test_what_is_being_ended_is_given_back_afterwards() -> None:
    """Or it would be ended for whoever has it next."""
    attempt = Attempt()
    wire = Ending(attempt)
    attempt.use(wire)
    attempt.end()
    wire.leaving.join()
    assert wire.in_time


def test_a_descriptor_is_not_closed_while_it_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another file's the moment after."""
    shutdown = socket.socket.shutdown
    closing: list[threading.Thread] = []

    def slowly(ended: socket.socket, how: int) -> None:
        if not closing:
            closing.append(meanwhile(wire.close))
            assert ended.fileno() >= 0
        shutdown(ended, how)

    with connected() as (wire, there):
        monkeypatch.setattr(socket.socket, "shutdown", slowly)
        wire.abort()
        closing[0].join()
        assert there.recv(1) == b""


class Meanwhile(Anywhere):
    """While they are asked about one connection, another thread wants one."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.threads: list[threading.Thread] = []

    def allows_address(self, *_: object) -> bool:
        if not self.threads:
            self.threads.append(meanwhile(self.call))
        return True


def test_an_idle_connection_is_taken_by_one() -> None:
    url = parse_url("http://127.0.0.1:1/weights")
    pool = Pool(HttpSettings(proxies={}), LoopbackOnly(), lambda: 0.0, Tracer())
    others: list[Connection | None] = []
    rules = Meanwhile(lambda: others.append(pool.take(url, Anywhere(), Attempt())))
    with connected() as (wire, _):
        stream = Stream(wire, Timeouts(), lambda: 0.0, "h")
        connection = Connection(wire, stream, url.origin, None, "127.0.0.1", 0)
        pool.give(connection)
        assert pool.take(url, rules, Attempt()) is connection
        rules.threads[0].join()
        assert others == [None]
