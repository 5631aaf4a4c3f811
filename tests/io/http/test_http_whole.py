"""One answer that has all of the file: who else had asked, and what is told meanwhile."""

from __future__ import annotations

import itertools
import threading

import pytest
from fault_server import ETAG, Asked, Client, FaultServer, until
from fetching import DATA, GROUPS, PATIENT, MemorySink, asked, check, engine

from lorax_async.errors import FetchError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.desk import Piece
from lorax_async.io.http.download import Download

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


LARGE = DATA * 4
"""More than is read at once."""


def head_of_all(client: Client, nbytes: int = len(DATA)) -> None:
    client.head("200 OK", f"Content-Length: {nbytes}", f"ETag: {ETAG}")


def test_who_waits_for_an_answer_leaves_it_to_the_one_that_came() -> None:
    """The server serves one at a time: the file comes once, and nobody waits for a turn."""
    turn, alone = threading.Lock(), threading.Event()
    served: list[Asked] = []

    def one_by_one(request: Asked, client: Client) -> None:
        if request.span == (0, 5_000):
            server.right(request, client)
            return
        until(lambda: len(server.asked) == 5)
        if not turn.acquire(blocking=False):
            client.stall()
        served.append(request)
        head_of_all(client)
        alone.wait(10)
        client.send(DATA)

    with FaultServer(DATA) as server, engine(timeouts=PATIENT) as fetching:
        server.behave = one_by_one
        answer = asked(fetching, server.url())
        sink, order = MemorySink(), list[int]()
        job = fetching.download(answer, GROUPS, sink, order.append)
        try:
            until(lambda: served)
            until(lambda: len(job.running) == 1)
        finally:
            alone.set()
        job.done.result(10)
        check(sink, order)
        assert len(served) == 1


def test_of_two_answers_that_have_all_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are here before anybody says what they are."""
    both, calls, streams = threading.Barrier(2), itertools.count(), list[Piece]()
    as_stream = Download._as_stream

    def at_once(job: Download, piece: Piece, attempt: Attempt) -> Piece:
        if next(calls) < 2:
            both.wait(10)
        streams.append(as_stream(job, piece, attempt))
        return streams[-1]

    def all_of_it(request: Asked, client: Client) -> None:
        if request.span == (0, 5_000):
            server.right(request, client)
        else:
            head_of_all(client)
            client.send(DATA)

    monkeypatch.setattr(Download, "_as_stream", at_once)
    with FaultServer(DATA) as server, engine(2, timeouts=PATIENT) as fetching:
        server.behave = all_of_it
        answer = asked(fetching, server.url())
        sink, order = MemorySink(), list[int]()
        fetching.download(answer, GROUPS, sink, order.append).done.result(10)
        check(sink, order)
        assert all(stream is streams[0] for stream in streams)


class EndsItself(MemorySink):
    """Whose first write waits for all bytes to be on their way, and then ends the download."""

    def __init__(self) -> None:
        super().__init__(len(LARGE))
        self.sent, self.begun = threading.Event(), threading.Event()
        self.job: Download | None = None
        self.nbytes = 0

    def write(self, offset: int, data: memoryview) -> None:
        self.nbytes += len(data)
        self.begun.wait(10)
        self.sent.wait(10)
        assert self.job is not None
        self.job.cancel(FetchError("enough"))


@pytest.mark.parametrize(("whole", "at_once"), [(False, 256 << 10), (True, 1 << 20)])
def test_no_more_is_written_after_an_end(whole: bool, at_once: int) -> None:
    """Than what was read already, though more bytes lie in the system's buffers."""
    sink = EndsItself()

    def answer(request: Asked, client: Client) -> None:
        if request.span == (0, 5_000):
            server.right(request, client)
            return
        if whole:
            head_of_all(client, len(LARGE))
            client.send(LARGE)
        else:
            server.right(request, client)
        sink.sent.set()

    with FaultServer(LARGE) as server, engine(1, timeouts=PATIENT) as fetching:
        server.behave = answer
        first = asked(fetching, server.url())
        order: list[int] = []
        sink.job = fetching.download(first, [[(5_000, len(LARGE))]], sink, order.append)
        sink.begun.set()
        assert str(sink.job.done.exception(10)) == str(FetchError("enough"))
        assert sink.nbytes <= at_once
        assert order == []
