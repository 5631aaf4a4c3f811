"""The network's calls, behind a seam: tests put another one there, and send nothing anywhere."""

from __future__ import annotations

import socket
from collections.abc import Callable
from ipaddress import ip_address
from threading import Event, Lock, Thread
from typing import NamedTuple, Protocol

from lorax_async.errors import FetchError
from lorax_async.io.http.failures import SetbackError

_LOOKUPS = 64


class Endpoint(NamedTuple):
    """An address and a port, as sockets take them."""

    family: int
    address: str
    port: int


class Network(Protocol):
    """What the engine needs of the machine. Every call blocks and may raise `OSError`."""

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        """The addresses of a host, in the order in which they should be tried."""

    def connect(
        self, endpoint: Endpoint, timeout: float, opened: Callable[[socket.socket], None]
    ) -> socket.socket:
        """A connected socket; `opened` is given it before it connects, and may raise."""

    def peer(self, connected: socket.socket) -> str:
        """The address at the other end."""


class RealNetwork:
    """The operating system's."""

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [Endpoint(family, str(place[0]), port) for family, _, _, _, place in found]

    def connect(
        self, endpoint: Endpoint, timeout: float, opened: Callable[[socket.socket], None]
    ) -> socket.socket:
        connecting = socket.socket(endpoint.family, socket.SOCK_STREAM)
        opened(connecting)
        connecting.settimeout(timeout)
        connecting.connect((endpoint.address, endpoint.port))
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connecting

    def peer(self, connected: socket.socket) -> str:
        return str(connected.getpeername()[0])


class _Lookup:
    def __init__(self) -> None:
        self.done = Event()
        self.found: list[Endpoint] = []
        self.error: Exception | None = None


class Lookups:
    """Looks names up in threads of their own, for the system's call knows no end to waiting.

    A name that is being looked up is not looked up twice. Who gives up leaves a thread behind that
    ends with the system's own timeout; there are 64 at most.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._lock = Lock()
        self._running: dict[tuple[str, int], _Lookup] = {}

    def find(
        self, host: str, port: int, timeout: float, look: Callable[[], None]
    ) -> list[Endpoint]:
        """Raises `TimeoutError`, what the network raised, and what `look` raises now and then."""
        if _is_number(host):  # and is not looked up anywhere
            return self._network.resolve(host, port)
        lookup = self._begin(host, port)
        waited = 0.0
        while not lookup.done.wait(0.05):
            waited += 0.05
            look()
            if waited >= timeout:
                raise TimeoutError(f"no answer for {host!r}")
        if lookup.error is not None:
            raise lookup.error
        return lookup.found

    def _begin(self, host: str, port: int) -> _Lookup:
        with self._lock:
            lookup = self._running.get((host, port))
            if lookup is None:
                if len(self._running) >= _LOOKUPS:
                    raise SetbackError(FetchError("the name service answers nothing any more"))
                lookup = self._start(host, port)
                self._running[host, port] = lookup
            return lookup

    def _start(self, host: str, port: int) -> _Lookup:
        lookup = _Lookup()
        work = (host, port, lookup)
        try:
            Thread(target=self._run, args=work, name="lorax-lookup", daemon=True).start()
        except RuntimeError as error:
            raise SetbackError(FetchError("the process may have no more threads")) from error
        return lookup

    def _run(self, host: str, port: int, lookup: _Lookup) -> None:
        try:
            lookup.found = self._network.resolve(host, port)
        except Exception as error:  # noqa: BLE001 - it is raised where somebody waits for it
            lookup.error = error
        with self._lock:
            del self._running[host, port]
        lookup.done.set()


def _is_number(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
