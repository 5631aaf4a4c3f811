"""The operator's settings: names, the admin token, and limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lorax_async.adapter import AdapterId, as_ref
from lorax_async.errors import ConfigError
from lorax_async.server.hosts import checked_hosts
from lorax_async.settings.allow import Allow, as_allow
from lorax_async.settings.limits import MiB
from lorax_async.settings.requirements import require_count, require_positive, require_seconds


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
                "max_waiting must be at least max_choices, or such requests never fit"
            )
        object.__setattr__(self, "sources", as_allow(self.sources, "sources"))
        if self.allowed_hosts is not None:
            object.__setattr__(self, "allowed_hosts", checked_hosts(self.allowed_hosts))
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
            raise ConfigError("the names of adapters are not empty")
        if name == base:
            raise ConfigError(f"{name!r} is the base model's name; give the adapter another one")
        as_ref(adapter)
