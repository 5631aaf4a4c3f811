"""What the page shows of a server: rows, numbers, and traces of cold requests."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from lorax_async.errors import CapacityError, LoaderClosedError, LoraxError, shorten
from lorax_async.events import Failed, Resident
from lorax_async.ids import parse_ref
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.placement import Placement
from lorax_async.server.responses import UNKNOWN, EventStream
from lorax_async.server.server_metrics import ServerMetrics
from lorax_async.server.server_settings import ModelNames
from lorax_async.telemetry import name_of
from lorax_async.tracing import ANOTHER
from lorax_async.types import AdapterId, AdapterKey, AdapterRef, Ref, as_ref

T = TypeVar("T")

MAX_RECORDINGS = 2  # at a time; further requests are not recorded; the last is for named adapters
SPAN_LIMIT = 8_192  # spans of one trace, and as many of "compute": at most 10 MB of JSON
MAX_COLD = 20  # cold requests kept, and as many for named adapters; the oldest go first
MAX_COLD_SPANS = 65_536  # of each of these two lists, 600 bytes each with their JSON: at most 40 MB
REST_FACTOR = 3  # the pause after encoding a trace, which competes with tokens, by its duration

Names = tuple[tuple[str, AdapterId], ...]


class ColdRequests:
    """Record cold requests until their first token.

    Keep the last ones, for the operator, and the last ones of named adapters, for all viewers.
    """

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        self._loader, self._names = loader, names
        self._recorded, self._count = set[Ref](), 0
        self._ended, self._named = deque[ColdRequest](), deque[ColdRequest]()
        self._encoding, self._resting_until = asyncio.Lock(), 0.0

    def record(self, adapter: AdapterId | None) -> ColdRequest | None:
        """Begin to record a request for an adapter that is not on the device."""
        left = MAX_RECORDINGS - len(self._recorded)
        if adapter is None or left <= 0 or as_ref(adapter) in self._recorded:
            return None
        if (left == 1 and self._names.name_of(adapter) is None) or not self.is_cold(adapter):
            return None
        self._recorded.add(as_ref(adapter))
        return ColdRequest(self._loader, adapter, self._keep)

    def is_cold(self, adapter: AdapterId) -> bool:
        """Return whether an adapter is not on the device."""
        story = self._loader.placement().story(adapter)
        return not (story and isinstance(story[-1], Resident))

    def _keep(self, request: ColdRequest) -> None:
        """Keep a request that has ended, but not one that was refused, or for a mistyped name."""
        self._recorded.discard(as_ref(request.adapter))
        is_named = self._names.name_of(request.adapter) is not None
        is_unknown = request.outcome in {kind.__name__ for kind in UNKNOWN}
        if request.outcome == "refused" or (is_unknown and not is_named):
            return
        with suppress(LoaderClosedError):  # links and revisions lead to another name
            story = self._loader.placement().story(request.adapter)
            request.names += [name_of(event.key) for event in story[-1:]]
        self._count = request.number = self._count + 1
        for kept in (self._ended, self._named) if is_named else (self._ended,):
            kept.append(request)
            while len(kept) > MAX_COLD or sum(each.spans for each in kept) > MAX_COLD_SPANS:
                kept.popleft()

    def visible(self, *, operator: bool) -> list[ColdRequest]:
        """Return the requests that the viewer may see, the last one first."""
        kept = reversed(self._ended if operator else self._named)  # names may be taken back
        return [each for each in kept if operator or self._names.name_of(each.adapter) is not None]

    async def encoded(self, number: int | None = None, *, operator: bool) -> bytes | None:
        """Return a trace in Chrome's format, of the last request without `number`; None without it.

        It is encoded once, in a thread. Only the operator sees all names in it.
        """
        while True:  # names and requests change meanwhile
            visible = self.visible(operator=operator)
            request = next((each for each in visible if number in {None, each.number}), None)
            if request is None:
                return None
            number = request.number
            names = None if operator else tuple(self._names.adapters.items())
            content = request.encoded_for(names)
            if content is not None:
                return await asyncio.to_thread(zlib.decompress, content)
            async with self._encoding:
                if request.encoded_for(names) is None:
                    await asyncio.sleep(max(0.0, self._resting_until - time.monotonic()))
                    began = time.monotonic()
                    await asyncio.to_thread(request.encode, names)
                    took = time.monotonic() - began
                    self._resting_until = began + (1 + REST_FACTOR) * took


class ColdRequest:
    """A request for an adapter that is not on the device, recorded until its first token."""

    def __init__(
        self, loader: AdapterLoader, adapter: AdapterId, on_end: Callable[[ColdRequest], None]
    ) -> None:
        self.adapter, self._on_end = adapter, on_end
        self.names = [name_of(as_ref(adapter))]
        """The trace's names for the adapter: as requested, and as resolved."""
        self.number, self.outcome = 0, ""
        """Counts those that have ended; "first token", or an error's class, "cancelled" …"""
        self.seconds = self.ended = 0.0
        """The time until then, and when that was by `time.time`."""
        self._encoded: dict[bool, tuple[Names | None, bytes]] = {}
        """By whether it is the operator's: the names in it, and the encoded trace."""
        self._trace, self._began = loader.trace(limit=SPAN_LIMIT).start(), time.monotonic()
        self._span = loader.tracer.span("requests", None, "request", as_ref(adapter))

    def end(self, outcome: str) -> None:
        """End the recording. Only the first call counts."""
        if not self.outcome:
            self.outcome = outcome
            self.seconds, self.ended = time.monotonic() - self._began, time.time()
            self._span.end(outcome=outcome)
            self._trace.stop()
            self._on_end(self)

    @property
    def spans(self) -> int:
        """How many spans its trace has."""
        return self._trace.kept

    def encoded_for(self, names: Names | None) -> bytes | None:
        """Return what `encode` made with these names, compressed; None if it has not."""
        made_for, content = self._encoded.get(names is None, (None, None))
        return content if made_for == names else None

    def encode(self, names: Names | None) -> None:
        """Make the trace in Chrome's format; with `names`, no other names are in it. Blocks.

        Names that several of these adapters have become "another adapter", as all others do.
        """
        called = None if names is None else self._called(names)
        self._encoded[names is None] = names, zlib.compress(self._trace.encoded(called), level=1)

    def _called(self, names: Names) -> dict[str, str]:
        """Return the viewer's names by those in the trace."""
        meanings: dict[str, dict[Ref, str]] = {}
        for name, adapter in names:
            ref = as_ref(adapter)
            meanings.setdefault(name_of(ref), {}).setdefault(ref, name)
            if isinstance(ref, AdapterRef):
                with suppress(LoraxError):  # without its revision
                    meanings.setdefault(name_of(parse_ref(ref)), {}).setdefault(ref, name)
        own = next(name for name, adapter in names if adapter == self.adapter)
        called = {
            each: ANOTHER if len(of) > 1 else min(of.values()) for each, of in meanings.items()
        }
        return called | dict.fromkeys(self.names, own)


MAX_ROWS = 200  # of named adapters, and as many of others, the nearest
MAX_PAGES = 64  # open pages of clients, and as many of the operator, which clients cannot use up
ERROR_LENGTH = 300
RATE_SECONDS = 10.0  # tokens per second are a mean over this time
TICK = 0.25  # seconds between two looks for changes,
ACTIVE_SECONDS = RATE_SECONDS + 2.0  # until this long after the last sign of one
FRESH_SECONDS = 0.2  # all pages share a read for at least this long,
FRESH_FACTOR = 20  # and this multiple of its duration: reading thousands of adapters takes long
SILENCE = 15.0  # seconds until an empty event is sent: proxies end silent connections
LAST_SECONDS = 1.0  # that a client may take to read the end of its stream

Row = dict[str, Any]


def shared(read: Callable[..., T]) -> Callable[..., T]:
    """Return `read`, whose result all callers with the same arguments share while it is fresh."""
    results: dict[tuple[bool, ...], tuple[float, T]] = {}

    def get(**options: bool) -> T:
        began, given = time.monotonic(), (*options.values(),)
        if given not in results or began >= results[given][0]:
            value, now = read(**options), time.monotonic()
            results[given] = now + max(FRESH_SECONDS, FRESH_FACTOR * (now - began)), value
        return results[given][1]

    return get


class Dashboard:
    """The page's rows and numbers, and its event streams; clients see named adapters only."""

    def __init__(
        self, loader: AdapterLoader, names: ModelNames, cold: ColdRequests, metrics: ServerMetrics
    ) -> None:
        self._loader, self._names, self._cold, self._metrics = loader, names, cold, metrics
        self._tokens = deque[tuple[float, int]]()
        """Totals of the last `RATE_SECONDS`, with their times."""
        self.numbers = shared(self._read_numbers)
        self.rows, self.cold = shared(self._read_rows), shared(self._read_cold)
        self._open: dict[EventStream, bool] = {}
        """Open streams; the values say whether a stream is the operator's."""
        self._ending, self._changed, self._active_until = False, asyncio.Event(), 0.0

    def note_change(self, _: object = None) -> None:
        """Look for changes, now and for some seconds: what is read is older than its events."""
        self._active_until = time.monotonic() + ACTIVE_SECONDS
        self._changed.set()

    def end(self) -> None:
        """End all streams at their next tick; disconnect clients that do not read the end."""
        if not self._ending:
            self._ending = True
            self.note_change()
            loop = asyncio.get_running_loop()
            loop.call_later(LAST_SECONDS, lambda: [stream.abort() for stream in self._open])

    @contextmanager
    def admit(self, stream: EventStream, *, operator: bool) -> Iterator[None]:
        """Count the stream as open, so that `end` disconnects it. Raise `CapacityError`."""
        if list(self._open.values()).count(operator) >= MAX_PAGES:
            raise CapacityError(f"{MAX_PAGES} pages are open, which is the limit; close one")
        self._open[stream] = operator
        unsubscribe = self._loader.subscribe(self.note_change)
        try:
            yield
        finally:
            unsubscribe()
            del self._open[stream]

    async def send(self, stream: EventStream, *, operator: bool) -> None:
        """Send all rows, then changes, until the client disconnects or the server ends."""
        await stream.begin()
        self.note_change()
        page, silent_at = dict[str, Any](), time.monotonic() + SILENCE
        while not self._ending:
            changes = self._update(page, operator)
            if changes or time.monotonic() >= silent_at:
                await stream.send_event(changes)
                silent_at = time.monotonic() + SILENCE
            if time.monotonic() >= self._active_until:  # a change would have moved it
                self._changed.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), silent_at - time.monotonic())
            await asyncio.sleep(TICK)
        await stream.end()

    def _update(self, page: dict[str, Any], operator: bool) -> dict[str, Any]:
        """Return what has changed since `page` was sent, and add it to that."""
        now: dict[str, Any] = {
            "base": self._names.base,
            "operator": operator,
            "more": max(0, len(self._names.adapters) - MAX_ROWS),  # named, but not shown
            "cold": self.cold(operator=operator),
            "numbers": self.numbers(),
        }
        changes = {name: it for name, it in now.items() if not page or it != page[name]}
        rows, known = self.rows(operator=operator), page.get("rows", {})
        if known is not rows:
            changed = {id: row for id, row in rows.items() if known.get(id) != row}
            gone = [id for id in known if id not in rows]
            changes |= {"rows": changed} if changed or not page else {}
            changes |= {"gone": gone} if gone else {}
        page |= now | {"rows": rows}
        return changes

    def _read_cold(self, *, operator: bool) -> Sequence[Row]:
        """Return the cold requests that the viewer may see, the last one first."""
        return [
            {name: getattr(each, name) for name in ("number", "outcome", "seconds", "ended")}
            | {"name": self._names.name_of(each.adapter) or each.names[0]}
            for each in self._cold.visible(operator=operator)
        ]

    def _read_rows(self, *, operator: bool) -> Mapping[str, Row]:
        """Return the rows by name; those without one by a text that begins with a NUL."""
        placement, rows, known = self._loader.placement(), dict[str, Row](), set[AdapterKey]()
        for name, adapter in tuple(self._names.adapters.items())[:MAX_ROWS]:
            known.update(event.key for event in placement.story(adapter)[-1:])
            own_pin = operator and name in self._names.pinned
            rows[name] = _row(placement, adapter, name, named=True, pinned=own_pin)
        for key in placement.nearest(MAX_ROWS) if operator else ():
            if key not in known:
                rows[f"\0{key}"] = _row(placement, key, str(key), named=False, pinned=True)
        return rows

    def _read_numbers(self) -> Row:
        """Return numbers of the whole server, in which no adapter is named."""
        metrics, now = self._metrics, time.monotonic()
        self._tokens.append((now, total := metrics.token_count))
        while now - self._tokens[0][0] > RATE_SECONDS:
            self._tokens.popleft()
        since, before = self._tokens[0]
        usage, hits = self._loader.placement().usage, self._loader.statistics().hits
        memory = {name: getattr(usage, f"{name}_bytes") for name in ("device", "host", "pinned")}
        return {
            "slots": usage.slots,
            "memory": {name: budget for name, budget in memory.items() if budget.limit},
            "hits": (hits["device"], sum(hits.values())),
            "running": metrics.running.total(),
            "waiting": metrics.waiting.total(),
            "tokens_per_second": round((total - before) / max(now - since, TICK), 1),
        }


def _row(
    placement: Placement, adapter: AdapterId | AdapterKey, name: str, *, named: bool, pinned: bool
) -> Row:
    """Return one adapter's row; `pinned`: show its pin, if it has one."""
    last = next(iter(placement.story(adapter)[-1:]), None)
    error = last.error if isinstance(last, Failed) else None
    # The operator's name replaces an id that may be a path.
    text = None if error is None else shorten(str(error.located(id=name)), ERROR_LENGTH)
    row: Row = {"name": name, "named": named, "error": text}
    where = placement.find(adapter)
    if where is None:
        return row | {"tier": "source", "state": "", "layers": None, "bytes": 0, "leases": 0}
    row |= {member: getattr(where, member) for member in ("tier", "state", "layers", "leases")}
    nbytes = where.device_bytes or where.host_bytes or where.pinned_bytes
    return row | {"bytes": nbytes, "pinned": pinned and where.pins > 0}
