"""Whether a response is what was asked for: status, range, length, validators, coding."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lorax_async.core.retries import retry_after_of
from lorax_async.core.spans import Span
from lorax_async.errors import (
    AccessDeniedError,
    AdapterError,
    AdapterNotFoundError,
    FetchError,
    IntegrityError,
)
from lorax_async.io.http.exchange import Response
from lorax_async.io.http.failures import SetbackError
from lorax_async.io.http.target import Known

_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_NO_RANGE = re.compile(r"bytes \*/([0-9]{1,18})")
_DENIED = frozenset({401, 403, 407, 451})
_ABSENT = frozenset({404, 410})
_CROWDED = frozenset({429, 503})
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Content:
    """Which bytes of the file the body has: [start, stop), to its end where `stop` is None."""

    start: int
    stop: int | None
    known: Known

    @property
    def whole(self) -> bool:
        return self.stop is None or (self.start == 0 and self.stop == self.known.size)


def content_of(
    response: Response,
    span: Span | None,
    known: Known,
    what: str,
    wall: Callable[[], float],
) -> Content:
    """What a response to a request for `span` (None: for the file) brings.

    Raises `SetbackError` where another attempt may succeed, else the error of its status, or
    `IntegrityError` where it is not what was asked for.
    """
    head = response.head
    what = f"{what} at {response.place.url}"
    if head.status not in {200, 206}:
        raise _failure(response, known, what, wall)
    coding = head.fields.get("content-encoding", "identity")
    if coding.lower() != "identity":
        raise FetchError(
            f"{what}: it came coded, which was not asked for; let it be served as it is",
            retryable=False,
        )
    if head.status == 206:
        return _part(response, span, known, what)
    size = response.body.length
    found = _same(response, Known(size=size), known, what)
    return Content(0, size, found)


def _part(response: Response, span: Span | None, known: Known, what: str) -> Content:
    found = _RANGE.fullmatch(response.head.fields.get("content-range", ""))
    if found is None or span is None:
        raise IntegrityError(f"{what}: a part came without a range, or without being asked for")
    start, stop = int(found[1]), int(found[2]) + 1
    size = None if found[3] == "*" else int(found[3])
    same = _same(response, Known(size=size), known, what)
    # The first request does not know the size yet, and may ask for more than there is.
    expected = span[1] if size is None or known.size is not None else min(span[1], size)
    if (start, stop) != (span[0], expected):
        raise IntegrityError(
            f"{what}: bytes {start:,}-{stop - 1:,} came where {span[0]:,}-{expected - 1:,} were"
            " asked for"
        )
    if response.body.length not in {None, stop - start}:
        raise IntegrityError(f"{what}: its length does not match its range")
    return Content(start, stop, same)


def _same(response: Response, now: Known, before: Known, what: str) -> Known:
    """What is known of the file now. Raises `IntegrityError` if it is another one."""
    fields = response.head.fields
    now = Known(now.size, fields.get("etag"), fields.get("last-modified"))
    changed = (
        None not in {before.size, now.size} and before.size != now.size,
        before.etag is not None and before.etag != now.etag,
        before.etag is None and before.modified is not None and before.modified != now.modified,
    )
    if any(changed):
        raise _changed(what)
    return Known(before.size if now.size is None else now.size, now.etag, now.modified)


def _failure(
    response: Response, known: Known, what: str, wall: Callable[[], float]
) -> SetbackError | AdapterError:
    status, fields = response.head.status, response.head.fields
    problem = f"{what}: status {status}"
    if status in _DENIED:
        return AccessDeniedError(f"{problem}; this caller may not have it, or needs a token")
    if status in _ABSENT:
        return AdapterNotFoundError(f"{problem}; there is no such file", stage="fetch")
    if status == 412:
        return _changed(what)
    if status == 416:
        return _out_of_range(fields.get("content-range", ""), known, what)
    if status in _AGAIN:
        after = retry_after_of(fields.get("retry-after", ""), wall())
        crowded = status in _CROWDED
        error = FetchError(problem, retry_after=after)
        return SetbackError(error, retry_after=after, crowded=crowded)
    return FetchError(f"{problem}, which is no answer to what was asked", retryable=False)


def _out_of_range(text: str, known: Known, what: str) -> AdapterError:
    found = _NO_RANGE.fullmatch(text)
    if found is None or known.size is None:
        return IntegrityError(f"{what}: it is shorter than what was asked for, or empty")
    if int(found[1]) != known.size:
        return _changed(what)
    return FetchError(f"{what}: it refuses a range that it has")


def _changed(what: str) -> IntegrityError:
    return IntegrityError(f"{what}: the file changed while it was read; load it again")
