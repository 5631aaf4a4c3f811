"""What a server can do wrong with one answer: behaviours for `FaultyWorld`."""

from __future__ import annotations

import gzip
import time
from email.utils import formatdate

from fault_server import Asked, Client, Hangup
from fault_world import Fault, FaultyWorld

BOMB = gzip.compress(bytes(1 << 20))


def begin(world: FaultyWorld, asked: Asked, client: Client, *, etag: str | None = None) -> bytes:
    """The head of a good answer; returns the body that should follow."""
    data, tag = world.content(asked.target)
    tag = etag or tag
    if asked.span is None:
        client.head("200 OK", f"Content-Length: {len(data)}", f"ETag: {tag}")
        return data
    start, stop = asked.span[0], min(asked.span[1], len(data))
    client.part(start, stop, len(data), f"ETag: {tag}")
    return data[start:stop]


def truncated(world: FaultyWorld, asked: Asked, client: Client) -> None:
    body = begin(world, asked, client)
    client.send(body[: len(body) // 2])
    raise Hangup


def reset(world: FaultyWorld, asked: Asked, client: Client) -> None:
    body = begin(world, asked, client)
    client.send(body[: len(body) // 2])
    time.sleep(0.02)
    client.reset()


def short_without_length(world: FaultyWorld, asked: Asked, client: Client) -> None:
    data, _ = world.content(asked.target)
    client.head("200 OK", "Connection: close")
    client.send(data[: len(data) // 2])
    raise Hangup


def long_without_length(world: FaultyWorld, asked: Asked, client: Client) -> None:
    data, _ = world.content(asked.target)
    client.head("200 OK", "Connection: close")
    client.send(data + b" and then some")
    raise Hangup


def wrong_bytes(world: FaultyWorld, asked: Asked, client: Client) -> None:
    body = begin(world, asked, client)
    client.send(body[:-1] + bytes([body[-1] ^ 1]))


def other_etag(world: FaultyWorld, asked: Asked, client: Client) -> None:
    client.send(begin(world, asked, client, etag='"another"'))


def wrong_range(world: FaultyWorld, asked: Asked, client: Client) -> None:
    data, etag = world.content(asked.target)
    assert asked.span is not None
    start, stop = asked.span[0], min(asked.span[1], len(data))
    client.part(start + 1, stop + 1, len(data), f"ETag: {etag}")
    client.send(data[start:stop])


def other_size(world: FaultyWorld, asked: Asked, client: Client) -> None:
    """One byte more than there was."""
    data, etag = world.content(asked.target)
    world.answer(asked, client, data + b"!", etag)


def more_than_said(world: FaultyWorld, asked: Asked, client: Client) -> None:
    client.send(begin(world, asked, client) + b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n!")


def whole_in_place_of_range(world: FaultyWorld, asked: Asked, client: Client) -> None:
    data, etag = world.content(asked.target)
    client.head("200 OK", f"Content-Length: {len(data)}", f"ETag: {etag}")
    client.send(data)


def whole_without_length(world: FaultyWorld, asked: Asked, client: Client) -> None:
    client.head("200 OK", "Connection: close")
    client.send(world.content(asked.target)[0])
    raise Hangup


def bomb(world: FaultyWorld, asked: Asked, client: Client) -> None:
    fields = [f"Content-Length: {len(BOMB)}", "Content-Encoding: gzip"]
    if asked.span is None:
        client.head("200 OK", *fields)
    else:
        start = asked.span[0]
        place = f"Content-Range: bytes {start}-{start + len(BOMB) - 1}/{1 << 20}"
        client.head("206 Partial Content", *fields, place)
    client.send(BOMB)


def silent(world: FaultyWorld, asked: Asked, client: Client) -> None:
    client.stall()


def stalled(world: FaultyWorld, asked: Asked, client: Client) -> None:
    body = begin(world, asked, client)
    client.send(body[: len(body) // 2])
    client.stall()


def dripping(world: FaultyWorld, asked: Asked, client: Client) -> None:
    """One byte per second."""
    client.drip(begin(world, asked, client), 1.0)


def status(line: str, *fields: str) -> Fault:
    def answer(world: FaultyWorld, asked: Asked, client: Client) -> None:
        client.head(line, "Content-Length: 0", *fields)

    return answer


def in_an_hour() -> Fault:
    """Unavailable until a date."""

    def answer(world: FaultyWorld, asked: Asked, client: Client) -> None:
        date = formatdate(time.time() + 3_600, usegmt=True)
        client.head("503 Unavailable", "Content-Length: 0", f"Retry-After: {date}")

    return answer


def refused_range(world: FaultyWorld, asked: Asked, client: Client) -> None:
    """416, and yet it says that it has these bytes."""
    size = len(world.content(asked.target)[0])
    client.head("416 No", "Content-Length: 0", f"Content-Range: bytes */{size}")


def redirected(to: str) -> Fault:
    return status("302 Found", f"Location: {to}")


def redirected_for_ever(world: FaultyWorld, asked: Asked, client: Client) -> None:
    client.head("302 Found", "Content-Length: 0", f"Location: {asked.target}")


def tagged(etag: str) -> Fault:
    """Right, with that ETag."""

    def answer(world: FaultyWorld, asked: Asked, client: Client) -> None:
        client.send(begin(world, asked, client, etag=etag))

    return answer
