"""Spans kept by the exporter of OpenTelemetry, for tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from lorax_async import AdapterLoader

Kept = InMemorySpanExporter


@pytest.fixture
def kept() -> Kept:
    return Kept()


@pytest.fixture
def tracer(kept: Kept) -> Iterator[Tracer]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    yield provider.get_tracer("tests")
    provider.shutdown()


def calls(kept: Kept) -> list[tuple[ReadableSpan, list[ReadableSpan]]]:
    """Each call's span with its stages', in the order in which they began."""
    spans = sorted(kept.get_finished_spans(), key=lambda span: span.start_time or 0)
    names = ("lorax load", "lorax stream", "lorax pin")
    return [
        (call, [span for span in spans if span.parent and span.parent == call.context])
        for call in spans
        if call.name in names
    ]


def stages(spans: list[ReadableSpan]) -> list[str]:
    return [span.name.removeprefix("lorax ") for span in spans]


async def load(there: AdapterLoader, name: str) -> None:
    (await there.load(name)).release()
