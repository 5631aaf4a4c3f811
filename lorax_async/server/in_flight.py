"""In-flight requests: their number, their clients' limits, and what ends them early."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from lorax_async.errors import CapacityError, LoaderClosedError
from lorax_async.server.clients import wait_for_disconnect
from lorax_async.types import AdapterId, Ref, as_ref

CLOSING = "the server is closing"


class RequestScope:
    """End the enclosed block with an error from outside, wherever it waits.

    As `asyncio.timeout` does: cancel the block, then turn the cancellation into the error. A
    client that disconnects interrupts with `ClientDisconnect`.
    """

    def __init__(self, scopes: set[RequestScope], receive: Receive) -> None:
        self._scopes = scopes
        self._receive = receive
        self._reason: Exception | None = None

    def interrupt(self, reason: Exception) -> None:
        """End the block with `reason`. Only the first call counts."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._listening = asyncio.create_task(self._listen(), name="lorax client's presence")
        self._scopes.add(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._listening.cancel()
        self._scopes.discard(self)
        if self._reason is not None:
            cancelled = self._task.uncancel() > self._cancelling  # by another task as well
            if kind is asyncio.CancelledError and not cancelled:
                raise self._reason from None

    async def _listen(self) -> None:
        await wait_for_disconnect(self._receive)
        self.interrupt(ClientDisconnect())


class InFlightRequests:
    """Count in-flight requests, and refuse new ones once closed. On one event loop."""

    def __init__(self) -> None:
        self.closing = False
        self._failed = False
        self._count = 0
        self._scopes: set[RequestScope] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def count_request(self) -> Iterator[None]:
        """Count one request while entered. Raise `LoaderClosedError` when closing."""
        if self.closing:
            raise LoaderClosedError(CLOSING)
        self._count += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._count -= 1
            if not self._count:
                self._idle.set()

    def open_scope(self, receive: Receive) -> RequestScope:
        """Return the scope in which to answer a request whose body was read.

        Raise `LoaderClosedError` after `fail`.
        """
        if self._failed:
            raise LoaderClosedError(CLOSING)
        return RequestScope(self._scopes, receive)

    def close(self) -> None:
        """Refuse new requests."""
        self.closing = True

    def fail(self) -> None:
        """End in-flight requests with `LoaderClosedError`, those still reading a body after it."""
        self._failed = True
        for scope in tuple(self._scopes):
            scope.interrupt(LoaderClosedError(CLOSING))

    async def wait_until_idle(self, seconds: float) -> bool:
        """Wait for the last request; return whether it ended in time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()


class ClientLimits:
    """Limit the different adapters that each client has in flight to `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._adapters: dict[tuple[str, str], Counter[Ref]] = {}

    @contextmanager
    def count_request(self, client: tuple[str, str], adapter: AdapterId | None) -> Iterator[None]:
        """Count one request while entered; the base (None) is free. Raise `CapacityError`."""
        if adapter is None:
            yield
            return
        ref, adapters = as_ref(adapter), self._adapters.setdefault(client, Counter())
        if ref not in adapters and len(adapters) >= self._limit:
            raise CapacityError(
                f"this client has requests for {self._limit} adapters in flight, the limit; try"
                " again when one has ended"
            )
        adapters[ref] += 1
        try:
            yield
        finally:
            adapters[ref] -= 1
            if not adapters[ref]:
                del adapters[ref]
            if not adapters:
                self._adapters.pop(client, None)
