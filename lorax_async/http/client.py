"""The HTTP client: one GET, through its redirects, to the head of its response."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from lorax_async.errors import AccessDeniedError, FetchError
from lorax_async.formats.spans import ByteRange
from lorax_async.http.connection import Attempt, Connection, ResponseHead
from lorax_async.http.failures import io_error
from lorax_async.http.pool import ConnectionPool
from lorax_async.http.ranges import LinkEstimate
from lorax_async.http.settings import HttpSettings
from lorax_async.http.target import ResolvedLocation, Target, Validators
from lorax_async.tracing.recorder import Recorder, Tracer, now
from lorax_async.urls import InvalidUrlError, Origin, resolve_redirect

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DRAINED_BYTES = 16 << 10
"""A rest of a body up to this is read: cheaper than another connection."""

_MEASURED_BYTES = 128 << 10
_CONNECT_SECONDS = 0.005
"""What a new connection costs here, however near the server is."""

UNKNOWN = LinkEstimate(delay=0.02, rate=5e6)
"""Guessed low: a first wave too many costs one delay, one too few makes layer 0 as late as all."""

_MAX_ORIGINS = 256
_NEWEST_WEIGHT = 0.3


class LinkStatistics:
    """Time to first byte and throughput per origin, of those used last. From any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._measured: OrderedDict[Origin, tuple[float | None, float | None]] = OrderedDict()

    def link(self, origin: Origin) -> LinkEstimate:
        """Return what was measured, and guesses for what was not."""
        with self._lock:
            delay, rate = self._measured.get(origin, (None, None))
        return LinkEstimate(
            UNKNOWN.delay if delay is None else delay, UNKNOWN.rate if rate is None else rate
        )

    def record_delay(self, origin: Origin, seconds: float) -> None:
        self._record(origin, delay=seconds)

    def record_rate(self, origin: Origin, rate: float) -> None:
        """Record the bytes per second of one connection."""
        self._record(origin, rate=rate)

    def _record(
        self, origin: Origin, *, delay: float | None = None, rate: float | None = None
    ) -> None:
        with self._lock:
            before = self._measured.get(origin, (None, None))
            self._measured[origin] = (_mixed(before[0], delay), _mixed(before[1], rate))
            self._measured.move_to_end(origin)
            if len(self._measured) > _MAX_ORIGINS:
                self._measured.popitem(last=False)


def _mixed(before: float | None, new: float | None) -> float | None:
    if before is None or new is None:
        return before if new is None else new
    return before + _NEWEST_WEIGHT * (new - before)


class RequestSpan:
    """A request in the trace: what was requested on which connection, and its outcome."""

    def __init__(
        self, recorder: Recorder, connection: int, span: ByteRange | None, hop: int
    ) -> None:
        self._recorder = recorder
        self._connection = connection
        self._name = "file" if span is None else f"bytes {span[0]}-{span[1] - 1}"
        self._args: dict[str, object] = {"hop": hop}
        if span is not None:
            self._args.update(at=span[0], asked=span[1] - span[0])
        self.received = 0
        self._start = now()

    def set_groups(self, groups: tuple[int, int] | None) -> None:
        """Name the first and the last group that it has bytes of."""
        if groups is not None:
            self._args["groups"] = list(groups)

    def set_status(self, status: int) -> None:
        """Record the wait for the head."""
        self._recorder.add("connections", self._connection, "wait", self._start, now())
        self._args["status"] = status

    def end(self, outcome: str) -> None:
        """Record the request."""
        self._args.update(bytes=self.received, outcome=outcome)
        add = self._recorder.add
        add("connections", self._connection, self._name, self._start, now(), self._args)


class Response:
    """A head, and a body to be read. Call `release` in the end."""

    def __init__(
        self,
        client: HttpClient,
        connection: Connection,
        head: ResponseHead,
        location: ResolvedLocation,
        attempt: Attempt,
        request_span: RequestSpan | None,
    ) -> None:
        self.head = head
        self.location = location
        self.request_span = request_span
        self._client = client
        self._connection = connection
        self._attempt = attempt
        self._released = False

    @property
    def rate(self) -> float | None:
        """Bytes per second of waiting for them; None before it is significant."""
        throughput = self._connection.throughput
        return throughput.rate if throughput.nbytes >= _MEASURED_BYTES else None

    @property
    def reconnect_seconds(self) -> float:
        """How long another connection would take to bring something, or a bit more."""
        return _CONNECT_SECONDS + 2 * self._client.links.link(self.location.url.origin).delay

    def fill(self, view: memoryview) -> int:
        """Read until the view is full or the body ends; return the number of bytes.

        Raises `RetryableError`, `FetchError`, and `AbortedError`.
        """
        try:
            count = self._connection.fill(view)
        except OSError as error:
            raise io_error(error, str(self.location.url)) from error
        if self.request_span is not None:
            self.request_span.received += count
        return count

    def drain(self) -> None:
        """Read the rest of the body, if that is little: cheaper than another connection."""
        if self.head.length is not None and self.head.length <= _DRAINED_BYTES:
            self.fill(memoryview(bytearray(_DRAINED_BYTES)))

    def release(self) -> None:
        """Keep the connection if it may carry another request, else close it. Idempotent."""
        self._attempt.release()
        if self._released:
            return
        self._released = True
        connection = self._connection
        if self.request_span is not None:
            self.request_span.end("whole" if connection.body_ended else "left")
        if self.rate is not None:
            self._client.links.record_rate(self.location.url.origin, self.rate)
        if connection.is_reusable:
            self._client.pool.put(connection)
        else:
            connection.close()


class HttpClient:
    """Sends requests. Used from many threads."""

    def __init__(
        self,
        settings: HttpSettings,
        pool: ConnectionPool,
        links: LinkStatistics,
        clock: Callable[[], float],
        tracer: Tracer,
    ) -> None:
        self._settings = settings
        self.pool = pool
        self.links = links
        self._clock = clock
        self._tracer = tracer

    def get(
        self,
        target: Target,
        location: ResolvedLocation,
        span: ByteRange | None,
        validators: Validators,
        attempt: Attempt,
    ) -> Response:
        """Return the first response that is no redirect. Blocks.

        Raises `RetryableError`, `AbortedError`, and where another attempt would fail too,
        `FetchError` or `AccessDeniedError`.
        """
        while True:
            if not target.rules.allows(location.url, location.hop):
                raise AccessDeniedError(
                    f"{target.name}: requests to {location.url} are not allowed; allow it"
                    " explicitly"
                )
            response = self._request(target, location, span, validators, attempt)
            if response.head.status not in _REDIRECTS:
                return response
            try:
                response.drain()
                location = self._next_location(target, response)
            finally:
                response.release()

    def _next_location(self, target: Target, response: Response) -> ResolvedLocation:
        before = response.location
        if before.hop >= self._settings.redirects:
            raise FetchError(
                f"{target.name}: more than {self._settings.redirects} redirects, the last one from"
                f" {before.url}",
                retryable=False,
            )
        try:
            url = resolve_redirect(before.url, response.head.fields.get("location", ""))
        except InvalidUrlError as error:
            raise FetchError(f"{before.url} redirects to what is no URL: {error}") from error
        if before.url.secure and not url.secure:
            raise AccessDeniedError(f"{before.url} redirects from https to http, to {url}")
        trusted = before.trusted and url.origin == target.url.origin
        return ResolvedLocation(url, before.hop + 1, trusted=trusted)

    def _request(
        self,
        target: Target,
        location: ResolvedLocation,
        span: ByteRange | None,
        validators: Validators,
        attempt: Attempt,
    ) -> Response:
        """Request on an idle connection; if that was closed meanwhile, on a new one."""
        url = location.url
        attempt.origin = url.origin
        fields = self._fields(target, location, span, validators)
        try:
            idle = self.pool.take(url, target.rules, attempt)
            if idle is not None:
                with suppress(ConnectionError):
                    return self._send(idle, fields, location, attempt, span)
            fresh = self.pool.open(url, target.rules, attempt)
            return self._send(fresh, fields, location, attempt, span)
        except OSError as error:
            raise io_error(error, str(url)) from error

    def _send(
        self,
        connection: Connection,
        fields: list[str],
        location: ResolvedLocation,
        attempt: Attempt,
        span: ByteRange | None,
    ) -> Response:
        url, proxy = location.url, connection.proxy
        lines = [f"GET {url.text if proxy else url.target} HTTP/1.1", *fields]
        if proxy is not None and proxy.authorization:
            lines.append(f"Proxy-Authorization: {proxy.authorization}")
        recorder = self._tracer.on
        traced = None
        if recorder is not None:
            traced = RequestSpan(recorder, connection.number, span, location.hop)
        begun = self._clock()
        try:
            connection.send(lines)
            head = connection.receive_head()
            self.links.record_delay(url.origin, self._clock() - begun)
            if traced is not None:
                traced.set_status(head.status)
            return Response(self, connection, head, location, attempt, traced)
        except BaseException:
            if traced is not None:
                traced.end("failed")
            connection.close()
            raise

    def _fields(
        self,
        target: Target,
        location: ResolvedLocation,
        span: ByteRange | None,
        validators: Validators,
    ) -> list[str]:
        """Build the fields anew for every hop."""
        fields = {
            "Host": location.url.origin.authority,
            "User-Agent": self._settings.user_agent,
            "Accept": "*/*",
            # A coded body has other offsets, and might be a bomb.
            "Accept-Encoding": "identity",
        }
        if location.trusted:
            fields.update(target.headers)
        if span is not None:
            fields["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        if validators.strong_etag is not None:
            fields["If-Match" if span is None else "If-Range"] = validators.strong_etag
        return [f"{name}: {value}" for name, value in fields.items()]
