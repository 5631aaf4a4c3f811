"""A range downloader for loopback only, with short timeouts."""

import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Self

from lorax_async.formats.spans import ByteRange, SpanSet
from lorax_async.http.client import Endpoint, Network
from lorax_async.http.failures import RetryPolicy
from lorax_async.http.range_downloader import RangeDownloader
from lorax_async.http.ranges import PieceSizes
from lorax_async.http.settings import Address, HttpSettings, Rules, Timeouts
from lorax_async.http.target import ProbeResult, Target
from lorax_async.urls import Url, parse_url

DATA = random.Random(5).randbytes(400_000)
GROUPS: list[list[ByteRange]] = [
    [],
    [(5_000, 105_000)],
    [(205_000, 305_000)],
    [(105_000, 205_000), (305_000, 330_000)],
    [(330_000, 400_000)],
]
"""Layers 0 to 2, of which 1 lies after 2, and something after the layers; before them a header."""

PATIENCE = Timeouts(connect=0.6, read=0.4, slowest=5_000, over=0.3, idle=5.0)
PATIENT = Timeouts(read=20, slowest=1, stuck=60)
RETRIES = RetryPolicy(attempts=3, base=0.01, most=0.02, obeyed=2.0)


class Anywhere:
    """Rules for loopback servers of the tests."""

    def allows(self, url: Url, hop: int) -> bool:
        return True

    def allows_address(self, url: Url, address: Address) -> bool:
        return address.is_loopback


class LoopbackOnly(Network):
    """The machine's network; fails the test for addresses other than loopback."""

    def connect(
        self, endpoint: Endpoint, timeout: float, opened: Callable[[socket.socket], None]
    ) -> socket.socket:
        assert ip_address(endpoint.address).is_loopback, endpoint
        return super().connect(endpoint, timeout, opened)


@dataclass
class PretendNetwork(LoopbackOnly):
    """Maps names to addresses, and addresses to loopback ports; `peers` are reported addresses."""

    names: dict[str, list[str]] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    peers: dict[str, str] = field(default_factory=dict)
    connected: list[str] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        self.resolved.append(host)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [Endpoint(socket.AF_INET, address, port) for address in self.names[host]]

    def connect(
        self, endpoint: Endpoint, timeout: float, opened: Callable[[socket.socket], None]
    ) -> socket.socket:
        self.connected.append(endpoint.address)
        self._last = endpoint.address
        port = self.ports[endpoint.address]
        return super().connect(Endpoint(socket.AF_INET, "127.0.0.1", port), timeout, opened)

    def peer(self, connected: socket.socket) -> str:
        return self.peers.get(self._last, self._last)


_ONE_MORE = bytes(range(1, 256)) + b"\xff"


class MemorySink:
    """Keeps written bytes and the count per byte; calls `before(offset, nbytes)` first."""

    def __init__(
        self, nbytes: int = len(DATA), before: Callable[[int, int], object] = lambda *_: None
    ) -> None:
        self.data, self.times = bytearray(nbytes), bytearray(nbytes)
        self.before = before

    def write(self, offset: int, data: memoryview) -> None:
        self.before(offset, len(data))
        stop = offset + len(data)
        self.data[offset:stop] = data
        self.times[offset:stop] = self.times[offset:stop].translate(_ONE_MORE)


class Engine(RangeDownloader):
    """A range downloader that closes at the end of a `with` block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def engine(connections: int = 4, *, network: Network | None = None, **settings: Any) -> Engine:
    given = {"timeouts": PATIENCE, "retries": RETRIES, "proxies": {}, **settings}
    given.setdefault("sizes", PieceSizes(least=10_000, most=1 << 20))
    return Engine(HttpSettings(connections=connections, **given), network=network or LoopbackOnly())


def target(url: str, headers: dict[str, str] | None = None, rules: Rules | None = None) -> Target:
    return Target(parse_url(url), "weights", headers or {}, rules or Anywhere())


def asked(engine: RangeDownloader, url: str, nbytes: int = 5_000) -> ProbeResult:
    return engine.probe(target(url), nbytes, timeout=20).done.result(25)


def fetched(
    engine: RangeDownloader,
    answer: ProbeResult,
    *,
    have: Any = (),
    timeout: float = 20,
    **before: Any,
) -> tuple[MemorySink, list[int]]:
    """Download to the end; raise what the download raises."""
    sink, order = MemorySink(**before), list[int]()
    here = SpanSet(have)
    missing = [[gap for span in group for gap in here.missing(*span)] for group in GROUPS]
    job = engine.download(answer, missing, sink.write, order.append, timeout=timeout)
    job.done.result(timeout + 5)
    return sink, order


def check(sink: MemorySink, order: list[int]) -> None:
    """Assert that exactly the groups' bytes came, right and once, and each was reported."""
    wanted = bytearray(len(DATA))
    for start, stop in (span for group in GROUPS for span in group):
        assert sink.data[start:stop] == DATA[start:stop]
        wanted[start:stop] = b"\1" * (stop - start)
    assert sink.times == wanted
    assert sorted(order) == list(range(len(GROUPS)))


def took(begun: float) -> float:
    return time.monotonic() - begun
