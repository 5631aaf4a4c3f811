"""Requests that call the server by a name that is not its own.

A page whose name is made to lead to this machine (DNS rebinding) is of the same origin as the
server to the browser that shows it; but its name stands in the requests' `Host`.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_async.server.calls.bodies import refuse_unread
from lorax_async.server.calls.errors import Refusal
from lorax_async.server.host_names import is_allowed


class AllowedHosts:
    """ASGI middleware: requests with another `Host` get status 400, and are not read."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], seconds: float) -> None:
        self._app = app
        self._hosts = hosts
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._allows(Headers(scope=scope).getlist("host")):
            await self._app(scope, receive, send)
            return
        refusal = Refusal(
            400,
            "This server is not called by this name; whoever runs it can allow it: --allowed-hosts",
            code="invalid_host",
            close=True,
        )
        await refuse_unread(refusal, scope, receive, send, self._seconds)

    def _allows(self, said: Sequence[str]) -> bool:
        return len(said) == 1 and is_allowed(said[0], self._hosts)
