"""The server's numbers for Prometheus, and the tokens of sequences as they are counted."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from itertools import islice

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lorax_async.errors import class_name
from lorax_async.loader import AdapterLoader
from lorax_async.metrics import LoaderCollector
from lorax_async.server.engine import Finish, TokenStream
from lorax_async.server.server_settings import ModelNames

CALLS = frozenset({
    "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/pin_lora_adapter", "/v1/unpin_lora_adapter", "/v1/adapters",
    "/tokenize", "/detokenize", "/health", "/ping", "/version", "/metrics", "/openapi.json",
    "/", "/page",
})  # fmt: skip
"""Paths with a label of their own; all others, which clients make up, are "other"."""

TEXT_FORMAT = "text/plain; version=0.0.4; charset=utf-8"
"""The media type of Prometheus' text format."""

MAX_TIERS = 200
"""Named adapters whose tier is reported, at most."""

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
        self.on_change: Callable[[], None] = lambda: None
        """Called when sequences, tokens, or what OpenAI's and the operator's calls say change."""
        registry = self._registry = CollectorRegistry()
        registry.register(self._loader)
        registry.register(self)

        def total(name: str, text: str, *labels: str) -> Total:
            return Total(f"lorax_server_{name}", text, labels, registry=registry)

        def seconds(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            if not name.startswith("vllm:"):
                return Histogram(f"lorax_server_{name}", text, buckets=buckets, registry=registry)
            labels = ["model_name"]  # as routers read it
            histogram = Histogram(name, text, labels, buckets=buckets, registry=registry)
            return histogram.labels(names.base)

        for name, text, models in (
            ("waiting", "Sequences without a token yet.", self.waiting),
            ("running", "Sequences that have a token, and no end.", self.running),
        ):
            gauge = Gauge(f"lorax_server_sequences_{name}", text, registry=registry)
            gauge.set_function(models.total)
        self.requests = total("requests", "Requests answered.", "call", "status")
        self.prompt_tokens = total("prompt_tokens", "Tokens of computed prompts.")
        self.tokens = total("tokens", "Tokens generated.")
        since = "From a sequence's start in the queue to its"
        self.first = seconds("first_token_seconds", f"{since} first token.", FIRST_SECONDS)
        between = "Between two tokens of a sequence."
        self.between = seconds("inter_token_seconds", between, BETWEEN_SECONDS)
        queued = "vllm:request_queue_time_seconds"
        self.queued = seconds(queued, f"{since} first step.", FIRST_SECONDS)
        text = f"{since} end, of those that had a token."
        self.whole = seconds("vllm:e2e_request_latency_seconds", text, WHOLE_SECONDS)

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
        if path.startswith("/v1/"):
            self.on_change()
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
        text = (
            f"1 for each of the first {MAX_TIERS} named adapters on the device or in host memory."
        )
        family = GaugeMetricFamily("lorax_adapter_tier", text, labels=["adapter", "tier"])
        placement = self._placement()
        for name, adapter in islice(self._names.adapters.items(), MAX_TIERS):
            where = placement.find(adapter)
            if where is not None and where.tier in {"device", "host"}:
                family.add_metric([name, where.tier], 1)
        yield family


def merge_replicas(texts: Mapping[str, bytes]) -> bytes:
    """Return the numbers of several servers as one text, with a label `replica`.

    `texts` are what `ServerMetrics.encode` returned, by the names of the servers.
    """
    merged: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            metric = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                metric.add_sample(sample.name, {"replica": replica} | sample.labels, sample.value)
    registry = CollectorRegistry()
    registry.register(_Collected(merged.values()))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


class ObservedTokens:
    """Pass the tokens of one sequence on; count and time them, and report how it went.

    `on_outcome` is called with "first token", or with what ended it: an error's class, "cancelled"
    or "no token". Only the first call counts.
    """

    def __init__(
        self,
        tokens: TokenStream,
        model: str,
        metrics: ServerMetrics,
        on_outcome: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.count = 0
        """Tokens passed on."""
        self.first_seconds: float | None = None
        """From its start in the queue to its first token."""
        self._tokens = tokens
        self._iterator = aiter(tokens)
        self._model = model
        self._metrics = metrics
        self._on_outcome = on_outcome
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
        except BaseException as error:
            is_end = isinstance(error, StopAsyncIteration)
            if is_end and self.finish is not None:
                self._count_prompt()
            name = "cancelled" if isinstance(error, asyncio.CancelledError) else class_name(error)
            self._end("no token" if is_end else name)
            raise
        metrics, before, self._since = self._metrics, self._since, time.monotonic()
        metrics.tokens.inc()
        metrics.on_change()
        self.count += 1
        seconds = self._since - before
        if self.count > 1:
            metrics.between.observe(seconds)
            return token
        self.first_seconds = seconds
        metrics.first.observe(seconds)
        self._count_prompt()
        if self.queue_seconds is not None:
            metrics.queued.observe(self.queue_seconds)
        if self._state is not None:
            self._move(metrics.running)
        self._on_outcome("first token")
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
        self._on_outcome(outcome)

    def _move(self, state: Counter[str] | None) -> None:
        before, self._state = self._state, state
        self._metrics.on_change()
        if before is not None:
            before[self._model] -= 1
            if not before[self._model]:
                del before[self._model]
        if state is not None:
            state[self._model] += 1
