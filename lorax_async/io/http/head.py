"""The head of a response, by RFC 9112's grammar: what is odd is refused, not guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

MAX_HEAD_BYTES = 64 << 10
MAX_FIELDS = 128

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
# Twice with different values, nobody knows which one counts.
_ONCE = frozenset(
    {
        *("content-length", "content-range", "transfer-encoding", "content-encoding", "location"),
        *("etag", "retry-after"),
    }
)


class MalformedHeadError(ValueError):
    """Says what is wrong without repeating what came."""


@dataclass(frozen=True, slots=True)
class Head:
    """Status and fields; names in lower case, repeated fields joined by a comma."""

    status: int
    fields: Mapping[str, str]
    minor: int

    @property
    def keeps_alive(self) -> bool:
        """Whether the connection may carry another request after this response."""
        tokens = {token.strip().lower() for token in self.fields.get("connection", "").split(",")}
        return "close" not in tokens and (self.minor == 1 or "keep-alive" in tokens)


def parse_head(data: bytes) -> Head:
    """Parse a head without its empty last line. Raises `MalformedHeadError`."""
    first, *lines = data.split(b"\r\n")
    status = _STATUS.fullmatch(first)
    if status is None:
        raise MalformedHeadError("it begins with no HTTP/1.x status line")
    if len(lines) > MAX_FIELDS:
        raise MalformedHeadError(f"it has more than {MAX_FIELDS} fields")
    fields: dict[str, str] = {}
    for line in lines:
        _add(fields, line)
    return Head(int(status[2]), fields, int(status[1]))


def _add(fields: dict[str, str], line: bytes) -> None:
    found = _FIELD.fullmatch(line)
    if found is None:
        raise MalformedHeadError("a field of it is malformed")
    name, value = found[1].decode("ascii").lower(), found[2].strip(b" \t").decode("latin-1")
    before = fields.get(name)
    if before is None:
        fields[name] = value
    elif name not in _ONCE:
        fields[name] = f"{before}, {value}"
    elif before != value:
        raise MalformedHeadError(f"it has two different {name} fields")
