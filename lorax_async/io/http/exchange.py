"""One GET, through its redirects, to the head of its response."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from lorax_async.core.spans import Span
from lorax_async.errors import AccessDeniedError, FetchError
from lorax_async.io.http.attempt import Attempt
from lorax_async.io.http.body import Body, body_of
from lorax_async.io.http.failures import NoAnswerError, failed_io
from lorax_async.io.http.head import Head
from lorax_async.io.http.links import Links
from lorax_async.io.http.pool import Connection, Pool
from lorax_async.io.http.settings import HttpSettings
from lorax_async.io.http.target import Known, Place, Target
from lorax_async.io.http.urls import InvalidUrlError, redirected
from lorax_async.tracing.recorder import Recorder, Tracer, now

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DRAINED = 16 << 10
_MEASURED = 128 << 10
_OPENING = 0.005
"""Seconds that a new connection costs here, however near the server is."""


class Asked:
    """A request on a connection, for whoever records: what was asked for, and what came of it."""

    def __init__(self, recorder: Recorder, connection: int, span: Span | None, hop: int) -> None:
        self._recorder = recorder
        self._connection = connection
        self._what = "file" if span is None else f"bytes {span[0]}-{span[1] - 1}"
        self._args: dict[str, object] = {"hop": hop}
        if span is not None:
            self._args.update(at=span[0], asked=span[1] - span[0])
        self.came = 0
        self._start = now()

    def carries(self, groups: tuple[int, int] | None) -> None:
        """The first and the last group that it has bytes of."""
        if groups is not None:
            self._args["groups"] = list(groups)

    def answered(self, status: int) -> None:
        self._recorder.add("connections", self._connection, "wait", self._start, now())
        self._args["status"] = status

    def end(self, outcome: str) -> None:
        self._args.update(bytes=self.came, outcome=outcome)
        add = self._recorder.add
        add("connections", self._connection, self._what, self._start, now(), self._args)


class Response:
    """A head, and a body to be read. Whoever got it calls `leave`."""

    def __init__(
        self,
        connection: Connection,
        head: Head,
        place: Place,
        pool: Pool,
        links: Links,
        attempt: Attempt,
        asked: Asked | None,
    ) -> None:
        self.head = head
        self.place = place
        self.body: Body = body_of(head, connection.stream)
        self._connection: Connection | None = connection
        self._stream = connection.stream
        self._pool = pool
        self._links = links
        self._attempt = attempt
        self.asked = asked
        """For whoever records."""

    @property
    def rate(self) -> float | None:
        """Bytes per second of waiting for them; None before it says something."""
        pace = self._stream.pace
        return pace.rate if pace.nbytes >= _MEASURED else None

    @property
    def another(self) -> float:
        """Seconds that another connection would take until something comes, or a bit more."""
        return _OPENING + 2 * self._links.of(self.place.url.origin).delay

    def fill(self, view: memoryview) -> int:
        """Read until the view is full or the body ends; how much came.

        Raises `SetbackError`, `FetchError`, and `AbortedError`.
        """
        try:
            count = self.body.fill(view)
        except OSError as error:
            raise failed_io(error, str(self.place.url)) from error
        if self.asked is not None:
            self.asked.came += count
        return count

    def drain(self) -> None:
        """Read what is left, if that is little: cheaper than another connection."""
        if self.body.length is not None and self.body.length <= _DRAINED:
            self.fill(memoryview(bytearray(_DRAINED)))

    def leave(self) -> None:
        """Keep the connection if it may carry another request, else close it. Idempotent."""
        self._attempt.leave()
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self.asked is not None:
            self.asked.end("whole" if self.body.done else "left")
        if self.rate is not None:
            self._links.moved(self.place.url.origin, self.rate)
        if self.body.done and self.head.keeps_alive:
            self._pool.give(connection)
        else:
            connection.wire.close()


class Exchange:
    """Asks. Used from many threads."""

    def __init__(
        self,
        settings: HttpSettings,
        pool: Pool,
        links: Links,
        clock: Callable[[], float],
        tracer: Tracer,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._links = links
        self._clock = clock
        self._tracer = tracer

    def get(
        self, target: Target, place: Place, span: Span | None, known: Known, attempt: Attempt
    ) -> Response:
        """The response that is no redirect. Blocks.

        Raises `SetbackError`, `AbortedError`, and where another attempt would be in vain,
        `FetchError` or `AccessDeniedError`.
        """
        while True:
            if not target.rules.allows(place.url, place.hop):
                raise AccessDeniedError(
                    f"{target.name}: requests to {place.url} are not allowed; allow it explicitly"
                )
            response = self._ask(target, place, span, known, attempt)
            if response.head.status not in _REDIRECTS:
                return response
            try:
                response.drain()
                place = self._next(target, response)
            finally:
                response.leave()

    def _next(self, target: Target, response: Response) -> Place:
        place = response.place
        if place.hop >= self._settings.redirects:
            raise FetchError(
                f"{target.name}: more than {self._settings.redirects} redirects, the last one from"
                f" {place.url}",
                retryable=False,
            )
        try:
            url = redirected(place.url, response.head.fields.get("location", ""))
        except InvalidUrlError as error:
            raise FetchError(f"{place.url} redirects to what is no URL: {error}") from error
        if place.url.secure and not url.secure:
            raise AccessDeniedError(f"{place.url} redirects from https to http, to {url}")
        same = place.trusted and url.origin == target.url.origin
        return Place(url, place.hop + 1, trusted=same)

    def _ask(
        self, target: Target, place: Place, span: Span | None, known: Known, attempt: Attempt
    ) -> Response:
        """On an idle connection; if that was closed meanwhile, on a new one."""
        attempt.origin = place.url.origin
        lines = self._fields(target, place, span, known)
        try:
            idle = self._pool.take(place.url, target.rules, attempt)
            if idle is not None:
                with suppress(NoAnswerError, ConnectionError):
                    return self._send(idle, lines, place, attempt, span)
            fresh = self._pool.open(place.url, target.rules, attempt)
            return self._send(fresh, lines, place, attempt, span)
        except OSError as error:
            raise failed_io(error, str(place.url)) from error

    def _send(
        self,
        connection: Connection,
        fields: list[str],
        place: Place,
        attempt: Attempt,
        span: Span | None,
    ) -> Response:
        url, proxy = place.url, connection.proxy
        lines = [f"GET {url.text if proxy else url.target} HTTP/1.1", *fields]
        if proxy is not None and proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        recorder = self._tracer.on
        asked = (
            Asked(recorder, connection.number, span, place.hop) if recorder is not None else None
        )
        begun = self._clock()
        try:
            # An ETag goes back as it came, and may have any byte from 0x80 on (RFC 9110, 8.8.3).
            connection.wire.send("\r\n".join([*lines, "", ""]).encode("latin-1"))
            head = connection.stream.head()
            self._links.answered(url.origin, self._clock() - begun)
            if asked is not None:
                asked.answered(head.status)
            return Response(connection, head, place, self._pool, self._links, attempt, asked)
        except BaseException:
            if asked is not None:
                asked.end("failed")
            connection.wire.close()
            raise

    def _fields(self, target: Target, place: Place, span: Span | None, known: Known) -> list[str]:
        """Built anew for every hop."""
        fields = {
            "Host": place.url.origin.authority,
            "User-Agent": self._settings.user_agent,
            "Accept": "*/*",
            # A coded body has other offsets, and might be a bomb.
            "Accept-Encoding": "identity",
        }
        if place.trusted:
            fields.update(target.headers)
        if span is not None:
            fields["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        if known.validator is not None:
            fields["If-Match" if span is None else "If-Range"] = known.validator
        return [f"{name}: {value}" for name, value in fields.items()]
