"""What is asked for, where it lies, and what is known of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorax_async.errors import UsageError
from lorax_async.io.http.settings import PublicOnly, Rules
from lorax_async.io.http.urls import Url

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")
_OURS = frozenset(
    {
        *("host", "range", "if-range", "if-match", "accept-encoding", "connection"),
        *("content-length", "transfer-encoding", "proxy-authorization", "user-agent"),
    }
)


@dataclass(frozen=True, slots=True)
class Target:
    """A file, as the caller names it.

    Attributes
    ----------
    url
        Where it lies.
    name
        What texts call it: no secret, no path.
    headers
        Fields for the URL's own origin. Whatever they are, no other origin ever sees them.
    rules
        Where requests and redirects may go.
    found
        Where redirects led to a moment ago, for who was told so: it is asked there first. Another
        origin than the URL's does not see the headers.
    """

    url: Url
    name: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    rules: Rules = field(default_factory=PublicOnly, repr=False)
    found: Url | None = None

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            if not _NAME.fullmatch(name) or name.lower() in _OURS:
                raise UsageError(f"{name!r} is not a field that a caller may set")
            if not _VALUE.fullmatch(value):
                raise UsageError(f"the value of the field {name!r} has characters it may not have")

    @property
    def place(self) -> Place:
        return Place(self.url, 0, trusted=True)

    @property
    def first_place(self) -> Place:
        if self.found is None:
            return self.place
        return Place(self.found, 1, trusted=self.found.origin == self.url.origin)


@dataclass(frozen=True, slots=True)
class Place:
    """Where redirects have led so far; `trusted` while no other origin was met on the way."""

    url: Url
    hop: int
    trusted: bool


@dataclass(frozen=True, slots=True)
class Known:
    """What the first answer said of the file; None where it said nothing.

    A strong `etag` names these very bytes; a weak one or `modified` can only tell that they
    changed.
    """

    size: int | None = None
    etag: str | None = field(default=None, repr=False)
    modified: str | None = None

    @property
    def validator(self) -> str | None:
        """The ETag, if it is strong."""
        return self.etag if self.etag is not None and not self.etag.startswith("W/") else None


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of the first request for a file.

    Attributes
    ----------
    target, place
        What was asked for, and where it was found: later ranges are asked for there.
    known
        What was said of the file as a whole.
    fields
        The response's fields; names in lower case.
    start
        The file's first bytes, as many as were asked for, or all of it.
    ranges
        Whether the server serves ranges.
    """

    target: Target
    place: Place
    known: Known
    fields: Mapping[str, str] = field(repr=False)
    start: bytes = field(repr=False)
    ranges: bool
