"""What operators and clients see of a server: metrics, the page's rows, traces of cold requests."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

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
from lorax_async.server.responses import UNKNOWN, EventStream
from lorax_async.server.server_settings import ModelNames
from lorax_async.tracing import ANOTHER, name_of
from lorax_async.types import AdapterId, AdapterKey, AdapterRef, Ref, as_ref

T = TypeVar("T")

# -- metrics --------------------------------------------------------------------------------------

CALLS = frozenset({
    "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/pin_lora_adapter", "/v1/unpin_lora_adapter", "/v1/adapters",
    "/tokenize", "/detokenize", "/health", "/ping", "/version", "/metrics", "/openapi.json",
    "/", "/page",
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
            f"{prefix}prompt_tokens", "Tokens of computed prompts.", registry=registry
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

    @property
    def token_count(self) -> int:
        """Tokens generated."""
        (family,) = self.tokens.collect()
        return int(family.samples[0].value)

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
        self._uncounted = len(tokens.generation.prompt)
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
            if self.finish is not None:
                self._count_prompt()
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
            self._count_prompt()
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

    def _count_prompt(self) -> None:
        """Count the tokens of the prompt, once, when a result shows that they were computed."""
        self._metrics.prompt_tokens.inc(self._uncounted)
        self._uncounted = 0

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
"""Spans of one trace, and as many of the computing: 10 MB of JSON at most."""

MAX_COLD = 20
"""Cold requests that are kept, and as many whose adapters have names."""

MAX_COLD_SPANS = 65_536
"""Spans of either, of about 600 bytes each with their JSON: 40 MB at most. The oldest go."""

REST_FACTOR = 3
"""After encoding a trace, pause this many times as long: it competes with computing tokens."""

_UNKNOWN = frozenset(kind.__name__ for kind in UNKNOWN)

Names = tuple[tuple[str, AdapterId], ...]


class ColdRequests:
    """Record cold requests while they wait for their first token.

    Keep the last ones that ended, which the operator may see, and the last ones whose adapters had
    names of the operator's, which all may.
    """

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        self._loader = loader
        self._names = names
        self._recorded: set[Ref] = set()
        self._count = 0
        self._ended: deque[ColdRequest] = deque()
        self._named: deque[ColdRequest] = deque()
        self._encoding = asyncio.Lock()
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
        """Keep a request that has ended, but not one that was refused, or for a mistyped name."""
        self._recorded.discard(as_ref(request.adapter))
        is_named = self._names.name_of(request.adapter) is not None
        if request.outcome == "refused" or (request.outcome in _UNKNOWN and not is_named):
            return
        with suppress(LoaderClosedError):  # links and revisions lead to another name
            story = self._loader.placement().story(request.adapter)
            request.names += tuple(name_of(event.key) for event in story[-1:])
        self._count += 1
        request.number = self._count
        for kept in (self._ended, self._named) if is_named else (self._ended,):
            kept.append(request)
            while len(kept) > MAX_COLD or sum(each.spans for each in kept) > MAX_COLD_SPANS:
                kept.popleft()

    def visible(self, *, operator: bool) -> list[ColdRequest]:
        """Return the requests that the viewer may see, the last one first."""
        if operator:
            return [*reversed(self._ended)]
        # A name may have been taken back.
        named = reversed(self._named)
        return [each for each in named if self._names.name_of(each.adapter) is not None]

    async def encoded(self, number: int | None = None, *, operator: bool) -> bytes | None:
        """Return a trace in Chrome's format, of the last request without `number`; None without it.

        It is encoded once, in a thread. Only the operator sees all names in it.
        """
        content = None
        while content is None:
            request = self._find(number, operator=operator)
            if request is None:
                return None
            number = request.number
            names = None if operator else tuple(self._names.adapters.items())
            content = request.compressed(names)
            if content is None:
                await self._encode(request, names)
        return await asyncio.to_thread(zlib.decompress, content)

    def _find(self, number: int | None, *, operator: bool) -> ColdRequest | None:
        visible = self.visible(operator=operator)
        return next((each for each in visible if number is None or each.number == number), None)

    async def _encode(self, request: ColdRequest, names: Names | None) -> None:
        async with self._encoding:
            if request.compressed(names) is not None:
                return
            await asyncio.sleep(max(0.0, self._resting_until - time.monotonic()))
            began = time.monotonic()
            await asyncio.to_thread(request.encode, names)
            self._resting_until = time.monotonic() + REST_FACTOR * (time.monotonic() - began)


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
        self._compressed: dict[bool, tuple[Names | None, bytes]] = {}
        """By whether it is the operator's: the names in it, and the encoded trace."""
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

    @property
    def spans(self) -> int:
        """How many spans its trace has."""
        return self._trace.kept

    def compressed(self, names: Names | None) -> bytes | None:
        """Return what `encode` made for these names."""
        made_for, content = self._compressed.get(names is None, (None, None))
        return content if made_for == names else None

    def encode(self, names: Names | None) -> None:
        """Make the trace in Chrome's format; with `names`, no other names are in it. Blocks.

        Names that several of these adapters have become "another adapter", as all others do.
        """
        called = None if names is None else self._called(names)
        content = zlib.compress(self._trace.encoded(called), level=1)
        self._compressed[names is None] = names, content

    def _called(self, names: Names) -> dict[str, str]:
        """Return the viewer's names by those in the trace."""
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
        return mapping | dict.fromkeys(self.names, own)


# -- the page -------------------------------------------------------------------------------------

MAX_ROWS = 200
"""Maximum of adapters with names; and of others, of which the nearest are shown."""

FRESH_SECONDS = 0.2
"""What is read is shared by all pages for at least this long,"""

FRESH_FACTOR = 20
"""and this many times as long as it took to read: milliseconds for thousands of adapters."""

RATE_SECONDS = 10.0
"""Tokens per second are a mean over this time."""

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


class SharedValue(Generic[T]):
    """What `read` returns, kept until it is stale."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._value: T | None = None
        self._stale = 0.0

    def get(self) -> T:
        """Return the same object until it is read again."""
        began = time.monotonic()
        if self._value is None or began >= self._stale:
            self._value = self._read()
            now = time.monotonic()
            self._stale = now + max(FRESH_SECONDS, FRESH_FACTOR * (now - began))
        return self._value


class Dashboard:
    """The page's rows and numbers, and the event streams of open pages. On one event loop.

    Clients see adapters that have names; the operator sees all.
    """

    def __init__(
        self, loader: AdapterLoader, names: ModelNames, cold: ColdRequests, metrics: ServerMetrics
    ) -> None:
        self._loader = loader
        self._names = names
        self._cold = cold
        self._metrics = metrics
        self._tokens: deque[tuple[float, int]] = deque()
        """Totals of the last `RATE_SECONDS`, with their times."""
        self._numbers = SharedValue(self._read_numbers)
        viewers = (False, True)
        """Whether what is read is for the operator."""
        self._rows = {each: SharedValue(partial(self._read_rows, each)) for each in viewers}
        self._cold_rows = {each: SharedValue(partial(self._read_cold, each)) for each in viewers}
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
            "numbers": self.numbers(),
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

    def cold(self, *, operator: bool) -> Sequence[Row]:
        """Return the cold requests that the viewer may see, the last one first."""
        return self._cold_rows[operator].get()

    def rows(self, *, operator: bool) -> Rows:
        """Return the rows by id; the same object until they are read again.

        Ids of named adapters are their names; others begin with a NUL, which no name has.
        """
        return self._rows[operator].get()

    def numbers(self) -> Row:
        """Return numbers of the whole server, in which no adapter is named."""
        return self._numbers.get()

    def _read_cold(self, operator: bool) -> Sequence[Row]:
        return [
            {
                "number": each.number,
                "name": self._names.name_of(each.adapter) or each.names[0],
                "outcome": each.outcome,
                "seconds": each.seconds,
                "ended": each.ended,
            }
            for each in self._cold.visible(operator=operator)
        ]

    def _read_rows(self, operator: bool) -> Rows:
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
        now, total = time.monotonic(), self._metrics.token_count
        self._tokens.append((now, total))
        while now - self._tokens[0][0] > RATE_SECONDS:
            self._tokens.popleft()
        since, before = self._tokens[0]
        usage, hits = self._loader.placement().usage, self._loader.statistics().hits
        memory = {name: getattr(usage, f"{name}_bytes") for name in ("device", "host", "pinned")}
        return {
            "slots": usage.slots,
            "memory": {name: budget for name, budget in memory.items() if budget.limit},
            "hits": (hits["device"], sum(hits.values())),
            "running": self._metrics.running.total(),
            "waiting": self._metrics.waiting.total(),
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
    return row | {
        "tier": where.tier,
        "state": where.state,
        "layers": where.layers,
        "bytes": where.device_bytes or where.host_bytes or where.pinned_bytes,
        "leases": where.leases,
        "pinned": pinned and where.pins > 0,
    }
