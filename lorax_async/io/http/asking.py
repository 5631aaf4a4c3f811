"""The first request for a file: its beginning, or all of a small one, and what is said of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

from lorax_async.errors import AccessDeniedError, AdapterNotFoundError, FetchError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.checks import Content, content_of
from lorax_async.io.http.desk import Desk, Job, Piece
from lorax_async.io.http.exchange import Exchange, Response
from lorax_async.io.http.failures import SetbackError, broken_off
from lorax_async.io.http.target import Answer, Known, Target
from lorax_async.io.http.urls import Origin

Enough = Callable[[memoryview, Known], int]
"""How many of the first bytes are needed, by those that came and what was said of the file."""

_PIECE = 16 << 10
"""What is read between two looks at the clock."""


class Ask(Job[Answer]):
    """Asks for the first `nbytes` bytes; without `ranged`, for a file of at most so many.

    Once what is `enough` has come, the rest is waited for only as long as it would take to open
    another connection: on a slow one it comes sooner over all.
    """

    def __init__(
        self,
        desk: Desk,
        exchange: Exchange,
        target: Target,
        nbytes: int,
        *,
        ranged: bool,
        urgency: int,
        deadline: float,
        wall: Callable[[], float],
        enough: Enough | None = None,
    ) -> None:
        super().__init__(desk, urgency, deadline)
        self._exchange = exchange
        self._target = target
        self._place = target.first_place
        self._nbytes = nbytes
        self._ranged = ranged
        self._wall = wall
        self._enough = enough
        self.announced = desk.connections if ranged else 0
        self.pending.append(Piece(0, 0, nbytes))

    @property
    def origin(self) -> Origin:
        return self._place.url.origin

    def work(self, piece: Piece, attempt: Attempt, buffer: memoryview) -> None:  # noqa: ARG002
        target = self._target
        span = (0, self._nbytes) if self._ranged else None
        response = self._exchange.get(target, self._place, span, Known(), attempt)
        try:
            content = content_of(response, span, Known(), target.name, self._wall)
            start = self._read(response, content)
        except (AccessDeniedError, AdapterNotFoundError) as error:
            if self._place == target.place:
                raise
            self._place = target.place  # signed places expire
            raise SetbackError(error) from error
        finally:
            response.leave()
        if content.stop is None and len(start) < self._nbytes:  # it has ended, so that is its size
            content = Content(0, len(start), replace(content.known, size=len(start)))
        ranges = response.head.status == 206
        fields = response.head.fields
        self.result = Answer(target, response.place, content.known, fields, start, ranges)

    def _read(self, response: Response, content: Content) -> bytes:
        if not self._ranged and (content.stop or 0) > self._nbytes:
            raise self._too_large()
        wanted = self._nbytes if content.stop is None else min(content.stop, self._nbytes)
        # One more than may come, where only the end tells how much it is.
        data = memoryview(bytearray(wanted + (content.stop is None and not self._ranged)))
        if content.stop is not None and self._enough is not None:
            return bytes(data[: self._read_enough(response, data, content.known, self._enough)])
        got = 0
        while got < len(data) and (count := response.fill(data[got:])):
            got += count
        if content.stop is not None and got < wanted:
            raise broken_off(str(response.place.url))
        if got > self._nbytes:
            raise self._too_large()
        return bytes(data[:got])

    def _read_enough(
        self, response: Response, data: memoryview, known: Known, enough: Enough
    ) -> int:
        """How much of it came."""
        got, until = 0, inf
        while got < len(data) and self.desk.clock() < until:
            count = response.fill(data[got : got + _PIECE])
            if not count:
                raise broken_off(str(response.place.url))
            got += count
            if until == inf and got >= enough(data[:got], known):
                until = self.desk.clock() + response.another
        return got

    def _too_large(self) -> FetchError:
        return FetchError(
            f"{self._target.name} has more than the {self._nbytes:,} bytes it may have",
            retryable=False,
        )

    def settle(self, piece: Piece) -> None:
        if self.result is None:
            self.put_back(piece)
        else:
            self.over = True
