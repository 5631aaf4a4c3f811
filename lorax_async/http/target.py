"""Requests for files, and the check that a response is what was requested."""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from lorax_async.errors import FetchError, IntegrityError, UsageError
from lorax_async.formats.spans import ByteRange
from lorax_async.http.connection import ResponseHead
from lorax_async.http.failures import changed_error, status_error
from lorax_async.http.settings import PublicOnly, Rules
from lorax_async.urls import Url

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\x21-\x7e](?:[\t\x20-\x7e]*[\x21-\x7e])?")
_RESERVED = frozenset(
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
    name
        Its name in error texts: no secret, no path.
    headers
        Fields for the URL's own origin. No other origin ever gets them.
    rules
        Where requests and redirects may go.
    redirected_to
        Where redirects led a moment ago, if the caller knows: requested first.
    """

    url: Url
    name: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    rules: Rules = field(default_factory=PublicOnly, repr=False)
    redirected_to: Url | None = None

    def __post_init__(self) -> None:
        for name, value in self.headers.items():
            if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
                raise UsageError(f"{name!r} is not a field that a caller may set")
            if not _VALUE.fullmatch(value):
                raise UsageError(f"the value of the field {name!r} has characters it may not have")

    @property
    def location(self) -> ResolvedLocation:
        """The URL, before any redirect."""
        return ResolvedLocation(self.url, 0, trusted=True)


@dataclass(frozen=True, slots=True)
class ResolvedLocation:
    """Where redirects have led so far; `trusted` while they met no other origin."""

    url: Url
    hop: int
    trusted: bool


@dataclass(frozen=True, slots=True)
class Validators:
    """What identifies a version of a file (RFC 9110, 8.8), from the first response.

    A strong `etag` names its bytes; a weak one or `modified` can only show that they changed.
    """

    size: int | None = None
    etag: str | None = field(default=None, repr=False)
    modified: str | None = None

    @property
    def strong_etag(self) -> str | None:
        """The ETag, if it is strong."""
        return self.etag if self.etag is not None and not self.etag.startswith("W/") else None


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of the first request for a file.

    Attributes
    ----------
    location
        Where it was found: ranges are requested there.
    fields
        The response's fields; names in lower case.
    start
        The file's first bytes: those that were needed, and what came with them.
    ranges
        Whether the server serves ranges.
    rest
        What comes after `start` of the bytes that were requested, within the time of two delays
        and 55 ms. Never fails.
    """

    target: Target
    location: ResolvedLocation
    validators: Validators
    fields: Mapping[str, str] = field(repr=False)
    start: bytes = field(repr=False)
    ranges: bool
    rest: Future[memoryview] = field(repr=False)


# -- checks ----------------------------------------------------------------------------------------

_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


class Content(NamedTuple):
    """What a body brings: the file's bytes up to `stop`; None is its end, wherever that is."""

    stop: int | None
    validators: Validators


def check_response(
    head: ResponseHead, span: ByteRange | None, expected: Validators, what: str
) -> Content:
    """Return what the response to a request for `span` (None: the whole file) brings.

    Raises `RetryableError` where another attempt may succeed, else the error of its status, or
    `IntegrityError` where it is not what was requested.
    """
    if head.status not in {200, 206}:
        raise status_error(head.status, head.fields, what, size=expected.size)
    if head.fields.get("content-encoding", "identity").lower() != "identity":
        raise FetchError(
            f"{what}: the response has a content coding, which was not requested; let the"
            " server send the file as it is",
            retryable=False,
        )
    if head.status == 200:
        return Content(head.length, _require_unchanged(head, head.length, expected, what))
    match = _RANGE.fullmatch(head.fields.get("content-range", ""))
    if match is None or span is None:
        raise IntegrityError(f"{what}: a part came without a range, or was not requested")
    start, stop = int(match[1]), int(match[2]) + 1
    size = None if match[3] == "*" else int(match[3])
    validators = _require_unchanged(head, size, expected, what)
    # The first request does not know the size yet, and may ask for more than there is.
    last = span[1] if size is None or expected.size is not None else min(span[1], size)
    if (start, stop) != (span[0], last):
        raise IntegrityError(
            f"{what}: bytes {start:,}-{stop - 1:,} came where {span[0]:,}-{last - 1:,} were"
            " requested"
        )
    if head.length not in {None, stop - start}:
        raise IntegrityError(f"{what}: its length does not match its range")
    return Content(stop, validators)


def _require_unchanged(
    head: ResponseHead, size: int | None, expected: Validators, what: str
) -> Validators:
    """Return the validators of the file. Raises `IntegrityError` if it is another one."""
    etag, modified = head.fields.get("etag"), head.fields.get("last-modified")
    if (
        (None not in {expected.size, size} and expected.size != size)
        or (expected.etag is not None and expected.etag != etag)
        or (expected.etag is None and expected.modified not in {None, modified})
    ):
        raise changed_error(what)
    return Validators(expected.size if size is None else size, etag, modified)
