"""URLs by a strict grammar; their `str` and `repr` show no secret."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

_MAX_CHARACTERS = 8_192
_TEXT = re.compile(r"[\x21-\x7e]+")
_AUTHORITY = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9.])?)(?::[0-9]{1,5})?"
)
_PORTS = {"http": 80, "https": 443}
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


class InvalidUrlError(ValueError):
    """The text is not a URL that this package requests; the message does not repeat it."""


class Origin(NamedTuple):
    """The unit that credentials and connections belong to."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """The `Host` field: the port only where it is not the scheme's default."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Url:
    """The address of one file.

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
    text = text.partition("#")[0]
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise InvalidUrlError("its host or port (1 to 65535) is malformed") from None
    # urlsplit drops some control characters and splits odd authorities without complaint.
    if parts.scheme not in _PORTS or not (_TEXT.fullmatch(text) and _AUTHORITY.fullmatch(parts[1])):
        raise InvalidUrlError(
            "it is not http(s)://host[:port]/path in ASCII without user name, password and spaces"
        )
    if port == 0:
        raise InvalidUrlError("its port is not from 1 to 65535")
    origin = Origin(parts.scheme, parts.hostname or "", port or _PORTS[parts.scheme])
    target = text[len(f"{parts.scheme}://{parts.netloc}") :]  # to the letter: it may be signed
    return Url(origin, target if target.startswith("/") else f"/{target}")


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
