"""Open connections only to where the rules allow, keep idle ones for later requests."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import Future, wait
from itertools import count
from threading import Lock, Thread
from typing import NamedTuple, Protocol

from lorax_async.errors import AccessDeniedError, AdapterError, FetchError
from lorax_async.http.connection import AbortableSocket, Attempt, Connection
from lorax_async.http.failures import RetryableError, io_error, lookup_error
from lorax_async.http.settings import (
    HttpSettings,
    Proxies,
    Proxy,
    Rules,
    address_of,
    is_public,
    tls_context,
)
from lorax_async.tracing.recorder import Tracer, now
from lorax_async.urls import Origin, Url, is_address

_MAX_ADDRESSES = 4
"""Addresses of a host that are tried."""

_MAX_LOOKUPS = 64
_CHECK_SECONDS = 0.05

# -- the network -----------------------------------------------------------------------------------


class Endpoint(NamedTuple):
    """An address and a port, as sockets take them."""

    family: int
    address: str
    port: int


class Network(Protocol):
    """What the engine needs of the machine: a seam for tests.

    Every call blocks and may raise `OSError`.
    """

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        """Return the addresses of a host, in the order in which they should be tried."""

    def connect(
        self, endpoint: Endpoint, timeout: float, opened: Callable[[socket.socket], None]
    ) -> socket.socket:
        """Return a connected socket; call `opened` with it before it connects. That may raise."""

    def peer(self, connected: socket.socket) -> str:
        """Return the address at the other end."""


class RealNetwork:
    """The operating system's network."""

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [Endpoint(family, str(place[0]), port) for family, _, _, _, place in infos]

    def connect(
        self, endpoint: Endpoint, timeout: float, opened: Callable[[socket.socket], None]
    ) -> socket.socket:
        """Connect by TCP, without Nagle's algorithm."""
        connecting = socket.socket(endpoint.family, socket.SOCK_STREAM)
        opened(connecting)
        connecting.settimeout(timeout)
        connecting.connect((endpoint.address, endpoint.port))
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connecting

    def peer(self, connected: socket.socket) -> str:
        return str(connected.getpeername()[0])


class Lookups:
    """Look names up in threads of their own: the system's call cannot be interrupted.

    Concurrent lookups of one name share a thread. A caller that gives up leaves it behind; it ends
    with the system's own timeout, and there are 64 at most.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._lock = Lock()
        self._running: dict[tuple[str, int], Future[list[Endpoint]]] = {}

    def find(self, origin: Origin, timeout: float, check: Callable[[], None]) -> list[Endpoint]:
        """Return the host's endpoints.

        Raises `TimeoutError`, what the network raises, and what `check`, called meanwhile, raises.
        """
        host, port = origin.host, origin.port
        if is_address(host):
            return self._network.resolve(host, port)
        lookup = self._begin(host, port)
        waited = 0.0
        while not wait([lookup], _CHECK_SECONDS).done:
            waited += _CHECK_SECONDS
            check()
            if waited >= timeout:
                raise TimeoutError(f"no answer for {host!r}")
        return lookup.result()

    def _begin(self, host: str, port: int) -> Future[list[Endpoint]]:
        with self._lock:
            lookup = self._running.get((host, port))
            if lookup is None:
                if len(self._running) >= _MAX_LOOKUPS:
                    raise RetryableError(FetchError("the name service answers nothing any more"))
                lookup = Future()
                work = (host, port, lookup)
                thread = Thread(target=self._run, args=work, name="lorax-lookup", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise RetryableError(
                        FetchError("the process may have no more threads")
                    ) from error
                self._running[host, port] = lookup
            return lookup

    def _run(self, host: str, port: int, lookup: Future[list[Endpoint]]) -> None:
        endpoints, failure = list[Endpoint](), None
        try:
            endpoints = self._network.resolve(host, port)
        except Exception as error:  # noqa: BLE001 - raised by `find`
            failure = error
        with self._lock:
            del self._running[host, port]
        if failure is None:
            lookup.set_result(endpoints)
        else:
            lookup.set_exception(failure)


# -- the pool --------------------------------------------------------------------------------------


class ConnectionPool:
    """All connections of an engine. Used from its threads."""

    def __init__(
        self, settings: HttpSettings, network: Network, clock: Callable[[], float], tracer: Tracer
    ) -> None:
        self._settings = settings
        self._network = network
        self._clock = clock
        self._tracer = tracer
        self._numbers = count(1)
        self._lookups = Lookups(network)
        self._proxies = Proxies(settings.proxies)
        self._tls = tls_context(settings.ca_bundle, os.environ)
        self._lock = Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def take(self, url: Url, rules: Rules, attempt: Attempt) -> Connection | None:
        """Return the idle connection that was used last, if it is still open.

        It may have been opened under other rules: its address is checked again.
        """
        while (connection := self._pop(url, rules)) is not None:
            try:
                if connection.socket.is_quiet:
                    attempt.use(connection.socket)
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()
        return None

    def _pop(self, url: Url, rules: Rules) -> Connection | None:
        with self._lock:
            for n in range(len(self._idle) - 1, -1, -1):
                idle = self._idle[n]
                if idle.origin == url.origin and (
                    idle.address is None or _allowed(idle.address, url, rules)
                ):
                    return self._idle.pop(n)
        return None

    def put(self, connection: Connection) -> None:
        """Keep a connection that may carry another request."""
        connection.idle_since = self._clock()
        with self._lock:
            self._idle.append(connection)
            full = self._closed or len(self._idle) > self._settings.connections
            oldest = self._idle.pop(0) if full else None
        if oldest is not None:
            oldest.close()

    def expire(self) -> bool:
        """Close what was idle for too long; return whether idle connections are left."""
        limit = self._clock() - self._settings.timeouts.idle
        with self._lock:
            expired = [each for each in self._idle if each.idle_since <= limit]
            self._idle = [each for each in self._idle if each.idle_since > limit]
            left = bool(self._idle)
        for connection in expired:
            connection.close()
        return left

    def close(self) -> None:
        """Close idle connections, and those that come back from here on."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def open(self, url: Url, rules: Rules, attempt: Attempt) -> Connection:
        """Open a connection.

        Raises `RetryableError`, `FetchError`, or `AccessDeniedError` where the address is not
        public and the rules do not allow it.
        """
        number = next(self._numbers)
        recorder = self._tracer.on
        if recorder is None:
            return self._open(url, rules, attempt, number)
        start, outcome = now(), "failed"
        try:
            opened = self._open(url, rules, attempt, number)
            outcome = "open"
            return opened
        finally:
            recorder.add("connections", number, "connect", start, now(), {"outcome": outcome})

    def _open(self, url: Url, rules: Rules, attempt: Attempt, number: int) -> Connection:
        proxy = self._proxies.to(url.origin)
        sock = AbortableSocket()
        attempt.use(sock)
        timeouts = self._settings.timeouts
        try:
            if proxy is None:
                address: str | None = self._connect(
                    sock, url.origin, attempt, lambda text: _allowed(text, url, rules)
                )
            else:
                _require_name(url.origin.host)
                address = _parse_number(url, rules)
                self._connect(sock, proxy.origin, attempt, lambda _: True)
                if url.secure:
                    self._tunnel(sock, url, proxy)
            if url.secure:
                sock.secure(self._tls, url.origin.host, timeouts.connect)
            sock.set_timeout(timeouts.read)
        except OSError as error:
            sock.close()
            attempt.check()
            raise io_error(error, str(url)) from error
        except BaseException:
            sock.close()
            raise
        return Connection(
            *(sock, url.origin, timeouts, self._clock),
            proxy=None if url.secure else proxy,
            address=address,
            number=number,
        )

    def _connect(
        self,
        sock: AbortableSocket,
        origin: Origin,
        attempt: Attempt,
        allowed: Callable[[str], bool],
    ) -> str:
        """Connect to the first allowed address that answers; return it."""
        known = self._endpoints(origin, attempt)
        endpoints = [endpoint for endpoint in known if allowed(endpoint.address)]
        if not endpoints:
            raise _refused_error(origin) if known else FetchError(f"{origin} has no address")
        failed: OSError | None = None
        for endpoint in endpoints[:_MAX_ADDRESSES]:
            try:
                connected = self._network.connect(
                    endpoint, self._settings.timeouts.connect, sock.attach
                )
            except OSError as error:
                sock.close()
                failed = error
                continue
            # Check the socket's own address, not the one that a name service returned.
            peer = self._network.peer(connected)
            if not allowed(peer):
                raise _refused_error(origin)
            return peer
        assert failed is not None
        raise failed

    def _endpoints(self, origin: Origin, attempt: Attempt) -> list[Endpoint]:
        host = origin.host
        _require_name(host)
        try:
            return self._lookups.find(origin, self._settings.timeouts.connect, attempt.check)
        except TimeoutError as error:
            raise io_error(error, f"the name service, asked for {host!r},") from error
        except OSError as error:
            raise lookup_error(error, host) from error

    def _tunnel(self, sock: AbortableSocket, url: Url, proxy: Proxy) -> None:
        timeouts = self._settings.timeouts
        sock.set_timeout(timeouts.connect)
        host, port = url.origin.host, url.origin.port
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
        if proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        connection = Connection(sock, proxy.origin, timeouts, self._clock)
        connection.send(lines)
        status = connection.receive_head().status
        if not 200 <= status < 300 or not connection.is_drained:
            raise _tunnel_failed(status, url, proxy)


def _require_name(host: str) -> None:
    """Refuse what TLS cannot name, which behind a proxy no name service has refused."""
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise FetchError(f"the host {host!r} is no name", retryable=False) from error


def _allowed(text: str, url: Url, rules: Rules) -> bool:
    address = address_of(text)
    return is_public(address) or rules.allows_address(url, address)


def _parse_number(url: Url, rules: Rules) -> str | None:
    """Check a host that is an address; behind a proxy, names are the proxy's business."""
    if not is_address(url.origin.host):
        return None
    if not _allowed(url.origin.host, url, rules):
        raise _refused_error(url.origin)
    return url.origin.host


def _refused_error(origin: Origin) -> AccessDeniedError:
    return AccessDeniedError(
        f"{origin} leads to an address that is not public; allow it explicitly if that is meant"
    )


def _tunnel_failed(status: int, url: Url, proxy: Proxy) -> RetryableError | AdapterError:
    problem = f"the proxy {proxy.origin} does not lead to {url} (status {status})"
    if status in {401, 403, 407}:
        return AccessDeniedError(problem)
    return RetryableError(FetchError(problem))
