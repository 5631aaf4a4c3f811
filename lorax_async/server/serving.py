"""The application on uvicorn: listen, serve, and let in-flight requests finish at the end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.server import HANDLED_SIGNALS

from lorax_async.server.app import create_app
from lorax_async.server.clients import ABORT
from lorax_async.server.service import Service

LAST_SECONDS = 5
"""Time for clients to take finished answers and errors at the end."""

BACKLOG = 2048

TICKS_PER_SECOND = 10
"""Uvicorn's unit of `on_tick`."""


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 is any. Raise `OSError`."""
    if not host:  # to sockets, every address
        raise OSError("the host is empty")
    if not 0 <= port < 1 << 16:
        raise OSError(f"{port} is not a port")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise OSError(f"the host is not a valid name: {error}") from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


async def serve(
    service: Service, listener: socket.socket, *, ready: Callable[[], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, or until cancelled; close `listener`.

    After the signal, new requests get status 503. In-flight requests have the settings' `drain`
    seconds, or until a second signal; then they fail, and all connections are closed. Signals are
    handled in the main thread only.

    Parameters
    ----------
    ready
        Called once requests are taken.
    """
    await DrainingServer(service, ready).serve([listener])


class DrainingServer(uvicorn.Server):
    """Serve one service on the running event loop, of any kind."""

    def __init__(self, service: Service, ready: Callable[[], None] | None = None) -> None:
        self._service = service
        self._in_flight = service.in_flight
        self._ready = ready
        super().__init__(_config(service))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        try:
            await super().serve(sockets)
        finally:
            self._in_flight.close()
            self._service.metrics.close()
            await self._disconnect_all(sockets or ())

    def stop(self) -> None:
        """Do as a signal does. On the loop."""
        if self._in_flight.closing:
            self._in_flight.fail()
        self._in_flight.close()
        self._service.feeds.end()
        self.should_exit = True
        self._stopped.set()

    # -- uvicorn's hooks --------------------------------------------------------------------------

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    async def main_loop(self) -> None:
        """Tick once a second, for the date header; uvicorn's own polls ten times."""
        counter = 0
        while not await self.on_tick(counter):
            counter += TICKS_PER_SECOND
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._stopped.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, do not raise signals again: the caller has parts to close."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in HANDLED_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        del sig, frame
        self._loop.call_soon_threadsafe(self.stop)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain. Keep listening meanwhile, so that new requests get a status."""
        self._in_flight.close()
        if not await self._in_flight.wait_until_idle(self._service.settings.drain):
            self._in_flight.fail()
        await super().shutdown(sockets)

    async def _disconnect_all(self, sockets: Iterable[socket.socket]) -> None:
        """Close what is left; after a cancelled `serve`, that is everything."""
        for server in getattr(self, "servers", ()):
            server.close()
        for listener in sockets:
            listener.close()
        for connection in tuple(self.server_state.connections):
            cast(Any, connection).transport.abort()
        if self.server_state.tasks:  # they end once their clients are disconnected
            await asyncio.wait(tuple(self.server_state.tasks), timeout=LAST_SECONDS)


def _config(service: Service) -> uvicorn.Config:
    class ServedConnection(_AbortableConnection, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        head_seconds = service.settings.slow_client

    return uvicorn.Config(
        create_app(service),
        http=ServedConnection,
        ws="none",
        lifespan="off",
        log_config=None,  # the process configures logging
        proxy_headers=False,  # clients are limited by address, which must not be theirs to choose
        server_header=False,
        timeout_graceful_shutdown=LAST_SECONDS,
        backlog=BACKLOG,
    )


class _AbortableConnection(asyncio.Protocol):
    """Uvicorn's protocol: requests can drop the connection, heads have a deadline, no access log.

    Uvicorn alone waits forever for the head of a request.
    """

    app_state: dict[str, Any]
    access_log: bool
    cycle: Any
    transport: asyncio.Transport
    head_seconds: float
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Uvicorn's own switch empties the handlers of a logger of the whole process.
        self.access_log = False
        self.app_state = self.app_state | {ABORT: cast(asyncio.Transport, transport).abort}
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in {socket.AF_INET, socket.AF_INET6}:
            # Disconnect a client that does not take the data that the kernel has buffered.
            milliseconds = min(int(self.head_seconds * 1000), 2**31 - 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_head()
        else:
            self._expect_nothing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(self.head_seconds, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
