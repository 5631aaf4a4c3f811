"""The range downloader: probe files, download them by ranges."""

from __future__ import annotations

import errno
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from lorax_async.errors import AccessDeniedError, AdapterNotFoundError, FetchError, IntegrityError
from lorax_async.formats.spans import ByteRange
from lorax_async.http.client import ConnectionPool, HttpClient, LinkModels, Network, Response
from lorax_async.http.connection import Attempt
from lorax_async.http.download_scheduler import DownloadPiece, DownloadScheduler, Job, WorkerPool
from lorax_async.http.failures import AbortedError, RetryableError, broken_off
from lorax_async.http.link_model import LinkEstimate
from lorax_async.http.ranges import GroupArrivals, RangePlan, split_of
from lorax_async.http.settings import HttpSettings
from lorax_async.http.target import (
    Content,
    ProbeResult,
    ResolvedLocation,
    Target,
    Validators,
    check_response,
)
from lorax_async.telemetry import Tracer

NeededBytes = Callable[[memoryview, Validators], int]
"""How many of the first bytes are needed, by those that came and the file's validators."""

T = TypeVar("T")

_PROBE_READ_BYTES = 16 << 10
"""Read between two looks at the clock."""

_CONNECT_SECONDS = 0.005
"""What a new connection costs here, however near the server is."""

_READ_BYTES = 32 << 10
_READ_SECONDS = 0.01
"""Read what comes in this time at once: few calls on a fast link, early reports on a slow one. Of a
link that is not known, read at first this many bytes, then as many as came before.
"""

_SPLIT_AFTER = 0.25
"""Seconds before a piece may be called slow: a connection, and this machine, may pause."""

_KEPT_BYTES = 512 << 10
_KEPT_SECONDS = 0.1
"""A piece with more left than this gives up its connection to a more urgent job."""

_FINISHED_SECONDS = 0.5
"""A piece that needs less time keeps its connection from other jobs: the rest of a piece that is
given up is requested again.
"""


class _FileJob(Job[T]):
    """A job of requests for one file, at its own location or where that led before."""

    _client: HttpClient
    _target: Target
    _location: ResolvedLocation

    def _move(self, location: ResolvedLocation) -> None:
        """Request at this location from here on."""
        self._location, self.origin = location, location.url.origin

    def _request(
        self, span: ByteRange | None, expected: Validators, attempt: Attempt
    ) -> tuple[Response, Content]:
        """Request the file, or a span of it, and check the head of the response."""
        target, location = self._target, self._location
        response = self._client.get(target, location, span, expected, attempt)
        try:
            what = f"{target.name} at {response.location.url}"
            return response, check_response(response.head, span, expected, what)
        except BaseException as error:
            response.release()
            if location.hop == 0 or not isinstance(error, AccessDeniedError | AdapterNotFoundError):
                raise
            self._move(target.location)  # signed locations expire: follow redirects anew
            raise RetryableError(error) from error


class ProbeRequest(_FileJob[ProbeResult]):
    """Request the first `nbytes` bytes; without `ranged`, a file of at most that many.

    `done` is set once `needed_bytes` have come. What comes after them, in the time that another
    connection would take to bring any, is the `rest` of the result.
    """

    def __init__(
        self,
        scheduler: DownloadScheduler,
        client: HttpClient,
        target: Target,
        nbytes: int,
        *,
        ranged: bool,
        urgency: int,
        timeout: float,
        needed_bytes: NeededBytes | None,
    ) -> None:
        super().__init__(scheduler, urgency, timeout)
        self._client = client
        self._target = target
        location, url = target.location, target.redirected_to
        if url is not None:
            location = ResolvedLocation(url, 1, trusted=url.origin == target.url.origin)
        self._move(location)
        self._nbytes = nbytes
        self._ranged = ranged
        self._needed_bytes = needed_bytes
        self.announced = scheduler.connections if ranged else 0
        self.pending.append(DownloadPiece(0, 0, nbytes))

    def work(self, piece: DownloadPiece, attempt: Attempt, buffer: memoryview) -> None:  # noqa: ARG002
        span = (0, self._nbytes) if self._ranged else None
        rest, came = Future[memoryview](), memoryview(b"")
        try:
            response, content = self._request(span, Validators(), attempt)
            with response:
                data, got = self._read(response, content)
                validators, head = content.validators, response.head
                if content.stop is None and got < self._nbytes:  # it has ended: that is its size
                    validators = replace(validators, size=got)
                found = self._target, response.location, validators, head.fields, bytes(data[:got])
                self.result = ProbeResult(*found, ranges=head.status == 206, rest=rest)
                if content.stop is not None and got < len(data):
                    self.done.set_result(self.result)
                    came = data[got : got + self._read_on(response, data[got:])]
        finally:
            rest.set_result(came)

    def _read(self, response: Response, content: Content) -> tuple[memoryview, int]:
        """Read until the needed bytes are here; return room for all, and how many are."""
        (stop, validators), most = content, self._nbytes
        if not self._ranged and (stop or 0) > most:
            raise self._too_large()
        # One more than may come, where only the end tells.
        size = min(stop, most) if stop is not None else most + (not self._ranged)
        data, got = memoryview(bytearray(size)), 0
        needed_bytes = None if stop is None else self._needed_bytes
        at_once = size if needed_bytes is None else _PROBE_READ_BYTES
        while got < size:
            count = response.fill(data[got : got + at_once])
            if not count and stop is not None:
                raise broken_off(str(response.location.url))
            got += count
            if not count or (needed_bytes and got >= needed_bytes(data[:got], validators)):
                break
        if got > most:
            raise self._too_large()
        return data, got

    def _too_large(self) -> FetchError:
        problem = f"{self._target.name} has more than the {self._nbytes:,} bytes it may have"
        return FetchError(problem, retryable=False)

    def _read_on(self, response: Response, data: memoryview) -> int:
        """Read while another connection would bring nothing yet; return how many bytes came."""
        clock, got, count = self.scheduler.clock, 0, 1
        delay = self._client.links.estimate(response.location.url.origin).delay
        self.deadline = until = min(self.deadline, clock() + _CONNECT_SECONDS + 2 * delay)
        with suppress(AbortedError, RetryableError, FetchError):  # others request what is missing
            while count and got < len(data) and clock() < until:
                count = response.fill(data[got : got + _PROBE_READ_BYTES])
                got += count
        return got

    def return_piece(self, piece: DownloadPiece) -> None:
        if self.result is None:
            self.put_back(piece)
        else:
            self.over = True


Sink = Callable[[int, memoryview], object]
"""Takes the bytes at an offset, a buffer used again later. Several threads; may raise `OSError`."""


class Download(_FileJob[None]):
    """Fetch the plan's pieces, in the order in which it cuts them.

    `arrived` is called with each group that is complete, by the thread that wrote its last byte.
    """

    def __init__(
        self,
        scheduler: DownloadScheduler,
        client: HttpClient,
        probe: ProbeResult,
        plan: RangePlan,
        arrivals: GroupArrivals,
        sink: Sink,
        arrived: Callable[[int], None],
        *,
        connections: int,
        least: int,
        urgency: int,
        timeout: float,
    ) -> None:
        super().__init__(scheduler, urgency, timeout)
        self._client = client
        self._connections = connections
        self._target = probe.target
        self._move(probe.location)
        self._validators = probe.validators
        self._sink = sink
        self._arrived = arrived
        self._least = least
        self._arrivals = arrivals
        self._plan = plan
        self._order = 0
        self.over = not plan.left
        self._stop = plan.stop
        self.hands_over = probe.ranges
        self._whole = None if probe.ranges else DownloadPiece(0, 0, self._stop)
        """All of the file in one response, which brings the pending pieces."""

        if self._whole is not None:
            self._take_plan()

    # -- with the lock ----------------------------------------------------------------------------

    def wanted(self, now: float) -> int:
        used = len(self.running)
        if self._whole is not None:
            ready = now >= max(self.not_before, self._whole.not_before)
            return max(used, int(ready))
        wanted = super().wanted(now)
        if self._plan.left and now >= self.not_before:
            pace = self._plan.pace(self._link(), self._most)
            wanted = max(wanted, min(int(self.limit), pace.connections))
        return wanted

    def useful(self) -> int | None:
        link = self._link()
        fewer = link.is_compared and link.connections < self._connections
        return link.connections if fewer else None

    @property
    def _most(self) -> int:
        """How many connections it may have."""
        return max(1, min(self._connections, int(self.limit)))

    def _link(self) -> LinkEstimate:
        return self._client.links.estimate(self._location.url.origin)

    def take(self, now: float) -> DownloadPiece | None:
        if self._whole is not None:
            is_free = not self.running and now >= max(self.not_before, self._whole.not_before)
            return self._whole if is_free else None
        piece = super().take(now)
        if piece is not None or now < self.not_before:
            return piece
        flight = sum([each.stop - each.at for each in self.running.values()])
        span = self._plan.take(self._link(), self._most, len(self.running), flight)
        return None if span is None else self._piece(span)

    def _piece(self, span: ByteRange) -> DownloadPiece:
        self._order += 1
        return DownloadPiece(self._order, *span)

    def _take_plan(self) -> None:
        """Let the response of the whole file bring what was not requested."""
        self.pending += map(self._piece, self._plan.take_all())

    def split(self, now: float) -> DownloadPiece | None:
        """Cut a part off the piece that has most left, where that saves time.

        Only a piece that is slow beside the others is: on a link that they share, or on a machine
        that is busy, all are, and another request would bring nothing.
        """
        if self._whole is not None or now < self.not_before or len(self.running) >= self._most:
            return None
        pieces = list(self.running.values())
        slow = [each for each in pieces if now - each.begun >= _SPLIT_AFTER]
        for piece in sorted(slow, key=lambda each: each.claimed - each.stop):
            left, link = (max(piece.at, piece.claimed), piece.stop), self._link()
            if piece.rate is None or left[0] >= left[1]:
                continue
            others = [each.rate for each in pieces if each is not piece and each.rate is not None]
            usual = statistics.median(others) if others else link.rate or 0.0
            rate = max(piece.rate, 1.0)
            cut = split_of(left, rate, max(usual, 1.0), link.delay, self._least)
            if cut is not None:
                part = DownloadPiece(piece.order, cut, piece.stop)
                piece.stop = cut
                return part
        return None

    def return_piece(self, piece: DownloadPiece) -> None:
        if piece is not self._whole and piece.at < piece.stop:
            self.put_back(piece)
        else:  # after throttling: one more after each round that went well
            self.limit = min(self.limit + 1 / self.limit, float(self.scheduler.connections))
        self.over = not self.pending and not self.running and not self._plan.left

    def put_back(self, piece: DownloadPiece) -> None:
        if piece is not self._whole:  # `take` returns that one
            piece.claimed = piece.at
            super().put_back(piece)

    # -- without it -------------------------------------------------------------------------------

    def work(self, piece: DownloadPiece, attempt: Attempt, buffer: memoryview) -> None:
        span = None if piece is self._whole else (piece.at, piece.stop)
        response, content = self._request(span, self._validators, attempt)
        with response:
            if response.request_span.recording and span is not None:
                response.request_span.set(groups=self._arrivals.groups_in(span))
            if response.location is not self._location:
                self._move(response.location)
            if content.validators.size is not None and content.validators.size < self._stop:
                raise IntegrityError(f"{self._target.name} is shorter than its header says")
            if response.head.status == 200:
                self._fetch_whole(self._as_whole(piece, attempt), response, buffer)
            else:
                self._fetch(piece, response, buffer)

    def _fetch(self, piece: DownloadPiece, response: Response, buffer: memoryview) -> None:
        usual = self._link().rate
        least = max(_READ_BYTES, int((usual or 0.0) * _READ_SECONDS))
        count = self._claim(piece, min(least, len(buffer)))
        while count:
            got = response.fill(buffer[:count])
            if not got:
                raise broken_off(str(response.location.url))
            self._write(piece.at, buffer[:got])
            rate = response.rate
            at_once = max(_READ_BYTES, int((rate or usual or 0.0) * _READ_SECONDS))
            at_once = min(len(buffer), at_once, max(least, response.received))
            with self.scheduler.lock:
                complete = self._arrivals.landed((piece.at, piece.at + got))
                piece.at += got
                piece.received += got
                piece.rate = rate
                self.received += got
                count = self._claim(piece, at_once)
                if response.link_differs and self._plan.left:
                    more = self.wanted(self.scheduler.clock()) - len(self.running)
                    self.scheduler.changed.notify(more)
            for group in complete:
                self._arrived(group)

    def _claim(self, piece: DownloadPiece, most: int) -> int:
        """Return how many bytes to read next: `split` leaves them to this thread."""
        with self.scheduler.lock:
            if self.over:
                raise AbortedError
            left = piece.stop - piece.at
            if len(self.scheduler.jobs) > 1 and self._hands_over(piece, left):
                return 0
            piece.claimed = piece.at + min(most, left)
            return piece.claimed - piece.at

    def _hands_over(self, piece: DownloadPiece, left: int) -> bool:
        """Return whether another job gets the connection before these bytes are read."""
        rate = piece.rate or self._link().rate
        if rate is None:
            return left > _KEPT_BYTES and self.scheduler.exceeds_share(self)
        if left <= min(rate * _KEPT_SECONDS, _KEPT_BYTES):
            return False
        return self.scheduler.exceeds_share(self, by_more_urgent=left <= rate * _FINISHED_SECONDS)

    def _as_whole(self, piece: DownloadPiece, attempt: Attempt) -> DownloadPiece:
        """Let this attempt's response be the whole file, and end the other attempts.

        They put back what they have not written: until then, no other thread may write it.
        """
        with self.scheduler.lock:
            if attempt.ended:
                raise AbortedError  # another thread saw it first
            if self._whole is None:
                self._whole, self.hands_over = DownloadPiece(0, 0, self._stop), False
                Job.put_back(self, piece)
                piece.claimed = piece.at
                self._take_plan()
                self.running[attempt] = self._whole
                for other in self.running:
                    if other is not attempt:
                        other.end()
            return self._whole

    def _fetch_whole(self, whole: DownloadPiece, response: Response, buffer: memoryview) -> None:
        """Write what comes for the pending pieces.

        Of one that was put back too late, and begins before, another response brings the bytes.
        """
        at = 0
        while self._beginning_in(at, self._stop):
            got = response.fill(buffer)
            if not got:
                raise broken_off(str(response.location.url))
            for piece in self._beginning_in(at, at + got):
                start, stop = piece.at, min(piece.stop, at + got)
                self._write(start, buffer[start - at : stop - at])
                with self.scheduler.lock:
                    complete = self._arrivals.landed((start, stop))
                    whole.received += stop - start
                    piece.at = stop
                    if stop == piece.stop:
                        self.pending.remove(piece)
                for group in complete:
                    self._arrived(group)
            at += got

    def _beginning_in(self, start: int, stop: int) -> list[DownloadPiece]:
        """Return the pending pieces whose next byte is in [start, stop)."""
        with self.scheduler.lock:
            if self.over:
                raise AbortedError
            return [piece for piece in self.pending if start <= piece.at < stop]

    def _write(self, offset: int, data: memoryview) -> None:
        try:
            self._sink(offset, data)
        except OSError as error:
            code = errno.errorcode.get(error.errno or 0, type(error).__name__)
            raise FetchError(f"{self._target.name} cannot be written ({code})") from error


FOREGROUND, PREFETCH = 0, 1
"""Urgencies: smaller ones come first."""


class RangeDownloader:
    """Fetches files by ranges, on blocking connections in threads of its own.

    Threads start with work and end after `Timeouts.idle` seconds without. Every method may be
    called from any thread; jobs report by a future. Its owner closes it.

    `network` and `clock` (monotonic seconds) are for tests; `tracer` records what each connection
    does.
    """

    def __init__(
        self,
        settings: HttpSettings | None = None,
        *,
        network: Network | None = None,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer | None = None,
    ) -> None:
        self._settings = settings = settings or HttpSettings()
        self._links = LinkModels(clock)
        tracer = tracer or Tracer()
        self._pool = ConnectionPool(settings, network or Network(), clock, tracer)
        self._client = HttpClient(settings, self._pool, self._links, clock, tracer)
        self._scheduler = DownloadScheduler(
            settings.connections, settings.retries, clock, random.random, settings.timeouts.stuck
        )
        self._workers = WorkerPool(self._scheduler, self._pool, settings.timeouts.idle)

    def probe(
        self,
        target: Target,
        nbytes: int,
        *,
        ranged: bool = True,
        urgency: int = FOREGROUND,
        timeout: float = 60.0,
        needed_bytes: NeededBytes | None = None,
    ) -> ProbeRequest:
        """Request the first `nbytes` of a file, or without `ranged` a file of at most that many.

        `done` of the job returns a `ProbeResult` as soon as `needed_bytes` of them are here, or
        raises `FetchError` (or a subclass) or `AdapterNotFoundError`.
        """
        job = ProbeRequest(
            *(self._scheduler, self._client, target, nbytes),
            ranged=ranged,
            urgency=urgency,
            timeout=timeout,
            needed_bytes=needed_bytes,
        )
        self._workers.submit(job)
        return job

    def download(
        self,
        probe: ProbeResult,
        groups: Sequence[Sequence[ByteRange]],
        sink: Sink,
        arrived: Callable[[int], None],
        *,
        urgency: int = FOREGROUND,
        timeout: float = 300.0,
    ) -> Download:
        """Write the groups' bytes to the sink, earlier groups first.

        `groups` has the spans to fetch of each, in the order in which they are wanted, none twice;
        the first with any is wanted before all others. `arrived(n)` is called once when group n is
        in the sink: from several threads of the downloader, or at once if nothing is missing. Both
        must be quick, or they delay the download. `PREFETCH` gets the connections that `FOREGROUND`
        leaves. `timeout` is for all of it, in seconds.

        `done` of the job returns None when all is in the sink, or raises one `FetchError` (or a
        subclass) or `AdapterNotFoundError`, after its last thread has stopped.
        """
        for n, spans in enumerate(groups):
            if not spans:
                arrived(n)
        first = 1 + next((n for n, spans in enumerate(groups) if spans), 0)
        sizes = self._settings.sizes
        plan = RangePlan(groups, first, sizes)
        job = Download(
            *(self._scheduler, self._client, probe, plan, GroupArrivals(groups), sink, arrived),
            connections=self._scheduler.connections_for(probe.location.url.origin, urgency),
            least=sizes.least,
            urgency=urgency,
            timeout=timeout,
        )
        self._workers.submit(job)
        return job

    def close(self) -> None:
        """Cancel everything, and wait until it has ended. Idempotent."""
        self._workers.close()
        self._pool.close()

    def __del__(self) -> None:
        workers = getattr(self, "_workers", None)
        if workers is not None and not workers.closed:
            warnings.warn("unclosed RangeDownloader", ResourceWarning, stacklevel=2)
