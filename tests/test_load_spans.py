"""Calls of a loader as spans, kept by OpenTelemetry's own exporter."""

import asyncio
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from event_loops import until
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter as Kept
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import ProxyTracerProvider, StatusCode, Tracer, get_tracer_provider
from scheduler_world import warm
from tiny_loaders import fails
from tiny_sources import make_source, over

from lorax_async import AdapterLoader, errors
from lorax_async.load_spans import LoadSpans

pytestmark = pytest.mark.usefixtures("nothing_left")

ALL = ["resolve", "fetch", "queue", "copy"]


@pytest.fixture
def exporter() -> Kept:
    return Kept()


@pytest.fixture
def tracer(exporter: Kept) -> Iterator[Tracer]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider.get_tracer("tests")
    provider.shutdown()


def calls(exporter: Kept) -> list[tuple[ReadableSpan, list[ReadableSpan]]]:
    """Each call's span with its stages', in the order in which they began."""
    spans = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
    names = ("lorax load", "lorax stream", "lorax pin")
    return [
        (call, [span for span in spans if span.parent and span.parent == call.context])
        for call in spans
        if call.name in names
    ]


def attribute(span: ReadableSpan, name: str) -> object:
    return (span.attributes or {})[f"lorax.{name}"]


def stages(spans: list[ReadableSpan]) -> list[str]:
    return [span.name.removeprefix("lorax ") for span in spans]


async def test_a_call_and_its_stages(tmp_path: Path, exporter: Kept, tracer: Tracer) -> None:
    async with over(make_source(tmp_path, "a", "b"), max_slots=1) as there:
        with LoadSpans(there, tracer):
            await warm(there, *"aaba")
        await warm(there, "b")
    every = cold, again, other, back = calls(exporter)
    assert [call.name for call, _ in every] == ["lorax load"] * 4
    assert stages(cold[1]) == ALL
    assert stages(again[1]) == ["resolve"]
    assert stages(other[1]) == ALL
    assert stages(back[1])[-1] == "copy"
    assert "fetch" not in stages(back[1])
    assert [attribute(call, "found") for call, _ in every] == ["source", "device", "source", "disk"]
    assert [attribute(call, "adapter") for call, _ in (cold, other)] == ["a", "b"]
    for call, parts in every:
        assert call.status.status_code is StatusCode.UNSET
        ends = [(span.start_time or 0, span.end_time or 0) for span in parts]
        assert (call.start_time or 0) <= ends[0][0]
        assert ends[-1][1] <= (call.end_time or 0)
        assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:], strict=False))
    assert [event.name for event in cold[0].events] == ["first layer ready"]


async def test_a_call_is_part_of_what_makes_it(
    tmp_path: Path, exporter: Kept, tracer: Tracer
) -> None:
    source = make_source(tmp_path, "a")

    async def request(there: AdapterLoader, name: str) -> None:
        with tracer.start_as_current_span(name):
            await warm(there, "a")

    async with over(source) as there:
        with LoadSpans(there, tracer):
            source.hold("a")
            both = [asyncio.create_task(request(there, name)) for name in ("one", "two")]
            await until(lambda: there.placement().usage.waiting == 2)
            source.allow("a", 0, 1, 2, 3)
            await asyncio.gather(*both)
    named = [span for span in exporter.get_finished_spans() if span.name in ("one", "two")]
    requests = {span.context.span_id: span.name for span in named if span.context}
    (first, its), (second, others) = calls(exporter)
    parents = {requests[call.parent.span_id] for call in (first, second) if call.parent}
    assert parents == {"one", "two"}
    assert stages(its)[0] == stages(others)[0] == "resolve"
    assert stages(its)[-1] == stages(others)[-1] == "copy"


async def test_errors_are_recorded(tmp_path: Path, exporter: Kept, tracer: Tracer) -> None:
    source = make_source(tmp_path, "a")
    source.fail("open", errors.FetchError("the source is down"), id="a")
    async with over(source) as there:
        with LoadSpans(there, tracer):
            for name, error in (("missing", errors.AdapterNotFoundError), ("a", errors.FetchError)):
                await fails(there.load(name), error)
    (missing, its), (failed, parts) = calls(exporter)
    assert (stages(its), stages(parts)) == (["resolve"], ["resolve", "fetch"])
    for call, last, kind in (
        (missing, its[-1], "AdapterNotFoundError"),
        (failed, parts[-1], "FetchError"),
    ):
        assert attribute(call, "stage") == last.name.removeprefix("lorax ")
        for span in (call, last):
            assert span.status.status_code is StatusCode.ERROR
            (event,) = [event for event in span.events if event.name == "exception"]
            assert (event.attributes or {})["exception.type"] == f"lorax_async.errors.{kind}"
    assert parts[0].status.status_code is StatusCode.UNSET


async def test_streams_pins_and_cancelled_calls(
    tmp_path: Path, exporter: Kept, tracer: Tracer
) -> None:
    source = make_source(tmp_path, "a", "b")
    async with over(source) as there:
        with LoadSpans(there, tracer):
            source.hold("a")
            async with there.stream("a") as handle:
                assert not handle.resident
                source.allow("a", 0, 1, 2, 3)
                await handle.layer_ready(3)
            await there.pin("a")
            source.hold("b")
            waiting = asyncio.create_task(there.load("b"))
            await until(lambda: there.placement().usage.slots.used == 2)
            waiting.cancel()
            await asyncio.wait([waiting])
    (stream, its), (pin, pins), (cancelled, parts) = calls(exporter)
    assert (stream.name, pin.name) == ("lorax stream", "lorax pin")
    assert stages(its) == ALL
    assert stages(pins) == ["resolve"]
    assert stages(parts) == ALL
    assert [event.name for event in cancelled.events] == ["cancelled"]
    assert cancelled.status.status_code is StatusCode.UNSET
    assert all(span.end_time for span in parts)


async def test_a_call_that_is_not_sampled_has_no_span(tmp_path: Path, exporter: Kept) -> None:
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with over(make_source(tmp_path, "a")) as there:
        with LoadSpans(there, provider.get_tracer("tests")):
            await warm(there, "a")
    assert exporter.get_finished_spans() == ()


async def test_one_watches_without_globals(tmp_path: Path, exporter: Kept, tracer: Tracer) -> None:
    async with over(make_source(tmp_path, "a")) as there:
        first = LoadSpans(there, tracer)
        first.close()
        first.close()
        with LoadSpans(there, tracer):
            first.close()
            await warm(there, "a")
        assert len(calls(exporter)) == 1
        await warm(there, "a")
        assert len(calls(exporter)) == 1
        reference = weakref.ref(first)
        del first
        gc.collect()
        assert reference() is None, "the loader holds none that was closed"
    assert isinstance(get_tracer_provider(), ProxyTracerProvider)


class Broken(SpanProcessor):
    """Fails at the beginnings, or at the ends, of spans with this name."""

    def __init__(self, name: str, *, at_end: bool) -> None:
        self.broken = name, at_end

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if self.broken == (span.name, False):
            raise RuntimeError("no room for spans")

    def on_end(self, span: ReadableSpan) -> None:
        if self.broken == (span.name, True):
            raise RuntimeError("no way to export")


@pytest.mark.parametrize("name", ["load", *ALL])
@pytest.mark.parametrize("at_end", [False, True])
async def test_a_broken_tracer_hurts_no_load(
    tmp_path: Path, name: str, at_end: bool, caplog: pytest.LogCaptureFixture
) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Broken(f"lorax {name}", at_end=at_end))
    source = make_source(tmp_path, "a", "b")
    source.fail("open", errors.FetchError("the source is down"), id="b")
    async with over(source, max_slots=1) as there:
        with LoadSpans(there, provider.get_tracer("tests")):
            await warm(there, *"aa")
            await fails(there.load("b"), errors.FetchError, "down")
            assert there.placement().usage.waiting == 0
    assert any(record.exc_info for record in caplog.records)
