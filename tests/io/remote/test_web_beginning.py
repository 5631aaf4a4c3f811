"""How much of weights is asked before their version is known."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest
from fault_server import ETAG, Asked, Client, FaultServer
from fetching import Anywhere, LoopbackOnly

from lorax_async.adapter import AdapterRef
from lorax_async.config import Limits
from lorax_async.io.http.engine import RangeEngine
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.remote.beginning import FIRST_BYTES
from lorax_async.io.remote.web import WebLocator

HEADER = json.dumps({"a": {"dtype": "U8", "shape": [400_000], "data_offsets": [0, 400_000]}})
WEIGHTS = len(HEADER).to_bytes(8, "little") + HEADER.encode() + bytes(400_000)
CONFIG = b"{}"


class Hurried(threading.local):
    """A clock by which everything takes long. How often other threads look at theirs is chance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.2
        return self.now


@pytest.mark.parametrize(
    ("etag", "least", "most"),
    [(ETAG, 8 + len(HEADER), FIRST_BYTES - 1), (None, FIRST_BYTES, FIRST_BYTES)]
    + [(tag, FIRST_BYTES, FIRST_BYTES) for tag in ('W/"weak"', "unquoted")],
    ids=["strong", "none", "weak", "unquoted"],
)
def test_what_is_part_of_the_version_is_waited_for(etag: str | None, least: int, most: int) -> None:
    def answer(asked: Asked, client: Client) -> None:
        data = CONFIG if "config" in asked.line else WEIGHTS
        tags = [f"ETag: {etag}"] if etag else []
        if asked.span is None:
            client.head("200 OK", f"Content-Length: {len(data)}", *tags)
            client.send(data)
        else:
            start, stop = asked.span[0], min(asked.span[1], len(data))
            client.part(start, stop, len(data), *tags)
            client.send(data[start:stop])

    async def found(server: FaultServer) -> int:
        with RangeEngine(HttpSettings(), network=LoopbackOnly(), clock=Hurried()) as engine:
            located = await WebLocator(engine, Anywhere(), Limits()).locate(
                AdapterRef(server.url("/folder/"))
            )
            _, weights = located.files
            assert weights.answer is not None
            return len(weights.answer.start)

    with FaultServer(WEIGHTS, answer) as server:
        assert least <= asyncio.run(found(server)) <= most
