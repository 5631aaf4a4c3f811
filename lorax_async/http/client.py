"""The HTTP client: connections, where the rules allow them, and a GET through its redirects."""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import lru_cache, partial
from ipaddress import ip_address
from itertools import count
from threading import Lock, Thread
from typing import NamedTuple, Self

from lorax_async.concurrency import SharedResource, close_all, complete
from lorax_async.errors import AccessDeniedError, FetchError
from lorax_async.formats.spans import ByteRange
from lorax_async.http.connection import Attempt, Connection, ResponseHead
from lorax_async.http.failures import DENIED, RetryableError, io_error, lookup_error
from lorax_async.http.link_model import LinkEstimate, LinkModel, Reception
from lorax_async.http.settings import (
    Address,
    HttpSettings,
    Proxies,
    Proxy,
    Rules,
    is_public,
    tls_context,
)
from lorax_async.http.target import ResolvedLocation, Target, Validators
from lorax_async.telemetry import Span, Tracer
from lorax_async.urls import InvalidUrlError, Origin, Url, is_address, resolve_redirect

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


class Network:
    """What the downloader needs of the machine. Every call blocks and may raise `OSError`."""

    def resolve(self, host: str, port: int) -> list[Endpoint]:
        """Return the addresses of a host, in the order in which they should be tried."""
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [Endpoint(family, str(place[0]), port) for family, _, _, _, place in infos]

    def connect(
        self, endpoint: Endpoint, timeout: float, opened: Callable[[socket.socket], None]
    ) -> socket.socket:
        """Connect by TCP, without Nagle's algorithm.

        Call `opened` with the socket before it connects; that may raise.
        """
        connecting = socket.socket(endpoint.family, socket.SOCK_STREAM)
        opened(connecting)
        connecting.settimeout(timeout)
        connecting.connect((endpoint.address, endpoint.port))
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connecting

    def peer(self, connected: socket.socket) -> str:
        """Return the address at the other end."""
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
        with self._lock:
            lookup = self._running.get((host, port)) or self._begin(host, port)
        waited = 0.0
        while not wait([lookup], _CHECK_SECONDS).done:
            waited += _CHECK_SECONDS
            check()
            if waited >= timeout:
                raise TimeoutError(f"no answer for {host!r}")
        return lookup.result()

    def _begin(self, host: str, port: int) -> Future[list[Endpoint]]:
        if len(self._running) >= _MAX_LOOKUPS:
            raise RetryableError(FetchError("the name service answers nothing any more"))
        lookup = Future[list[Endpoint]]()
        work = lookup, partial(self._look_up, host, port)
        try:
            Thread(target=complete, args=work, name="lorax-lookup", daemon=True).start()
        except RuntimeError as error:
            raise RetryableError(FetchError("the process may have no more threads")) from error
        self._running[host, port] = lookup
        return lookup

    def _look_up(self, host: str, port: int) -> list[Endpoint]:
        try:
            return self._network.resolve(host, port)
        finally:
            with self._lock:
                del self._running[host, port]


# -- the pool --------------------------------------------------------------------------------------


class ConnectionPool:
    """All connections of a downloader. Used from its threads."""

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
        certificates = partial(tls_context, settings.ca_bundle, os.environ)
        self._tls = SharedResource("the certificates", open=certificates)  # takes 10 ms
        self._lock = Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def take(self, url: Url, rules: Rules, attempt: Attempt) -> Connection | None:
        """Return the idle connection that was used last, if it is still open.

        It may have been opened under other rules: its address is checked again.
        """
        while True:
            with self._lock:
                for connection in reversed(self._idle):
                    if connection.origin == url.origin and _may_carry(connection, url, rules):
                        break
                else:
                    return None
                self._idle.remove(connection)
            try:
                if connection.is_quiet:
                    attempt.use(connection)
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()

    def put(self, connection: Connection) -> None:
        """Keep a connection that may carry another request."""
        connection.idle_since = self._clock()
        with self._lock:
            self._idle.append(connection)
            full = self._closed or len(self._idle) > self._settings.connections
            oldest = [self._idle.pop(0)] if full else []
        close_all(oldest)

    def expire(self) -> bool:
        """Close what was idle for too long; return whether idle connections are left."""
        limit = self._clock() - self._settings.timeouts.idle
        with self._lock:
            expired = [each for each in self._idle if each.idle_since <= limit]
            self._idle = [each for each in self._idle if each.idle_since > limit]
        close_all(expired)
        return bool(self._idle)

    def close(self) -> None:
        """Close idle connections, and those that come back from here on."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        close_all(idle)

    def open(self, url: Url, rules: Rules, attempt: Attempt) -> Connection:
        """Open a connection.

        Raises `RetryableError`, `FetchError`, or `AccessDeniedError` where the address is not
        public and the rules do not allow it.
        """
        timeouts = self._settings.timeouts
        connection = Connection(url.origin, timeouts, self._clock, next(self._numbers))
        with self._tracer.span("connections", connection.number, "connect") as span:
            try:
                attempt.use(connection)
                self._connect(connection, url, rules, attempt)
                if url.secure:
                    with self._tls as tls:
                        connection.secure(tls, url.origin.host, timeouts.connect)
                connection.set_timeout(timeouts.read)
            except BaseException as error:
                span.set(outcome="failed")
                connection.close()
                if not isinstance(error, OSError):
                    raise
                raise io_error(error, str(url)) from error
            span.set(outcome="open")
        return connection

    def _connect(self, connection: Connection, url: Url, rules: Rules, attempt: Attempt) -> None:
        """Connect to the origin or its proxy; behind that, names are the proxy's business."""
        host, proxy = url.origin.host, self._proxies.to(url.origin)
        _require_name(host)
        if proxy is None:
            connection.address = self._connect_to(
                connection, url.origin, attempt, lambda text: _is_allowed(text, url, rules)
            )
            return
        if is_address(host):
            if not _is_allowed(host, url, rules):
                raise _refused_error(url.origin)
            connection.address = host
        _require_name(proxy.origin.host)
        self._connect_to(connection, proxy.origin, attempt, lambda _: True)
        if url.secure:
            self._tunnel(connection, url, proxy)
        else:
            connection.proxy = proxy

    def _connect_to(
        self,
        connection: Connection,
        origin: Origin,
        attempt: Attempt,
        allowed: Callable[[str], bool],
    ) -> str:
        """Connect to the first allowed address that answers; return it."""
        timeout = self._settings.timeouts.connect
        try:
            known = self._lookups.find(origin, timeout, attempt.check)
        except TimeoutError as error:
            raise io_error(error, f"the name service, asked for {origin.host!r},") from error
        except OSError as error:
            raise lookup_error(error, origin.host) from error
        endpoints = [endpoint for endpoint in known if allowed(endpoint.address)]
        if not endpoints:
            raise _refused_error(origin) if known else FetchError(f"{origin} has no address")
        failed: OSError | None = None
        for endpoint in endpoints[:_MAX_ADDRESSES]:
            try:
                connected = self._network.connect(endpoint, timeout, connection.attach)
            except OSError as error:
                connection.close()
                failed = error
                continue
            # Check the socket's own address, not the one that a name service returned.
            peer = self._network.peer(connected)
            if peer != endpoint.address and not allowed(peer):
                raise _refused_error(origin)
            return peer
        assert failed is not None
        raise failed

    def _tunnel(self, connection: Connection, url: Url, proxy: Proxy) -> None:
        host, port = url.origin.host, url.origin.port
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
        if proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        connection.set_timeout(self._settings.timeouts.connect)
        connection.peer = str(proxy.origin)
        connection.send(lines)
        status = connection.receive_head().status
        connection.peer = str(url.origin)
        problem = f"the proxy {proxy.origin} does not lead to {url} (status {status})"
        if status in DENIED:
            raise AccessDeniedError(problem)
        if not 200 <= status < 300 or not connection.is_drained:
            raise RetryableError(FetchError(problem))


def _require_name(host: str) -> None:
    """Refuse what TLS cannot name, which behind a proxy no name service has refused."""
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise FetchError(f"the host {host!r} is no name", retryable=False) from error


def _may_carry(idle: Connection, url: Url, rules: Rules) -> bool:
    """Whether the rules allow a connection's address for this URL; remember the last one."""
    last_url, last_rules = idle.allowed_for
    if last_url is not url or last_rules is not rules:
        if idle.address is not None and not _is_allowed(idle.address, url, rules):
            return False
        idle.allowed_for = url, rules
    return True


def _is_allowed(text: str, url: Url, rules: Rules) -> bool:
    address, public = _address(text)
    return public or rules.allows_address(url, address)


@lru_cache(256)
def _address(text: str) -> tuple[Address, bool]:
    """Parse an address that a socket shows, some with a zone; tell whether it is public."""
    address = ip_address(text.partition("%")[0])
    return address, is_public(address)


def _refused_error(origin: Origin) -> AccessDeniedError:
    return AccessDeniedError(
        f"{origin} leads to an address that is not public; allow it explicitly if that is meant"
    )


# -- requests --------------------------------------------------------------------------------------

MAX_REDIRECTS = 3
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DRAINED_BYTES = 16 << 10
"""A rest of a body up to this is read: cheaper than another connection."""

_MEASURED_BYTES = 128 << 10
_MAX_ORIGINS = 256


class LinkModels:
    """The link model of each origin, of those used last. From any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = Lock()
        self._models: OrderedDict[Origin, LinkModel] = OrderedDict()

    def estimate(self, origin: Origin) -> LinkEstimate:
        with self._lock:
            return self._models.get(origin, _UNKNOWN).estimate()

    def began(self, origin: Origin, delay: float) -> Reception:
        """Record the head of a response and the seconds that it took."""
        with self._lock:
            model = self._models.setdefault(origin, LinkModel())
            self._models.move_to_end(origin)
            reception = model.began(self._clock(), delay)
            if len(self._models) > _MAX_ORIGINS:
                # A new model must not be told of the end of responses to a forgotten one.
                idle = (each for each, other in self._models.items() if not other.is_receiving)
                if (oldest := next(idle, None)) is not None:
                    del self._models[oldest]
            return reception

    def received(self, origin: Origin, reception: Reception, nbytes: int) -> bool:
        """Record bytes of a response; return whether the origin's estimate differs now."""
        with self._lock:
            model = self._models.get(origin)
            return model is not None and model.received(reception, self._clock(), nbytes)

    def ended(self, origin: Origin, reception: Reception) -> None:
        """Record that nothing more is read of a response."""
        with self._lock:
            if (model := self._models.get(origin)) is not None:
                model.ended(reception, self._clock())


_UNKNOWN = LinkModel()


@dataclass(slots=True)
class Response:
    """A head, and a body to be read. A `with` block releases it in the end."""

    client: HttpClient
    connection: Connection
    head: ResponseHead
    location: ResolvedLocation
    attempt: Attempt
    request_span: Span
    reception: Reception
    received: int = 0
    link_differs: bool = False
    """Whether the estimate of the link changed with the bytes that came last."""

    @property
    def rate(self) -> float | None:
        """Bytes per second of waiting for them; None before it is significant."""
        nbytes, rate = self.connection.measured()
        return rate if nbytes >= _MEASURED_BYTES else None

    def fill(self, view: memoryview) -> int:
        """Read until the view is full or the body ends; return the number of bytes.

        Raises `RetryableError`, `FetchError`, and `AbortedError`.
        """
        try:
            count = self.connection.fill(view)
        except OSError as error:
            raise io_error(error, str(self.location.url)) from error
        self.received += count
        self.link_differs = self.client.links.received(
            self.location.url.origin, self.reception, count
        )
        return count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Keep the connection if it may carry another request, else close it."""
        self.attempt.release()
        connection = self.connection
        outcome = "whole" if connection.body_ended else "left"
        self.request_span.end(bytes=self.received, outcome=outcome)
        self.client.links.ended(self.location.url.origin, self.reception)
        if connection.is_reusable:
            self.client.pool.put(connection)
        else:
            connection.close()


@dataclass(frozen=True, slots=True)
class HttpClient:
    """Sends requests. Used from many threads."""

    settings: HttpSettings
    pool: ConnectionPool
    links: LinkModels
    clock: Callable[[], float]
    tracer: Tracer

    def get(
        self,
        target: Target,
        location: ResolvedLocation,
        span: ByteRange | None,
        validators: Validators,
        attempt: Attempt,
    ) -> Response:
        """Return the first response that is no redirect. Blocks.

        Raises `RetryableError`, `AbortedError`, and where another attempt would fail too,
        `FetchError` or `AccessDeniedError`.
        """
        while True:
            url = location.url
            if not target.rules.allows(url, location.hop):
                raise AccessDeniedError(
                    f"{target.name}: requests to {url} are not allowed; allow it explicitly"
                )
            attempt.origin = url.origin
            fields = self._fields(target, location, span, validators)
            try:
                response = self._send_idle(target, fields, location, attempt, span)
                if response is None:
                    fresh = self.pool.open(url, target.rules, attempt)
                    response = self._send(fresh, fields, location, attempt, span)
            except OSError as error:
                raise io_error(error, str(url)) from error
            if response.head.status not in _REDIRECTS:
                return response
            try:
                length = response.head.length
                if length is not None and length <= _DRAINED_BYTES:
                    response.fill(memoryview(bytearray(_DRAINED_BYTES)))
                location = self._next_location(target, response)
            finally:
                response.release()

    def _send_idle(
        self,
        target: Target,
        fields: list[str],
        location: ResolvedLocation,
        attempt: Attempt,
        span: ByteRange | None,
    ) -> Response | None:
        """Send on an idle connection; None if there is none, or it was closed meanwhile."""
        idle = self.pool.take(location.url, target.rules, attempt)
        if idle is None:
            return None
        try:
            return self._send(idle, fields, location, attempt, span)
        except ConnectionError:
            return None

    def _next_location(self, target: Target, response: Response) -> ResolvedLocation:
        before = response.location
        if before.hop >= MAX_REDIRECTS:
            raise FetchError(
                f"{target.name}: more than {MAX_REDIRECTS} redirects, the last one from"
                f" {before.url}",
                retryable=False,
            )
        try:
            url = resolve_redirect(before.url, response.head.fields.get("location", ""))
        except InvalidUrlError as error:
            raise FetchError(f"{before.url} redirects to what is no URL: {error}") from error
        if before.url.secure and not url.secure:
            raise AccessDeniedError(f"{before.url} redirects from https to http, to {url}")
        trusted = before.trusted and url.origin == target.url.origin
        return ResolvedLocation(url, before.hop + 1, trusted=trusted)

    def _send(
        self,
        connection: Connection,
        fields: list[str],
        location: ResolvedLocation,
        attempt: Attempt,
        span: ByteRange | None,
    ) -> Response:
        url, proxy = location.url, connection.proxy
        lines = [f"GET {url.text if proxy else url.target} HTTP/1.1", *fields]
        if proxy is not None and proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        name = "file" if span is None else f"bytes {span[0]}-{span[1] - 1}"
        request_span = self.tracer.span("connections", connection.number, name, hop=location.hop)
        if span is not None:
            request_span.set(at=span[0], asked=span[1] - span[0])
        begun = self.clock()
        try:
            with self.tracer.span("connections", connection.number, "wait"):
                connection.send(lines)
                head = connection.receive_head()
        except BaseException:
            request_span.end(bytes=0, outcome="failed")
            connection.close()
            raise
        request_span.set(status=head.status)
        reception = self.links.began(url.origin, self.clock() - begun)
        return Response(self, connection, head, location, attempt, request_span, reception)

    def _fields(
        self,
        target: Target,
        location: ResolvedLocation,
        span: ByteRange | None,
        validators: Validators,
    ) -> list[str]:
        """Build the fields anew for every hop."""
        fields = {
            "Host": location.url.origin.authority,
            "User-Agent": self.settings.user_agent,
            "Accept": "*/*",
            # A coded body has other offsets, and might be a bomb.
            "Accept-Encoding": "identity",
        }
        if location.trusted:
            fields.update(target.headers)
        if span is not None:
            fields["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        if validators.strong_etag is not None:
            fields["If-Match" if span is None else "If-Range"] = validators.strong_etag
        return [f"{name}: {value}" for name, value in fields.items()]
