"""One file on its way: its pieces, over many connections, into a sink."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from lorax_async.core.arrivals import Arrivals
from lorax_async.core.ranges import Wave, overlaps, split_of, without
from lorax_async.core.spans import Span
from lorax_async.errors import AccessDeniedError, AdapterNotFoundError, FetchError, IntegrityError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.checks import content_of
from lorax_async.io.http.desk import Desk, Job, Piece
from lorax_async.io.http.exchange import Exchange, Response
from lorax_async.io.http.failures import AbortedError, SetbackError, broken_off
from lorax_async.io.http.links import Links
from lorax_async.io.http.target import Answer
from lorax_async.io.http.urls import Origin

_READ_BYTES = 256 << 10
_READ_SECONDS = 0.01
"""What comes in so long is read at once: few calls on a fast link, and early news on a slow one."""

_GIVEN_UP = 512 << 10
_GIVEN_UP_SECONDS = 0.1
"""A piece with more left than this is handed back when others lack a connection."""


class Sink(Protocol):
    """Where bytes go. Called from several threads at once, for different bytes."""

    def write(self, offset: int, data: memoryview) -> None:
        """Take all of `data`, which is used again afterwards. May raise `OSError`."""


class Download(Job[None]):
    """Brings the waves' pieces in order.

    `arrived` is called with each group that is whole, in their order, by one thread at a time.
    """

    def __init__(
        self,
        desk: Desk,
        exchange: Exchange,
        links: Links,
        answer: Answer,
        waves: Sequence[Wave],
        arrivals: Arrivals,
        sink: Sink,
        arrived: Callable[[int], None],
        *,
        least: int,
        urgency: int,
        deadline: float,
        wall: Callable[[], float],
    ) -> None:
        super().__init__(desk, urgency, deadline)
        self._exchange = exchange
        self._links = links
        self._target = answer.target
        self._place = answer.place
        self._known = answer.known
        self._sink = sink
        self._arrived = arrived
        self._wall = wall
        self._least = least
        self._arrivals = arrivals
        self._news: list[int] = []
        self._telling = False
        self.pending = [
            Piece(n, *span) for n, span in enumerate(piece for wave in waves for piece in wave)
        ]
        stop = max((piece.stop for piece in self.pending), default=0)
        self._stream = None if answer.ranges else Piece(0, 0, stop)
        self._stop = stop
        self.over = not self.pending

    # -- with the lock ----------------------------------------------------------------------------

    @property
    def origin(self) -> Origin:
        return self._place.url.origin

    def hands_over(self, piece: Piece) -> bool:
        return piece is not self._stream

    def wanted(self, now: float) -> int:
        if self._stream is None:
            return super().wanted(now)
        ready = now >= max(self.not_before, self._stream.not_before)
        return max(len(self.running), int(ready))

    def take(self, now: float) -> Piece | None:
        return self._stream or super().take(now)

    def split(self, now: float) -> Piece | None:
        if (
            self._stream is not None
            or now < self.not_before
            or len(self.running) >= int(self.limit)
        ):
            return None
        link = self._links.of(self._place.url.origin)
        for piece in sorted(self.running.values(), key=lambda each: each.claimed - each.stop):
            left = (max(piece.at, piece.claimed), piece.stop)
            if piece.rate is None or left[0] >= left[1]:
                continue
            cut = split_of(left, max(piece.rate, 1.0), link, self._least)
            if cut is not None:
                newcomer = Piece(piece.order, cut, piece.stop)
                piece.stop = cut
                return newcomer
        return None

    def settle(self, piece: Piece) -> None:
        if piece is not self._stream and piece.at < piece.stop:
            self.put_back(piece)
        else:  # if the source had too much to do: one more after each round that went well
            self.limit = min(self.limit + 1 / self.limit, float(self.desk.connections))
        self.over = not self.pending and not self.running

    def put_back(self, piece: Piece) -> None:
        if piece is not self._stream:
            piece.claimed = piece.at
            super().put_back(piece)

    # -- without it -------------------------------------------------------------------------------

    def work(self, piece: Piece, attempt: Attempt, buffer: memoryview) -> None:
        place = self._place
        span = None if piece is self._stream else (piece.at, piece.stop)
        response = self._exchange.get(self._target, place, span, self._known, attempt)
        if response.asked is not None and span is not None:
            response.asked.carries(self._arrivals.groups_in(span))
        try:
            content = content_of(response, span, self._known, self._target.name, self._wall)
            self._place = response.place
            if content.known.size is not None and content.known.size < self._stop:
                raise IntegrityError(f"{self._target.name} is shorter than its header says")
            if response.head.status == 200:
                self._bring_whole(self._as_stream(piece, attempt), response, buffer)
            else:
                self._bring(piece, response, buffer)
        except (AccessDeniedError, AdapterNotFoundError) as error:
            if response.place.hop == 0 or place.hop == 0:
                raise
            # Signed places expire: the way there is asked for anew.
            self._place = self._target.place
            raise SetbackError(error) from error
        finally:
            response.leave()

    def _bring(self, piece: Piece, response: Response, buffer: memoryview) -> None:
        count = self._claim(piece, min(_READ_BYTES, len(buffer)))
        while count:
            got = response.fill(buffer[:count])
            if not got:
                raise broken_off(str(response.place.url))
            self._write(piece.at, buffer[:got])
            with self.desk.changed:
                self._landed((piece.at, piece.at + got))
                piece.at += got
                piece.came += got
                self.came += got
                piece.rate = response.rate
                count = self._claim(piece, _at_once(response.rate, len(buffer)))
            self._tell()

    def _claim(self, piece: Piece, most: int) -> int:
        """How many bytes to read next: nobody else will take them over."""
        with self.desk.changed:
            if self.over:
                raise AbortedError
            left = piece.stop - piece.at
            soon = _GIVEN_UP if piece.rate is None else int(piece.rate * _GIVEN_UP_SECONDS)
            if left > min(soon, _GIVEN_UP) and self.desk.overdrawn(self):
                return 0
            piece.claimed = piece.at + min(most, left)
            return piece.claimed - piece.at

    def _as_stream(self, piece: Piece, attempt: Attempt) -> Piece:
        """The server sends all or nothing: let this response be all, and end the others."""
        with self.desk.changed:
            if self.running.get(attempt) is self._stream and self._stream is not None:
                return self._stream
            if self._stream is not None:
                raise AbortedError  # another thread saw it first
            self._stream = Piece(0, 0, self._stop)
            self.put_back(piece)
            self.running[attempt] = self._stream
            for other in self.running:
                if other is not attempt:
                    other.end()
            return self._stream

    def _bring_whole(self, stream: Piece, response: Response, buffer: memoryview) -> None:
        at = 0
        while self._missing((at, self._stop)):
            got = response.fill(buffer)
            if not got:
                raise broken_off(str(response.place.url))
            for start, stop in self._missing((at, at + got)):
                self._write(start, buffer[start - at : stop - at])
                with self.desk.changed:
                    self._landed((start, stop))
                    self._strike((start, stop))
                    stream.came += stop - start
            at += got
            self._tell()

    def _missing(self, span: Span) -> tuple[Span, ...]:
        with self.desk.changed:
            if self.over:
                raise AbortedError
            return overlaps(((piece.at, piece.stop) for piece in self.pending), span)

    def _strike(self, span: Span) -> None:
        self.pending = [
            Piece(piece.order, *part)
            for piece in self.pending
            for part in without([(piece.at, piece.stop)], [span])
        ]

    def _write(self, offset: int, data: memoryview) -> None:
        try:
            self._sink.write(offset, data)
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, type(error).__name__)
            raise FetchError(f"{self._target.name} cannot be written ({code})") from error

    def _landed(self, span: Span) -> None:
        self._arrivals.landed(span)
        self._news += self._arrivals.take()

    def _tell(self) -> None:
        """Tell of groups in order; who comes while another thread tells leaves it to that one."""
        while self._news:
            with self.desk.changed:
                if self._telling or not self._news:
                    return
                self._telling, news, self._news = True, self._news, []
            try:
                for group in news:
                    self._arrived(group)
            finally:
                with self.desk.changed:
                    self._telling = False


def _at_once(rate: float | None, most: int) -> int:
    """Bytes to read in one call, from a connection that brings `rate` of them per second."""
    return min(most, max(_READ_BYTES, int((rate or 0.0) * _READ_SECONDS)))
