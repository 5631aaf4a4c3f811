"""How downloads end before they are whole; and nothing is left of them."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
from fault_server import FaultServer, until
from fetching import (
    DATA,
    GROUPS,
    PATIENT,
    MemorySink,
    asked,
    check,
    engine,
    fetched,
    target,
    took,
)

from common import open_sockets, our_threads
from lorax_async.errors import FetchError, FetchTimeoutError, InternalError, LoraxError
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import HttpSettings, Timeouts

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


@pytest.mark.parametrize("how", ["cancel", "close", "deadline"])
def test_an_end_from_outside(how: str) -> None:
    """At once, with one error, whatever the threads wait for; and nothing is left."""
    before = open_sockets()
    with FaultServer(DATA) as server:
        fetching = engine(timeouts=PATIENT)
        try:
            answer = asked(fetching, server.url())
            server.behave = server.stalled
            sink, order = MemorySink(), list[int]()
            begun = time.monotonic()
            job = fetching.download(
                answer, GROUPS, sink, order.append, timeout=0.4 if how == "deadline" else 60
            )
            until(lambda: len(server.asked) == 5)
            time.sleep(0.02)
            if how == "cancel":
                job.cancel(FetchError("enough"))
            elif how == "close":
                fetching.close()
            error = job.done.exception(5)
            assert took(begun) < 3
            assert type(error) is (FetchTimeoutError if how == "deadline" else FetchError)
            assert not job.running
            written = bytes(sink.times)
            if how != "close":
                server.behave = None
                check(*fetched(fetching, answer))
            assert bytes(sink.times) == written
            assert order == [0], "only what has no bytes was told of"
        finally:
            fetching.close()
        assert not our_threads()
        # The server's threads close their own ends meanwhile: the two counts are not of one moment.
        until(lambda: open_sockets() - server.connected() - 1 <= before)


def test_the_closed_take_no_more() -> None:
    fetching = engine()
    fetching.close()
    fetching.close()
    with pytest.raises(FetchError, match="closed"):
        fetching.ask(target("http://127.0.0.1:1/"), 9)


def test_the_forgotten_are_told_of() -> None:
    fetching = RangeEngine(HttpSettings(proxies={}))
    cycle = [fetching]
    cycle.append(cycle)  # type: ignore[arg-type]
    reference = weakref.ref(fetching)
    del fetching, cycle
    with pytest.warns(ResourceWarning, match="unclosed RangeEngine"):
        gc.collect()
    assert reference() is None


def test_idle_threads_and_connections_end() -> None:
    with FaultServer(DATA) as server, engine(timeouts=Timeouts(idle=0.1)) as fetching:
        check(*fetched(fetching, asked(fetching, server.url())))
        until(lambda: not our_threads())
        until(lambda: server.connected() == 0)
        check(*fetched(fetching, asked(fetching, server.url())))


class Broken(MemorySink):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, offset: int, data: memoryview) -> None:
        raise self.error


class Slow(MemorySink):
    """Whose first write ends when it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def write(self, offset: int, data: memoryview) -> None:
        self.begun.set()
        self.go.wait(10)
        super().write(offset, data)


def test_an_end_is_told_when_nobody_writes_any_more() -> None:
    sink = Slow()
    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        job = fetching.download(answer, GROUPS, sink, lambda _: None)
        assert sink.begun.wait(10)
        job.cancel(FetchError("enough"))
        time.sleep(0.05)
        told = job.done.done()
        sink.go.set()
        assert str(job.done.exception(10)) == str(FetchError("enough"))
        assert not told
        assert not job.running


def test_the_engine_has_ended_when_nobody_writes_any_more() -> None:
    sink = Slow()
    before = open_sockets()
    with FaultServer(DATA) as server, engine() as fetching:
        job = fetching.download(asked(fetching, server.url()), GROUPS, sink, lambda _: None)
        assert sink.begun.wait(10)
        closing = threading.Thread(target=fetching.close)
        closing.start()
        closing.join(0.05)
        early = not closing.is_alive()
        sink.go.set()
        closing.join(10)
        assert not early
        assert not our_threads()
        until(lambda: open_sockets() - server.connected() - 1 <= before)
        assert job.done.exception(0) is not None


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device"), FetchError, r"cannot be written \(ENOSPC\)"),
        (FetchError("no room"), FetchError, "no room"),
        (ZeroDivisionError(), InternalError, "ZeroDivisionError"),
    ],
)
def test_a_sink_that_fails(error: Exception, kind: type[LoraxError], words: str) -> None:
    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        job = fetching.download(answer, GROUPS, Broken(error), lambda _: None)
        with pytest.raises(kind, match=words) as caught:
            job.done.result(10)
        assert type(caught.value) is kind
        check(*fetched(fetching, answer))


def test_a_callback_that_fails() -> None:
    def fail(group: int) -> None:
        if group == 1:
            raise ZeroDivisionError

    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        job = fetching.download(answer, GROUPS, MemorySink(), fail)
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            job.done.result(10)


@pytest.mark.parametrize("name", ["lorax-http-clock", "lorax-http"])
def test_no_more_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said plainly or late, but never waited for without end; afterwards all is as before."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with FaultServer(DATA) as server, engine() as fetching:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            job = fetching.ask(target(server.url()), 9, timeout=0.2)
            error = job.done.exception(5)
            assert isinstance(error, FetchError)
            late = isinstance(error, FetchTimeoutError)
            assert late is (name == "lorax-http")
        check(*fetched(fetching, asked(fetching, server.url())))
