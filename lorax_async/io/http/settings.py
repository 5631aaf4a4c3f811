"""The settings of the HTTP engine, and the rules about where it may go."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Protocol

from lorax_async.core.ranges import PieceSizes
from lorax_async.core.retries import Retries
from lorax_async.io.http.urls import Url

Address = IPv4Address | IPv6Address

_NAT64 = int(IPv6Address("64:ff9b::")) >> 32


class Rules(Protocol):
    """The operator's word. Asked for every URL, redirects included. Quick, from any thread."""

    def allows(self, url: Url, hop: int) -> bool:
        """Whether this URL may be asked for; `hop` is 0 for the caller's own, then counts."""

    def allows_address(self, url: Url, address: Address) -> bool:
        """Whether that host may be this address, which is no public one."""


class PublicOnly:
    """The rules where nobody said otherwise: https, and public addresses."""

    def allows(self, url: Url, hop: int) -> bool:  # noqa: ARG002 - the rule is the same on each
        return url.secure

    def allows_address(self, url: Url, address: Address) -> bool:  # noqa: ARG002 - none is
        return False


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds; the deadline of a whole download is the caller's.

    Attributes
    ----------
    connect
        For finding a host, for connecting to one address, and for the TLS handshake, each.
    read
        For the next byte, and for the whole head of a response.
    slowest, over
        Bytes per second that a connection must bring, on average, in every `over` seconds of
        waiting for it. Per-read timeouts never end what drips.
    idle
        For how long a connection is kept for the next request.
    stuck
        After so long without a byte, a connection of a download that has more than its share is
        ended, if another at the same origin has less. For another origin's sake it is ended at
        once: docs/http.md has the rules.
    """

    connect: float = 10.0
    read: float = 20.0
    slowest: float = 4_096.0
    over: float = 15.0
    idle: float = 15.0
    stuck: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """How the engine fetches.

    Attributes
    ----------
    connections
        Threads, and so connections in use, of all downloads together. As many more may be idle.
    sizes
        Limits of the ranges that are asked for.
    ca_bundle
        A file of certificates to trust instead of the system's, in PEM.
    proxies
        URL of the proxy by scheme ("http", "https"), and under "no" the hosts that need none, as
        `NO_PROXY` lists them; None takes what the environment says.
    user_agent
        What the engine calls itself.
    """

    connections: int = 16
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: Retries = field(default_factory=Retries)
    sizes: PieceSizes = field(default_factory=PieceSizes)
    redirects: int = 3
    ca_bundle: str | None = None
    proxies: dict[str, str] | None = field(default=None, repr=False)
    user_agent: str = "lorax-async"


def is_public(address: Address) -> bool:
    """Whether the address is one of the open internet, also where it is wrapped in another."""
    inner = _wrapped(address)
    if inner is not None:
        return is_public(inner)
    if isinstance(address, IPv6Address) and address.is_site_local:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _wrapped(address: Address) -> IPv4Address | None:
    if isinstance(address, IPv4Address):
        return None
    if int(address) >> 32 == _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)


def address_of(text: str) -> Address:
    """Of a number as sockets show it, with or without a zone."""
    return ip_address(text.partition("%")[0])
