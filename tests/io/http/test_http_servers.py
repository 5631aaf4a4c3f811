"""What good servers do in different ways: whole files, chunks, no lengths, keep-alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest
from fault_server import ETAG, Asked, Client, FaultServer, Hangup, until
from fetching import DATA, GROUPS, MemorySink, asked, check, engine, fetched, target, took

from lorax_async.core.ranges import PieceSizes
from lorax_async.errors import FetchError, IntegrityError

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")


def test_every_byte_once_in_order() -> None:
    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        assert (answer.start, answer.known.size, answer.ranges) == (DATA[:5_000], len(DATA), True)
        check(*fetched(fetching, answer))
        spans = [span for span in server.spans if span]
        assert sum(stop - start for start, stop in spans) == len(DATA)
        assert max(client.number for client in server.clients) < 4, "connections are used again"
        assert all(each.fields["if-range"] == ETAG for each in server.asked[1:])
        assert all(each.fields["accept-encoding"] == "identity" for each in server.asked)


def test_what_is_there_already_is_not_asked_for() -> None:
    have = [(0, 100_000), (200_000, 290_000)]
    with FaultServer(DATA) as server, engine() as fetching:
        sink, order = fetched(fetching, asked(fetching, server.url()), have=have)
        assert order == [0, 1, 2, 3, 4]
        came = {n for span in server.spans[1:] if span for n in range(*span)}
        wanted = {n for group in GROUPS for span in group for n in range(*span)}
        assert came == wanted - {n for span in have for n in range(*span)}
        assert all(sink.data[n] == DATA[n] for n in came)


def test_all_is_there_already() -> None:
    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        _, order = fetched(fetching, answer, have=[(0, len(DATA))])
        assert order == [0, 1, 2, 3, 4]
        assert len(server.asked) == 1


def whole(server: FaultServer, asked: Asked, client: Client) -> None:
    client.head("200 OK", f"Content-Length: {len(server.data)}", f"ETag: {ETAG}")
    client.send(server.data)


def chunked(server: FaultServer, asked: Asked, client: Client) -> None:
    client.head("200 OK", "Transfer-Encoding: chunked", f"ETag: {ETAG}")
    for n in range(0, len(server.data), 7_001):
        part = server.data[n : n + 7_001]
        client.send(f"{len(part):X};name=value\r\n".encode() + part + b"\r\n")
    client.send(b"0\r\nTrailer: x\r\n\r\n")


def to_the_end(server: FaultServer, asked: Asked, client: Client) -> None:
    client.head("200 OK", f"ETag: {ETAG}")
    client.send(server.data)
    raise Hangup


def old_version(server: FaultServer, asked: Asked, client: Client) -> None:
    client.send(b"HTTP/1.0 200 OK\r\nETag: " + ETAG.encode() + b"\r\n\r\n" + server.data)
    raise Hangup


@pytest.mark.parametrize("answer", [whole, chunked, to_the_end, old_version])
@pytest.mark.parametrize("from_the_first", [True, False])
def test_a_server_that_sends_all_or_nothing(
    answer: Callable[[FaultServer, Asked, Client], None], from_the_first: bool
) -> None:
    """The whole file comes in one stream, even if the server served ranges at first."""
    with FaultServer(DATA) as server, engine() as fetching:

        def behave(asked: Asked, client: Client) -> None:
            if not from_the_first and asked.span == (0, 5_000):
                server.right(asked, client)
            else:
                answer(server, asked, client)

        server.behave = behave
        first = asked(fetching, server.url())
        assert first.start == DATA[:5_000]
        check(*fetched(fetching, first))


def test_a_whole_stream_that_breaks_goes_on_where_it_was() -> None:
    broken: list[int] = []
    with FaultServer(DATA) as server, engine() as fetching:

        def behave(asked: Asked, client: Client) -> None:
            client.head("200 OK", f"Content-Length: {len(DATA)}", f"ETag: {ETAG}")
            if asked.span is None and not broken:
                broken.append(1)
                client.send(DATA[:150_000])
                raise Hangup
            client.send(DATA)

        server.behave = behave
        check(*fetched(fetching, asked(fetching, server.url())))
        assert broken
        assert server.asked[-1].fields["if-match"] == ETAG


def test_short_without_a_length() -> None:
    """The end of the connection is no proof that all was sent."""
    with FaultServer(DATA) as server, engine() as fetching:

        def behave(asked: Asked, client: Client) -> None:
            client.head("200 OK", f"ETag: {ETAG}")
            client.send(DATA[:200_000])
            raise Hangup

        server.behave = behave
        with pytest.raises(FetchError, match="before all was sent"):
            fetched(fetching, asked(fetching, server.url()))


def test_a_file_that_is_shorter_than_its_header_says() -> None:
    with (
        FaultServer(DATA[:390_000]) as server,
        engine() as fetching,
        pytest.raises(IntegrityError),
    ):
        fetched(fetching, asked(fetching, server.url()))


def test_small_files_whole() -> None:
    with FaultServer(DATA[:3_000]) as server, engine() as fetching:
        whole_target = target(server.url())
        answer = fetching.ask(whole_target, 3_000, ranged=False).done.result(10)
        assert answer.start == DATA[:3_000]
        assert server.asked[0].span is None
        with pytest.raises(FetchError, match="more than the 2,999 bytes") as caught:
            fetching.ask(whole_target, 2_999, ranged=False).done.result(10)
        assert not caught.value.retryable
        assert fetching.ask(whole_target, 9_000).done.result(10).start == DATA[:3_000]


def test_a_bomb_without_a_length_is_cut_off() -> None:
    sent = [0]
    with FaultServer(DATA) as server, engine() as fetching:

        def endless(asked: Asked, client: Client) -> None:
            client.head("200 OK", "Transfer-Encoding: chunked")
            while True:
                client.send(b"10000\r\n" + bytes(65_536) + b"\r\n")
                sent[0] += 65_536

        server.behave = endless
        with pytest.raises(FetchError, match="more than the 1,000 bytes"):
            fetching.ask(target(server.url()), 1_000, ranged=False).done.result(10)
        assert sent[0] < 32 << 20


def test_keep_alive_that_ended_between_requests() -> None:
    """The server closes after each answer without saying so: no failure, no wait."""

    def closing(asked: Asked, client: Client) -> None:
        server.right(asked, client)
        raise Hangup

    with FaultServer(DATA) as server, engine() as fetching:
        server.behave = closing
        for _ in range(2):
            check(*fetched(fetching, asked(fetching, server.url())))


def test_an_idle_connection_that_dies_under_the_request() -> None:
    def once(asked: Asked, client: Client) -> None:
        if client.requests > 1:
            client.reset()
        server.right(asked, client)

    with FaultServer(DATA) as server, engine(1) as fetching:
        server.behave = once
        answer = asked(fetching, server.url())
        check(*fetched(fetching, answer))
        assert all(client.requests <= 2 for client in server.clients)


def test_too_many_connections_for_the_server() -> None:
    """It serves two at a time and turns away the others; nothing fails."""
    room = threading.Semaphore(2)
    turned_away = [0]

    def crowded(asked: Asked, client: Client) -> None:
        if not room.acquire(blocking=False):
            turned_away[0] += 1
            client.head("503 Busy", "Content-Length: 0")
            return
        try:
            client.ending.wait(0.02)
            server.right(asked, client)
        finally:
            room.release()

    sizes = PieceSizes(least=10_000, most=20_000)
    with FaultServer(DATA) as server, engine(8, sizes=sizes) as fetching:
        server.behave = crowded
        check(*fetched(fetching, asked(fetching, server.url())))
        assert 0 < turned_away[0] <= 20, "it learns how many may be"


def test_retry_after_is_waited_for_without_a_connection() -> None:
    told = threading.Event()
    open_meanwhile: list[int] = []

    def later(asked: Asked, client: Client) -> None:
        if not told.is_set():
            told.set()
            client.head("429 Later", "Retry-After: 1", "Content-Length: 0", "Connection: close")
            raise Hangup
        server.right(asked, client)

    with FaultServer(DATA) as server, engine() as fetching:
        server.behave = later
        job = fetching.ask(target(server.url()), 5_000)
        told.wait(5)
        client = server.clients[0]
        threading.Event().wait(0.3)
        open_meanwhile.append(server.connected())
        assert job.done.result(10).start == DATA[:5_000]
        assert open_meanwhile == [0]
        assert client.requests == 1


def test_a_wait_beyond_the_deadline_is_not_waited() -> None:
    def later(asked: Asked, client: Client) -> None:
        client.head("503 Later", "Retry-After: 2", "Content-Length: 0")

    with FaultServer(DATA, later) as server, engine() as fetching:
        begun = time.monotonic()
        with pytest.raises(FetchError, match="503") as caught:
            fetching.ask(target(server.url()), 9, timeout=1.5).done.result(5)
        assert caught.value.retry_after == 2.0
        assert took(begun) < 1


def test_what_comes_unasked_answers_nothing() -> None:
    """A second response after the first must not be taken for the next request's."""

    def talkative(asked: Asked, client: Client) -> None:
        server.right(asked, client)
        client.ending.wait(0.05)
        with suppress(OSError):
            client.head("206 P", "Content-Length: 4", "Content-Range: bytes 0-3/4")
            client.send(b"evil")

    with FaultServer(DATA) as server, engine() as fetching:
        server.behave = talkative
        for _ in range(3):
            answer = fetching.ask(target(server.url()), 4).done.result(10)
            assert answer.start == DATA[:4]
            time.sleep(0.1)


class AfterGroup1(MemorySink):
    """What lies behind group 1 is written when somebody hears of that."""

    def __init__(self) -> None:
        super().__init__()
        self.heard = threading.Event()

    def write(self, offset: int, data: memoryview) -> None:
        if offset >= GROUPS[1][0][1]:
            self.heard.wait(1)  # nobody hears of it while all threads wait here
        super().write(offset, data)


def test_a_group_is_told_of_when_its_bytes_are_there_and_after_those_before_it() -> None:
    """Whichever threads bring them, and however long somebody takes to hear it."""
    sink, there, order = AfterGroup1(), list[bool](), list[int]()

    def slowly(group: int) -> None:
        there.append(
            all(sink.data[start:stop] == DATA[start:stop] for start, stop in GROUPS[group])
        )
        if group == 1:
            sink.heard.set()
            until(lambda: sink.data[5_000:] == DATA[5_000:])
            threading.Event().wait(0.1)  # for whoever would tell of the others
        order.append(group)

    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        fetching.download(answer, GROUPS, sink, slowly).done.result(20)
    assert all(there)
    assert order == list(range(len(GROUPS)))
