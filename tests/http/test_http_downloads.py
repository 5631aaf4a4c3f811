"""Downloads beside each other: shares of the connections, ends from outside, threads."""

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from fault_server import ETAG, Asked, Client, FaultServer, begin, until
from leaks import open_sockets, our_threads
from range_downloads import (
    DATA,
    GROUPS,
    PATIENT,
    Anywhere,
    Engine,
    MemorySink,
    asked,
    check,
    engine,
    fetched,
    target,
    took,
)

from link import Link
from lorax_async.errors import FetchError, FetchTimeoutError, InternalError, LoraxError
from lorax_async.http.download_scheduler import Job
from lorax_async.http.range_downloader import PREFETCH, RangeDownloader
from lorax_async.http.ranges import PieceSizes
from lorax_async.http.settings import HttpSettings, Timeouts
from lorax_async.http.target import Target
from lorax_async.urls import parse_url

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

LASTING = replace(PATIENT, idle=600.0)
"""Threads and connections stay as long as the engine."""

LARGE = 8 << 20


def test_a_long_piece_makes_way() -> None:
    """One connection, and a hint whose piece takes seconds: a load in between waits for a chunk."""
    data = bytes(LARGE)
    release = threading.Event()

    with FaultServer(data) as server, engine(1, timeouts=PATIENT, sizes=PieceSizes()) as fetching:

        def slow(asked: Asked, client: Client) -> None:
            if asked.target == "/wanted" or asked.span == (0, 5_000) or release.is_set():
                server.right(asked, client)
                return
            body = begin(asked, client, data, f"ETag: {ETAG}")
            for n in range(0, len(body), 1 << 18):
                client.send(body[n : n + (1 << 18)])
                client.ending.wait(0.1)

        server.behave = slow
        hint, wanted = asked(fetching, server.url("/hint")), asked(fetching, server.url("/wanted"))
        sink = MemorySink(LARGE)
        spans = [[(0, LARGE)]]
        behind = fetching.download(hint, spans, sink.write, lambda _: None, urgency=PREFETCH)
        until(lambda: len(server.asked) == 3)
        time.sleep(0.15)
        job = fetching.download(wanted, [[(0, 1_000)]], MemorySink().write, lambda _: None)
        job.done.result(10)
        assert not behind.done.done()
        release.set()
        behind.done.result(10)
        assert sink.times == b"\1" * LARGE, "and no byte of the other came twice"


def test_a_straggler_is_relieved() -> None:
    """One connection brings 5 MB/s, the other 0.5: the last piece is shared out among both."""
    data = bytes(LARGE // 2)
    with FaultServer(data) as server, engine(2, timeouts=PATIENT, sizes=PieceSizes()) as fetching:

        def uneven(asked: Asked, client: Client) -> None:
            body = begin(asked, client, data, f"ETag: {ETAG}")
            slow = asked.span is not None and asked.span[0] == 0
            for n in range(0, len(body), 50_000):
                client.send(body[n : n + 50_000])
                client.ending.wait(0.1 if slow else 0.01)

        answer = asked(fetching, server.url())
        server.behave = uneven
        sink = MemorySink(len(data))
        fetching.download(answer, [[(0, len(data))]], sink.write, lambda _: None).done.result(20)
        assert len(server.asked) > 3, "one more request than the plan had"
        assert sink.times == b"\1" * len(data)


@pytest.mark.parametrize("how", ["cancel", "close", "deadline"])
def test_an_end_from_outside(how: str) -> None:
    """At once, with one error, whatever the threads wait for; another origin is as before."""
    before = open_sockets()
    with FaultServer(DATA) as server, FaultServer(DATA) as good:
        fetching = engine(timeouts=PATIENT)
        try:
            answer, other = asked(fetching, server.url()), asked(fetching, good.url())
            server.behave = server.stalled
            sink, order = MemorySink(), list[int]()
            begun = time.monotonic()
            job = fetching.download(
                answer, GROUPS, sink.write, order.append, timeout=0.4 if how == "deadline" else 60
            )
            until(lambda: len(server.asked) == 5)
            time.sleep(0.02)
            assert not job.done.cancel(), "as asyncio would"
            if how == "cancel":
                job.cancel(FetchError("enough"))
                job.cancel(FetchError("more than that"))
            elif how == "close":
                fetching.close()
            error = job.done.exception(5)
            assert took(begun) < 3
            assert type(error) is (FetchTimeoutError if how == "deadline" else FetchError)
            assert (how == "cancel") is ("enough" in str(error))
            written = bytes(sink.times)
            if how != "close":
                check(*fetched(fetching, other, timeout=5))
                server.behave = None
                check(*fetched(fetching, answer))
            assert bytes(sink.times) == written
            assert order == [0], "only what has no bytes was reported"
        finally:
            fetching.close()
        assert not our_threads()
        # The servers' threads close their own ends meanwhile: the counts are not of one moment.
        until(lambda: open_sockets() - server.connected() - good.connected() - 2 <= before)


def test_a_closed_engine_takes_no_more_and_an_unclosed_one_warns() -> None:
    fetching = engine()
    fetching.close()
    fetching.close()
    with pytest.raises(FetchError, match="closed"):
        fetching.probe(target("http://127.0.0.1:1/"), 9)
    cycle: list[object] = [RangeDownloader(HttpSettings(proxies={}))]
    reference = weakref.ref(cycle[0])
    cycle.append(cycle)
    del cycle
    with pytest.warns(ResourceWarning, match="unclosed RangeDownloader"):
        gc.collect()
    assert reference() is None


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_an_end_is_reported_once_nothing_is_written_any_more(how: str) -> None:
    begun, go = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        begun.set()
        go.wait(10)

    sink = MemorySink(before=wait)
    with FaultServer(DATA) as server, engine() as fetching:
        job = fetching.download(asked(fetching, server.url()), GROUPS, sink.write, lambda _: None)
        assert begun.wait(10)
        end = fetching.close if how == "close" else partial(job.cancel, FetchError("enough"))
        ending = threading.Thread(target=end)
        ending.start()
        ending.join(0.05)
        early = job.done.done() or (how == "close" and not ending.is_alive())
        go.set()
        error = job.done.exception(10)
        ending.join(10)
        assert not early
        assert (how == "cancel") is ("enough" in str(error))
        assert not job.running
        if how == "close":
            assert not our_threads()


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(28, "No space left on device"), FetchError, r"cannot be written \(ENOSPC\)"),
        (FetchError("no room"), FetchError, "no room"),
        (ZeroDivisionError(), InternalError, "ZeroDivisionError"),
    ],
)
def test_a_failing_sink_or_callback(error: Exception, kind: type[LoraxError], words: str) -> None:
    def fail(group: int, nbytes: int = 0) -> None:
        if group == 1 or nbytes:
            raise error

    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        for sink, arrived in ((MemorySink(before=fail), lambda _: None), (MemorySink(), fail)):
            if arrived is fail and isinstance(error, OSError):
                continue
            job = fetching.download(answer, GROUPS, sink.write, arrived)
            with pytest.raises(kind, match=words) as caught:
                job.done.result(10)
            assert type(caught.value) is kind
        check(*fetched(fetching, answer))


def test_idle_threads_and_connections_end_or_rest() -> None:
    with FaultServer(DATA) as server:
        with engine(timeouts=Timeouts(idle=0.1)) as fetching:
            check(*fetched(fetching, asked(fetching, server.url())))
            until(lambda: not our_threads())
            until(lambda: server.connected() == 0)
            check(*fetched(fetching, asked(fetching, server.url())))
        with engine(timeouts=LASTING) as fetching:
            check(*fetched(fetching, asked(fetching, server.url())))
            used = time.process_time()
            time.sleep(0.1)
            assert time.process_time() - used < 0.05, "they wait, and do not look all the time"
            begun = time.monotonic()
        assert took(begun) < 2, "idle threads end at once"


@pytest.mark.parametrize("name", ["lorax-http-clock", "lorax-http"])
def test_a_thread_that_cannot_start(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said plainly or late, but never waited for without end; afterwards all is as before."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == name:
            raise RuntimeError("can't start new thread")
        start(thread)

    with FaultServer(DATA) as server, engine() as fetching:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            job = fetching.probe(target(server.url()), 9, timeout=0.2)
            error = job.done.exception(5)
            assert isinstance(error, FetchError)
            late = isinstance(error, FetchTimeoutError)
            assert late is (name == "lorax-http")
        check(*fetched(fetching, asked(fetching, server.url())))


LAYERS = 16
LAYER = 125_000
HEADER = 20_000
THROTTLED = random.Random(3).randbytes(HEADER + LAYERS * LAYER)


def test_layer_0_comes_long_before_the_rest_of_a_throttled_load(tmp_path: Path) -> None:
    """2 MB on 4 connections of 600 KB/s. Bytes are counted: no clock is looked at."""
    file = tmp_path / "weights"
    file.write_bytes(THROTTLED)
    spans = [(HEADER + n * LAYER, HEADER + (n + 1) * LAYER) for n in range(LAYERS)]
    names = sorted(range(LAYERS), key=str)
    groups = [[], *([spans[names.index(layer)]] for layer in range(LAYERS)), []]
    sink, told = MemorySink(len(THROTTLED)), list[tuple[int, int]]()
    with Link({"w": file}, rate=6e5, delay=0.005) as link:
        with Engine(HttpSettings(connections=4, proxies={})) as engine:
            place = Target(parse_url(link.url("w")), "w", rules=Anywhere())
            answer = engine.probe(place, HEADER).done.result(10)
            sink.data[:HEADER] = answer.start
            job = engine.download(
                answer, groups, sink.write, lambda group: told.append((group, sink.times.count(1)))
            )
            job.done.result(20)
        counts = link.counts()
    assert sink.data == THROTTLED
    assert sorted(dict(told)) == list(range(LAYERS + 2))
    assert dict(told)[1] < 0.3 * sink.times.count(1)
    assert counts["bytes"] == len(THROTTLED), "and every byte was sent once"
    assert counts["requests"] <= 1 + 4 * 6


def test_downloads_that_begin_beside_others_have_no_byte_sent_twice(tmp_path: Path) -> None:
    """Running pieces finish; no other connection requests the rest of them again."""
    file = tmp_path / "weights"
    layer = 1 << 20
    file.write_bytes(bytes(LAYERS * layer))
    groups = [[(n * layer, (n + 1) * layer)] for n in range(LAYERS)]
    with (
        Link({"w": file}, rate=2e7, delay=0.01) as link,
        Engine(HttpSettings(connections=8, proxies={})) as engine,
    ):
        place = Target(parse_url(link.url("w")), "w", rules=Anywhere())
        answer = engine.probe(place, HEADER).done.result(10)

        def download(arrived: Callable[[int], None]) -> Job[None]:
            return engine.download(answer, groups, lambda *_: None, arrived)

        download(lambda _: None).done.result(20)  # the link is known now
        link.counts(reset=True)
        jobs, begun = list[Job[None]](), threading.Event()
        jobs.append(download(lambda _: begun.set()))
        assert begun.wait(20)
        jobs += [download(lambda _: None) for _ in range(3)]
        for job in jobs:
            job.done.result(20)
        assert link.counts()["bytes"] == 4 * LAYERS * layer
