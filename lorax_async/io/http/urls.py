"""URLs, by a strict grammar, and texts about them that hold no secret."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote, urljoin

_MOST = 8_192
_PARTS = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9.])?)"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<target>[/?][\x21-\x7e]*)?",
    re.IGNORECASE | re.ASCII,
)
_PORTS = {"http": 80, "https": 443}
_PRINTABLE = "".join(map(chr, range(0x21, 0x7F)))


class InvalidUrlError(ValueError):
    """The text is not a URL that this package asks for; says why without repeating it."""


class Origin(NamedTuple):
    """What credentials belong to, and connections lead to."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """As the `Host` field has it: the port only where it is not the scheme's own."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Url:
    """Where one file lies.

    `str` and `repr` tell the origin only: signatures and keys stand in paths and queries.
    """

    origin: Origin
    target: str = field(repr=False)

    def __str__(self) -> str:
        return str(self.origin)

    @property
    def text(self) -> str:
        """All of it: a secret."""
        return f"{self.origin}{self.target}"

    @property
    def secure(self) -> bool:
        return self.origin.scheme == "https"


def parse_url(text: str) -> Url:
    """An absolute http or https URL in ASCII, without user and password; its fragment is dropped.

    Raises `InvalidUrlError`.
    """
    if len(text) > _MOST:
        raise InvalidUrlError(f"it is longer than {_MOST:,} characters")
    found = _PARTS.fullmatch(text.partition("#")[0])
    if found is None:
        raise InvalidUrlError(
            "it is not http(s)://host[:port]/path in ASCII without user name, password and spaces"
        )
    scheme = found["scheme"].lower()
    port = int(found["port"] or _PORTS[scheme])
    if not 0 < port < 65_536:
        raise InvalidUrlError("its port is not from 1 to 65535")
    target = found["target"] or "/"
    host = found["host"].strip("[]").lower()
    return Url(Origin(scheme, host, port), target if target[0] == "/" else f"/{target}")


def redirected(base: Url, location: str) -> Url:
    """Where a `Location` field leads, which may be relative. Raises `InvalidUrlError`.

    Bytes that are not ASCII are quoted, as browsers do.
    """
    quoted = quote(location.encode("latin-1", "replace"), safe=_PRINTABLE)
    try:
        return parse_url(urljoin(base.text, quoted))
    except InvalidUrlError:
        raise
    except ValueError as error:
        raise InvalidUrlError("it is no URL") from error
