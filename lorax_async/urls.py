"""The one grammar of http(s) URLs: of files, in which anything may be signed, and of folders.

A folder's URL is an adapter's id, so it has one spelling and one reading. `str` and `repr` of a URL
show no secret.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}

_MAX_CHARACTERS = 8_192
_MAX_FOLDER_CHARACTERS = 2_048
_MAX_HOST_CHARACTERS = 253
_TEXT = re.compile(r"[\x21-\x7e]+")
_AUTHORITY = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9.])?)(?::[0-9]{1,5})?"
)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PATH = re.compile(r"/(?:[A-Za-z0-9._~!$&'()*+,=:@/-]|%[0-9A-Fa-f]{2})*")
_ENCODED = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))
_FORM = (
    "it is not http(s)://host[:port]/path, where the host is a name in ASCII, an IPv4 address, or"
    " an IPv6 address in brackets (without a zone), the port is from 1 to 65535, and there is no"
    " user name and no space"
)


class InvalidUrlError(ValueError):
    """The text is not a URL that this package requests; the message does not repeat it."""


class Origin(NamedTuple):
    """The unit that credentials and connections belong to; an IPv6 `host` has no brackets."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def explicit_port(self) -> int | None:
        """None for the scheme's default."""
        return None if self.port == DEFAULT_PORTS[self.scheme] else self.port

    @property
    def authority(self) -> str:
        """The `Host` field: the port only where it is not the scheme's default."""
        return _authority(self)


@lru_cache(256)  # for each request
def _authority(origin: Origin) -> str:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    return host if origin.explicit_port is None else f"{host}:{origin.port}"


@dataclass(frozen=True, slots=True)
class Url:
    """The address of one file or folder; `target` is its path and query.

    `str` and `repr` show the origin only: paths and queries hold signatures and keys.
    """

    origin: Origin
    target: str = field(repr=False)

    def __str__(self) -> str:
        return str(self.origin)

    @property
    def text(self) -> str:
        """The whole URL: a secret."""
        return f"{self.origin}{self.target}"

    @property
    def secure(self) -> bool:
        return self.origin.scheme == "https"


def parse_url(text: str) -> Url:
    """Parse an absolute http(s) URL in ASCII without user and password; drop its fragment.

    Raises `InvalidUrlError`.
    """
    if len(text) > _MAX_CHARACTERS:
        raise InvalidUrlError(f"it is longer than {_MAX_CHARACTERS:,} characters")
    origin, target = _split(text.partition("#")[0])
    if not _TEXT.fullmatch(target):
        raise InvalidUrlError("its path or query is not in printable ASCII without spaces")
    return Url(origin, target)


def parse_folder_url(text: str) -> Url:
    """Parse the URL of a folder into its canonical spelling; the path begins and ends with "/".

    Raises `InvalidUrlError`, also for a query or a fragment.
    """
    if len(text) > _MAX_FOLDER_CHARACTERS or "?" in text or "#" in text:
        raise InvalidUrlError(
            "a URL is http(s)://host[:port]/folder/, of at most"
            f" {_MAX_FOLDER_CHARACTERS:,} characters, without user name, query and fragment"
        )
    origin, path = _split(text)
    host = parse_host(f"[{origin.host}]" if ":" in origin.host else origin.host)
    return Url(origin._replace(host=host), folder_path(path))


def resolve_redirect(base: Url, location: str) -> Url:
    """Resolve a `Location` field, which may be relative. Raises `InvalidUrlError`.

    Bytes that are not ASCII are quoted, as browsers do.
    """
    quoted = quote(location.encode("latin-1", "replace"), safe=_PRINTABLE)
    try:
        return parse_url(urljoin(base.text, quoted))
    except InvalidUrlError:
        raise
    except ValueError as error:
        raise InvalidUrlError("it is no URL") from error


def _split(text: str) -> tuple[Origin, str]:
    """Return the origin and, to the letter, all behind it: it may be signed."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        if parts.netloc.startswith("["):
            host = str(IPv6Address(host))
    except ValueError:
        raise InvalidUrlError(_FORM) from None
    # urlsplit drops some control characters and splits odd authorities without complaint.
    scheme, _, target = text.partition(f"://{parts.netloc}")
    if scheme.lower() not in DEFAULT_PORTS or not _AUTHORITY.fullmatch(parts.netloc) or port == 0:
        raise InvalidUrlError(_FORM)
    origin = Origin(parts.scheme, host, port or DEFAULT_PORTS[parts.scheme])
    return origin, target if target.startswith("/") else f"/{target}"


def parse_host(text: str) -> str:
    """Return the canonical spelling of a host name, or of an address, without brackets.

    Raises `InvalidUrlError`, also for numbers that only some programs read as addresses.
    """
    if text.startswith("[") and text.endswith("]"):
        return _parse_ipv6(text[1:-1])
    host = text.lower()
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(host))
        except ValueError:
            raise InvalidUrlError(
                "an IPv4 address is written as four decimal numbers from 0 to 255"
            ) from None
    if (
        not text.isascii()
        or len(host) > _MAX_HOST_CHARACTERS
        or not all(_LABEL.fullmatch(label) for label in labels)
    ):
        raise InvalidUrlError(
            "the URL's host is a name of letters, digits, '-' and '_' between dots (others in their"
            " xn-- form), an IPv4 address, or an IPv6 address in brackets"
        )
    return host


def _parse_ipv6(text: str) -> str:
    try:
        address = IPv6Address(text)
    except ValueError:
        address = None
    if address is None or "%" in text:
        raise InvalidUrlError("the host in brackets is no IPv6 address (without a zone)")
    if address.ipv4_mapped is not None:
        raise InvalidUrlError("an IPv4 address is written as such, not within an IPv6 address")
    return str(address)


@lru_cache(maxsize=1_024)
def is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def folder_path(path: str) -> str:
    """Normalize a path: "/" at both ends, and only necessary percent-encoding.

    Raises `InvalidUrlError`, also where two programs might read it as different paths.
    """
    if not _PATH.fullmatch(path):
        raise InvalidUrlError(
            "the path of a URL is in ASCII, with all but letters, digits and -._~!$&'()*+,=:@"
            " percent-encoded"
        )
    inner = path[1:].removesuffix("/")
    for part in inner.split("/") if len(path) > 1 else ():
        try:
            plain = unquote_to_bytes(part).decode()
        except UnicodeDecodeError:
            raise InvalidUrlError("the path of a URL does not decode to UTF-8") from None
        require_path_part(plain, "/\\%;")  # some servers cut at ";"
    return _ENCODED.sub(_normalize_escape, f"/{inner}/" if inner else "/")


def require_path_part(part: str, ambiguous: str) -> None:
    """Raise `InvalidUrlError` for a part of a path that some servers read as another path.

    `part` is decoded. Servers may decode it twice, or split it, at the `ambiguous` characters.
    """
    if part in {"", ".", ".."}:
        raise InvalidUrlError("a path has no part that is '', '.' or '..'")
    if not part.isprintable() or set(ambiguous) & set(part):
        raise InvalidUrlError(
            f"a part of the path contains no {' '.join(ambiguous)} and no unprintable"
            " character, encoded or not"
        )


def _normalize_escape(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if _UNRESERVED.fullmatch(character) else escape[0].upper()
