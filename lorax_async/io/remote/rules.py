"""Where requests for adapters may lead, by what the operator has allowed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from ipaddress import IPv6Address, ip_address, ip_network

from lorax_async.errors import InvalidAdapterIdError
from lorax_async.ids.folder_urls import DEFAULT_PORTS, checked_host, folder_path
from lorax_async.io.http.settings import Address
from lorax_async.io.http.urls import Origin, Url
from lorax_async.settings.allow import Allow, Reach, is_address

_PRIVATE = [
    ip_network(text)
    for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
]
"""RFC 1918, 6598 and 4193: neither loopback nor link-local."""


class AllowRules:
    """`Rules` made of the operator's entries.

    - The first request goes where an "https" or "http" entry allows it, or to a named origin.
    - A redirect also leads to any https URL. No other host than a named one or one of an entry (and
      there only below its prefix) may have an address that is not public.

    Parameters
    ----------
    allow
        Entries for other schemes than "https" and "http" count for nothing here.
    named
        Origins that are allowed as they are, whatever their addresses, for the operator has named
        them: the hub's endpoint, or that of a store.
    """

    def __init__(self, allow: Sequence[Allow] = (), named: Collection[Origin] = ()) -> None:
        self._entries = tuple(entry for entry in allow if entry.scheme in DEFAULT_PORTS)
        self._named = frozenset(_place(origin) for origin in named)

    def allows(self, url: Url, hop: int) -> bool:
        return (hop > 0 and url.secure) or self._is_named(url) or bool(self._covering(url))

    def allows_address(self, url: Url, address: Address) -> bool:
        return self._is_named(url) or any(_admits(entry, address) for entry in self._covering(url))

    def _is_named(self, url: Url) -> bool:
        return _place(url.origin) in self._named

    def _covering(self, url: Url) -> list[Allow]:
        reach = Reach(*_place(url.origin), _path(url))
        return [entry for entry in self._entries if entry.covers(reach)]


def _place(origin: Origin) -> tuple[str, str, int | None]:
    """As entries spell it; a host that could be none of theirs stays as it is."""
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    try:
        host = checked_host(host)
    except InvalidAdapterIdError:
        host = origin.host
    own = origin.port == DEFAULT_PORTS[origin.scheme]
    return origin.scheme, host, None if own else origin.port


def _path(url: Url) -> str:
    """Below the host; "" where a server might read it in two ways, so that no prefix fits it."""
    try:
        return folder_path(url.target.partition("?")[0])[1:]
    except InvalidAdapterIdError:
        return ""


def _admits(entry: Allow, address: Address) -> bool:
    """Whether the entry's host may be this address, which is no public one."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    plain = mapped or address
    if entry.host == "localhost":
        return plain.is_loopback
    if is_address(entry.host):
        return plain == ip_address(entry.host)
    return entry.private and any(plain in network for network in _PRIVATE)
