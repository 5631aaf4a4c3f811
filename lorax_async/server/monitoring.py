"""What the page shows of a server: rows, numbers, and traces of cold requests."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from lorax_async.errors import CapacityError, LoraxError, shorten
from lorax_async.events import Failed, Resident
from lorax_async.ids import parse_ref
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.placement import Placement
from lorax_async.server.responses import UNKNOWN, EventStream
from lorax_async.server.server_metrics import ServerMetrics
from lorax_async.server.server_settings import ModelNames
from lorax_async.telemetry import name_of
from lorax_async.types import AdapterId, AdapterKey, AdapterRef, Ref, as_ref

Row = dict[str, Any]
Names = tuple[tuple[str, AdapterId], ...]

MAX_RECORDINGS = 2  # at a time; further requests are not recorded; the last is for named adapters
SPAN_LIMIT = 8_192  # spans of one trace, and as many of "compute": at most 10 MB of JSON
MAX_COLD = 20  # cold requests kept, and as many for named adapters; the oldest go first
MAX_COLD_SPANS = 65_536  # of each of these two lists, 600 bytes each with their JSON: at most 40 MB


class ColdRequest:
    """A request for an adapter that is not on the device, recorded until its first token."""

    def __init__(self, loader: AdapterLoader, adapter: AdapterId) -> None:
        self.adapter = adapter
        self.names = [name_of(as_ref(adapter))]
        """The trace's names for the adapter: as requested, and as resolved."""
        self.row: Row = {}
        """What the page shows of it once it has ended."""
        self.encoded: dict[bool, tuple[Names | None, asyncio.Task[bytes]]] = {}
        """By whether it is the operator's: the names in it, and the compressed trace."""
        self.began, self.trace = time.monotonic(), loader.trace(limit=SPAN_LIMIT).start()
        self.span = loader.tracer.span("requests", None, "request", as_ref(adapter))

    def encode(self, names: Names | None) -> bytes:
        """Return the trace in Chrome's format, compressed; with `names`, no others are in it.

        Names that several of these adapters have become "another adapter", as all others do.
        Blocks.
        """
        called = None if names is None else self._called(names)
        return zlib.compress(self.trace.encoded(called), level=1)

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
        called = {each: min(of.values()) for each, of in meanings.items() if len(of) == 1}
        return called | dict.fromkeys(self.names, own)


class ColdRequests:
    """Record cold requests until their first token.

    Keep the last ones, for the operator, and the last ones of named adapters, for all viewers.
    """

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        self._loader, self._names = loader, names
        self._recorded, self._count = set[Ref](), 0
        self._ended, self._named = deque[ColdRequest](), deque[ColdRequest]()
        self._encoding = asyncio.Lock()

    def is_cold(self, adapter: AdapterId) -> bool:
        """Return whether an adapter is not on the device."""
        story = self._loader.placement().story(adapter)
        return not (story and isinstance(story[-1], Resident))

    def record(self, adapter: AdapterId | None) -> Callable[[str], None]:
        """Record a request if its adapter is not on the device.

        Return the function to call with its outcome; only the first call counts.
        """
        if adapter is None or as_ref(adapter) in self._recorded or not self.is_cold(adapter):
            return lambda _: None
        is_named = self._names.name_of(adapter) is not None
        if len(self._recorded) >= (MAX_RECORDINGS if is_named else MAX_RECORDINGS - 1):
            return lambda _: None
        self._recorded.add(as_ref(adapter))
        return partial(self._end, ColdRequest(self._loader, adapter))

    def _end(self, request: ColdRequest, outcome: str) -> None:
        """End a recording; keep it, unless the request was refused or for a mistyped name."""
        if request.row:
            return
        request.span.end(outcome=outcome)
        request.trace.stop()
        seconds = time.monotonic() - request.began
        request.row = {"outcome": outcome, "seconds": seconds, "ended": time.time()}
        self._recorded.discard(as_ref(request.adapter))
        is_named = self._names.name_of(request.adapter) is not None
        is_unknown = outcome in {kind.__name__ for kind in UNKNOWN}
        if outcome == "refused" or (is_unknown and not is_named):
            return
        # Links and revisions lead to another name.
        story = self._loader.placement().story(request.adapter)
        request.names += [name_of(event.key) for event in story[-1:]]
        self._count = request.row["number"] = self._count + 1
        for kept in (self._ended, self._named) if is_named else (self._ended,):
            kept.append(request)
            while len(kept) > MAX_COLD or sum(each.trace.kept for each in kept) > MAX_COLD_SPANS:
                kept.popleft()

    def visible(self, *, operator: bool) -> list[ColdRequest]:
        """Return the requests that the viewer may see, the last one first."""
        kept = reversed(self._ended if operator else self._named)  # names may be taken back
        return [each for each in kept if operator or self._names.name_of(each.adapter) is not None]

    async def encoded(self, number: int | None = None, *, operator: bool) -> bytes | None:
        """Return a trace in Chrome's format, of the last request without `number`; None without it.

        It is encoded once, in a thread. Only the operator sees all names in it.
        """
        visible = self.visible(operator=operator)
        request = next((each for each in visible if number in {None, each.row["number"]}), None)
        if request is None:
            return None
        names = None if operator else tuple(self._names.adapters.items())
        made_for, encoding = request.encoded.get(operator, (None, None))
        if encoding is None or made_for != names:
            encoding = asyncio.create_task(self._encode(request, names))
            request.encoded[operator] = names, encoding
        return await asyncio.to_thread(zlib.decompress, await asyncio.shield(encoding))

    async def _encode(self, request: ColdRequest, names: Names | None) -> bytes:
        async with self._encoding:  # one at a time: they compete with tokens
            return await asyncio.to_thread(request.encode, names)


MAX_ROWS = 200  # of named adapters, and as many of others, the nearest
MAX_PAGES = 64  # open pages of clients, and as many of the operator, which clients cannot use up
ERROR_LENGTH = 300
RATE_SECONDS = 10.0  # tokens per second are a mean over this time
TICK = 0.25  # seconds between two looks for changes,
ACTIVE_SECONDS = RATE_SECONDS + 2.0  # until this long after the last sign of one
FRESH_FACTOR = 20  # all pages share a read for this multiple of its duration, and for a tick
SILENCE = 15.0  # seconds until an empty event is sent: proxies end silent connections
LAST_SECONDS = 1.0  # that a client may take to read the end of its stream


class Dashboard:
    """The page's rows and numbers, and its event streams; clients see named adapters only."""

    def __init__(
        self, loader: AdapterLoader, names: ModelNames, cold: ColdRequests, metrics: ServerMetrics
    ) -> None:
        self._loader, self._names, self._cold, self._metrics = loader, names, cold, metrics
        self._tokens = deque[tuple[float, int]]()
        """Totals of the last `RATE_SECONDS`, with their times."""
        self._pages: dict[bool, tuple[float, Row]] = {}
        """What the operator's pages and those of all others show, and until when that is fresh."""
        self._open: dict[EventStream, bool] = {}
        """Open streams; the values say whether a stream is the operator's."""
        self._ending, self._changed, self._active_until = False, asyncio.Event(), 0.0

    def note_change(self, _: object = None) -> None:
        """Look for changes, now and for some seconds: what is read is older than its events."""
        self._active_until = time.monotonic() + ACTIVE_SECONDS
        self._changed.set()

    def end(self) -> None:
        """End all streams at their next tick; disconnect clients that do not read the end."""
        self._ending = True
        self.note_change()
        loop = asyncio.get_running_loop()
        loop.call_later(LAST_SECONDS, lambda: [stream.abort() for stream in self._open])

    async def send(self, stream: EventStream, *, operator: bool) -> None:
        """Send the page, then changes, until the client disconnects or the server ends.

        Raise `CapacityError`, before that.
        """
        if list(self._open.values()).count(operator) >= MAX_PAGES:
            raise CapacityError(f"{MAX_PAGES} pages are open, which is the limit; close one")
        self._open[stream] = operator
        unsubscribe = self._loader.subscribe(self.note_change)
        try:
            await stream.begin()
            self.note_change()
            sent, silent_at = Row(), time.monotonic() + SILENCE
            while not self._ending:
                page = self.page(operator=operator)
                changes, sent = _changes(sent, page), page
                if changes or time.monotonic() >= silent_at:
                    await stream.send_event(changes)
                    silent_at = time.monotonic() + SILENCE
                if time.monotonic() >= self._active_until:  # a change would have moved it
                    self._changed.clear()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), silent_at - time.monotonic())
                await asyncio.sleep(TICK)
            await stream.end()
        finally:
            unsubscribe()
            del self._open[stream]

    def page(self, *, operator: bool) -> Row:
        """Return all that the page shows. All streams share a read while it is fresh."""
        began, (fresh_until, page) = time.monotonic(), self._pages.get(operator, (0.0, Row()))
        if began >= fresh_until:
            page = {
                "base": self._names.base,
                "operator": operator,
                "more": max(0, len(self._names.adapters) - MAX_ROWS),  # named, but not shown
                "cold": [
                    each.row | {"name": self._names.name_of(each.adapter) or each.names[0]}
                    for each in self._cold.visible(operator=operator)
                ],
                "numbers": self._read_numbers(),
                "rows": self._read_rows(operator=operator),
            }
            now = time.monotonic()
            fresh_until = now + max(TICK, FRESH_FACTOR * (now - began))
            self._pages[operator] = fresh_until, page
        return page

    def _read_rows(self, *, operator: bool) -> dict[str, Row]:
        """Return the rows by name; those without one by a text that begins with a NUL."""
        placement, rows, known = self._loader.placement(), dict[str, Row](), set[AdapterKey]()
        for name, adapter in tuple(self._names.adapters.items())[:MAX_ROWS]:
            known.update(event.key for event in placement.story(adapter)[-1:])
            own_pin = operator and name in self._names.pinned
            rows[name] = _row(placement, adapter, name, pinned=own_pin)
        for key in placement.nearest(MAX_ROWS) if operator else ():
            if key not in known:
                rows[f"\0{key}"] = _row(placement, key, str(key), pinned=True)
        return rows

    def _read_numbers(self) -> Row:
        """Return numbers of the whole server, in which no adapter is named."""
        metrics, now = self._metrics, time.monotonic()
        self._tokens.append((now, total := metrics.token_count))
        while now - self._tokens[0][0] > RATE_SECONDS:
            self._tokens.popleft()
        since, before = self._tokens[0]
        usage, hits = self._loader.placement().usage, self._loader.statistics().hits
        return {
            "slots": usage.slots,
            "memory": {of: getattr(usage, f"{of}_bytes") for of in ("device", "host", "pinned")},
            "hits": (hits["device"], sum(hits.values())),
            "running": metrics.running.total(),
            "waiting": metrics.waiting.total(),
            "tokens_per_second": round((total - before) / max(now - since, TICK), 1),
        }


def _changes(before: Row, page: Row) -> Row:
    """Return what has changed on the page."""
    changes = {name: it for name, it in page.items() if it != before.get(name)}
    if "rows" in changes:
        known, rows = before.get("rows", {}), page["rows"]
        changes["rows"] = {id: row for id, row in rows.items() if row != known.get(id)}
        gone = [id for id in known if id not in rows]
        changes |= {"gone": gone} if gone else {}
    return changes


def _row(placement: Placement, adapter: AdapterId | AdapterKey, name: str, *, pinned: bool) -> Row:
    """Return one adapter's row; `pinned`: show its pin, if it has one."""
    last, where = next(iter(placement.story(adapter)[-1:]), None), placement.find(adapter)
    error = last.error if isinstance(last, Failed) else None
    # The operator's name replaces an id that may be a path.
    text = None if error is None else shorten(str(error.located(id=name)), ERROR_LENGTH)
    row: Row = {"name": name, "error": text}
    if where is None:
        return row | {"tier": "source", "state": "", "layers": None, "bytes": 0, "leases": 0}
    row |= {member: getattr(where, member) for member in ("tier", "state", "layers", "leases")}
    nbytes = where.device_bytes or where.host_bytes or where.pinned_bytes
    return row | {"bytes": nbytes, "pinned": pinned and where.pins > 0}
