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
from lorax_async.metrics import LoaderCollector
from lorax_async.server.calls.names import Names
from lorax_async.server.generation import Tokens, TokensInFront

CALLS = frozenset({
    "/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/v1/adapters", "/health", "/metrics", "/", "/page",
})  # fmt: skip
"""Told apart in metrics; all others, which strangers make up, are "other"."""

TEXT = "text/plain; version=0.0.4; charset=utf-8"

GONE = "499"
"""The status of a request whose client left before it had one, as nginx counts them."""

FIRST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BETWEEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class ServerMetrics:
    """A registry of its own, with the loader's numbers and the server's. On one event loop."""

    def __init__(self, loader: AdapterLoader, names: Names) -> None:
        registry = self._registry = CollectorRegistry()
        self._loader = LoaderCollector(loader)
        registry.register(self._loader)
        self.sequences = Sequences(names, loader.config.max_slots)
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
        """As of `LoaderCollector`."""
        self._loader.close()

    def measured(self, tokens: Tokens, model: str, prompt: int) -> MeasuredTokens:
        """The same tokens, counted; of a sequence for `model` whose prompt has so many."""
        self.prompt_tokens.inc(prompt)
        return MeasuredTokens(tokens, model, self)

    async def show(self, _: Request) -> Response:
        """GET /metrics, in Prometheus' text form, whatever else the client understands.

        In that of OpenMetrics, prometheus_client calls vLLM's metric by another name.
        """
        return Response(generate_latest(self._registry), headers={"content-type": TEXT})


class Sequences(Collector):
    """Which sequences wait and run now; also as vLLM tells routers which adapters do."""

    def __init__(self, names: Names, max_lora: int) -> None:
        self.waiting: Counter[str] = Counter()
        self.running: Counter[str] = Counter()
        self._names = names
        self._max_lora = max_lora

    def describe(self) -> Iterable[Metric]:
        return self.collect()

    def collect(self) -> Iterable[Metric]:
        for name, text, models in (
            ("waiting", "Sequences without a token yet.", self.waiting),
            ("running", "Sequences that have a token, and no end.", self.running),
        ):
            yield GaugeMetricFamily(f"lorax_server_sequences_{name}", text, value=models.total())
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters with names that requests have now; the value is the time, in seconds.",
            labels=["max_lora", "waiting_lora_adapters", "running_lora_adapters"],
        )
        lists = (self._adapters(self.waiting), self._adapters(self.running))
        info.add_metric([str(self._max_lora), *lists], time.time())
        yield info

    def _adapters(self, models: Counter[str]) -> str:
        """Ids that requests brought are not told: they are their clients'.

        Nor is a name with a comma, which would be read as two others.
        """
        named = self._names.adapters
        return ",".join(sorted(name for name in models if name in named and "," not in name))


class MeasuredTokens(TokensInFront):
    """The `Tokens` of one sequence; tells when each one came."""

    def __init__(self, tokens: Tokens, model: str, metrics: ServerMetrics) -> None:
        super().__init__(tokens)
        self._model = model
        self._metrics = metrics
        self._begun = False
        self._since = time.monotonic()
        self._in: Counter[str] | None = None
        self._move(metrics.sequences.waiting)

    def cancel(self) -> None:
        self._move(None)
        self._tokens.cancel()

    async def __anext__(self) -> int:
        try:
            token = await super().__anext__()
        except BaseException:
            self._move(None)
            raise
        self._note()
        return token

    def _note(self) -> None:
        """One more token."""
        metrics, now = self._metrics, time.monotonic()
        histogram = metrics.between if self._begun else metrics.first
        histogram.observe(now - self._since)
        metrics.tokens.inc()
        if not self._begun and self._in is not None:
            self._move(metrics.sequences.running)
        self._begun, self._since = True, now

    def _move(self, models: Counter[str] | None) -> None:
        before, self._in = self._in, models
        if before is not None:
            before[self._model] -= 1
            if not before[self._model]:
                del before[self._model]
        if models is not None:
            models[self._model] += 1


class CountedRequests:
    """ASGI middleware: each request over HTTP by its call and the status it got."""

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the server's own beginning and end, say
            await self._app(scope, receive, send)
            return
        status = GONE

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception:
            status = "500" if status == GONE else status  # it is answered behind this
            raise
        finally:
            self._metrics.requests.labels(_call_of(scope), status).inc()


def _call_of(scope: Scope) -> str:
    path = str(scope.get("path", ""))
    if path.startswith("/v1/models/"):
        return "/v1/models"
    if path.startswith("/page/"):
        return "/page"
    return path if path in CALLS else "other"
