"""GET /metrics: the numbers of the loader and of the server, for Prometheus."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorax_async.loader import AdapterLoader
from lorax_async.observability.prometheus import LoaderCollector
from lorax_async.server.model_names import ModelNames

CALLS = frozenset({
    "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/adapters", "/health", "/metrics", "/", "/page",
})  # fmt: skip
"""Paths with a label of their own; all others, which clients make up, are "other"."""

TEXT = "text/plain; version=0.0.4; charset=utf-8"

GONE = "499"
"""The status of a request whose client left before it had one, as in nginx."""

FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class ServerMetrics:
    """A registry with the loader's numbers and the server's. On one event loop."""

    def __init__(self, loader: AdapterLoader, names: ModelNames) -> None:
        registry = self._registry = CollectorRegistry()
        self._loader = LoaderCollector(loader)
        registry.register(self._loader)
        self.sequences = SequenceGauges(names, loader.config.max_slots)
        registry.register(self.sequences)
        self.requests = Total(
            "lorax_server_requests", "Requests answered.", ["call", "status"], registry=registry
        )
        self.prompt_tokens = Total(
            "lorax_server_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.tokens = Total("lorax_server_tokens", "Tokens generated.", registry=registry)
        self.first = Histogram(
            "lorax_server_first_token_seconds",
            "From a sequence's start in the queue to its first token.",
            registry=registry,
            buckets=FIRST_SECONDS,
        )
        self.between = Histogram(
            "lorax_server_inter_token_seconds",
            "Between two tokens of a sequence.",
            registry=registry,
            buckets=BETWEEN_SECONDS,
        )

    def close(self) -> None:
        """Close the `LoaderCollector`."""
        self._loader.close()

    def observe_sequence(self, model: str, prompt: int) -> SequenceMetrics:
        """Return the observer of a sequence for `model` with a prompt of this many tokens."""
        self.prompt_tokens.inc(prompt)
        return SequenceMetrics(model, self)

    async def show(self, _: Request) -> Response:
        """GET /metrics, always in Prometheus' text format.

        In OpenMetrics, prometheus_client gives vLLM's metric another name.
        """
        return Response(generate_latest(self._registry), headers={"content-type": TEXT})


class SequenceGauges(Collector):
    """Count waiting and running sequences, and list their adapters as vLLM does for routers."""

    def __init__(self, names: ModelNames, max_lora: int) -> None:
        self.waiting: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        self._names = names
        self._max_lora = max_lora

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        name, waiting, running = "lorax_server_sequences", self.waiting, self.running
        text = "Sequences without a token yet."
        yield GaugeMetricFamily(f"{name}_waiting", text, value=waiting.total())
        text = "Sequences that have a token, and no end."
        yield GaugeMetricFamily(f"{name}_running", text, value=running.total())
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with names that requests have now; the value is the time, in seconds.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        labels = [str(self._max_lora), self._adapters(waiting), self._adapters(running)]
        info.add_metric(labels, time.time())
        yield info

    def _adapters(self, models: Counter[str]) -> str:
        """Join the operator's names; ids from requests belong to their clients.

        Omit names with a comma, which would be read as two.
        """
        named = self._names.adapters
        return ",".join(sorted(name for name in models if name in named and "," not in name))


class SequenceMetrics:
    """Observe the tokens of one sequence."""

    def __init__(self, model: str, metrics: ServerMetrics) -> None:
        self._model = model
        self._metrics = metrics
        self._begun = False
        self._since = time.monotonic()
        self._state: Counter[str] | None = None
        self._move(metrics.sequences.waiting)

    def on_token(self) -> None:
        metrics, now = self._metrics, time.monotonic()
        histogram = metrics.between if self._begun else metrics.first
        histogram.observe(now - self._since)
        metrics.tokens.inc()
        if not self._begun and self._state is not None:
            self._move(metrics.sequences.running)
        self._begun, self._since = True, now

    def on_end(self, outcome: str) -> None:
        del outcome
        self._move(None)

    def _move(self, state: Counter[str] | None) -> None:
        before, self._state = self._state, state
        if before is not None:
            before[self._model] -= 1
            if not before[self._model]:
                del before[self._model]
        if state is not None:
            state[self._model] += 1


class RequestCounter:
    """ASGI middleware: count HTTP requests by call and status."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # lifespan, say
            await self._app(scope, receive, send)
            return
        status = GONE

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, record_status)
        except Exception:
            status = "500" if status == GONE else status  # an outer handler answers it
            raise
        finally:
            self._metrics.requests.labels(_call_label(scope), status).inc()


def _call_label(scope: Scope) -> str:
    path = str(scope.get("path", ""))
    if path.startswith("/v1/models/"):
        return "/v1/models"
    if path.startswith("/page/"):
        return "/page"
    return path if path in CALLS else "other"
