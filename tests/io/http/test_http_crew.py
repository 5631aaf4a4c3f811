"""The engine's threads: who is woken, who is waited for, and who keeps the time."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import pytest
from fault_server import Asked, Client, FaultServer, until
from fetching import DATA, GROUPS, PATIENT, MemorySink, asked, check, engine, target

from common import our_threads
from lorax_async.core.ranges import PieceSizes
from lorax_async.core.retries import Retries
from lorax_async.errors import FetchError
from lorax_async.io.http.crew import Crew
from lorax_async.io.http.download import Download
from lorax_async.io.http.pool import Pool

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

NEVER = 600.0
LASTING = replace(PATIENT, idle=NEVER)
"""Threads and connections stay as long as the engine."""


@pytest.fixture
def no_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock rests until it is woken."""
    monkeypatch.setattr("lorax_async.io.http.crew._TICK", NEVER)


class Together:
    """Answers once so many have asked."""

    def __init__(self, server: FaultServer, count: int) -> None:
        self.server = server
        self.everybody = threading.Barrier(count)

    def __call__(self, asked: Asked, client: Client) -> None:
        self.everybody.wait(3)
        self.server.right(asked, client)


@pytest.mark.usefixtures("no_ticks")
def test_threads_for_more_work_begin_at_once() -> None:
    """One is there; two files, which are to be asked for at the same time, need another."""
    with FaultServer(DATA[:9]) as server, engine(timeouts=LASTING) as fetching:
        small = target(server.url())
        fetching.ask(small, 9, ranged=False).done.result(10)
        server.behave = Together(server, 2)
        jobs = [fetching.ask(small, 9, ranged=False) for _ in range(2)]
        for job in jobs:
            assert job.done.result(10).start == DATA[:9]


def test_who_is_idle_begins_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock is busy with."""
    go_on = threading.Event()
    tick = Crew._tick

    def late(crew: Crew) -> float | None:
        go_on.wait(10)
        return tick(crew)

    with FaultServer(DATA) as server, engine(timeouts=LASTING) as fetching:
        asked(fetching, server.url())
        monkeypatch.setattr(Crew, "_tick", late)
        try:
            time.sleep(0.06)  # for the clock to come there
            assert fetching.ask(target(server.url()), 9).done.result(3).start == DATA[:9]
        finally:
            go_on.set()


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """After how many seconds the clock wants to look again; None for never."""
    pauses: list[float | None] = []
    tick = Crew._tick

    def noted(crew: Crew) -> float | None:
        pauses.append(tick(crew))
        return pauses[-1]

    monkeypatch.setattr(Crew, "_tick", noted)
    return pauses


@pytest.mark.usefixtures("no_ticks")
def test_an_end_waits_for_nobody_who_rests(ticks: list[float | None]) -> None:
    """Neither for idle threads nor for the clock."""
    with FaultServer(DATA) as server:
        fetching = engine(timeouts=LASTING)
        asked(fetching, server.url())
        until(lambda: len(ticks) == 2)  # it was begun, and then woken
        closing = threading.Thread(target=fetching.close, daemon=True)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()


def test_who_waits_for_another_attempt_is_woken() -> None:
    def once(asked: Asked, client: Client) -> None:
        if len(server.asked) == 1:
            client.head("500 Oops", "Content-Length: 0")
        else:
            server.right(asked, client)

    with FaultServer(DATA) as server, engine(timeouts=LASTING) as fetching:
        server.behave = once
        assert fetching.ask(target(server.url()), 9).done.result(5).start == DATA[:9]


@pytest.mark.usefixtures("no_ticks")
def test_who_may_come_back_is_woken() -> None:
    """The source has turned one of two away. When the other is through, both are to come."""
    number = itertools.count()
    both = threading.Barrier(2)
    jobs: list[Download] = []

    def behave(asked: Asked, client: Client) -> None:
        match next(number):
            case 1:
                until(lambda: len(server.asked) == 3)
                client.head("503 Busy", "Content-Length: 0", "Retry-After: 0")
                return
            case 2:
                until(lambda: jobs and jobs[0].limit == 1.0)
            case 3 | 4:
                both.wait(3)
        server.right(asked, client)

    retries = Retries(attempts=5, base=0.0, most=0.0)
    sizes = PieceSizes(least=10_000, most=50_000)
    with FaultServer(DATA) as server:
        server.behave = behave
        with engine(2, timeouts=LASTING, retries=retries, sizes=sizes) as fetching:
            answer = asked(fetching, server.url())
            sink, order = MemorySink(), list[int]()
            jobs.append(fetching.download(answer, GROUPS, sink, order.append))
            jobs[0].done.result(10)
            check(sink, order)


def test_a_thread_of_its_own_may_end_it() -> None:
    """It does not wait for itself, and leaves nothing open."""
    ended: list[int] = []

    def end(group: int) -> None:
        fetching.close()
        ended.append(group)

    with FaultServer(DATA) as server:
        fetching = engine()
        answer = asked(fetching, server.url())
        job = fetching.download(answer, GROUPS[1:], MemorySink(), end)
        with pytest.raises(FetchError, match="closed"):
            job.done.result(10)
        until(lambda: not our_threads())
        assert ended


# -- the clock ------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that were started."""
    names = []
    start = threading.Thread.start

    def noted(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", noted)
    return names


def test_there_is_one_clock(started: list[str]) -> None:
    with FaultServer(DATA) as server, engine(timeouts=LASTING) as fetching:
        for _ in range(3):
            asked(fetching, server.url())
        assert started.count("lorax-http-clock") == 1


def test_nothing_is_started_for_who_came_before_the_end(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is closed after it has taken the job, and before that has a clock."""
    start_clock = Crew._start_clock

    def late(crew: Crew) -> None:
        fetching.close()
        start_clock(crew)

    monkeypatch.setattr(Crew, "_start_clock", late)
    fetching = engine()
    job = fetching.ask(target("http://127.0.0.1:1/"), 9)
    with pytest.raises(FetchError, match="closed"):
        job.done.result(5)
    assert started == []


@pytest.mark.parametrize("name", ["lorax-http-clock", "lorax-http"])
def test_an_end_waits_for_a_thread_that_is_being_started(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    closings: list[threading.Thread] = []
    errors: list[Exception] = []

    def close() -> None:
        try:
            fetching.close()
        except Exception as error:
            errors.append(error)

    def slowly(thread: threading.Thread) -> None:
        if thread.name == name and not closings:
            closings.append(threading.Thread(target=close))
            start(closings[0])
            closings[0].join(0.2)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    fetching = engine()
    job = fetching.ask(target("http://127.0.0.1:1/"), 9)
    with pytest.raises(FetchError, match="closed"):
        job.done.result(5)
    closings[0].join(5)
    assert errors == []
    assert not our_threads()


def test_the_clock_sees_what_is_given_back_after_it_looked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last job ends, and leaves an idle connection, just when the clock finds none."""
    expire = Pool.expire
    held, looked = threading.Event(), threading.Event()

    def behave(asked: Asked, client: Client) -> None:
        held.set()
        looked.wait(10)
        server.right(asked, client)

    def late(pool: Pool) -> bool:
        kept = expire(pool)
        if held.is_set() and not looked.is_set():
            looked.set()
            job.done.result(10)
        return kept

    timeouts = replace(PATIENT, idle=0.1)
    with FaultServer(DATA) as server, engine(timeouts=timeouts) as fetching:
        server.behave = behave
        monkeypatch.setattr(Pool, "expire", late)
        job = fetching.ask(target(server.url()), 9)
        job.done.result(10)
        until(lambda: server.connected() == 0)


@pytest.mark.usefixtures("no_ticks")
def test_the_clock_rests_when_it_was_woken(ticks: list[float | None]) -> None:
    """Once for each time."""
    with FaultServer(DATA) as server, engine(timeouts=LASTING) as fetching:
        for _ in range(3):
            asked(fetching, server.url())
        time.sleep(0.05)  # in which an unresting one would have hundreds
        assert len(ticks) <= 4
