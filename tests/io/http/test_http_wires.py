"""A connection and who uses it: an end comes at any moment, and reaches him and nobody else."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from fault_server import FaultServer, meanwhile
from fetching import DATA, Anywhere, LoopbackOnly, engine, target

from lorax_async.errors import FetchTimeoutError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.failures import AbortedError, SetbackError
from lorax_async.io.http.network import Endpoint
from lorax_async.io.http.pool import Connection, Pool
from lorax_async.io.http.settings import HttpSettings, Timeouts
from lorax_async.io.http.stream import Stream
from lorax_async.io.http.urls import parse_url
from lorax_async.io.http.wire import Wire
from lorax_async.tracing.recorder import Tracer

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


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


def test_who_was_ended_is_told_so_and_no_other_error() -> None:
    with connected() as (wire, _):
        wire.abort()
        with pytest.raises(AbortedError):
            wire.send(b"x")
        with pytest.raises(AbortedError):
            wire.receive(memoryview(bytearray(1)))
        with pytest.raises(AbortedError):
            wire.receive_all(memoryview(bytearray(1)))


def test_who_was_ended_gets_what_came_before() -> None:
    with connected() as (wire, there):
        stream = Stream(wire, Timeouts(), lambda: 0.0, "h")
        there.sendall(b"abc")
        wire.abort()
        view = memoryview(bytearray(9))
        assert stream.fill(view) == 3
        assert bytes(view[:3]) == b"abc"
        with pytest.raises(AbortedError):
            stream.fill(view)


def test_a_head_comes_in_time() -> None:
    """Though some of it comes now and then."""
    seconds = iter(range(9))
    with connected() as (wire, there):
        stream = Stream(wire, Timeouts(read=0.5), lambda: next(seconds), "h")
        there.sendall(b"HTTP/1.1 200 OK\r\n")
        there.shutdown(socket.SHUT_WR)
        with pytest.raises(SetbackError) as caught:
            stream.head()
        assert type(caught.value.error) is FetchTimeoutError


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


class EndedMeanwhile(ssl.SSLContext):
    """Somebody ends the wire when TLS has the descriptor, and the wire does not know yet."""

    wire: Wire
    ending: threading.Thread

    def wrap_socket(self, plain: socket.socket, **how: object) -> ssl.SSLSocket:  # type: ignore[override]
        secured = super().wrap_socket(plain, **how)  # type: ignore[arg-type]
        self.ending = meanwhile(self.wire.abort)
        return secured


def test_an_end_reaches_a_socket_that_is_being_secured() -> None:
    context = EndedMeanwhile(ssl.PROTOCOL_TLS_CLIENT)
    with connected() as (wire, _):
        context.wire = wire
        with pytest.raises((ssl.SSLError, ConnectionError)):  # and not that it took too long
            wire.secure(context, "h", timeout=1.0)
        context.ending.join()


# -- the pool -------------------------------------------------------------------------------------


def pool_of(network: LoopbackOnly | None = None, clock: Callable[[], float] = lambda: 0.0) -> Pool:
    return Pool(HttpSettings(proxies={}), network or LoopbackOnly(), clock, Tracer())


URL = parse_url("http://127.0.0.1:1/weights")


def idle(pool: Pool, wire: Wire) -> Connection:
    stream = Stream(wire, Timeouts(), lambda: 0.0, "h")
    connection = Connection(wire, stream, URL.origin, None, "127.0.0.1", 0)
    pool.give(connection)
    return connection


def test_who_was_ended_closes_what_he_took() -> None:
    pool, attempt = pool_of(), Attempt()
    attempt.end()
    with connected() as (wire, there):
        idle(pool, wire)
        with pytest.raises(AbortedError):
            pool.take(URL, Anywhere(), attempt)
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
    pool = pool_of()
    others: list[Connection | None] = []
    rules = Meanwhile(lambda: others.append(pool.take(URL, Anywhere(), Attempt())))
    with connected() as (wire, _):
        connection = idle(pool, wire)
        assert pool.take(URL, rules, Attempt()) is connection
        rules.threads[0].join()
        assert others == [None]


def test_a_connection_is_idle_from_when_it_was_given() -> None:
    """Somebody closes old ones just when it is."""
    looks: list[bool] = []

    def clock() -> float:
        looks.append(True)
        if len(looks) == 1:
            pool.expire()
        return 1_000.0

    pool = pool_of(clock=clock)
    with connected() as (wire, _):
        connection = idle(pool, wire)
        assert pool.take(URL, Anywhere(), Attempt()) is connection


class Unreachable(LoopbackOnly):
    """Nobody answers; whoever tries is ended meanwhile."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt

    def connect(
        self, endpoint: Endpoint, timeout: float, opened: Callable[[socket.socket], None]
    ) -> socket.socket:
        opened(socket.socket())
        self.attempt.end()
        raise ConnectionAbortedError


def test_who_is_ended_while_he_connects_is_told_so() -> None:
    """It is no failure of the source."""
    attempt = Attempt()
    with pytest.raises(AbortedError):
        pool_of(Unreachable(attempt)).open(URL, Anywhere(), attempt)


def test_an_end_does_not_reach_a_connection_that_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give = Pool.give

    def ended(pool: Pool, connection: Connection) -> None:
        give(pool, connection)
        for job in fetching._desk.jobs:
            for attempt in job.running:
                attempt.end()

    monkeypatch.setattr(Pool, "give", ended)
    with FaultServer(DATA) as server, engine() as fetching:
        for _ in range(2):
            fetching.ask(target(server.url()), 9).done.result(10)
        assert len(server.clients) == 1
