"""Folders behind `http(s)://host[:port]/folder/`, by a grammar that leaves no second reading."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv6Address
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from lorax_async.errors import InvalidAdapterIdError

DEFAULT_PORTS = {"http": 80, "https": 443}

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[^\]/]*\]|[^:/\[\]]*)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/.*)?",
    re.IGNORECASE | re.ASCII,
)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PATH = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,=:@/-]|%[0-9A-Fa-f]{2})*")
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_LONGEST = 2_048
_LONGEST_HOST = 253

# A server that unwraps twice, or cuts at ';', reads these as another path.
_TWO_FACED = frozenset("/\\%;")


class FolderUrl(NamedTuple):
    """A folder behind a URL, in its one spelling.

    `host` has no brackets, `port` is None where it is the scheme's own, and `path` begins and ends
    with "/".
    """

    scheme: str
    host: str
    port: int | None
    path: str

    @property
    def text(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def parse_folder_url(text: str) -> FolderUrl:
    """Raises `InvalidAdapterIdError`."""
    found = _URL.fullmatch(text)
    if found is None or len(text) > _LONGEST:
        raise InvalidAdapterIdError(
            "a URL is http(s)://host[:port]/folder/, of at most"
            f" {_LONGEST:,} characters, without user name, query and fragment"
        )
    scheme = found["scheme"].lower()
    port = checked_port(scheme, int(found["port"] or DEFAULT_PORTS[scheme]))
    return FolderUrl(scheme, checked_host(found["host"]), port, folder_path(found["path"] or "/"))


def checked_port(scheme: str, port: int) -> int | None:
    """None for the scheme's own. Raises `InvalidAdapterIdError`."""
    if not 0 < port < 65_536:
        raise InvalidAdapterIdError("a port is from 1 to 65535")
    return None if port == DEFAULT_PORTS[scheme] else port


def checked_host(text: str) -> str:
    """A name, or an address in its usual spelling, without brackets.

    Raises `InvalidAdapterIdError`, also for numbers that only some programs read as addresses.
    """
    if text.startswith("[") and text.endswith("]"):
        return _checked_ipv6(text[1:-1])
    host = text.lower()
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _checked_ipv4(host)
    if (
        not text.isascii()
        or len(host) > _LONGEST_HOST
        or not all(_LABEL.fullmatch(label) for label in labels)
    ):
        raise InvalidAdapterIdError(
            "the URL's host is a name of letters, digits, '-' and '_' between dots (others in their"
            " xn-- form), an IPv4 address, or an IPv6 address in brackets"
        )
    return host


def _checked_ipv4(host: str) -> str:
    try:
        return str(IPv4Address(host))
    except ValueError:
        raise InvalidAdapterIdError(
            "an IPv4 address is written as four decimal numbers from 0 to 255"
        ) from None


def _checked_ipv6(host: str) -> str:
    try:
        address = IPv6Address(host)
    except ValueError:
        address = None
    if address is None or "%" in host:
        raise InvalidAdapterIdError("what is in brackets is no IPv6 address (without a zone)")
    if address.ipv4_mapped is not None:
        raise InvalidAdapterIdError("an IPv4 address is written as such, not within an IPv6 one")
    return str(address)


def folder_path(path: str) -> str:
    """With a "/" at both ends, encoded no more than needed. Raises `InvalidAdapterIdError`."""
    if not _PATH.fullmatch(path):
        raise InvalidAdapterIdError(
            "the path of a URL is in ASCII, with all but letters, digits and -._~!$&'()*+,=:@"
            " percent-encoded"
        )
    inner = path[1:].removesuffix("/")
    if inner or len(path) > 1:
        for part in inner.split("/"):
            _check_part(part)
    return _ENCODED.sub(_encoded, f"/{inner}/" if inner else "/")


def _check_part(part: str) -> None:
    try:
        plain = unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise InvalidAdapterIdError("the path of a URL does not decode to UTF-8") from None
    if plain in {"", ".", ".."}:
        raise InvalidAdapterIdError("the path of a URL has no part that is '', '.' or '..'")
    if not plain.isprintable() or _TWO_FACED & set(plain):
        raise InvalidAdapterIdError(
            "the path of a URL has none of / \\ % ; in a part of it, and nothing that cannot be"
            " printed, encoded or not"
        )


def _encoded(found: re.Match[str]) -> str:
    character = chr(int(found[1], 16))
    return character if _UNRESERVED.fullmatch(character) else found[0].upper()
