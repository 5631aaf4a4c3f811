"""What operators and clients see of a server: metrics, the page's rows, traces of cold requests."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorax_async.errors import CapacityError, LoaderClosedError, LoraxError, shorten
from lorax_async.events import Failed, Resident
from lorax_async.ids import parse_ref
from lorax_async.loader import AdapterLoader
from lorax_async.metrics import LoaderCollector
from lorax_async.runtime.placement import Placement
from lorax_async.server.engine import Finish, TokenStream
from lorax_async.server.responses import EventStream
from lorax_async.server.server_settings import ModelNames
from lorax_async.tracing import ANOTHER, name_of
from lorax_async.types import AdapterId, AdapterKey, AdapterRef, Ref, as_ref

# -- metrics --------------------------------------------------------------------------------------

CALLS = frozenset({
    "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/adapters", "/tokenize", "/detokenize", "/health", "/ping",
    "/version", "/metrics", "/openapi.json", "/docs", "/", "/page",
})  # fmt: skip
"""Paths with a label of their own; all others, which clients make up, are "other"."""

FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
WHOLE_SECONDS = (0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
BETWEEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class ServerMetrics(Collector):
    """A registry with the loader's numbers and the server's. On one event loop."""

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        self._names = names
        self._max_lora = str(loader.config.max_slots)
        self._loader = LoaderCollector(loader)
        self._placement = loader.placement
        self.waiting: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        registry = self._registry = CollectorRegistry()
        registry.register(self._loader)
        registry.register(self)
        prefix = "lorax_server_"
        for name, text, models in (
            ("sequences_waiting", "Sequences without a token yet.", self.waiting),
            ("sequences_running", "Sequences that have a token, and no end.", self.running),
        ):
            Gauge(prefix + name, text, registry=registry).set_function(models.total)
        self.requests = Total(
            f"{prefix}requests", "Requests answered.", ["call", "status"], registry=registry
        )
        self.prompt_tokens = Total(
            f"{prefix}prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.tokens = Total(f"{prefix}tokens", "Tokens generated.", registry=registry)
        self.first = Histogram(
            f"{prefix}first_token_seconds",
            "From a sequence's start in the queue to its first token.",
            registry=registry,
            buckets=FIRST_SECONDS,
        )
        self.between = Histogram(
            f"{prefix}inter_token_seconds",
            "Between two tokens of a sequence.",
            registry=registry,
            buckets=BETWEEN_SECONDS,
        )
        for_routers: Any = {"registry": registry, "labelnames": ["model_name"]}
        self.queued = Histogram(
            "vllm:request_queue_time_seconds",
            "From a sequence's start in the queue to its first step.",
            buckets=FIRST_SECONDS,
            **for_routers,
        ).labels(names.base)
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From a sequence's start in the queue to its end, of those that had a token.",
            buckets=WHOLE_SECONDS,
            **for_routers,
        ).labels(names.base)

    def close(self) -> None:
        """Close the `LoaderCollector`."""
        self._loader.close()

    def encode(self) -> bytes:
        """Return all numbers in Prometheus' text format.

        In OpenMetrics, prometheus_client gives vLLM's metric another name.
        """
        return generate_latest(self._registry)

    def count_request(self, path: str, status: int) -> None:
        """Count a request that was answered."""
        for folder in ("/v1/models", "/page"):
            path = folder if path.startswith(f"{folder}/") else path
        self.requests.labels(path if path in CALLS else "other", str(status)).inc()

    def collect(self) -> Iterable[Metric]:
        """Yield what vLLM tells routers, and where the adapters with names are."""
        for state, count in (("running", self.running), ("waiting", self.waiting)):
            text = f"Sequences that are {state}, by vLLM's name."
            family = GaugeMetricFamily(f"vllm:num_requests_{state}", text, labels=["model_name"])
            family.add_metric([self._names.base], count.total())
            yield family
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with names that requests have now; the value is the time, in seconds.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        # Ids from requests belong to their clients, and a name with a comma would be read as two.
        known = {name for name in self._names.adapters if "," not in name}
        adapters = (",".join(sorted(known & set(m))) for m in (self.waiting, self.running))
        info.add_metric([self._max_lora, *adapters], time.time())
        yield info
        yield self._tiers()

    def _tiers(self) -> Metric:
        text = f"1 for each of the first {MAX_ROWS} named adapters on the device or in host memory."
        family = GaugeMetricFamily("lorax_adapter_tier", text, labels=["adapter", "tier"])
        placement = self._placement()
        for name, adapter in islice(self._names.adapters.items(), MAX_ROWS):
            where = placement.find(adapter)
            if where is not None and where.tier in {"device", "host"}:
                family.add_metric([name, where.tier], 1)
        return family


class ObservedTokens:
    """Pass the tokens of one sequence on; count and time them, and end its recording."""

    def __init__(
        self,
        tokens: TokenStream,
        model: str,
        metrics: ServerMetrics,
        recording: ColdRequest | None = None,
    ) -> None:
        self.count = 0
        """Tokens passed on."""
        self.first_seconds: float | None = None
        """From its start in the queue to its first token."""
        self._tokens = tokens
        self._iterator = aiter(tokens)
        self._model = model
        self._metrics = metrics
        self._recording = recording
        self._histogram = metrics.first
        self._began = self._since = time.monotonic()
        self._state: Counter[str] | None = None
        self._move(metrics.waiting)

    @property
    def finish(self) -> Finish | None:
        return self._tokens.finish

    @property
    def queue_seconds(self) -> float | None:
        """From its start in the queue to its first step."""
        return self._tokens.queue_seconds

    def __aiter__(self) -> AsyncIterator[int]:
        return self

    async def __anext__(self) -> int:
        try:
            token = await anext(self._iterator)
        except StopAsyncIteration:
            self._end("no token")
            raise
        except asyncio.CancelledError:
            self._end("cancelled")
            raise
        except BaseException as error:
            self._end(type(error).__name__)
            raise
        now, metrics = time.monotonic(), self._metrics
        began, self._since = self._since, now
        self._histogram.observe(now - began)
        metrics.tokens.inc()
        self.count += 1
        if self._histogram is metrics.first:
            self.first_seconds = now - began
            if self.queue_seconds is not None:
                metrics.queued.observe(self.queue_seconds)
            self._histogram = metrics.between
            if self._state is not None:
                self._move(metrics.running)
            if self._recording is not None:
                self._recording.end("first token")
        return token

    def cancel(self) -> None:
        self._end("cancelled")
        self._tokens.cancel()

    def _end(self, outcome: str) -> None:
        if self._state is not None and self.count:
            self._metrics.whole.observe(time.monotonic() - self._began)
        self._move(None)
        if self._recording is not None:
            self._recording.end(outcome)

    def _move(self, state: Counter[str] | None) -> None:
        before, self._state = self._state, state
        if before is not None:
            before[self._model] -= 1
            if not before[self._model]:
                del before[self._model]
        if state is not None:
            state[self._model] += 1


# -- traces of cold requests ----------------------------------------------------------------------

MAX_RECORDINGS = 2
"""Concurrent recordings; further requests are not recorded. The last is for named adapters."""

SPAN_LIMIT = 8_192
"""Spans of one trace, and as many of the computing: 10 MB at most."""

REST_FACTOR = 3
"""After encoding a trace, pause this many times as long: it competes with computing tokens."""


class ColdRequests:
    """Record cold requests while they wait for their first token.

    Keep the last one that ended, which the operator may see, and the last one whose adapter had a
    name of the operator's, which all may.
    """

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        self._loader = loader
        self._names = names
        self._recorded: set[Ref] = set()
        self._count = 0
        self._last: ColdRequest | None = None
        self._last_named: ColdRequest | None = None
        self._encoding = asyncio.Lock()
        self._encoded: dict[bool, tuple[object, bytes]] = {}
        self._resting_until = 0.0

    def record(self, adapter: AdapterId | None) -> ColdRequest | None:
        """Begin to record a request for an adapter that is not on the device."""
        left = MAX_RECORDINGS - len(self._recorded)
        if adapter is None or left <= 0 or as_ref(adapter) in self._recorded:
            return None
        if not self.is_cold(adapter):
            return None
        if left == 1 and self._names.name_of(adapter) is None:
            return None
        self._recorded.add(as_ref(adapter))
        return ColdRequest(self, self._loader, adapter)

    def is_cold(self, adapter: AdapterId) -> bool:
        """Return whether an adapter is not on the device."""
        story = self._loader.placement().story(adapter)
        return not (story and isinstance(story[-1], Resident))

    def finish(self, request: ColdRequest) -> None:
        """Keep a request that has ended; discard it if it was refused."""
        self._recorded.discard(as_ref(request.adapter))
        if request.outcome == "refused":
            return
        with suppress(LoaderClosedError):  # links and revisions lead to another name
            story = self._loader.placement().story(request.adapter)
            request.names += tuple(name_of(event.key) for event in story[-1:])
        self._count += 1
        request.number = self._count
        self._last = request
        if self._names.name_of(request.adapter) is not None:
            self._last_named = request

    def last(self, *, operator: bool) -> ColdRequest | None:
        """Return the last request that the viewer may see."""
        if operator:
            return self._last
        last = self._last_named  # its name may have been taken back
        return None if last is None or self._names.name_of(last.adapter) is None else last

    async def encoded(self, *, operator: bool) -> bytes | None:
        """Return the last trace in Chrome's format, encoded once in a thread; None without one.

        Only the operator sees all names in it.
        """

        def version() -> tuple[int, tuple[tuple[str, AdapterId], ...] | None]:
            last = self.last(operator=operator)
            names = None if operator else tuple(self._names.adapters.items())
            return last.number if last is not None else 0, names

        async with self._encoding:
            wanted, content = self._encoded.get(operator, (None, None))
            if wanted == version():
                return content
            await asyncio.sleep(max(0.0, self._resting_until - time.monotonic()))
            last = self.last(operator=operator)
            if last is None:
                return None
            wanted = version()  # it may have changed meanwhile
            began = time.monotonic()
            content = await asyncio.to_thread(last.encoded, wanted[1])
            self._resting_until = time.monotonic() + REST_FACTOR * (time.monotonic() - began)
            self._encoded[operator] = wanted, content
            return content


class ColdRequest:
    """A request for an adapter that is not on the device, recorded until its first token."""

    def __init__(self, requests: ColdRequests, loader: AdapterLoader, adapter: AdapterId) -> None:
        self.adapter = adapter
        self.names: tuple[str, ...] = (name_of(as_ref(adapter)),)
        """The trace's names for the adapter: as requested, and as resolved."""
        self.number = 0
        """Counts requests that have ended."""
        self.outcome = ""
        """"first token", or what ended it: an error's class, "cancelled", "no token"."""
        self.seconds = self.ended = 0.0
        """The time until then, and when that was by `time.time`."""
        self._requests = requests
        self._trace = loader.trace(limit=SPAN_LIMIT).start()
        self._began = time.monotonic()
        self._span = loader.tracer.span("requests", None, "request", as_ref(adapter))

    def end(self, outcome: str) -> None:
        """End the recording. Only the first call counts."""
        if not self.outcome:
            self.outcome = outcome
            self.seconds, self.ended = time.monotonic() - self._began, time.time()
            self._span.end(outcome=outcome)
            self._trace.stop()
            self._requests.finish(self)

    def encoded(self, names: Sequence[tuple[str, AdapterId]] | None) -> bytes:
        """Return the trace in Chrome's format; with `names`, no other names are in it.

        Names that several of these adapters have become "another adapter", as all others do.
        """
        if names is None:
            return self._trace.encoded(None)
        mapping: dict[str, str] = {}
        refs: dict[str, Ref] = {}
        for name, adapter in names:
            ref = as_ref(adapter)
            traced = {name_of(ref)}
            if isinstance(ref, AdapterRef):
                with suppress(LoraxError):
                    traced.add(name_of(parse_ref(ref)))  # without its revision
            for traced_name in traced:
                if refs.setdefault(traced_name, ref) == ref:
                    mapping.setdefault(traced_name, name)
                else:
                    mapping[traced_name] = ANOTHER
        own = next(name for name, adapter in names if adapter == self.adapter)
        return self._trace.encoded(mapping | dict.fromkeys(self.names, own))


# -- the page -------------------------------------------------------------------------------------

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

Row = dict[str, Any]
Rows = Mapping[str, Row]


class Dashboard:
    """The page's rows, and the event streams of open pages. On one event loop.

    Clients see adapters that have names; the operator sees all.
    """

    def __init__(self, loader: AdapterLoader, names: ModelNames, cold: ColdRequests) -> None:
        self._loader = loader
        self._names = names
        self._cold = cold
        self._rows: dict[bool, tuple[float, Rows]] = {}
        """By whether they are the operator's: when they are stale, and the rows."""
        self._cold_rows: dict[bool, tuple[float, Row | None]] = {}
        """Likewise for the last cold request."""
        self._open: dict[EventStream, bool] = {}
        """Open streams; the values say whether a stream is the operator's."""
        self._ending = False

    def end(self) -> None:
        """End all streams at their next tick; disconnect clients that do not read the end."""
        if not self._ending:
            self._ending = True
            asyncio.get_running_loop().call_later(
                LAST_SECONDS, lambda: [stream.abort() for stream in self._open]
            )

    @contextmanager
    def admit(self, stream: EventStream, *, operator: bool) -> Iterator[None]:
        """Count the stream as open. Raise `CapacityError`."""
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
        page, silent = dict[str, Any](), 0.0
        while not self._ending:
            changes = self._update(page, operator)
            if changes or silent >= SILENCE:
                await stream.send_event(changes)
                silent = 0.0
            await asyncio.sleep(TICK)
            silent += TICK
        await stream.end()

    def _update(self, page: dict[str, Any], operator: bool) -> dict[str, Any]:
        """Return what has changed since `page` was sent, and add it to that."""
        now: dict[str, Any] = {
            "base": self._names.base,
            "operator": operator,
            "more": max(0, len(self._names.adapters) - MAX_ROWS),  # with names, and not shown
            "cold": self.cold(operator=operator),
        }
        changes = {name: it for name, it in now.items() if name not in page or it != page[name]}
        before, rows = page.get("rows"), self.rows(operator=operator)
        if before is not rows:
            known = before or {}
            changed = {id: row for id, row in rows.items() if known.get(id) != row}
            gone = [id for id in known if id not in rows]
            changes |= {"rows": changed} if changed or before is None else {}
            changes |= {"gone": gone} if gone else {}
        page |= now | {"rows": rows}
        return changes

    def cold(self, *, operator: bool) -> Row | None:
        """Return the last cold request that the viewer may see, as of `FRESH_SECONDS` ago."""
        now = time.monotonic()
        stale, row = self._cold_rows.get(operator, (now, None))
        if now < stale:
            return row
        last = self._cold.last(operator=operator)
        row = None
        if last is not None:
            row = {
                "number": last.number,
                "name": self._names.name_of(last.adapter) or last.names[0],
                "outcome": last.outcome,
                "seconds": last.seconds,
                "ended": last.ended,
            }
        self._cold_rows[operator] = now + FRESH_SECONDS, row
        return row

    def rows(self, *, operator: bool) -> Rows:
        """Return the rows by id; the same object until they are recomputed.

        Ids of named adapters are their names; others begin with a NUL, which no name has.
        """
        began = time.monotonic()
        stale, rows = self._rows.get(operator, (began, {}))
        if began < stale:
            return rows
        placement, rows, known = self._loader.placement(), dict[str, Row](), set[AdapterKey]()
        for name, adapter in tuple(self._names.adapters.items())[:MAX_ROWS]:
            known.update(event.key for event in placement.story(adapter)[-1:])
            rows[name] = _row(placement, adapter, name, named=True)
        for key in placement.nearest(MAX_ROWS) if operator else ():
            if key not in known:
                rows[f"\0{key}"] = _row(placement, key, str(key), named=False)
        now = time.monotonic()
        self._rows[operator] = now + max(FRESH_SECONDS, FRESH_FACTOR * (now - began)), rows
        return rows


def _row(placement: Placement, adapter: AdapterId | AdapterKey, name: str, *, named: bool) -> Row:
    last = next(iter(placement.story(adapter)[-1:]), None)
    error = last.error if isinstance(last, Failed) else None
    # The operator's name replaces an id that may be a path.
    text = None if error is None else shorten(str(error.located(id=name)), ERROR_LENGTH)
    row: Row = {"name": name, "named": named, "error": text}
    where = placement.find(adapter)
    if where is None:
        return row | {"tier": "source", "state": "", "layers": None, "bytes": 0, "leases": 0}
    return row | {
        "tier": where.tier,
        "state": where.state,
        "layers": where.layers,
        "bytes": where.device_bytes or where.host_bytes or where.pinned_bytes,
        "leases": where.leases,
    }
