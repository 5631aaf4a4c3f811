"""Whom TLS trusts, and which proxy leads where: as users of other tools have set it up."""

from __future__ import annotations

import base64
import os
import ssl
from collections.abc import Mapping
from importlib import import_module, util
from typing import NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies

from lorax_async.errors import ConfigError
from lorax_async.io.http.urls import Origin, parse_url

BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Read in this order, after `ca_bundle`; OpenSSL itself reads SSL_CERT_FILE and SSL_CERT_DIR."""


def tls_context(ca_bundle: str | None, environment: Mapping[str, str]) -> ssl.SSLContext:
    """TLS 1.2 or newer, names checked. Raises `ConfigError` if the bundle cannot be read.

    Without a bundle the system's certificates count; where it has none, certifi's, if installed.
    """
    named = (environment[name] for name in BUNDLES if environment.get(name))
    bundle = ca_bundle or next(named, None) or _fallback(environment)
    try:
        if bundle is not None and os.path.isdir(bundle):
            return ssl.create_default_context(capath=bundle)
        return ssl.create_default_context(cafile=bundle)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "the certificates that ca_bundle, REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names cannot be"
            f" read ({type(error).__name__})"
        ) from error


def _fallback(environment: Mapping[str, str]) -> str | None:
    paths = ssl.get_default_verify_paths()
    named = any(environment.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
    if named or paths.cafile or paths.capath or util.find_spec("certifi") is None:
        return None
    where: str = import_module("certifi").where()
    return where


class Proxy(NamedTuple):
    """Where requests go instead, and the field that says who asks."""

    origin: Origin
    authorization: str | None

    def __repr__(self) -> str:
        return f"Proxy({self.origin})"


class Proxies:
    """Which proxy leads to an origin, if any.

    `given` has URLs by scheme, and under "no" a list of hosts; None reads the environment, once.
    """

    def __init__(self, given: Mapping[str, str] | None) -> None:
        found = getproxies() if given is None else given
        self._by_scheme = {
            scheme: _proxy(found[scheme]) for scheme in ("http", "https") if found.get(scheme)
        }
        direct = (found.get("no") or "").lower().split(",")
        self._direct = [host.strip() for host in direct if host.strip()]

    def to(self, origin: Origin) -> Proxy | None:
        return None if self._is_direct(origin) else self._by_scheme.get(origin.scheme)

    def _is_direct(self, origin: Origin) -> bool:
        for entry in self._direct:
            host, _, port = entry.partition(":") if entry.count(":") == 1 else (entry, "", "")
            if port and port != str(origin.port):
                continue
            bare = host.lstrip("*").lstrip(".")
            if host == "*" or origin.host == bare or (bare and origin.host.endswith(f".{bare}")):
                return True
        return False


def _proxy(text: str) -> Proxy:
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        user, at, place = parts.netloc.rpartition("@")
        origin = parse_url(f"{parts.scheme}://{place}").origin
    except ValueError:
        origin = None
    if origin is None or origin.scheme != "http":
        raise ConfigError(
            "a proxy must be http://[user:password@]host:port; SOCKS and TLS to the proxy itself"
            " are not known here"
        )
    if not at:
        return Proxy(origin, None)
    return Proxy(origin, f"Basic {base64.b64encode(unquote(user).encode()).decode()}")
