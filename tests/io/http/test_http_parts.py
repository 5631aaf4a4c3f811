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
from lorax_async.io.http.failures import AbortedError
from lorax_async.io.http.head import MalformedHeadError, parse_head
from lorax_async.io.http.pool import Connection, Pool
from lorax_async.io.http.settings import HttpSettings, Timeouts
from lorax_async.io.http.stream import Stream
from lorax_async.io.http.urls import parse_url
from lorax_async.io.http.wire import Wire
from lorax_async.tracing.recorder import Tracer

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

# -- heads and rates -------------------------------------------------------------------------------


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
