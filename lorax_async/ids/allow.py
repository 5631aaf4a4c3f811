"""The operator's allow list of places with adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Literal, NamedTuple, get_args

from lorax_async.errors import ConfigError, InvalidAdapterIdError, shorten
from lorax_async.ids.grammar import (
    DEFAULT_PORTS,
    STORES,
    checked_bucket,
    checked_host,
    checked_port,
    checked_prefix,
    folder_path,
    is_hub_name,
)
from lorax_async.validation import require_bool, require_one_of

Scheme = Literal["hub", "s3", "gs", "az", "https", "http"]
"""The kinds of remote places."""


class OriginPlace(NamedTuple):
    """A remote place, in the terms of an `Allow`.

    `path` is the folder below host or bucket, or "org/name/" on the hub; it ends with "/" and does
    not begin with one. `host` is "" on the hub; `port` is None for the scheme's default.
    """

    scheme: str
    host: str
    port: int | None
    path: str


@dataclass(frozen=True, slots=True)
class Allow:
    """A place from which adapters may be loaded, with everything below it.

    Parameters
    ----------
    scheme
        "hub", "s3", "gs", "az", "https" or "http".
    host
        The full name of the host, bucket or container; an IPv6 address with or without brackets.
        "" for the hub.
    port
        The port of "https" and "http"; None is the scheme's default.
    prefix
        The folder below it, ending with "/"; on the hub "org/" or "org/name/". "" is all.
    pull_requests
        Hub only: allow `refs/pr/N`, which anyone may have proposed.
    use_token
        Hub only: use this machine's own token (`HF_TOKEN`, `hf auth login`) for ids below `prefix`
        without a token. Everyone who may name an id then reads what that token reads there; ids
        that the hub redirects elsewhere are refused.
    private
        "https" and "http" with a name as host only: allow private addresses (RFC 1918, 6598, 4193).
        An address or "localhost" as host needs no permission.

    Raises
    ------
    ConfigError
        The entry contradicts itself, or cannot match anything.
    """

    scheme: Scheme
    host: str = ""
    port: int | None = None
    prefix: str = ""
    pull_requests: bool = field(default=False, kw_only=True)
    use_token: bool = field(default=False, kw_only=True)
    private: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        require_one_of("the scheme of Allow", self.scheme, get_args(Scheme))
        for name in ("host", "prefix"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"{name} of Allow must be a str, not {getattr(self, name)!r}")
        for name in ("pull_requests", "use_token", "private"):
            require_bool(f"{name} of Allow", getattr(self, name))
        try:
            self._normalize()
        except InvalidAdapterIdError as error:
            raise ConfigError(f"Allow({self.scheme!r}, …): {error.problem}") from None

    def _normalize(self) -> None:
        """Check the fields for this scheme and bring them into canonical spelling."""
        if self.prefix and (self.prefix[0] == "/" or self.prefix[-1] != "/"):
            raise ConfigError(
                f"prefix {shorten(self.prefix, 200)!r} of Allow must end with '/', because it"
                " is a folder, and must not begin with it"
            )
        self._require_applicable()
        if self.scheme == "hub":
            self._check_hub()
        elif self.scheme in DEFAULT_PORTS:
            self._normalize_web()
        else:
            checked_bucket(self.scheme, self.host)
            checked_prefix(self.prefix)

    def _require_applicable(self) -> None:
        web = self.scheme in DEFAULT_PORTS
        for name, value, applicable in (
            ("host", self.host, self.scheme != "hub"),
            ("port", self.port is not None, web),
            ("private", self.private, web),
            ("pull_requests", self.pull_requests, self.scheme == "hub"),
            ("use_token", self.use_token, self.scheme == "hub"),
        ):
            if value and not applicable:
                raise ConfigError(f"Allow({self.scheme!r}, …) has no {name}")
        if not self.host and self.scheme != "hub":
            word = {"az": "container"}.get(
                self.scheme, "bucket" if self.scheme in STORES else "host"
            )
            raise ConfigError(f"Allow({self.scheme!r}, …) must name the {word}")

    def _check_hub(self) -> None:
        names = self.prefix.split("/")[:-1]
        if len(names) > 2 or not all(map(is_hub_name, names)):
            raise ConfigError(
                f"prefix {shorten(self.prefix, 200)!r} of Allow('hub') is neither 'org/' nor"
                " 'org/name/'"
            )

    def _normalize_web(self) -> None:
        bare = self.host.count(":") > 1 and not self.host.startswith("[")
        host = checked_host(f"[{self.host}]" if bare else self.host)
        object.__setattr__(self, "host", host)
        object.__setattr__(self, "prefix", folder_path(f"/{self.prefix}")[1:])
        if self.port is not None:
            if not isinstance(self.port, int) or isinstance(self.port, bool):
                raise ConfigError(f"port of Allow must be an integer or None, not {self.port!r}")
            object.__setattr__(self, "port", checked_port(self.scheme, self.port))
        if self.private and (host == "localhost" or is_address(host)):
            raise ConfigError("private of Allow is for names: an address and 'localhost' need none")

    def covers(self, place: OriginPlace) -> bool:
        """Return whether `place` is this place or below it."""
        return place[:3] == (self.scheme, self.host, self.port) and place.path.startswith(
            self.prefix
        )


def as_allow(entries: object, name: str = "allow") -> tuple[Allow, ...]:
    """Check a tuple or list of `Allow` entries. Raises `ConfigError`."""
    if not isinstance(entries, tuple | list) or not all(
        isinstance(entry, Allow) for entry in entries
    ):
        raise ConfigError(f"{name} must be a tuple of Allow(scheme, host, port, prefix)")
    return tuple(entries)


def is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
