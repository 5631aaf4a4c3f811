"""The application on uvicorn: listening, and ending without breaking off what is under way."""

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

from lorax_async.server.calls.app import create_app
from lorax_async.server.calls.events import ABORT
from lorax_async.server.calls.service import Service

LAST_SECONDS = 5
"""For answers that are computed, and errors, to be taken by their clients."""

BACKLOG = 2048

TICKS_PER_SECOND = 10
"""As uvicorn counts."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any. Raises `OSError`."""
    if not host:  # to sockets it is every address that there is, which nobody says by nothing
        raise OSError("the host is empty")
    if not 0 <= port < 1 << 16:
        raise OSError("there is no such port")
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise OSError(f"no host has such a name: {error}") from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


async def serve(
    service: Service, listener: socket.socket, *, ready: Callable[[], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, or until cancelled; closes `listener`.

    From the signal on, new requests get status 503. Those under way have the `drain` seconds of the
    settings, or until a second signal, to end; the rest fails, and all connections are closed. On
    the running loop, of whichever kind; signals are heard in the main thread only.

    Parameters
    ----------
    ready
        Called once requests are taken.
    """
    await Serving(service, ready).serve([listener])


class Serving(uvicorn.Server):
    """One service on one event loop."""

    def __init__(self, service: Service, ready: Callable[[], None] | None = None) -> None:
        self._service = service
        self._under_way = service.under_way
        self._ready = ready
        super().__init__(_config(service))

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        try:
            await super().serve(sockets)
        finally:
            self._under_way.close()
            self._service.metrics.close()
            await self._cut_off(sockets or ())

    def stop(self) -> None:
        """As a signal does. On the loop."""
        if self._under_way.closing:
            self._under_way.fail()
        self._under_way.close()
        self._service.feeds.end()
        self.should_exit = True
        self._stopped.set()

    # -- uvicorn's own hooks ----------------------------------------------------------------------

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    async def main_loop(self) -> None:
        """Once a second, for the dates in answers; uvicorn's own looks ten times."""
        counter = 0
        while not await self.on_tick(counter):
            counter += TICKS_PER_SECOND
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._stopped.wait()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's, it raises none again: whoever serves has things to close afterwards."""
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
        """Listening goes on while requests are under way, so that new ones are told."""
        self._under_way.close()
        if not await self._under_way.ended(self._service.settings.drain):
            self._under_way.fail()
        await super().shutdown(sockets)

    async def _cut_off(self, sockets: Iterable[socket.socket]) -> None:
        """Close what is left; after a cancelled `serve`, that is everything."""
        for server in getattr(self, "servers", ()):
            server.close()
        for listener in sockets:
            listener.close()
        for connection in tuple(self.server_state.connections):
            cast(Any, connection).transport.abort()
        if self.server_state.tasks:  # they find out that their clients have gone
            await asyncio.wait(tuple(self.server_state.tasks), timeout=LAST_SECONDS)


def _config(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        create_app(service),
        http=_connection(service.settings.slow_client),
        ws="none",
        lifespan="off",
        log_config=None,  # logging is configured by whoever runs this
        proxy_headers=False,  # who asks is counted by address, which nobody shall choose
        server_header=False,
        timeout_graceful_shutdown=LAST_SECONDS,
        backlog=BACKLOG,
    )


def _connection(seconds: float) -> type[asyncio.Protocol]:
    """Uvicorn's protocol, whose requests can cut their connection, and which logs no access."""

    class Connection(_Cuttable, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        patience = seconds

    return Connection


class _Cuttable(asyncio.Protocol):
    app_state: dict[str, Any]
    access_log: bool
    cycle: Any
    transport: asyncio.Transport
    patience: float
    _too_slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvicorn's own switch would empty the handlers of a logger of the whole process.
        self.access_log = False
        self.app_state = self.app_state | {ABORT: cast(asyncio.Transport, transport).abort}
        found = transport.get_extra_info("socket")
        if found is not None and found.family in {socket.AF_INET, socket.AF_INET6}:
            # For what was handed to the system whole: a client that takes none of it is cut off.
            milliseconds = min(int(self.patience * 1000), 2**31 - 1)
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        super().connection_made(transport)
        self._expect_a_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_a_head()
        else:
            self._expect_nothing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect_a_head(self) -> None:
        """Of its next request, whole, within the time that a body has; uvicorn waits for ever."""
        if self._too_slow is None and not self.transport.is_closing():
            loop = asyncio.get_running_loop()
            self._too_slow = loop.call_later(self.patience, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._too_slow is not None:
            self._too_slow.cancel()
            self._too_slow = None
