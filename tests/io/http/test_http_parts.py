"""The parts below the engine: heads, measured links, and who may end or take a connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fault_server import meanwhile
from fetching import Anywhere, LoopbackOnly
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.failures import AbortedError, SetbackError
from lorax_async.io.http.head import Head, MalformedHeadError, parse_head
from lorax_async.io.http.links import UNKNOWN, Links
from lorax_async.io.http.pool import Connection, Pool
from lorax_async.io.http.settings import HttpSettings, Timeouts
from lorax_async.io.http.stream import Pace, Stream
from lorax_async.io.http.urls import Origin, parse_url
from lorax_async.io.http.wire import Wire
from lorax_async.tracing.recorder import Tracer

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

# -- heads and rates -------------------------------------------------------------------------------


TOKEN = st.text("abcXYZ09-_.!#", min_size=1, max_size=12)


VALUE = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=30)


def test_a_head() -> None:
    head = parse_head(
        b'HTTP/1.1 206 Partial Content\r\nETag:  "a b" \r\nVia: x\r\nvia:\ty\r\nEmpty:\r\n'
        b"Content-Length: 5\r\nContent-Length: 5\r\nName: caf\xe9"
    )
    assert head.status == 206
    assert head.fields == {
        "etag": '"a b"',
        "via": "x, y",
        "empty": "",
        "content-length": "5",
        "name": "café",
    }


@pytest.mark.parametrize(
    ("line", "connection", "keeps"),
    [
        ("HTTP/1.1 200 OK", "", True),
        ("HTTP/1.1 200 OK", "Connection: Close", False),
        ("HTTP/1.1 200", "Connection: x, close", False),
        ("HTTP/1.0 200 OK", "", False),
        ("HTTP/1.0 200 OK", "Connection: keep-alive", True),
    ],
)
def test_whether_the_connection_stays(line: str, connection: str, keeps: bool) -> None:
    lines = [line, connection] if connection else [line]
    assert parse_head("\r\n".join(lines).encode()).keeps_alive is keeps


@settings(max_examples=200, deadline=None)
@given(
    status=st.integers(100, 599),
    fields=st.dictionaries(TOKEN.map(str.lower), VALUE, max_size=20),
    reason=VALUE,
)
def test_heads_come_out_as_they_went_in(status: int, fields: dict[str, str], reason: str) -> None:
    lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {text}" for name, text in fields.items())]
    assert parse_head("\r\n".join(lines).encode()) == Head(status, fields, 1)


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=300))
@example(b"")
@example(b"HTTP/1.1 200 OK\r\n")
def test_anything_else_is_malformed_and_no_other_error(data: bytes) -> None:
    try:
        head = parse_head(data)
    except MalformedHeadError:
        return
    assert data.startswith(b"HTTP/1.")
    assert 100 <= head.status < 600


def test_a_link_is_guessed_until_it_was_measured() -> None:
    links, here = Links(), Origin("http", "h", 80)
    assert links.of(here) == UNKNOWN
    links.answered(here, 0.5)
    assert (links.of(here).delay, links.of(here).rate) == (0.5, UNKNOWN.rate)
    links.moved(here, 1e6)
    links.moved(here, 2e6)
    assert links.of(here).rate == pytest.approx(1.3e6)
    for n in range(1_000):
        links.moved(Origin("http", f"h{n}", 80), 1.0)
    assert links.of(here) == UNKNOWN, "of so many the oldest are forgotten"


def test_what_drips_is_too_slow() -> None:
    """1,000 bytes per second are asked for, over each 10 s of waiting."""
    pace = Pace(Timeouts(slowest=1_000, over=10), "h")
    for _ in range(19):
        pace.add(500, 0.5)
    pace.add(500, 0.5)
    for _ in range(9):
        pace.add(999, 1.0)
    with pytest.raises(SetbackError, match="999 bytes per second") as caught:
        pace.add(999, 1.0)
    assert caught.value.error.retryable
    assert pace.rate == pytest.approx((20 * 500 + 10 * 999) / 20)


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
