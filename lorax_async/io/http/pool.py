"""Connections: opened with care for where they lead, kept for the next request, and closed."""

from __future__ import annotations

import os
from collections.abc import Callable
from ipaddress import ip_address
from itertools import count
from threading import Lock

from lorax_async.errors import AccessDeniedError, AdapterError, FetchError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.failures import SetbackError, failed_io, failed_lookup
from lorax_async.io.http.network import Endpoint, Lookups, Network
from lorax_async.io.http.settings import HttpSettings, Rules, address_of, is_public
from lorax_async.io.http.stream import Stream
from lorax_async.io.http.trust import Proxies, Proxy, tls_context
from lorax_async.io.http.urls import Origin, Url
from lorax_async.io.http.wire import Wire
from lorax_async.tracing.recorder import Tracer, now

_ADDRESSES = 4
"""So many of a host's addresses are tried."""


class Connection:
    """To one origin; `proxy` is set where requests name their URL whole.

    `address` is that of the other end, where that is the host; no two of a pool have one `number`.
    """

    def __init__(
        self,
        wire: Wire,
        stream: Stream,
        origin: Origin,
        proxy: Proxy | None,
        address: str | None,
        number: int,
    ) -> None:
        self.wire = wire
        self.stream = stream
        self.origin = origin
        self.proxy = proxy
        self.address = address
        self.number = number
        self.idle_since = 0.0


class Pool:
    """All connections of an engine. Used from its threads."""

    def __init__(
        self,
        settings: HttpSettings,
        network: Network,
        clock: Callable[[], float],
        tracer: Tracer,
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
        """An idle connection on which nothing has happened; the one used last.

        Others may have opened it, by other rules: where it leads is asked anew.
        """
        while (connection := self._pop(url, rules)) is not None:
            if connection.wire.quiet:
                try:
                    attempt.use(connection.wire)
                except BaseException:
                    connection.wire.close()
                    raise
                return connection
            connection.wire.close()
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

    def give(self, connection: Connection) -> None:
        """It may carry another request."""
        connection.idle_since = self._clock()
        with self._lock:
            self._idle.append(connection)
            many = self._closed or len(self._idle) > self._settings.connections
            oldest = self._idle.pop(0) if many else None
        if oldest is not None:
            oldest.wire.close()

    def expire(self) -> bool:
        """Close what was idle for too long; whether there is more that is idle."""
        limit = self._clock() - self._settings.timeouts.idle
        with self._lock:
            old = [each for each in self._idle if each.idle_since <= limit]
            self._idle = [each for each in self._idle if each.idle_since > limit]
            kept = bool(self._idle)
        for connection in old:
            connection.wire.close()
        return kept

    def close(self) -> None:
        """Close what is idle, and what is given back from here on."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.wire.close()

    def open(self, url: Url, rules: Rules, attempt: Attempt) -> Connection:
        """A new connection; raises as `_opened` does."""
        number = next(self._numbers)
        recorder = self._tracer.on
        if recorder is None:
            return self._opened(url, rules, attempt, number)
        start, outcome = now(), "failed"
        try:
            opened = self._opened(url, rules, attempt, number)
            outcome = "open"
            return opened
        finally:
            recorder.add("connections", number, "connect", start, now(), {"outcome": outcome})

    def _opened(self, url: Url, rules: Rules, attempt: Attempt, number: int) -> Connection:
        """A new connection.

        Raises `SetbackError`, `FetchError`, or `AccessDeniedError` where its address is not public
        and the rules do not allow it.
        """
        proxy = self._proxies.to(url.origin)
        wire = Wire()
        attempt.use(wire)
        timeouts = self._settings.timeouts
        try:
            if proxy is None:
                address: str | None = self._connect(
                    wire, url.origin, attempt, lambda text: _allowed(text, url, rules)
                )
            else:
                address = _number_allowed(url, rules)
                self._connect(wire, proxy.origin, attempt, lambda _: True)
                if url.secure:
                    self._tunnel(wire, url, proxy)
            if url.secure:
                wire.secure(self._tls, url.origin.host, timeouts.connect)
            wire.set_timeout(timeouts.read)
        except OSError as error:
            wire.close()
            attempt.look()
            raise failed_io(error, str(url)) from error
        except BaseException:
            wire.close()
            raise
        stream = Stream(wire, timeouts, self._clock, str(url))
        plain = None if url.secure else proxy
        return Connection(wire, stream, url.origin, plain, address, number)

    def _connect(
        self, wire: Wire, origin: Origin, attempt: Attempt, allowed: Callable[[str], bool]
    ) -> str:
        """The address that it is connected to."""
        found = self._found(origin, attempt)
        endpoints = [endpoint for endpoint in found if allowed(endpoint.address)]
        if not endpoints:
            raise _refused(origin) if found else FetchError(f"{origin} has no address")
        failed: OSError | None = None
        for endpoint in endpoints[:_ADDRESSES]:
            try:
                connected = self._network.connect(
                    endpoint, self._settings.timeouts.connect, wire.attach
                )
            except OSError as error:
                wire.close()
                failed = error
                continue
            # What is connected to counts, not what a name service said before.
            peer = self._network.peer(connected)
            if not allowed(peer):
                raise _refused(origin)
            return peer
        assert failed is not None
        raise failed

    def _found(self, origin: Origin, attempt: Attempt) -> list[Endpoint]:
        wait = self._settings.timeouts.connect
        try:
            return self._lookups.find(origin.host, origin.port, wait, attempt.look)
        except TimeoutError as error:
            raise failed_io(error, f"the name service, asked for {origin.host!r},") from error
        except OSError as error:
            raise failed_lookup(error, origin.host) from error
        except UnicodeError as error:
            raise FetchError(f"the host {origin.host!r} is no name", retryable=False) from error

    def _tunnel(self, wire: Wire, url: Url, proxy: Proxy) -> None:
        wire.set_timeout(self._settings.timeouts.connect)
        place = url.origin.authority if ":" in url.origin.authority else f"{url.origin.host}:443"
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
        if proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        wire.send("\r\n".join([*lines, "", ""]).encode("ascii"))
        stream = Stream(wire, self._settings.timeouts, self._clock, f"the proxy {proxy.origin}")
        status = stream.head().status
        if not 200 <= status < 300 or not stream.clean:
            raise _tunnel_failed(status, url, proxy)


def _allowed(text: str, url: Url, rules: Rules) -> bool:
    address = address_of(text)
    return is_public(address) or rules.allows_address(url, address)


def _number_allowed(url: Url, rules: Rules) -> str | None:
    """Behind a proxy names are its own business, but a number is plain to see."""
    try:
        ip_address(url.origin.host)
    except ValueError:
        return None
    if not _allowed(url.origin.host, url, rules):
        raise _refused(url.origin)
    return url.origin.host


def _refused(origin: Origin) -> AccessDeniedError:
    return AccessDeniedError(
        f"{origin} leads to an address that is not public; allow it explicitly if that is meant"
    )


def _tunnel_failed(status: int, url: Url, proxy: Proxy) -> SetbackError | AdapterError:
    problem = f"the proxy {proxy.origin} does not lead to {url} (status {status})"
    if status in {401, 403, 407}:
        return AccessDeniedError(problem)
    return SetbackError(FetchError(problem))
