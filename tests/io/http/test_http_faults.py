"""Everything a server can do wrong ends in bytes that are right, or in one typed error."""

from __future__ import annotations

import threading
import time

import pytest
from fault_server import ETAG, Asked, Behaviour, Client, FaultServer
from fetching import DATA, asked, check, engine, fetched, took

from lorax_async.core.retries import Retries
from lorax_async.errors import (
    AccessDeniedError,
    AdapterNotFoundError,
    FetchError,
    FetchTimeoutError,
    IntegrityError,
    LoraxError,
)

pytestmark = pytest.mark.usefixtures("nothing_left", "no_socket_left")

KEY = b"x" * 30


class Sometimes:
    """Misbehaves on the first `times` range requests after the first answer."""

    def __init__(self, server: FaultServer, fault: Behaviour, times: int = 1 << 30) -> None:
        self.server = server
        self.fault = fault
        self.left = times
        self._lock = threading.Lock()

    def __call__(self, asked: Asked, client: Client) -> None:
        with self._lock:
            first = asked.span == (0, 5_000)
            wrong = not first and self.left > 0
            self.left -= wrong
        (self.fault if wrong else self.server.right)(asked, client)


def right_head(asked: Asked, client: Client) -> bytes:
    """The head of a good answer; returns the body that should follow."""
    assert asked.span is not None
    start, stop = asked.span
    client.part(start, stop, len(DATA), f"ETag: {ETAG}")
    return DATA[start:stop]


def truncated(asked: Asked, client: Client) -> None:
    body = right_head(asked, client)
    client.send(body[: len(body) // 2])
    raise ConnectionError


def reset(asked: Asked, client: Client) -> None:
    body = right_head(asked, client)
    client.send(body[: len(body) // 2])
    time.sleep(0.02)
    client.reset()


def stall(asked: Asked, client: Client) -> None:
    client.send(right_head(asked, client)[:100])
    client.stall()


def drip(asked: Asked, client: Client) -> None:
    client.drip(right_head(asked, client))


def silent(asked: Asked, client: Client) -> None:
    client.stall()


def slow_head(asked: Asked, client: Client) -> None:
    client.drip(b"HTTP/1.1 206 Partial Content\r\nX: " + b"y" * 60_000, 0.005)


def gone(asked: Asked, client: Client) -> None:
    client.reset()


def unavailable(asked: Asked, client: Client) -> None:
    client.head("503 Service Unavailable", "Content-Length: 0", "Retry-After: 0")


def broken(asked: Asked, client: Client) -> None:
    client.head("500 Oops", "Content-Length: 4")
    client.send(b"oops")


PASSING = [truncated, reset, stall, drip, silent, slow_head, gone, unavailable, broken]


@pytest.mark.parametrize("fault", PASSING, ids=lambda f: f.__name__)
def test_what_passes_is_overcome(fault: Behaviour) -> None:
    with FaultServer(DATA) as server, engine() as fetching:
        server.behave = Sometimes(server, fault, times=2)
        answer = asked(fetching, server.url())
        check(*fetched(fetching, answer))


ENDS: dict[str, type[LoraxError]] = {
    "truncated": FetchError,
    "reset": FetchError,
    "stall": FetchTimeoutError,
    "drip": FetchTimeoutError,
    "silent": FetchTimeoutError,
    "slow_head": FetchTimeoutError,
    "gone": FetchError,
    "unavailable": FetchError,
    "broken": FetchError,
}


@pytest.mark.parametrize("fault", PASSING, ids=lambda f: f.__name__)
def test_what_stays_is_one_typed_error(fault: Behaviour) -> None:
    retries = Retries(attempts=2, base=0.01, most=0.02)
    with FaultServer(DATA) as server, engine(2, retries=retries) as fetching:
        server.behave = Sometimes(server, fault)
        answer = asked(fetching, server.url())
        begun = time.monotonic()
        with pytest.raises(FetchError) as caught:
            fetched(fetching, answer)
        assert took(begun) < 8
        assert type(caught.value) is ENDS[fault.__name__]
        assert caught.value.retryable
        assert caught.value.stage == "fetch"
        assert "127.0.0.1" in caught.value.problem


def lies(*fields: str, status: str = "206 Partial Content", body: bytes = b"") -> Behaviour:
    def answer(asked: Asked, client: Client) -> None:
        client.head(status, *fields)
        client.send(body)

    return answer


def wrong_start(asked: Asked, client: Client) -> None:
    assert asked.span is not None
    start, stop = asked.span
    client.part(start + 1, stop + 1, len(DATA), f"ETag: {ETAG}")
    client.send(DATA[start:stop])


def other_etag(asked: Asked, client: Client) -> None:
    assert asked.span is not None
    start, stop = asked.span
    client.part(start, stop, len(DATA), 'ETag: "v2"')
    client.send(DATA[start:stop])


def other_length(asked: Asked, client: Client) -> None:
    assert asked.span is not None
    start, stop = asked.span
    client.part(start, stop, len(DATA), f"ETag: {ETAG}", length=stop - start - 1)
    client.send(DATA[start : stop - 1])


FINAL = {
    "wrong Content-Range": (wrong_start, IntegrityError, "were asked for"),
    "no Content-Range": (lies("Content-Length: 0"), IntegrityError, "without a range"),
    "another file": (other_etag, IntegrityError, "changed"),
    "length and range differ": (other_length, IntegrityError, "length"),
    "changed, whole": (
        lies("Content-Length: 400000", 'ETag: "v2"', status="200 OK"),
        IntegrityError,
        "changed",
    ),
    "another size": (
        lies("Content-Length: 399999", f"ETag: {ETAG}", status="200 OK"),
        IntegrityError,
        "changed",
    ),
    "412": (lies("Content-Length: 0", status="412 No"), IntegrityError, "changed"),
    "416": (
        lies("Content-Length: 0", "Content-Range: bytes */7", status="416 No"),
        IntegrityError,
        "changed",
    ),
    "coded": (
        lies("Content-Length: 99", "Content-Encoding: gzip", "Content-Range: bytes 0-98/400000"),
        FetchError,
        "coded",
    ),
    "401": (lies("Content-Length: 0", status="401 No"), AccessDeniedError, "401"),
    "403": (lies("Content-Length: 0", status="403 No"), AccessDeniedError, "403"),
    "404": (lies("Content-Length: 0", status="404 No"), AdapterNotFoundError, "404"),
    "418": (lies("Content-Length: 0", status="418 No"), FetchError, "418"),
    "a day": (
        lies("Content-Length: 0", "Retry-After: 86400", status="429 No"),
        FetchError,
        "429",
    ),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_is_wrong_for_good_ends_at_once(name: str) -> None:
    fault, kind, words = FINAL[name]
    with FaultServer(DATA) as server, engine(2) as fetching:
        server.behave = Sometimes(server, fault)
        answer = asked(fetching, server.url())
        with pytest.raises(LoraxError, match=words) as caught:
            fetched(fetching, answer)
        assert type(caught.value) is kind
        assert caught.value.stage == "fetch"
        assert len(server.asked) <= 3, "the first, and one per connection"
        assert caught.value.retry_after == (86_400.0 if name == "a day" else None)


HEADS = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
    "HTTP/2": b"HTTP/2 200\r\n\r\n",
    "binary": bytes(range(256)) + b"\r\n\r\n",
    "control characters": b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n",
    "bare CR": b"HTTP/1.1 200 OK\r\nX: a\rY: b\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 4\n\n\r\n\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
    "space before the colon": b"HTTP/1.1 200 OK\r\nContent-Length : 4\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\n",
    "length and chunks": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n",
    "coded transfer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "length in hex": b"HTTP/1.1 200 OK\r\nContent-Length: 0x10\r\n\r\n",
    "a minus": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "many fields": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    "one huge field": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
    "no end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 40_000,
    "interim for ever": b"HTTP/1.1 100 Continue\r\n\r\n" * 50,
    "switching": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
}


@pytest.mark.parametrize("name", HEADS)
def test_hostile_heads_are_refused(name: str) -> None:
    def hostile(asked: Asked, client: Client) -> None:
        client.send(HEADS[name])
        client.stall()

    with FaultServer(DATA, hostile) as server, engine() as fetching:
        begun = time.monotonic()
        with pytest.raises(FetchError) as caught:
            asked(fetching, server.url())
        assert took(begun) < 3
        assert type(caught.value) is FetchError, "refused, and not waited for"
        assert "y" * 20 not in str(caught.value)


def test_spaces_without_end_take_no_time() -> None:
    def spaces(asked: Asked, client: Client) -> None:
        client.send(b"HTTP/1.1 200 OK\r\nX:" + b" " * 60_000 + b"\x01\r\n\r\n")
        client.stall()

    with FaultServer(DATA, spaces) as server, engine() as fetching:
        begun = time.monotonic()
        with pytest.raises(FetchError, match="malformed"):
            asked(fetching, server.url())
        assert took(begun) < 1


def test_interim_responses_are_passed_over() -> None:
    def early(asked: Asked, client: Client) -> None:
        client.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
        server.right(asked, client)

    with FaultServer(DATA) as server, engine() as fetching:
        server.behave = early
        check(*fetched(fetching, asked(fetching, server.url())))
