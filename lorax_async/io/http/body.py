"""The body of a response: by length, in chunks, or to the end of the connection."""

from __future__ import annotations

import re
from typing import Protocol

from lorax_async.errors import FetchError
from lorax_async.io.http.failures import broken_off
from lorax_async.io.http.head import Head
from lorax_async.io.http.stream import Stream

_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_LENGTH = re.compile(r"[0-9]{1,18}")
_LINE = 1_024
_TRAILERS = 64


class Body(Protocol):
    """What comes after a head."""

    @property
    def length(self) -> int | None:
        """Bytes in all, where the server said so."""

    @property
    def done(self) -> bool:
        """All of it was read, and the connection stands where the next response begins."""

    def fill(self, view: memoryview) -> int:
        """Until the view is full or the body ends; how much came.

        Raises a `SetbackError` where it ends before its length, and `OSError`.
        """


def body_of(head: Head, stream: Stream) -> Body:
    """By RFC 9112, section 6.3. Raises `FetchError` where it is not clear."""
    coding = head.fields.get("transfer-encoding")
    length = head.fields.get("content-length")
    if head.status in {204, 304}:
        return SizedBody(stream, 0)
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise FetchError(f"{stream.what} sent a body in a form that is not clear")
        return ChunkedBody(stream)
    if length is None:
        return EndlessBody(stream)
    if not _LENGTH.fullmatch(length):
        raise FetchError(f"{stream.what} sent a Content-Length that is no number")
    return SizedBody(stream, int(length))


class SizedBody:
    def __init__(self, stream: Stream, length: int) -> None:
        self._stream = stream
        self.length: int | None = length
        self._left = length

    @property
    def done(self) -> bool:
        return not self._left and self._stream.clean

    def fill(self, view: memoryview) -> int:
        part = view[: self._left]
        got = self._stream.fill(part)
        self._left -= got
        if part and not got:  # after a part of it came, the next call says that there is no more
            raise broken_off(self._stream.what)
        return got


class EndlessBody:
    """Only its reader can know whether it is whole, and no other response can follow."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.length: int | None = None
        self.done = False

    def fill(self, view: memoryview) -> int:
        return self._stream.fill(view)


class ChunkedBody:
    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.length: int | None = None
        self._left = 0
        self._begun = False
        self._ended = False

    @property
    def done(self) -> bool:
        return self._ended and self._stream.clean

    def fill(self, view: memoryview) -> int:
        got = 0
        while got < len(view) and self._next():
            part = view[got : got + self._left]
            count = self._stream.fill(part)
            self._left -= count
            got += count
            if count < len(part):
                if not got:
                    raise broken_off(self._stream.what)
                break
        return got

    def _next(self) -> bool:
        """Whether bytes of a chunk are to come."""
        if self._left or self._ended:
            return not self._ended
        if self._begun and self._stream.line(0):
            raise self._malformed()
        found = _CHUNK.fullmatch(self._stream.line(_LINE))
        if found is None:
            raise self._malformed()
        self._begun, self._left = True, int(found[1], 16)
        if not self._left:
            self._skip_trailers()
        return not self._ended

    def _skip_trailers(self) -> None:
        for _ in range(_TRAILERS):
            if not self._stream.line(_LINE):
                self._ended = True
                return
        raise self._malformed()

    def _malformed(self) -> FetchError:
        return FetchError(f"{self._stream.what} sent malformed chunks")
