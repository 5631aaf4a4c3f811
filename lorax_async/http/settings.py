"""Settings of the range downloader: limits, where requests may go, trusted authorities, proxies."""

from __future__ import annotations

import base64
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module, util
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple, Protocol
from urllib.parse import unquote
from urllib.request import getproxies

from lorax_async.errors import ConfigError
from lorax_async.http.failures import RetryPolicy
from lorax_async.http.ranges import PieceSizes
from lorax_async.urls import InvalidUrlError, Origin, Url, parse_url

# -- where requests may go -------------------------------------------------------------------------

Address = IPv4Address | IPv6Address

_NAT64 = int(IPv6Address("64:ff9b::")) >> 32


class Rules(Protocol):
    """The operator's rules, applied to every URL, redirects included. Quick, from any thread."""

    def allows(self, url: Url, hop: int) -> bool:
        """Whether this URL may be requested; `hop` is 0 for the caller's own, then counts."""

    def allows_address(self, url: Url, address: Address) -> bool:
        """Whether the URL's host may have this address, which is not public."""


class PublicOnly:
    """The default rules: https and public addresses."""

    def allows(self, url: Url, hop: int) -> bool:  # noqa: ARG002 - the same on each hop
        return url.secure

    def allows_address(self, url: Url, address: Address) -> bool:  # noqa: ARG002 - none is
        return False


def is_public(address: Address) -> bool:
    """Whether the address is on the open internet, also where it is wrapped in another."""
    if isinstance(address, IPv6Address):
        teredo = address.teredo
        inner = address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)
        if int(address) >> 32 == _NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


# -- limits ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Limits in seconds; the deadline of a whole download is the caller's.

    Attributes
    ----------
    connect
        For a name lookup, for connecting to one address, and for the TLS handshake, each.
    read
        For the next byte, and for the whole head of a response.
    slowest, over
        Bytes per second that a connection must bring, on average, in every `over` seconds of
        waiting for it. Timeouts per read never end a server that drips.
    idle
        How long a connection is kept for the next request.
    stuck
        After this long without a byte, a connection of a download that has more than its share is
        ended, if another download at the same origin has less; at once if the whole download is
        silent (`download_scheduler.py` says from when on). For another origin's sake it is
        ended at once: docs/http.md has the rules.
    """

    connect: float = 10.0
    read: float = 20.0
    slowest: float = 4_096.0
    over: float = 15.0
    idle: float = 15.0
    stuck: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    """How the downloader fetches.

    Attributes
    ----------
    connections
        Threads, and so connections in use, of all downloads together. As many more may be idle.
    sizes
        Limits of the ranges that are requested.
    ca_bundle
        A PEM file of certificates to trust instead of the system's.
    proxies
        URL of the proxy by scheme ("http", "https"), and under "no" the hosts that need none, as
        `NO_PROXY` lists them; None reads the environment.
    user_agent
        The `User-Agent` field.
    """

    connections: int = 16
    timeouts: Timeouts = field(default_factory=Timeouts)
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    sizes: PieceSizes = field(default_factory=PieceSizes)
    ca_bundle: str | None = None
    proxies: dict[str, str] | None = field(default=None, repr=False)
    user_agent: str = "lorax-async"


# -- trusted authorities ---------------------------------------------------------------------------


def tls_context(ca_bundle: str | None, environment: Mapping[str, str]) -> ssl.SSLContext:
    """Make a context for TLS 1.2 or newer that checks names.

    Without a bundle the system's certificates count; where it has none, certifi's, if installed.
    OpenSSL itself reads SSL_CERT_FILE and SSL_CERT_DIR. Raises `ConfigError` if the bundle cannot
    be read.
    """
    bundle, get = ca_bundle, environment.get
    bundle = bundle or get("REQUESTS_CA_BUNDLE") or get("CURL_CA_BUNDLE") or None
    system = ssl.get_default_verify_paths()
    named = system.cafile or system.capath or get("SSL_CERT_FILE") or get("SSL_CERT_DIR")
    try:
        if bundle is None and not named and util.find_spec("certifi") is not None:
            bundle = import_module("certifi").where()
        if bundle is not None and os.path.isdir(bundle):
            return ssl.create_default_context(capath=bundle)
        return ssl.create_default_context(cafile=bundle)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "the certificates that ca_bundle, REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names cannot be"
            f" read ({type(error).__name__})"
        ) from error


# -- proxies ---------------------------------------------------------------------------------------


class Proxy(NamedTuple):
    """A proxy and its `Proxy-Authorization` field."""

    origin: Origin
    authorization: str | None

    def __repr__(self) -> str:
        return f"Proxy({self.origin})"


class Proxies:
    """The proxy of each origin, if any, by `HttpSettings.proxies` or the environment, read once."""

    def __init__(self, configured: Mapping[str, str] | None) -> None:
        urls = getproxies() if configured is None else configured
        self._by_scheme = {
            scheme: _proxy(urls[scheme]) for scheme in ("http", "https") if urls.get(scheme)
        }
        direct = (urls.get("no") or "").lower().split(",")
        self._direct = [host.strip() for host in direct if host.strip()]

    def to(self, origin: Origin) -> Proxy | None:
        return None if self._is_direct(origin) else self._by_scheme.get(origin.scheme)

    def _is_direct(self, origin: Origin) -> bool:
        # `urllib.request.proxy_bypass` does not know "*:8080", nor a host with an empty port.
        for entry in self._direct:
            host, _, port = entry.partition(":") if entry.count(":") == 1 else (entry, "", "")
            if port and port != str(origin.port):
                continue
            bare = host.lstrip("*").lstrip(".")
            if host == "*" or origin.host == bare or (bare and origin.host.endswith(f".{bare}")):
                return True
        return False


def _proxy(text: str) -> Proxy:
    scheme, _, rest = text.rpartition("://")
    user, at, authority = rest.rstrip("/").rpartition("@")
    try:
        origin = parse_url(f"{scheme or 'http'}://{authority}").origin
    except InvalidUrlError:
        origin = None
    if origin is None or origin.scheme != "http":
        raise ConfigError(
            "a proxy must be http://[user:password@]host:port; SOCKS and TLS to the proxy itself"
            " are not supported"
        )
    if not at:
        return Proxy(origin, None)
    return Proxy(origin, f"Basic {base64.b64encode(unquote(user).encode()).decode()}")
