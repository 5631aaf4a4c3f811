"""Which piece of which job starts when, and which thread may end or take a connection."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
from fault_server import meanwhile
from range_downloads import Anywhere, LoopbackOnly, MemorySink, target

from lorax_async.errors import FetchError
from lorax_async.http.client import ConnectionPool, HttpClient, LinkModels
from lorax_async.http.connection import Attempt, Connection
from lorax_async.http.download_scheduler import DownloadPiece, DownloadScheduler, Job
from lorax_async.http.failures import AbortedError, RetryableError, RetryPolicy
from lorax_async.http.range_downloader import FOREGROUND, PREFETCH, Download
from lorax_async.http.ranges import GroupArrivals, PieceSizes, RangePlan
from lorax_async.http.settings import HttpSettings, Timeouts
from lorax_async.http.target import ProbeResult, Validators
from lorax_async.telemetry import Tracer
from lorax_async.urls import parse_url

LARGE = 100 << 20
STUCK = 2.0
ANSWER = 64 << 10


class Pieces(Job[None]):
    """A job of `count` pieces of 10 bytes, at an origin of its own."""

    def __init__(self, scheduler: DownloadScheduler, count: int, origin: str, urgency: int) -> None:
        super().__init__(scheduler, urgency, timeout=1_000.0)
        self.pending = [DownloadPiece(n, 10 * n, 10 * n + 10) for n in range(count)]
        self.origin = origin
        scheduler.jobs.append(self)

    def work(self, piece: DownloadPiece, attempt: Attempt, buffer: memoryview) -> None:
        raise AssertionError("nothing is read here")

    def return_piece(self, piece: DownloadPiece) -> None:
        self.over = not self.pending and not self.running


class World:
    """A scheduler, a clock that stands until it is set, and threads that only say what they would do."""

    def __init__(self, connections: int = 4) -> None:
        self.now = 0.0
        retries = RetryPolicy(attempts=10, base=0.0, most=0.0, obeyed=60.0)
        self.scheduler = DownloadScheduler(
            connections, retries, lambda: self.now, lambda: 0.0, STUCK
        )

    def job(self, count: int, origin: str = "a", urgency: int = FOREGROUND) -> Pieces:
        return Pieces(self.scheduler, count, origin, urgency)

    def begin(self, most: int = 99) -> list[tuple[Job[None], DownloadPiece, Attempt]]:
        """As many tasks as there may be."""
        found: list[tuple[Job[None], DownloadPiece, Attempt]] = []
        with self.scheduler.changed:
            while len(found) < most and (task := self.scheduler.next()) is not None:
                found.append(task)
        return found

    def look(self, *moments: float) -> None:
        """As the timer thread does every 50 ms."""
        for moment in moments or (self.now,):
            self.now = moment
            with self.scheduler.changed:
                self.scheduler.reclaim()

    def counts(self, *jobs: Job[None]) -> list[int]:
        """Count each job's threads once those that were ended have left and looked again."""
        for job in jobs:
            for attempt in [each for each in job.running if each.ended]:
                job.leave(attempt, None)
        self.begin(self.scheduler.connections - sum(len(job.running) for job in jobs))
        return [len(job.running) for job in jobs]


def bring(job: Job[None], nbytes: int) -> None:
    for attempt in job.running:
        connection = unopened()
        attempt.use(connection)
        connection.received += nbytes


def finish(job: Job[None]) -> None:
    """All of it is there, and nothing else wanted."""
    job.pending.clear()
    for attempt in list(job.running):
        job.running[attempt].at = job.running[attempt].stop
        job.leave(attempt, None)


def later(seconds: float | None = None, *, throttled: bool = False) -> RetryableError:
    return RetryableError(FetchError("later"), retry_after=seconds, throttled=throttled)


@pytest.mark.parametrize("early", [False, True])
def test_an_outcome_is_an_answer_even_if_what_follows_it_is_cut_off(early: bool) -> None:
    """Another job at that origin, much later, has its share at once."""
    world = World(connections=4)
    probe = world.job(1, "a")
    world.begin()
    if early:
        probe.done.set_result(None)
    probe.cancel(FetchError("the rest is late"))
    for attempt in list(probe.running):
        probe.leave(attempt, None)
    world.scheduler.finish(probe)
    world.now += 5.0
    slow, other = world.job(9, "a"), world.job(9, "b")
    assert world.counts(slow, other) == ([2, 2] if early else [1, 3])


def test_two_jobs_of_one_origin_have_even_shares() -> None:
    """The second comes when the first has all connections, and has half of them in the end."""
    world = World()
    first = world.job(9)
    attempts = [attempt for _, _, attempt in world.begin()]
    second = world.job(9)
    for attempt in attempts[:2]:
        first.running[attempt].at = first.running[attempt].stop
        first.leave(attempt, None)
    assert [job for job, _, _ in world.begin()] == [second, second]
    assert world.counts(first, second) == [2, 2]


def test_a_piece_that_waits_keeps_no_other() -> None:
    world = World()
    job = world.job(2)
    ((_, first, attempt),) = world.begin(1)
    job.leave(attempt, later(10.0))
    assert [piece.order for _, piece, _ in world.begin()] == [1]
    world.now = 9.9
    assert world.begin() == []
    world.now = 10.0
    assert [piece for _, piece, _ in world.begin()] == [first]


@pytest.mark.parametrize("waits", [[10.0] * 4, [1.0, 10.0, 1.0, 1.0]])
def test_a_throttled_job_waits_the_longest_time_named_and_uses_fewer(waits: list[float]) -> None:
    world = World()
    job = world.job(9)
    for (_, _, attempt), seconds in zip(world.begin(), waits, strict=True):
        job.leave(attempt, later(seconds, throttled=True))
    world.now = 9.9
    assert world.begin() == []
    assert world.scheduler.wanted_threads() == 0
    world.now = 10.0
    assert len(world.begin()) == 1


@pytest.mark.parametrize("origin", ["a", "b"])
def test_a_new_request_overtakes_retries(origin: str) -> None:
    """At its own origin, and at another one; where there is room for both, it goes first."""
    for connections in (1, 2):
        world = World(connections)
        old = world.job(1)
        ((_, _, attempt),) = world.begin()
        old.leave(attempt, later())
        new = world.job(1, origin)
        assert [task[0] for task in world.begin()] == [new, old][:connections]
    world = World(1)
    old = world.job(1)
    ((_, _, attempt),) = world.begin()
    urgent, hint = world.job(1, "c"), world.job(1, "c", PREFETCH)
    old.leave(attempt, later())
    order = []
    for world.now in (1.0, 2.0, 3.0):
        ((job, _, attempt),) = world.begin()
        order.append(job)
        finish(job)
    assert order == [urgent, old, hint]


def test_another_origin_has_its_share_at_once() -> None:
    """One that has all connections and sends nothing gives up half of them, and no more."""
    world = World()
    first = world.job(9, "a")
    oldest = world.begin()[0][2]
    world.now = 0.1
    second = world.job(9, "b")
    world.look(0.1, 0.1)
    assert world.counts(first, second) == [2, 2]
    assert oldest in first.running
    world.now = 0.15
    third = world.job(9, "c")
    world.look(0.22)
    assert world.counts(first, second, third) == [2, 1, 1]


def test_an_origin_that_stalls_keeps_one_connection() -> None:
    """Another one that sends has all others, also new ones, for as long as it has a use for them."""
    world = World()
    stalled = world.job(9, "a")
    world.begin()
    world.look(0.1, 0.2, 0.3)
    healthy = world.job(9, "b", PREFETCH)
    world.look()
    assert world.counts(stalled, healthy) == [1, 3], "a hint, too: it sends something"
    bring(healthy, ANSWER)
    finish(healthy)
    assert world.counts(stalled, healthy) == [4, 0]
    another = world.job(9, "b")
    world.look()
    assert world.counts(stalled, another) == [1, 3]


def test_downloads_that_stall_give_way_to_another_of_their_origin() -> None:
    """All but one connection, as soon as they have been silent for a while; and take them back."""
    world = World()
    stalled = [world.job(99) for _ in range(8)]
    healthy = world.job(9)
    for tenths in range(1, 20):
        world.begin()
        world.look(tenths / 10)
        for job in stalled:
            for attempt in [each for each in job.running if each.ended]:
                job.leave(attempt, None)
        bring(healthy, ANSWER)
    assert len(healthy.running) == 3
    assert sum(len(job.running) for job in stalled) == 1
    bring(healthy, ANSWER)
    finish(healthy)
    assert sum(world.counts(*stalled)) == 4


def test_downloads_that_stall_after_their_first_bytes_stay_silent() -> None:
    """Each new attempt brings a thousand bytes, and nothing more."""
    world = World()
    stalled = [world.job(99) for _ in range(8)]
    healthy: list[Pieces] = []
    brought = set[Attempt]()
    for twentieths in range(1, 80):
        if twentieths == 40:
            healthy.append(world.job(9))
        world.begin()
        for job in healthy:
            bring(job, ANSWER)
        for job in stalled:
            for attempt in set(job.running) - brought:
                connection = unopened()
                attempt.use(connection)
                connection.received += 1_000
                brought.add(attempt)
        world.look(twentieths / 20)
        for job in stalled:
            for attempt in [each for each in job.running if each.ended]:
                job.leave(attempt, None)
        if twentieths > 41:
            assert len(healthy[0].running) == 3


def test_a_slow_answer_is_waited_for_though_others_of_its_origin_never_come() -> None:
    """The silent ones have the one connection by turns, beside one that uses all the others."""
    world = World()
    dead, slow, busy = [world.job(99) for _ in range(3)], world.job(9), world.job(10_000)
    begun: dict[Attempt, tuple[float, Connection]] = {}
    for hundredths in range(1, 900):
        now = hundredths / 100
        world.begin(4 - sum(len(job.running) for job in (slow, *dead, busy)))
        world.look(now)
        for job in (slow, *dead, busy):
            for attempt in list(job.running):
                if attempt not in begun:
                    begun[attempt] = now, unopened()
                    attempt.use(begun[attempt][1])
                since, connection = begun[attempt]
                if attempt.ended:
                    job.leave(attempt, None)
                elif job is busy or (job is slow and now - since > 0.6):
                    connection.received += 1
    heard = [begun[attempt][1].received for attempt in slow.running]
    assert sum(heard) > 100


def _answers(world: World) -> None:
    """It sends something now and then, and all is there."""
    job = world.job(4)
    world.begin()
    for moment in (0.2, 0.4, 0.6):
        bring(job, ANSWER)
        world.look(moment)
    finish(job)


def _loses_its_callers(world: World) -> None:
    """They leave sooner than it is noticed."""
    for _ in range(4):
        job = world.job(1)
        world.begin()
        world.now += 0.1
        job.cancel(FetchError("enough"))
        for attempt in list(job.running):
            job.leave(attempt, None)
        world.scheduler.finish(job)


@pytest.mark.parametrize(
    ("past", "waited", "counts"), [(_answers, 0.1, [2, 2]), (_loses_its_callers, 0.06, [1, 3])]
)
def test_what_makes_an_origin_stalled(
    past: Callable[[World], None], waited: float, counts: list[int]
) -> None:
    world = World()
    past(world)
    again = world.job(9)
    world.begin()
    world.now += waited
    other = world.job(9, "b")
    world.look()
    assert world.counts(again, other) == counts


def test_what_is_being_read_is_not_given_to_another() -> None:
    """Of one large piece, from a source whose connections bring 1 MB/s each."""
    world = World(connections=2)
    scheduler, settings = world.scheduler, HttpSettings(proxies={})
    links = LinkModels(scheduler.clock)
    pool = ConnectionPool(settings, LoopbackOnly(), scheduler.clock, Tracer())
    place = target("http://127.0.0.1:1/weights")
    span = (0, LARGE)
    for _ in range(3):  # of one connection: 1 MB/s after 10 ms
        reception = links.began(place.url.origin, 0.01)
        for _ in range(9):
            world.now += 0.1
            links.received(place.url.origin, reception, 100_000)
        links.ended(place.url.origin, reception)
    job = Download(
        scheduler,
        HttpClient(settings, pool, links, scheduler.clock, Tracer()),
        ProbeResult(place, place.location, Validators(), {}, b"", ranges=True, rest=Future()),
        RangePlan([[span]], 1, PieceSizes()),
        GroupArrivals([[span]]),
        MemorySink().write,
        lambda _: None,
        connections=2,
        least=1 << 20,
        urgency=FOREGROUND,
        timeout=1_000.0,
    )
    scheduler.jobs.append(job)
    _, piece, attempt = world.begin(1)[0]
    while world.begin(1):  # all others come
        for other in [each for each in job.running if each is not attempt]:
            job.running[other].at = job.running[other].stop
            job.leave(other, None)
    piece.rate, piece.claimed = 1e5, piece.stop - (4 << 20)
    stop = piece.stop
    assert not world.begin(1), "it has just begun"
    world.now += 1.0
    _, rest, _ = world.begin(1)[0]
    assert piece.claimed <= piece.stop == rest.at < rest.stop == stop


URL = parse_url("http://127.0.0.1:1/weights")


def unopened() -> Connection:
    return Connection(URL.origin, Timeouts(), lambda: 0.0)


@contextmanager
def connected() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and the socket at its other end."""
    here, there = socket.socketpair()
    connection = unopened()
    connection.attach(here)
    connection.address = "127.0.0.1"
    with there:
        try:
            yield connection, there
        finally:
            connection.close()


def test_an_ended_attempt_gets_no_connection() -> None:
    attempt, sock = Attempt(), unopened()
    attempt.end()
    with pytest.raises(AbortedError):
        attempt.use(sock)
    sock.abort()
    with socket.socket() as opened, pytest.raises(AbortedError):
        sock.attach(opened)


def test_an_end_does_not_reach_what_was_released() -> None:
    with connected() as (sock, there):
        attempt = Attempt()
        attempt.use(sock)
        attempt.release()
        attempt.end()
        sock.send(["x"])
        assert there.recv(9) == b"x\r\n\r\n"


class Ending(Connection):
    """While it is aborted another thread releases it."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(URL.origin, Timeouts(), lambda: 0.0)
        self.attempt = attempt
        self.released = False

    def release(self) -> None:
        self.attempt.release()
        self.released = True

    def abort(self) -> None:
        self.leaving = meanwhile(self.release)
        self.in_time = not self.released


def test_what_is_being_ended_is_released_afterwards() -> None:
    """Or it would be ended for the thread that has it next."""
    attempt = Attempt()
    sock = Ending(attempt)
    attempt.use(sock)
    attempt.end()
    sock.leaving.join()
    assert sock.in_time


def test_a_descriptor_is_not_closed_while_it_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another file's the moment after."""
    shutdown = socket.socket.shutdown
    closing: list[threading.Thread] = []

    def slowly(ended: socket.socket, how: int) -> None:
        if not closing:
            closing.append(meanwhile(sock.close))
            assert ended.fileno() >= 0
        shutdown(ended, how)

    with connected() as (sock, there):
        monkeypatch.setattr(socket.socket, "shutdown", slowly)
        sock.abort()
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
    pool = ConnectionPool(HttpSettings(proxies={}), LoopbackOnly(), lambda: 0.0, Tracer())
    others: list[Connection | None] = []
    rules = Meanwhile(lambda: others.append(pool.take(URL, Anywhere(), Attempt())))
    with connected() as (connection, _):
        pool.put(connection)
        assert pool.take(URL, rules, Attempt()) is connection
        rules.threads[0].join()
        assert others == [None]


def test_an_attempt_that_ended_closes_the_connection_that_it_takes() -> None:
    ended = Attempt()
    pool = ConnectionPool(HttpSettings(proxies={}), LoopbackOnly(), lambda: 0.0, Tracer())
    ended.end()
    with connected() as (connection, there):
        pool.put(connection)
        with pytest.raises(AbortedError):
            pool.take(URL, Anywhere(), ended)
        assert there.recv(1) == b""
        assert pool.take(URL, Anywhere(), Attempt()) is None
