"""The server's dashboard at /: adapters, their tiers, and the trace of the last cold request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from time import monotonic
from typing import Any, Generic, TypeVar

from lorax_async.errors import CapacityError, LoaderClosedError, LoraxError, shorten
from lorax_async.events import Event, Failed, Resident
from lorax_async.ids import parse_ref
from lorax_async.loader import AdapterLoader
from lorax_async.runtime.placement import AdapterResidency
from lorax_async.server.clients import EventStream
from lorax_async.server.model_names import ModelNames
from lorax_async.tracing.recorder import name_of
from lorax_async.tracing.trace import ANOTHER, Trace
from lorax_async.types import AdapterId, AdapterKey, AdapterRef, Ref, as_ref

MAX_RECORDINGS = 2
"""Concurrent recordings; further requests are not recorded. The last is for named adapters."""

SPAN_LIMIT = 8_192
"""Spans of one trace, and as many of the computing: 10 MB at most."""


@dataclass(frozen=True, slots=True)
class ColdRequest:
    """A cold request that has its first token, or ended without one.

    Attributes
    ----------
    number
        Counts cold requests.
    names
        The trace's names for the adapter: as requested, and as resolved.
    outcome
        "first token", or what ended it: an error's class, "cancelled", "no token".
    seconds
        Time until then.
    ended
        When it ended, by `time.time`.
    """

    number: int
    adapter: AdapterId
    names: tuple[str, ...]
    outcome: str
    seconds: float
    ended: float
    trace: Trace


class ColdRequests:
    """Record cold requests while they wait for their first token.

    Keep the last one that ended, and the last one whose adapter had a name of the operator's.
    """

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        self._loader = loader
        self._names = names
        self._recorded: set[Ref] = set()
        self._numbers = count(1)
        self._last: ColdRequest | None = None
        self._last_named: ColdRequest | None = None

    def record(self, adapter: AdapterId | None) -> ColdRecording | None:
        """Begin to record a request for an adapter that is not on the device."""
        if adapter is None or not self._should_record(adapter):
            return None
        recording = ColdRecording(self, self._loader, adapter)
        self._recorded.add(as_ref(adapter))
        return recording

    def last(self, *, named: bool) -> ColdRequest | None:
        """Return the last one that ended; `named`: the last one for an adapter with a name."""
        last = self._last_named if named else self._last
        return None if last is None or (named and not self._is_named(last.adapter)) else last

    def finish(self, recording: ColdRecording, outcome: str, seconds: float) -> None:
        """Keep a recording that has ended; discard it if its request was refused."""
        adapter = recording.adapter
        self._recorded.discard(as_ref(adapter))
        if outcome == "refused":
            return
        names = (recording.name, *self._resolved_name(adapter))
        self._last = ColdRequest(
            next(self._numbers), adapter, names, outcome, seconds, time.time(), recording.trace
        )
        if self._is_named(adapter):
            self._last_named = self._last

    def _should_record(self, adapter: AdapterId) -> bool:
        if len(self._recorded) >= MAX_RECORDINGS or as_ref(adapter) in self._recorded:
            return False
        if len(self._recorded) == MAX_RECORDINGS - 1 and not self._is_named(adapter):
            return False
        story = self._loader.placement().story(adapter)
        return not (story and isinstance(story[-1], Resident))

    def _is_named(self, adapter: AdapterId) -> bool:
        return self._names.name_of(adapter) is not None

    def _resolved_name(self, adapter: AdapterId) -> Iterator[str]:
        """Yield the name that links and revisions lead to."""
        with suppress(LoaderClosedError):
            for event in self._loader.placement().story(adapter)[-1:]:
                yield name_of(event.key)


class ColdRecording:
    """Record one request until its first token, as an observer of its tokens."""

    def __init__(self, requests: ColdRequests, loader: AdapterLoader, adapter: AdapterId) -> None:
        self.adapter = adapter
        self.name = name_of(as_ref(adapter))
        self.trace = loader.trace(limit=SPAN_LIMIT).start()
        self._requests = requests
        self._ended = False
        self._began = time.monotonic()
        recorder = loader.tracer.on
        assert recorder is not None  # it records this trace
        self._recorder = recorder
        self._span = recorder.begin("requests", None, f"request {self.name}", adapter=self.name)

    def on_token(self) -> None:
        self.on_end("first token")

    def on_end(self, outcome: str) -> None:
        """End the recording. Only the first call counts."""
        if not self._ended:
            self._ended = True
            self._recorder.end(self._span, outcome=outcome)
            self.trace.stop()
            self._requests.finish(self, outcome, time.monotonic() - self._began)


MAX_ROWS = 200
"""Maximum of adapters with names; and of others, of which the nearest are shown."""

FRESH_SECONDS = 0.2
"""Rows are shared by all pages for at least this long,"""

FRESH_FACTOR = 20
"""and this many times as long as it took to read them: milliseconds for thousands of adapters."""

MAX_PAGES = 64
"""Open pages of clients, and as many of the operator, which clients cannot use up."""

LAST_SECONDS = 1.0
"""Seconds that a client may take to read the end of its stream."""

TICK = 0.25
"""Seconds between two checks for changes."""

SILENCE = 15.0
"""Seconds without changes after which an empty event is sent: proxies end silent connections."""

ERROR_LENGTH = 300

REST_FACTOR = 3
"""After encoding a trace, pause this many times as long: it competes with computing tokens."""

Row = dict[str, Any]
Rows = Mapping[str, Row]
T = TypeVar("T")
Named = Sequence[tuple[str, AdapterId]]


class _CachedValue(Generic[T]):
    """A value that is recomputed once it is stale."""

    def __init__(self, compute: Callable[[], T]) -> None:
        self._compute = compute
        self._until = 0.0

    def get(self) -> T:
        began = monotonic()
        if began >= self._until:
            self._value = self._compute()
            seconds = monotonic() - began
            self._until = began + seconds + max(FRESH_SECONDS, FRESH_FACTOR * seconds)
        return self._value


class Dashboard:
    """The rows of the page. Clients see adapters that have names; the operator sees all."""

    def __init__(self, loader: AdapterLoader, names: ModelNames, cold: ColdRequests) -> None:
        self._loader = loader
        self._names = names
        self._cold_requests = cold
        self._rows = {
            operator: _CachedValue(partial(self._find_rows, operator)) for operator in (False, True)
        }
        self._cold = {
            operator: _CachedValue(partial(self._find_cold, operator)) for operator in (False, True)
        }

    @property
    def base(self) -> str:
        return self._names.base

    def rows(self, *, operator: bool) -> Rows:
        """Return the rows by id; the same object until they are recomputed."""
        return self._rows[operator].get()

    def more(self) -> int:
        """Return how many adapters with names are not shown."""
        return max(0, len(self._names.adapters) - MAX_ROWS)

    def cold(self, *, operator: bool) -> Row | None:
        """Return the last cold request that the viewer may see."""
        return self._cold[operator].get()

    def _find_cold(self, operator: bool) -> Row | None:
        last = self._cold_requests.last(named=not operator)
        if last is None:
            return None
        return {
            "number": last.number,
            "name": self._names.name_of(last.adapter) or last.names[0],
            "outcome": last.outcome,
            "seconds": last.seconds,
            "ended": last.ended,
        }

    def _find_rows(self, operator: bool) -> Rows:
        """Return rows by name; the operator's other ids begin with a NUL, which no name has."""
        placement, rows, known = self._loader.placement(), dict[str, Row](), set[AdapterKey]()
        for name, adapter in tuple(self._names.adapters.items())[:MAX_ROWS]:
            story = placement.story(adapter)
            known.update(event.key for event in story[-1:])
            rows[name] = _row(name, placement.find(adapter), story, named=True)
        if operator:
            for key, where in placement.nearest(MAX_ROWS).items():
                if key not in known:
                    rows[f"\0{key}"] = _row(str(key), where, placement.story(key), named=False)
        return rows


def _row(
    name: str, where: AdapterResidency | None, story: tuple[Event, ...], *, named: bool
) -> Row:
    last = story[-1] if story else None
    error = last.error if isinstance(last, Failed) else None
    # The operator's name replaces an id that may be a path.
    text = None if error is None else shorten(str(error.located(id=name)), ERROR_LENGTH)
    row: Row = {"name": name, "named": named, "error": text}
    if where is None:
        return row | {"tier": "source", "state": "", "layers": None, "bytes": 0, "leases": 0}
    return row | {
        "tier": where.tier,
        "state": where.state,
        "layers": where.layers,
        "bytes": where.device_bytes or where.host_bytes or where.pinned_bytes,
        "leases": where.leases,
    }


class DashboardFeeds:
    """The event streams of open pages. On one event loop."""

    def __init__(self, dashboard: Dashboard) -> None:
        self._dashboard = dashboard
        self._open: dict[EventStream, bool] = {}
        """Open streams; the values say whether a stream is the operator's."""
        self._ending = False

    def end(self) -> None:
        """End all streams at their next tick; disconnect clients that do not read the end."""
        if not self._ending:
            self._ending = True
            asyncio.get_running_loop().call_later(LAST_SECONDS, self._abort_all)

    def _abort_all(self) -> None:
        for stream in self._open:
            stream.abort()

    @contextmanager
    def admit(self, stream: EventStream, *, operator: bool) -> Iterator[None]:
        """Count the stream as open. Raises `CapacityError`."""
        if list(self._open.values()).count(operator) >= MAX_PAGES:
            raise CapacityError(f"{MAX_PAGES} pages are open, which is the limit; close one")
        self._open[stream] = operator
        try:
            yield
        finally:
            del self._open[stream]

    async def send(self, stream: EventStream, *, operator: bool) -> None:
        """Send all rows, then changes, until the client disconnects or the server ends."""
        await stream.begin()
        page = _OpenPage(self._dashboard, operator=operator)
        silent = 0.0
        while not self._ending:
            changes = page.changes()
            if changes or silent >= SILENCE:
                await stream.send_event(changes)
                silent = 0.0
            await asyncio.sleep(TICK)
            silent += TICK
        await stream.end()


class _OpenPage:
    """The state that one page was sent."""

    def __init__(self, dashboard: Dashboard, *, operator: bool) -> None:
        self._dashboard = dashboard
        self._operator = operator
        self._rows: Rows | None = None
        self._cold: Row | None = None
        self._more = 0

    def changes(self) -> dict[str, Any]:
        """Return changes since the last call; everything at the first call."""
        dashboard, changes = self._dashboard, dict[str, Any]()
        before, self._rows = self._rows, dashboard.rows(operator=self._operator)
        if before is None:
            changes = {"base": dashboard.base, "operator": self._operator, "more": 0, "cold": None}
        if before is not self._rows:
            known = before or {}
            changed = {id: row for id, row in self._rows.items() if known.get(id) != row}
            gone = [id for id in known if id not in self._rows]
            changes |= {"rows": changed} if changed or before is None else {}
            changes |= {"gone": gone} if gone else {}
        if dashboard.more() != self._more:
            self._more = changes["more"] = dashboard.more()
        cold = dashboard.cold(operator=self._operator)
        if cold != self._cold:
            self._cold, changes["cold"] = cold, cold
        return changes


class ColdTrace:
    """The trace of the last cold request that a viewer may see, with the names it may see."""

    def __init__(self, cold: ColdRequests, names: ModelNames) -> None:
        self._cold = cold
        self._names = names
        self._encoding = asyncio.Lock()
        self._encoded: dict[bool, tuple[object, bytes]] = {}
        self._resting_until = 0.0

    async def get(self, *, operator: bool) -> bytes | None:
        """Return the trace in Chrome's format, encoded once in a thread; None if there is none."""
        async with self._encoding:
            version, content = self._encoded.get(operator, (None, None))
            if version == self._version(operator=operator):
                return content
            await asyncio.sleep(max(0.0, self._resting_until - monotonic()))
            version = self._version(operator=operator)  # it may have changed meanwhile
            last = self._cold.last(named=not operator)
            if last is None:
                return None
            began = monotonic()
            content = await asyncio.to_thread(_encode, last, version[1])
            self._resting_until = monotonic() + REST_FACTOR * (monotonic() - began)
            self._encoded[operator] = version, content
            return content

    def _version(self, *, operator: bool) -> tuple[int, Named | None]:
        """Return the request's number and the names in its trace; None is all its own names."""
        last = self._cold.last(named=not operator)
        names = None if operator else tuple(self._names.adapters.items())
        return last.number if last is not None else 0, names


def _encode(request: ColdRequest, names: Named | None) -> bytes:
    return request.trace.encoded(None if names is None else _map_names(request, names))


def _map_names(request: ColdRequest, names: Named) -> Mapping[str, str]:
    """Map the trace's names to the operator's; ambiguous ones become "another adapter"."""
    mapping: dict[str, str] = {}
    refs: dict[str, Ref] = {}
    for name, adapter in names:
        ref = as_ref(adapter)
        for traced_name in _names_in_trace(ref):
            if refs.setdefault(traced_name, ref) == ref:
                mapping.setdefault(traced_name, name)
            else:
                mapping[traced_name] = ANOTHER
    own = next(name for name, adapter in names if adapter == request.adapter)
    return mapping | dict.fromkeys(request.names, own)


def _names_in_trace(ref: Ref) -> Iterator[str]:
    """Yield the names of `ref` as requested, and without its revision."""
    yield name_of(ref)
    if isinstance(ref, AdapterRef):
        with suppress(LoraxError):
            yield name_of(parse_ref(ref))
