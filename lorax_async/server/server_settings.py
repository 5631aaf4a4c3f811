"""The operator's settings: names, the admin token, and limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import MappingProxyType

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_async.config import MiB
from lorax_async.errors import ConfigError, shorten
from lorax_async.ids import Allow, as_allow
from lorax_async.server.clients import UnreadRefusal
from lorax_async.server.error_responses import Refusal
from lorax_async.types import AdapterId, as_ref, require_count, require_positive, require_seconds
from lorax_async.urls import is_address

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
                    "This host name is not allowed; the operator can allow it with --allowed-hosts",
                    code="invalid_host",
                    close=True,
                )
                await UnreadRefusal(refusal, self._seconds)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def is_allowed(field: str, hosts: Sequence[str]) -> bool:
    """Return whether a `Host` field, with or without a port, is one of `normalize_hosts`."""
    if ANY in hosts:
        return True
    match = _FIELD.fullmatch(field.lower())
    if match is None:
        return False
    name = _normalize_host(match[1])
    return any(name.endswith(host[1:]) if host.startswith("*") else name == host for host in hosts)


def normalize_hosts(hosts: object) -> tuple[str, ...]:
    """Return names and addresses normalized: lower case, no brackets. Raise `ConfigError`.

    "*.example.com" matches every name below it, "*" everything.
    """
    if not isinstance(hosts, tuple | list):
        raise ConfigError("allowed_hosts must be a tuple of names, or None")
    return tuple(map(_normalize_pattern, hosts))


def _normalize_pattern(host: object) -> str:
    if not isinstance(host, str):
        raise ConfigError(f"an allowed host must be a string, not {host!r}")
    if host == ANY:
        return host
    name = _normalize_host(host.lower())
    if not (is_address(name) or _NAME.fullmatch(name)):
        raise ConfigError(
            f"{shorten(host, 200)!r} is not a host; write a name, *.name for all names below it, or"
            " an address, without a port"
        )
    return name


def _normalize_host(host: str) -> str:
    """Return an address in its usual spelling, or a name without the root's dot."""
    bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    return str(ip_address(bare)) if is_address(bare) else bare.removesuffix(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP server.

    Parameters
    ----------
    base
        The base model's name in requests; every other name is an adapter's.
    adapters
        Names for adapters, given as for `AdapterLoader.load`. A `pathlib.Path` carries the
        operator's authority. Other names in requests are ids, local only below `local_roots`.
    sources
        The places below which requests may name adapters by id, as far as the loader's `allow`
        lets them. Empty: only folders below `local_roots`, and nothing of the hub.
    admin_token
        Clients that send it as `Authorization: Bearer …` may load and unload by name, and list
        all adapters. None: no client may.
    allowed_hosts
        Names and addresses by which clients may call the server, without ports: "*.example.com"
        is every name below it, "*" is any. None checks nothing, as "*".
    max_body_bytes
        Of one request.
    max_prompt_tokens
        Of one prompt; None leaves room for one new token.
    max_choices
        Sequences of one request: its prompts, times `n`.
    max_waiting
        Sequences of all clients together of which nothing was computed yet.
    max_adapters_per_client
        Different adapters that one client may have in flight. Clients are told apart by their
        bearer key, which is not verified, or else by their address.
    slow_client
        Seconds for a client to send its body, and to take ready data, before it is disconnected.
    retry_after
        Seconds in `Retry-After` where no better estimate exists.
    drain
        Seconds that in-flight requests have after the signal to end.

    Raises
    ------
    ConfigError
        A value is out of range.
    UsageError
        A value of `adapters` is no adapter id.
    """

    base: str
    adapters: Mapping[str, AdapterId] = field(default_factory=dict)
    sources: tuple[Allow, ...] = ()
    admin_token: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] | None = None
    max_body_bytes: int = MiB
    max_prompt_tokens: int | None = None
    max_choices: int = 16
    max_waiting: int = 256
    max_adapters_per_client: int = 64
    slow_client: float = 30.0
    retry_after: float = 1.0
    drain: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_choices", "max_waiting", "max_adapters_per_client"):
            require_positive(name, getattr(self, name))
        if self.max_prompt_tokens is not None:
            require_count("max_prompt_tokens", self.max_prompt_tokens, least=1)
        for name in ("slow_client", "retry_after", "drain"):
            require_seconds(name, getattr(self, name))
        if self.max_waiting < self.max_choices:
            raise ConfigError(
                "max_waiting must be at least max_choices: larger requests would never fit"
            )
        object.__setattr__(self, "sources", as_allow(self.sources, "sources"))
        if self.allowed_hosts is not None:
            object.__setattr__(self, "allowed_hosts", normalize_hosts(self.allowed_hosts))
        _require_token(self.admin_token)
        _require_names(self.base, self.adapters)
        object.__setattr__(self, "adapters", MappingProxyType(dict(self.adapters)))


def _require_token(token: object) -> None:
    """Refuse an empty token: an unset variable must not open the server."""
    if token is None:
        return
    if not isinstance(token, str) or not token or not all("!" <= c <= "~" for c in token):
        raise ConfigError("admin_token must be printable ASCII without spaces, or None")


def _require_names(base: object, adapters: Mapping[str, AdapterId]) -> None:
    if not isinstance(base, str) or not base:
        raise ConfigError("base must be the name of the base model")
    for name, adapter in adapters.items():
        if not isinstance(name, str) or not name:
            raise ConfigError("the names of adapters must be non-empty strings")
        if name == base:
            raise ConfigError(f"{name!r} is the base model's name; give the adapter another name")
        as_ref(adapter)
