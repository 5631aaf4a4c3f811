"""The names by which clients may call the server.

A page whose DNS name is rebound to this machine has the server's origin in its visitor's browser;
only the requests' `Host` field gives it away.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_async.errors import ConfigError, shorten
from lorax_async.server.clients import UnreadRefusal
from lorax_async.server.errors import Refusal
from lorax_async.settings.allow import is_address

ANY = "*"
LOOPBACK = ("localhost", "*.localhost", "127.0.0.1", "::1")
"""Names that a browser resolves to its own machine."""

_NAME = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_FIELD = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]{0,5})?")


class AllowedHosts:
    """ASGI middleware: refuse requests with another `Host` (status 400), unread."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str], seconds: float) -> None:
        self._app = app
        self._hosts = hosts
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            fields = Headers(scope=scope).getlist("host")
            if len(fields) != 1 or not is_allowed(fields[0], self._hosts):
                refusal = Refusal(
                    400,
                    "This server is not called by this name; whoever runs it can allow it:"
                    " --allowed-hosts",
                    code="invalid_host",
                    close=True,
                )
                await UnreadRefusal(refusal, self._seconds)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_allowed(field: str, hosts: Sequence[str]) -> bool:
    """Return whether a `Host` field, with or without a port, is one of `checked_hosts`."""
    if ANY in hosts:
        return True
    match = _FIELD.fullmatch(field.lower())
    if match is None:
        return False
    name = _normalized(match[1])
    return any(name.endswith(host[1:]) if host.startswith("*") else name == host for host in hosts)


def checked_hosts(hosts: object) -> tuple[str, ...]:
    """Return names and addresses normalized: lower case, no brackets. Raise `ConfigError`.

    "*.example.com" matches every name below it, "*" everything.
    """
    if not isinstance(hosts, tuple | list):
        raise ConfigError("allowed_hosts must be a tuple of names, or None")
    return tuple(map(_checked, hosts))


def _checked(host: object) -> str:
    if not isinstance(host, str):
        raise ConfigError(f"an allowed host is a text, not {host!r}")
    if host == ANY:
        return host
    name = _normalized(host.lower())
    if not (is_address(name) or _NAME.fullmatch(name)):
        raise ConfigError(
            f"{shorten(host, 200)!r} is no host; write a name, *.name for all below it, or an"
            " address, without a port"
        )
    return name


def _normalized(host: str) -> str:
    """Return an address in its usual spelling, or a name without the root's dot."""
    bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    return str(ip_address(bare)) if is_address(bare) else bare.removesuffix(".")
