"""The operator's settings: limits, keys, allowed hosts, and names of models."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from types import MappingProxyType

from fastapi.requests import HTTPConnection
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lorax_async.config import MiB
from lorax_async.errors import ConfigError, shorten
from lorax_async.ids import Allow, as_allow, parse_requested
from lorax_async.server.responses import Refusal, UnreadRefusal, unknown_model
from lorax_async.types import AdapterId, AdapterKey, as_ref, require_count, require_seconds
from lorax_async.urls import is_address

ANY = "*"
LOOPBACK = ("localhost", "*.localhost", "127.0.0.1", "::1")
"""Names that a browser resolves to its own machine."""

_NAME = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_ROOT_PATH = re.compile(r"(?:/[A-Za-z0-9._~-]+)*")
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
            if len(fields) != 1 or not self._is_allowed(fields[0]):
                message = (
                    "This host name is not allowed; the operator can allow it with --allowed-hosts"
                )
                refusal = Refusal(400, message, code="invalid_host", close=True)
                await UnreadRefusal(refusal, self._seconds)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_allowed(self, field: str) -> bool:
        """Return whether a `Host` field, with or without a port, is one of the hosts."""
        match = _FIELD.fullmatch(field.lower())
        if match is None:
            return ANY in self._hosts
        name = _normalize_host(match[1])
        return any(
            name.endswith(host[1:]) if host.startswith(ANY) else name == host
            for host in self._hosts
        )


def _normalize_host(host: str) -> str:
    """Return an address in its usual spelling, or a name without the root's dot."""
    bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    return str(ip_address(bare)) if is_address(bare) else bare.removesuffix(".")


def _normalize_pattern(host: object) -> str:
    """Return a name, a pattern *.name or an address, in lower case. Raise `ConfigError`."""
    if not isinstance(host, str):
        raise ConfigError(f"an allowed host must be a string, not {host!r}")
    name = _normalize_host(host.lower())
    if not (host == ANY or is_address(name) or _NAME.fullmatch(name)):
        raise ConfigError(
            f"{shorten(host, 200)!r} is not a host; write a name, *.name for all names below it, or"
            " an address, without a port"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Settings of the HTTP server.

    Raise `ConfigError` for a value out of range, and `UsageError` for a value of `adapters` that is
    no adapter id.
    """

    base: str
    """The base model's name in requests; every other name is an adapter's."""
    adapters: Mapping[str, AdapterId] = field(default_factory=dict)
    """Names for adapters, given as for `AdapterLoader.load`. A `pathlib.Path` carries the
    operator's authority. Other names in requests are ids, local only below `local_roots`."""
    sources: tuple[Allow, ...] = ()
    """The places below which requests may name adapters by id, as far as the loader's `allow` lets
    them. Empty: only folders below `local_roots`, and nothing of the hub."""
    admin_token: str | None = field(default=None, repr=False)
    """Clients that send it as `Authorization: Bearer …` may load and unload by name, and list all
    adapters. None: no client may."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Clients must send one of these, or the admin token, as `Authorization: Bearer …` for OpenAI's
    calls and the page's data. Empty: anybody may call."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names and addresses by which clients may call the server, without ports: "*.example.com" is
    every name below it, "*" is any. None checks nothing, as "*"."""
    root_path: str = ""
    """The path below which a proxy has the server, as "/llm"; the proxy may remove it or not."""
    max_body_bytes: int = MiB
    """Of one request."""
    max_prompt_tokens: int | None = None
    """Of one prompt; None leaves room for one new token."""
    max_choices: int = 16
    """Sequences of one request: its prompts, times `n`."""
    max_waiting: int = 256
    """Sequences of all clients together of which nothing was computed yet."""
    max_adapters_per_client: int = 64
    """Different adapters that one client may have in flight. Clients are told apart by address and
    bearer key, which is not verified without `api_keys`."""
    slow_client: float = 30.0
    """Seconds for a client to send its body, and to take ready data, before it is disconnected."""
    retry_after: float = 1.0
    """Seconds in `Retry-After` where no better estimate exists."""
    drain: float = 30.0
    """Seconds that in-flight requests have after the signal to end."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_choices", "max_waiting", "max_adapters_per_client"):
            require_count(name, getattr(self, name))
        if self.max_prompt_tokens is not None:
            require_count("max_prompt_tokens", self.max_prompt_tokens, least=1)
        for name in ("slow_client", "retry_after", "drain"):
            require_seconds(name, getattr(self, name))
        if self.max_waiting < self.max_choices:
            raise ConfigError(
                "max_waiting must be at least max_choices: larger requests would never fit"
            )
        self._require_keys()
        if not isinstance(self.root_path, str) or not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError("root_path must be a path as /llm, without a / at its end, or empty")
        self._require_names()
        object.__setattr__(self, "sources", as_allow(self.sources, "sources"))
        object.__setattr__(self, "adapters", MappingProxyType(dict(self.adapters)))
        if self.allowed_hosts is not None:
            if not isinstance(self.allowed_hosts, tuple | list):
                raise ConfigError("allowed_hosts must be a tuple of names, or None")
            object.__setattr__(
                self, "allowed_hosts", tuple(map(_normalize_pattern, self.allowed_hosts))
            )

    def _require_keys(self) -> None:
        if self.admin_token is not None and not _is_key(self.admin_token):
            raise ConfigError("admin_token must be printable ASCII without spaces, or None")
        keys = self.api_keys
        if not isinstance(keys, tuple | list) or not all(map(_is_key, keys)):
            raise ConfigError("api_keys must be a tuple of printable ASCII texts without spaces")
        if self.admin_token in keys:
            raise ConfigError(
                "one of api_keys is the admin_token, so that every client would be the operator;"
                " choose another LORAX_ADMIN_TOKEN or another key (--api-key, LORAX_API_KEY)"
            )
        object.__setattr__(self, "api_keys", tuple(keys))

    def _require_names(self) -> None:
        if not isinstance(self.base, str) or not self.base:
            raise ConfigError("base must be the name of the base model")
        for name, adapter in self.adapters.items():
            if not isinstance(name, str) or not name:
                raise ConfigError("the names of adapters must be non-empty strings")
            if name == self.base:
                raise ConfigError(
                    f"{name!r} is the base model's name; give the adapter another name"
                )
            as_ref(adapter)


def _is_key(value: object) -> bool:
    """Return whether a client can send this. An empty one, of an unset variable, opens nothing."""
    return isinstance(value, str) and value != "" and all("!" <= c <= "~" for c in value)


# -- clients --------------------------------------------------------------------------------------


def read_bearer_key(connection: HTTPConnection) -> str | None:
    """Return the client's bearer key, if it sends one."""
    scheme, blank, key = connection.headers.get("authorization", "").partition(" ")
    return key.strip() if blank and scheme.lower() == "bearer" else None


def identify_client(connection: HTTPConnection) -> tuple[str, str]:
    """Identify a client by its address and its key: users may share either."""
    address = connection.client.host if connection.client else ""
    return address, read_bearer_key(connection) or ""


def _brings(connection: HTTPConnection, keys: Sequence[str]) -> bool:
    """Return whether the client's bearer key is one of `keys`. The time does not tell which."""
    key = (read_bearer_key(connection) or "").encode("utf-8", "surrogateescape")
    return sum(hmac.compare_digest(key, each.encode()) for each in keys) > 0


def is_operator(settings: ServerSettings, connection: HTTPConnection) -> bool:
    """Return whether the client brings the admin token."""
    return settings.admin_token is not None and _brings(connection, [settings.admin_token])


async def require_operator(connection: HTTPConnection) -> None:
    """Raise `Refusal` unless the client brings the admin token. A dependency of calls."""
    settings: ServerSettings = connection.app.state.settings
    if settings.admin_token is None:
        message = "This call is disabled: the server was started without an admin token"
        raise Refusal(403, message, code="admin_disabled")
    if not is_operator(settings, connection):
        message = "This call needs the admin token, as Authorization: Bearer TOKEN"
        raise Refusal(401, message, code="invalid_api_key")


async def require_client(connection: HTTPConnection) -> None:
    """Raise `Refusal` if there are API keys, and the client brings neither one nor the token.

    A dependency of calls.
    """
    settings: ServerSettings = connection.app.state.settings
    if not settings.api_keys or is_operator(settings, connection):
        return
    if not _brings(connection, settings.api_keys):
        is_missing = read_bearer_key(connection) is None
        fault = "This server needs an API key" if is_missing else "Incorrect API key provided"
        message = f"{fault}; send it as Authorization: Bearer KEY"
        raise Refusal(401, message, code="invalid_api_key")


async def sees_everything(connection: HTTPConnection) -> bool:
    """Return whether a viewer of the page is the operator; raise `Refusal` for a wrong key."""
    settings: ServerSettings = connection.app.state.settings
    if is_operator(settings, connection):
        return True
    if settings.api_keys:
        await require_client(connection)
    elif read_bearer_key(connection) is not None:
        await require_operator(connection)
    return False


# -- names of models ------------------------------------------------------------------------------


class ModelNames:
    """The base's name, and a changing table of names for adapters.

    `sources` are the places below which a request may name adapters by id.
    """

    def __init__(
        self, base: str, adapters: Mapping[str, AdapterId], sources: Sequence[Allow] = ()
    ) -> None:
        self.base = base
        self._sources = sources
        self._adapters: dict[str, AdapterId] = {}
        self._names: dict[AdapterId, dict[str, None]] = {}
        self.pinned: dict[str, AdapterKey] = {}
        """The version that each pinned name keeps on the device; see `NamePins`."""
        for name, adapter in adapters.items():
            self.add(name, adapter)

    @property
    def adapters(self) -> Mapping[str, AdapterId]:
        """The adapters by name."""
        return MappingProxyType(self._adapters)

    def resolve(self, model: str) -> AdapterId | None:
        """Return the adapter that a request's `model` names; None is the base.

        An unknown name is an id, or the name of a folder in one of the loader's `local_roots`. It
        stays text, so that it is local only there.
        Raise `Refusal` for an id that requests may not name.
        """
        if model == self.base:
            return None
        if model in self._adapters:
            return self._adapters[model]
        id = model if "/" in model or ":" in model else f"./{model}"
        if parse_requested(id, self._sources) is None:
            raise unknown_model(model)
        return id

    def name_of(self, adapter: AdapterId) -> str | None:
        """Return the first name of an adapter."""
        return next(iter(self._names.get(adapter, ())), None)

    def add(self, name: str, adapter: AdapterId) -> None:
        """Name an adapter; a name in use changes its meaning."""
        self._detach(name)
        self._adapters[name] = adapter
        self._names.setdefault(adapter, {})[name] = None

    def remove(self, name: str) -> AdapterId | None:
        """Forget a name; return the adapter that it named, if any."""
        self._detach(name)
        return self._adapters.pop(name, None)

    def _detach(self, name: str) -> None:
        if name in self._adapters:
            adapter = self._adapters[name]
            del self._names[adapter][name]
            if not self._names[adapter]:
                del self._names[adapter]
