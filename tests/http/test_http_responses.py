"""Whatever a server answers ends in bytes that are right, or in one typed error."""

import gc
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from fault_server import ETAG, Asked, Behaviour, Client, FaultServer, Hangup, begin
from range_downloads import (
    DATA,
    GROUPS,
    PATIENCE,
    PATIENT,
    Engine,
    LoopbackOnly,
    MemorySink,
    asked,
    check,
    engine,
    fetched,
    target,
    took,
)

from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
    LoraxError,
)
from lorax_async.formats.spans import ByteRange
from lorax_async.http.failures import FileChangedError, RetryPolicy
from lorax_async.http.range_downloader import RangeDownloader
from lorax_async.http.settings import HttpSettings
from lorax_async.http.target import ProbeResult

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

TAG, EMPTY = f"ETag: {ETAG}", "Content-Length: 0"


def sometimes(server: FaultServer, fault: Behaviour, times: int = 1 << 30) -> Behaviour:
    """Wrong for the first `times` range requests after the first answer."""
    faults = itertools.count()

    def behave(asked: Asked, client: Client) -> None:
        wrong = asked.span != (0, 5_000) and next(faults) < times
        (fault if wrong else server.right)(asked, client)

    return behave


@pytest.mark.parametrize("have", [[], [(0, 100_000), (200_000, 290_000)], [(0, len(DATA))]])
def test_every_missing_byte_comes_once(have: list[ByteRange]) -> None:
    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        assert answer.start == DATA[:5_000]
        assert (answer.validators.size, answer.ranges) == (len(DATA), True)
        sink, order = fetched(fetching, answer, have=have)
        assert sorted(order) == [0, 1, 2, 3, 4]
        came = [n for span in server.spans[1:] if span for n in range(*span)]
        wanted = {n for group in GROUPS for span in group for n in range(*span)}
        assert len(came) == len(set(came))
        assert set(came) == wanted - {n for span in have for n in range(*span)}
        assert all(sink.data[n] == DATA[n] for n in came)
        assert all(client.number < 4 for client in server.clients), "connections are used again"
        assert all(each.fields["if-range"] == ETAG for each in server.asked[1:])
        assert all(each.fields["accept-encoding"] == "identity" for each in server.asked)


def whole(asked: Asked, client: Client) -> None:
    client.head("200 OK", f"Content-Length: {len(DATA)}", TAG)
    client.send(DATA)


def chunked(asked: Asked, client: Client) -> None:
    client.head("200 OK", "Transfer-Encoding: chunked", TAG)
    for n in range(0, len(DATA), 7_001):
        part = DATA[n : n + 7_001]
        client.send(f"{len(part):X};name=value\r\n".encode() + part + b"\r\n")
    client.send(b"0\r\nTrailer: x\r\n\r\n")


@pytest.mark.parametrize("answer", [whole, chunked])
@pytest.mark.parametrize("from_the_first", [True, False])
def test_a_server_that_sends_all_or_nothing(answer: Behaviour, from_the_first: bool) -> None:
    """The whole file comes in one stream, even if the server served ranges at first."""
    with FaultServer(DATA) as server, engine() as fetching:
        server.behave = answer if from_the_first else sometimes(server, answer)
        first = asked(fetching, server.url())
        assert first.start == DATA[:5_000]
        check(*fetched(fetching, first))


def test_the_whole_file_comes_while_a_part_of_it_is_written() -> None:
    """The part is fetched by whoever writes it, and no byte is written twice."""
    first, other, numbers = threading.Event(), threading.Event(), itertools.count()

    def write(_offset: int, _nbytes: int) -> None:
        (other if first.is_set() else first).set()
        other.wait(10)

    def answer(asked: Asked, client: Client) -> None:
        if not next(numbers):
            server.right(asked, client)
        else:
            first.wait(10)
            whole(asked, client)

    with FaultServer(DATA) as server, engine(timeouts=PATIENT) as fetching:
        server.behave = sometimes(server, answer)
        check(*fetched(fetching, asked(fetching, server.url()), before=write))


@pytest.mark.parametrize("form", [whole, chunked])
def test_a_whole_stream_that_breaks_is_resumed(form: Behaviour) -> None:
    """By a request that another version of the file would fail."""
    broken: list[int] = []
    with FaultServer(DATA) as server, engine() as fetching:

        def behave(asked: Asked, client: Client) -> None:
            if asked.span is None and not broken:
                broken.append(1)
                length = form is whole
                client.head("200 OK", f"Content-Length: {len(DATA)}" if length else CHUNKED, TAG)
                client.send((b"" if length else b"40000\r\n") + DATA[:150_000])
                raise Hangup
            form(asked, client)

        server.behave = behave
        check(*fetched(fetching, asked(fetching, server.url())))
        assert broken
        assert server.asked[-1].fields["if-match"] == ETAG


def test_small_files_whole() -> None:
    with FaultServer(DATA[:3_000]) as server, engine() as fetching:
        small = target(server.url())
        answer = fetching.probe(small, 3_000, ranged=False).done.result(10)
        assert answer.start == DATA[:3_000]
        assert server.asked[0].span is None
        with pytest.raises(FetchError, match="more than the 2,999 bytes") as caught:
            fetching.probe(small, 2_999, ranged=False).done.result(10)
        assert not caught.value.retryable
        assert fetching.probe(small, 9_000).done.result(10).start == DATA[:3_000]


@pytest.mark.parametrize("connections", [1, 4])
def test_interim_responses_and_ends_between_requests_cost_no_failure(connections: int) -> None:
    """The server ends each connection when it is asked once more."""

    def once(asked: Asked, client: Client) -> None:
        if client.requests > 1:
            client.reset()
        for status in ("100 Continue", "103 Early Hints", "102 Processing"):
            client.head(status, "Link: </x>")
        server.right(asked, client)

    with FaultServer(DATA, once) as server, engine(connections) as fetching:
        for _ in range(2):
            check(*fetched(fetching, asked(fetching, server.url())))
        assert max(client.requests for client in server.clients) == 2, "they were used again"


def test_a_wait_beyond_the_deadline_is_not_waited() -> None:
    with FaultServer(DATA, lies(EMPTY, "Retry-After: 2", status="503 L")) as server:
        with engine() as fetching:
            begun = time.monotonic()
            with pytest.raises(FetchError, match="503") as caught:
                fetching.probe(target(server.url()), 9, timeout=1.5).done.result(5)
        assert caught.value.retry_after == 2.0
        assert took(begun) < 1


def test_a_group_is_reported_once_its_bytes_are_there() -> None:
    sink, order = MemorySink(), list[int]()

    def arrived(group: int) -> None:
        order.append(group)
        assert all(sink.data[start:stop] == DATA[start:stop] for start, stop in GROUPS[group])

    with FaultServer(DATA) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        fetching.download(answer, GROUPS, sink.write, arrived).done.result(20)
    assert sorted(order) == list(range(len(GROUPS)))


def lies(*fields: str, status: str = "206 Partial Content") -> Behaviour:
    return lambda _, client: client.head(status, *fields)


def good_head(then: Callable[[Client, bytes], object]) -> Behaviour:
    """What follows is given the body that should."""

    def answer(asked: Asked, client: Client) -> None:
        then(client, begin(asked, client, DATA, TAG))

    return answer


def truncated(client: Client, body: bytes) -> None:
    client.send(body[: len(body) // 2])
    client.hang_up()


def stalls(client: Client, body: bytes) -> None:
    client.send(body[:100])
    client.stall()


def slow_head(asked: Asked, client: Client) -> None:
    client.drip(b"HTTP/1.1 206 Partial Content\r\nX: " + b"y" * 60_000, 0.005)


def half_a_head(asked: Asked, client: Client) -> None:
    """Which is none, though no byte of a body would be missing."""
    client.send(b"HTTP/1.1 200 OK\r\nETag: " + ETAG.encode() + b"\r\n")
    client.hang_up()


FAULTS: dict[str, tuple[Behaviour, type[LoraxError]]] = {
    "truncated": (good_head(truncated), FetchError),
    "stall": (good_head(stalls), FetchTimeoutError),
    "drip": (good_head(Client.drip), FetchTimeoutError),
    "slow head": (slow_head, FetchTimeoutError),
    "half a head": (half_a_head, FetchError),
    "no answer": (lambda _, client: client.hang_up(), FetchError),
    "reset": (lambda _, client: client.reset(), FetchError),
    "unavailable": (lies(EMPTY, "Retry-After: 0", status="503 Unavailable"), FetchError),
}


@pytest.mark.parametrize(("fault", "kind"), FAULTS.values(), ids=FAULTS)
def test_a_fault_that_passes_is_overcome_and_others_are_typed_errors(
    fault: Behaviour, kind: type[LoraxError]
) -> None:
    hasty = replace(PATIENCE, read=0.2, over=0.2)
    for attempts, times in ((3, 2), (2, 1 << 30)):
        retries = RetryPolicy(attempts=attempts, base=0.01, most=0.02)
        with FaultServer(DATA) as server, engine(2, timeouts=hasty, retries=retries) as fetching:
            answer = asked(fetching, server.url())
            server.behave = sometimes(server, fault, times)
            if attempts == 3:
                check(*fetched(fetching, answer))
                continue
            begun = time.monotonic()
            with pytest.raises(FetchError) as caught:
                fetched(fetching, answer)
            assert took(begun) < 8
    assert type(caught.value) is kind
    assert (caught.value.retryable, caught.value.stage) == (True, "fetch")
    assert "127.0.0.1" in caught.value.problem


def whole_of(nbytes: int, etag: str = ETAG) -> Behaviour:
    return lies(f"Content-Length: {nbytes}", f"ETag: {etag}", status="200 OK")


def sends(data: bytes) -> Behaviour:
    def answer(asked: Asked, client: Client) -> None:
        client.send(data)
        client.stall()

    return answer


def _shifted(*fields: str, by: int = 0, cut: int = 0) -> Behaviour:
    """A part that says it begins `by` later, or ends `cut` sooner."""

    def answer(asked: Asked, client: Client) -> None:
        assert asked.span is not None
        start, stop = asked.span
        client.part(start + by, stop + by, len(DATA), *fields, length=stop - start - cut)
        client.send(DATA[start : stop - cut])

    return answer


OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", "Transfer-Encoding: chunked"
HOSTILE: dict[str, tuple[Behaviour, type[LoraxError], str]] = {
    "wrong range": (_shifted(TAG, by=1), IntegrityError, "were requested"),
    "no range": (lies(EMPTY), IntegrityError, "without a range"),
    "another file": (_shifted('ETag: "v2"'), FileChangedError, "changed"),
    "length and range differ": (_shifted(TAG, cut=1), IntegrityError, "length"),
    "changed, whole": (whole_of(400_000, '"v2"'), FileChangedError, "changed"),
    "another size": (whole_of(399_999), FileChangedError, "changed"),
    "412": (lies(EMPTY, status="412 No"), FileChangedError, "changed"),
    "416": (lies(EMPTY, "Content-Range: bytes */7", status="416 No"), FileChangedError, "changed"),
    "coded": (lies(EMPTY, "Content-Encoding: gzip"), FetchError, "content coding"),
    "101": (lies(EMPTY, status="101 Switching Protocols"), FetchError, "101"),
    "401": (lies(EMPTY, status="401 No"), AccessDeniedError, "401"),
    "403": (lies(EMPTY, status="403 No"), AccessDeniedError, "403"),
    "404": (lies(EMPTY, status="404 No"), AdapterNotFoundError, "404"),
    "418": (lies(EMPTY, status="418 No"), FetchError, "418"),
    "a day": (lies(EMPTY, "Retry-After: 86400", status="429 No"), FetchError, "429"),
}
HEADS = {
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "binary": bytes(range(256)) + b"\r\n\r\n",
    "HTTP/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "a NUL": OK + b"X: a\x00b\r\n\r\n",
    "a folded field": OK + b"X: a\r\n b\r\n\r\n",
    "no colon": OK + b"X\r\n\r\n",
    "two lengths": OK + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n",
    "length and chunks": OK + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
    "coded transfer": OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "a minus": OK + b"Content-Length: -1\r\n\r\n",
    "many fields": OK + b"X: y\r\n" * 200 + b"\r\n",
    "one huge field": OK + b"X: " + b"y" * 70_000,
    "no end": OK + b"X: " + b"y" * 40_000 + b"\r\nX: " + b"y" * 60_000,
    "interim for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 4_000,
}
"""Refused, and not waited for."""

HOSTILE |= {name: (sends(head), FetchError, "malformed|no end") for name, head in HEADS.items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_wrong_answer_ends_the_download_at_once(name: str) -> None:
    fault, kind, words = HOSTILE[name]
    with FaultServer(DATA) as server, engine(2) as fetching:
        server.behave = sometimes(server, fault)
        answer = asked(fetching, server.url())
        begun = time.monotonic()
        with pytest.raises(LoraxError, match=words) as caught:
            fetched(fetching, answer)
        assert took(begun) < 3
        assert type(caught.value) is kind
        assert caught.value.stage == "fetch"
        assert len(server.asked) <= 3, "the first, and one per connection"
        assert caught.value.retry_after == (86_400.0 if name == "a day" else None)
        assert "y" * 5 not in str(caught.value)


def _without_a_length(asked: Asked, client: Client) -> None:
    client.head("200 OK", TAG)
    client.send(DATA[:200_000])
    raise Hangup


def test_a_file_that_is_shorter_than_it_was_said_to_be() -> None:
    with (
        FaultServer(DATA, _without_a_length) as server,
        engine() as fetching,
        pytest.raises(FetchError, match="before all was sent"),
    ):
        fetched(fetching, asked(fetching, server.url()))
    with FaultServer(DATA[:390_000]) as server, engine() as fetching:
        answer = asked(fetching, server.url())
        with pytest.raises(IntegrityError):
            fetched(fetching, answer)


@pytest.mark.parametrize("size", [b"x", b"", b"-5", b"1" * 70_000])
def test_malformed_chunks(size: bytes) -> None:
    def answer(asked: Asked, client: Client) -> None:
        client.head("200 OK", CHUNKED, TAG)
        client.send(b"3e8\r\n" + DATA[:1_000] + b"\r\n" + size + b"\r\n" + DATA)
        raise Hangup

    with FaultServer(DATA, answer) as server, engine() as fetching:
        with pytest.raises(FetchError) as caught:
            fetching.probe(target(server.url()), 5_000).done.result(10)
        assert "1" * 6 not in str(caught.value), "more ones than a port has"


def test_a_bomb_without_a_length_is_cut_off() -> None:
    sent = [0]

    def endless(asked: Asked, client: Client) -> None:
        client.head("200 OK", CHUNKED)
        while True:
            client.send(b"10000\r\n" + bytes(65_536) + b"\r\n")
            sent[0] += 65_536

    with FaultServer(DATA, endless) as server, engine() as fetching:
        with pytest.raises(FetchError, match="more than the 1,000 bytes"):
            fetching.probe(target(server.url()), 1_000, ranged=False).done.result(10)
        assert sent[0] < 32 << 20


def leave_responses() -> None:
    """Leave responses in every state, with their connections, to the garbage collector."""
    faults = [FAULTS[name][0] for name in ("truncated", "stall", "half a head", "unavailable")]
    faults += [HOSTILE[name][0] for name in ("403", "wrong range", "changed, whole", "SSH")]
    for fault in [*faults, _without_a_length]:
        with FaultServer(DATA) as server, engine(2) as fetching:
            server.behave = sometimes(server, fault)
            with suppress(LoraxError):
                fetched(fetching, asked(fetching, server.url()))
    gc.collect()


def test_responses_that_are_left_say_nothing_when_they_are_collected() -> None:
    """Python 3.13 prints what a finaliser raises; older ones do in development mode."""
    given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = "import test_http_responses; test_http_responses.leave_responses()"
    command = [sys.executable, "-X", "dev", "-c", program]
    done = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_what_comes_unasked_answers_nothing(pause: float) -> None:
    """A second response after the first must not be taken for the next request's."""

    def talkative(asked: Asked, client: Client) -> None:
        server.right(asked, client)
        client.ending.wait(pause)
        with suppress(OSError):
            client.head("206 P", "Content-Length: 4", "Content-Range: bytes 0-3/4")
            client.send(b"evil")

    with FaultServer(DATA, talkative) as server, engine() as fetching:
        for _ in range(3):
            answer = fetching.probe(target(server.url()), 4).done.result(10)
            assert answer.start == DATA[:4]
            time.sleep(0.1)


LARGE = DATA * 4
"""More than is read at once."""


@pytest.mark.parametrize(("is_whole", "at_once"), [(False, 64 << 10), (True, 1 << 20)])
def test_no_more_is_written_after_an_end(is_whole: bool, at_once: int) -> None:
    """Than what was read already, though more bytes lie in the system's buffers."""
    sent, begun, written = threading.Event(), threading.Event(), list[int]()

    def end(_: int, nbytes: int) -> None:
        """The first write waits for all bytes to be on their way, and then cancels the download."""
        written.append(nbytes)
        begun.wait(10)
        sent.wait(10)
        job.cancel(FetchError("enough"))

    def answer(asked: Asked, client: Client) -> None:
        if is_whole:
            client.head("200 OK", f"Content-Length: {len(LARGE)}", TAG)
            client.send(LARGE)
        else:
            server.right(asked, client)
        sent.set()

    with FaultServer(LARGE) as server, engine(1, timeouts=PATIENT) as fetching:
        server.behave = sometimes(server, answer)
        first = asked(fetching, server.url())
        order: list[int] = []
        sink = MemorySink(len(LARGE), before=end)
        job = fetching.download(first, [[(5_000, len(LARGE))]], sink.write, order.append)
        begun.set()
        assert str(job.done.exception(10)) == str(FetchError("enough"))
        assert sum(written) <= at_once
        assert order == []


ASKED = 200_000
NEEDED = 40_000
READ = 49_152
"""Three times 16 KiB: what is read of it at once."""


class Clock:
    """Stands still until it has a `step`, which then passes between two looks."""

    def __init__(self) -> None:
        self.now, self.step = 100.0, 0.0

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@contextmanager
def clocked() -> Iterator[tuple[Engine, Clock]]:
    clock = Clock()
    with Engine(HttpSettings(connections=4), network=LoopbackOnly(), clock=clock) as engine:
        yield engine, clock


def asked_in_part(engine: RangeDownloader, url: str, needed: int = NEEDED) -> ProbeResult:
    return engine.probe(target(url), ASKED, needed_bytes=lambda *_: needed).done.result(10)


def test_what_is_needed_does_not_wait_for_the_rest() -> None:
    go = threading.Event()

    def pauses(asked: Asked, client: Client) -> None:
        client.part(0, ASKED, len(DATA), TAG)
        client.send(DATA[:READ])
        go.wait(10)
        client.send(DATA[READ:ASKED])

    with FaultServer(DATA, pauses) as server, clocked() as (engine, _):
        answer = asked_in_part(engine, server.url())
        assert answer.start == DATA[:READ]
        assert not answer.rest.done()
        go.set()
        assert answer.rest.result(10) == DATA[READ:ASKED]
        server.behave = None
        sink, _ = fetched(engine, answer, have=[(0, ASKED)])
        assert sink.data[ASKED:] == DATA[ASKED:]
        assert len({client.number for client in server.clients}) <= 4, (
            "its connection is used again"
        )


@pytest.mark.parametrize("ending", ["slow", "closed", "cancelled", "engine closed"])
def test_a_rest_that_does_not_come_soon_is_left_out(ending: str) -> None:
    def holds_the_rest(asked: Asked, client: Client) -> None:
        server.behave = None
        client.part(0, ASKED, len(DATA), TAG)
        client.send(DATA[: READ + 100])
        if ending == "closed":
            client.hang_up()
        client.stall()

    with FaultServer(DATA, holds_the_rest) as server, clocked() as (engine, clock):
        place, forever = target(server.url()), 1e9
        job = engine.probe(place, ASKED, timeout=forever, needed_bytes=lambda *_: NEEDED)
        answer = job.done.result(10)
        assert answer.start == DATA[:READ]
        if ending == "slow":
            clock.step = 0.5
        elif ending == "cancelled":
            job.cancel(FetchError("nobody waits"))
        elif ending == "engine closed":
            engine.close()
        rest = answer.rest.result(10)
        clock.step = 0.0
        assert rest == DATA[READ : READ + len(rest)]
        assert job.done.result() is answer
        assert answer.validators.size == len(DATA)
        if ending == "engine closed":
            return
        sink, _ = fetched(engine, answer, have=[(0, READ)])
        assert sink.data[READ:] == DATA[READ:], "the rest comes on other connections"
        assert server.spans[0] == (0, ASKED)
        assert len({client.number for client in server.clients}) > 1


def test_bytes_that_are_needed_are_waited_for() -> None:
    with FaultServer(DATA) as server, clocked() as (engine, clock):
        clock.step = 0.05
        answer = asked_in_part(engine, server.url(), needed=ASKED)
        clock.step = 0.0
        assert answer.start == DATA[:ASKED]
        assert not answer.rest.result(10)
        check(*fetched(engine, answer))
