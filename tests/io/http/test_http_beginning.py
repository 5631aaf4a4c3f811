"""The first bytes of weights: how much of them is waited for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fault_server import ETAG, Asked, Client, FaultServer
from fetching import DATA, LoopbackOnly, check, fetched, target

from lorax_async.core.header import header_end
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.http.target import Known

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

ASKED, ENOUGH = 200_000, 40_000
READ = 49_152
"""Three times 16 KiB: the first look at the clock after what is enough."""


class Clock:
    """Stands still until somebody `hurries`: then half a second passes between two looks."""

    def __init__(self) -> None:
        self.now, self.step = 100.0, 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@contextmanager
def fetching(clock: Clock) -> Iterator[RangeEngine]:
    settings = HttpSettings(connections=4)
    with RangeEngine(settings, network=LoopbackOnly(), clock=clock) as engine:
        yield engine


def test_what_comes_slowly_after_enough_is_not_waited_for() -> None:
    clock = Clock()

    def enough(data: memoryview, known: Known) -> int:
        clock.step = 0.5 if len(data) >= ENOUGH else 0.0
        return ENOUGH

    def holds_the_rest(asked: Asked, client: Client) -> None:
        server.behave = None
        client.part(0, ASKED, len(DATA), f"ETag: {ETAG}")
        client.send(DATA[:READ])
        client.stall()

    with FaultServer(DATA, holds_the_rest) as server, fetching(clock) as engine:
        answer = engine.ask(target(server.url()), ASKED, enough=enough).done.result(10)
        clock.step = 0.0
        assert answer.start == DATA[:READ]
        assert answer.known.size == len(DATA)
        have = [(0, len(answer.start))]
        sink, _ = fetched(engine, answer, have=have)
        assert sink.data[READ:] == DATA[READ:], "the rest comes on other connections"
        assert server.spans[0] == (0, ASKED)
        assert len({client.number for client in server.clients}) > 1


def test_what_comes_at_once_is_taken() -> None:
    clock = Clock()
    with FaultServer(DATA) as server, fetching(clock) as engine:
        asked = engine.ask(target(server.url()), ASKED, enough=lambda data, known: ENOUGH)
        answer = asked.done.result(10)
        assert answer.start == DATA[:ASKED]
        check(*fetched(engine, answer))


def test_what_is_needed_is_waited_for_however_slowly_it_comes() -> None:
    clock = Clock()
    with FaultServer(DATA) as server, fetching(clock) as engine:
        clock.step = 0.05
        asked = engine.ask(target(server.url()), ASKED, enough=lambda data, known: ASKED)
        assert asked.done.result(10).start == DATA[:ASKED]


def test_a_file_without_a_length_is_read_to_its_end() -> None:
    """Where it ends is how large it is."""
    clock = Clock()

    def endless(asked: Asked, client: Client) -> None:
        client.head("200 OK", "Transfer-Encoding: chunked", f"ETag: {ETAG}")
        client.send(b"%X\r\n%s\r\n0\r\n\r\n" % (ASKED // 2, DATA[: ASKED // 2]))

    with FaultServer(DATA, endless) as server, fetching(clock) as engine:
        clock.step = 0.01
        answer = engine.ask(target(server.url()), ASKED, enough=lambda data, known: 1).done.result(
            10
        )
        assert answer.start == DATA[: ASKED // 2]
        assert answer.known.size == ASKED // 2


@pytest.mark.parametrize(
    ("start", "needed"),
    [(b"", 8), (b"\x10\x00\x00", 8), (b"\x10" + bytes(7), 24), (b"\xff" * 9, 8 + 2**64 - 1)],
)
def test_how_much_a_header_needs_by_its_own_word(start: bytes, needed: int) -> None:
    assert header_end(start) == needed
