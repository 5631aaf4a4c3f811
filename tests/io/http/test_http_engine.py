"""Downloads beside each other: shares, urgency, stragglers, faults."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
from fault_server import ETAG, Asked, Client, FaultServer, Hangup, until
from fetching import (
    DATA,
    GROUPS,
    PATIENT,
    MemorySink,
    asked,
    check,
    engine,
    fetched,
    took,
)

from lorax_async.core.ranges import PieceSizes
from lorax_async.core.retries import Retries
from lorax_async.errors import FetchError
from lorax_async.io.http.engine import FOREGROUND, PREFETCH

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

LARGE = 8 << 20


class Gate:
    """Answers range requests when it is told to, and counts those that wait."""

    def __init__(self, server: FaultServer) -> None:
        self.server = server
        self.opened = threading.Event()
        self.waiting: list[str] = []

    def __call__(self, asked: Asked, client: Client) -> None:
        if asked.span != (0, 5_000):
            self.waiting.append(asked.target)
            self.opened.wait(20)
        self.server.right(asked, client)


def test_shares_are_even() -> None:
    """Two at once on four connections, the second later: each has two of them in the end."""
    with FaultServer(DATA) as server, engine(timeouts=PATIENT) as fetching:
        first, second = asked(fetching, server.url("/a")), asked(fetching, server.url("/b"))
        gate = server.behave = Gate(server)
        before = fetching.download(first, GROUPS, MemorySink(), lambda _: None)
        until(lambda: len(gate.waiting) == 4)
        behind = fetching.download(second, GROUPS, MemorySink(), lambda _: None)
        gate.opened.set()
        before.done.result(10)
        behind.done.result(10)
        # Four of the first were under way; then it is the second's turn until both have two.
        assert gate.waiting[:6] == [*["/a"] * 4, *["/b"] * 2]


def test_the_foreground_goes_first() -> None:
    """Of a hint that came earlier only what was under way comes before it."""
    sizes = PieceSizes(least=10_000, most=20_000)
    with FaultServer(DATA) as server, engine(timeouts=PATIENT, sizes=sizes) as fetching:
        hint, wanted = asked(fetching, server.url("/hint")), asked(fetching, server.url("/wanted"))
        gate = server.behave = Gate(server)
        behind = fetching.download(hint, GROUPS, MemorySink(), lambda _: None, urgency=PREFETCH)
        until(lambda: len(gate.waiting) == 4)
        before = fetching.download(wanted, GROUPS, MemorySink(), lambda _: None)
        gate.opened.set()
        before.done.result(10)
        behind.done.result(10)
        pieces = gate.waiting.count("/wanted")
        assert pieces >= 20
        assert gate.waiting[:4] == ["/hint"] * 4
        # The server's four threads may note those that are asked for at once in any order.
        others = gate.waiting[4 : 4 + pieces + 3]
        assert others.count("/wanted") == pieces
        assert others[: pieces - 3].count("/hint") == 0


def test_a_long_piece_makes_way() -> None:
    """One connection, and a hint whose piece takes seconds: a load in between waits for a chunk."""
    data = bytes(LARGE)
    release = threading.Event()

    with FaultServer(data) as server, engine(1, timeouts=PATIENT, sizes=PieceSizes()) as fetching:

        def slow(asked: Asked, client: Client) -> None:
            if asked.target == "/wanted" or asked.span == (0, 5_000) or release.is_set():
                server.right(asked, client)
                return
            assert asked.span is not None
            start, stop = asked.span
            client.part(start, stop, len(data), f"ETag: {ETAG}")
            for n in range(start, stop, 1 << 18):
                client.send(data[n : min(n + (1 << 18), stop)])
                client.ending.wait(0.1)

        server.behave = slow
        hint, wanted = asked(fetching, server.url("/hint")), asked(fetching, server.url("/wanted"))
        sink = MemorySink(LARGE)
        spans = [[(0, LARGE)]]
        behind = fetching.download(hint, spans, sink, lambda _: None, urgency=PREFETCH)
        until(lambda: len(server.asked) == 3)
        time.sleep(0.15)
        begun = time.monotonic()
        fetching.download(wanted, [[(0, 1_000)]], MemorySink(), lambda _: None).done.result(10)
        assert took(begun) < 1
        assert not behind.done.done()
        release.set()
        behind.done.result(10)
        assert sink.times == b"\1" * LARGE, "and no byte of the other came twice"


@pytest.mark.parametrize("urgency", [FOREGROUND, PREFETCH])
@pytest.mark.parametrize("sent", [0, 100])
def test_who_is_stuck_makes_way(sent: int, urgency: int) -> None:
    """A source stalls on all connections; the other download has its share, and both are whole."""
    release = threading.Event()
    timeouts = replace(PATIENT, stuck=0.1)
    with FaultServer(DATA) as server, engine(timeouts=timeouts) as fetching:
        stuck, wanted = asked(fetching, server.url("/stuck")), asked(fetching, server.url("/good"))
        waiting = []

        def stalled(asked: Asked, client: Client) -> None:
            if asked.target != "/stuck" or release.is_set():
                server.right(asked, client)
                return
            assert asked.span is not None
            if sent:
                client.part(*asked.span, len(DATA), f"ETag: {ETAG}")
                client.send(DATA[asked.span[0] : asked.span[0] + sent])
            waiting.append(asked)
            release.wait(20)
            raise Hangup

        server.behave = stalled
        sinks, orders = (MemorySink(), MemorySink()), (list[int](), list[int]())
        behind = fetching.download(stuck, GROUPS, sinks[0], orders[0].append, urgency=urgency)
        until(lambda: len(waiting) == 4)
        fetching.download(wanted, GROUPS, sinks[1], orders[1].append).done.result(10)
        assert not behind.done.done()
        release.set()
        behind.done.result(10)
        for sink, order in zip(sinks, orders, strict=True):
            check(sink, order)


def test_a_straggler_is_relieved() -> None:
    """One connection brings 5 MB/s, the other 0.5: the last piece is shared out among both."""
    data = bytes(LARGE // 2)
    with FaultServer(data) as server, engine(2, timeouts=PATIENT, sizes=PieceSizes()) as fetching:

        def uneven(asked: Asked, client: Client) -> None:
            assert asked.span is not None
            start, stop = asked.span[0], min(asked.span[1], len(data))
            client.part(start, stop, len(data), f"ETag: {ETAG}")
            slow = asked.span[0] == 0 and asked.span[1] > 5_000
            for n in range(start, stop, 50_000):
                client.send(data[n : min(n + 50_000, stop)])
                client.ending.wait(0.1 if slow else 0.01)

        answer = asked(fetching, server.url())
        server.behave = uneven
        sink = MemorySink(len(data))
        begun = time.monotonic()
        job = fetching.download(answer, [[(0, len(data))]], sink, lambda _: None)
        job.done.result(20)
        assert took(begun) < 3.2, "alone the slow one would have taken 4.2 s"
        assert len(server.asked) > 3, "one more request than the plan had"
        assert sink.times == b"\1" * len(data)


def test_many_at_once_on_few_connections() -> None:
    """Every third request fails; one by one they are whole, and the connections never too many."""
    count = [0]
    lock = threading.Lock()

    with FaultServer(DATA) as server:

        def moody(asked: Asked, client: Client) -> None:
            with lock:
                count[0] += 1
                bad = count[0] % 3 == 0
            if bad:
                client.send(b"HTTP/1.1 206 Partial")
                client.reset()
            server.right(asked, client)

        server.behave = moody
        retries = Retries(attempts=20, base=0.01, most=0.02)
        with engine(6, retries=retries) as fetching:
            answer = asked(fetching, server.url())
            done = []
            for n in range(20):
                sink, order = MemorySink(), list[int]()
                job = fetching.download(answer, GROUPS, sink, order.append, first=2, urgency=n % 2)
                done.append((job, sink, order))
            assert server.connected() <= 6 + 6
            for job, sink, order in done:
                job.done.result(30)
                check(sink, order)


def test_the_fault_of_one_is_none_of_the_others() -> None:
    with FaultServer(DATA) as bad, FaultServer(DATA) as good:
        bad.behave = bad.stalled
        with engine(4, timeouts=PATIENT) as fetching:
            worse, better = asked(fetching, bad.url()), asked(fetching, good.url())
            hanging = fetching.download(worse, GROUPS, MemorySink(), lambda _: None)
            until(lambda: len(bad.asked) == 5)
            hanging.cancel(FetchError("enough"))
            check(*fetched(fetching, better, timeout=5))
