"""Responses as `Connection` reads them, compared with `http.client`."""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse

import pytest

from lorax_async.errors import FetchError
from lorax_async.http.connection import Connection
from lorax_async.http.failures import RetryableError
from lorax_async.http.settings import Timeouts
from lorax_async.urls import Origin

ORIGIN = Origin("http", "files.test", 80)
Read = tuple[int, bytes, dict[str, str]]


@contextmanager
def sending(parts: list[bytes]) -> Iterator[socket.socket]:
    """Yield a socket on which these parts come, one after the other, and then the end."""
    ours, theirs = socket.socketpair()

    def send() -> None:
        with theirs, suppress(OSError):
            for part in parts:
                theirs.sendall(part)
                time.sleep(0.0005)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with ours:
            yield ours
    finally:
        sender.join()


def read_here(parts: list[bytes], draw: random.Random) -> tuple[Read, bool]:
    """Return the response, and whether the connection may carry another one."""
    with sending(parts) as ours:
        connection = Connection(ORIGIN, Timeouts(read=5.0), time.monotonic)
        connection.attach(ours)
        connection.set_timeout(5.0)
        head = connection.receive_head()
        body = bytearray()
        while count := connection.fill(view := memoryview(bytearray(draw.choice([1, 7, 90_000])))):
            body += view[:count]
        assert connection.body_ended
        return (head.status, bytes(body), dict(head.fields)), connection.is_reusable


def read_by_http_client(parts: list[bytes]) -> tuple[Read, bool]:
    with sending(parts) as ours, HTTPResponse(ours, method="GET") as response:
        response.begin()
        body = response.read()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return (response.status, body, fields), not response.will_close


def response(draw: random.Random) -> bytes:
    """Return a well-formed response: its body ends by length, by chunks or with the connection."""
    body = draw.randbytes(draw.choice([0, 1, 100, 9_000, 200_000]))
    line = draw.choice([b"\r\n", b"\n"])
    fields = [b'ETag: "a: b"', b"x-empty:", b"X-Spaces:\t  a  b \t", b"Server: caf\xe9 (x)"]
    form = draw.choice(["length", "chunks", "end"])
    if form == "length":
        fields.append(b"content-LENGTH: %d" % len(body))
    elif form == "chunks":
        fields.append(b"Transfer-Encoding: Chunked")
        coded = b""
        while body:
            size = draw.randint(1, len(body))
            coded += b"%x%s\r\n" % (size, draw.choice([b"", b";a=b", b" "]))
            coded, body = coded + body[:size] + b"\r\n", body[size:]
        body = coded + b"000\r\n" + draw.choice([b"", b"X-Trailer: y\r\n"]) + b"\r\n"
    fields += draw.choice([[], [b"Connection: close"], [b"Connection: keep-alive"]])
    draw.shuffle(fields)
    status = draw.choice([b"HTTP/1.1 200 OK", b"HTTP/1.0 206 ", b"HTTP/1.1 418"])
    return line.join([status, *fields, b"", b""]) + body


@pytest.mark.parametrize("seed", range(60))
def test_a_response_is_what_http_client_reads(seed: int) -> None:
    draw = random.Random(seed)
    whole = response(draw)
    cuts = sorted(draw.sample(range(len(whole)), min(len(whole), draw.choice([0, 1, 30]))))
    parts = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    (status, body, fields), reusable = read_here(parts, draw)
    (other_status, other_body, other_fields), other_reusable = read_by_http_client(parts)
    assert (status, body, reusable) == (other_status, other_body, other_reusable)
    assert fields == {name: value.strip() for name, value in other_fields.items()}


@pytest.mark.parametrize("seed", range(60))
def test_what_http_client_refuses_is_refused(seed: int) -> None:
    """A response in which bytes were exchanged is an error, or the same as there."""
    draw = random.Random(seed)
    whole = bytearray(response(draw))
    at = draw.randrange(min(len(whole), 300))
    whole[at : at + draw.choice([0, 1, 20])] = draw.choice([b"", b"\x00", b"\r\n", b"zz", b"-1"])
    try:
        read, _ = read_here([bytes(whole)], draw)
    except (FetchError, RetryableError, ConnectionError):
        return
    assert read[:2] == read_by_http_client([bytes(whole)])[0][:2]
