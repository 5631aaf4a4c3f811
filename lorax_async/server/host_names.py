"""The names by which clients may call the server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import ip_address

from lorax_async.errors import ConfigError, shorten
from lorax_async.settings.allow import is_address

ANY = "*"
LOOPBACK = ("localhost", "*.localhost", "127.0.0.1", "::1")
"""What a browser takes for this machine without asking anybody."""

_NAME = re.compile(r"(?:\*\.)?[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_FIELD = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]{0,5})?")


def is_allowed(field: str, hosts: Sequence[str]) -> bool:
    """Return whether a `Host` field, with or without a port, is one of `checked_hosts`."""
    if ANY in hosts:
        return True
    found = _FIELD.fullmatch(field.lower())
    if found is None:
        return False
    name = _plain(found[1])
    return any(name.endswith(host[1:]) if host.startswith("*") else name == host for host in hosts)


def checked_hosts(hosts: object) -> tuple[str, ...]:
    """Return names and addresses in one spelling: small letters, no brackets.

    "*.example.com" is all below that name, "*" is all. Raises `ConfigError`.
    """
    if not isinstance(hosts, tuple | list):
        raise ConfigError("allowed_hosts must be a tuple of names, or None")
    return tuple(map(_checked, hosts))


def _checked(host: object) -> str:
    if not isinstance(host, str):
        raise ConfigError(f"an allowed host is a text, not {host!r}")
    if host == ANY:
        return host
    name = _plain(host.lower())
    if not (is_address(name) or _NAME.fullmatch(name)):
        raise ConfigError(
            f"{shorten(host, 200)!r} is no host; write a name, *.name for all below it, or an"
            " address, without a port"
        )
    return name


def _plain(host: str) -> str:
    """An address in its usual spelling, a name without the dot of the root."""
    bare = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    return str(ip_address(bare)) if is_address(bare) else bare.removesuffix(".")
