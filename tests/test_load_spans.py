"""Calls of a loader as spans, kept by OpenTelemetry's own exporter."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import ProxyTracerProvider, StatusCode, Tracer, get_tracer_provider

from common import until
from lorax_async import AdapterLoader, AdapterNotFoundError, FetchError, UsageError
from lorax_async.load_spans import LoadSpans
from spans_kept import Kept, calls, kept, load, stages, tracer
from tiny_sources import over, stocked

__all__ = ["kept", "tracer"]

pytestmark = pytest.mark.usefixtures("nothing_left")


async def test_a_call_and_its_stages(tmp_path: Path, kept: Kept, tracer: Tracer) -> None:
    source = stocked(tmp_path, "a", "b")
    async with over(source, max_slots=1) as there:
        with LoadSpans(there, tracer):
            for name in ("a", "a", "b", "a"):
                await load(there, name)
        await load(there, "b")
    cold, warm, other, again = calls(kept)
    assert [call.name for call, _ in (cold, warm, other, again)] == ["lorax load"] * 4
    assert stages(cold[1]) == ["resolve", "fetch", "queue", "copy"]
    assert stages(warm[1]) == ["resolve"]
    assert stages(other[1]) == ["resolve", "fetch", "queue", "copy"]
    assert stages(again[1])[-1] == "copy"
    assert "fetch" not in stages(again[1])
    found = [(call.attributes or {})["lorax.found"] for call, _ in (cold, warm, other, again)]
    assert found == ["source", "device", "source", "disk"]
    assert [(call.attributes or {})["lorax.adapter"] for call, _ in (cold, other)] == ["a", "b"]
    for call, parts in (cold, warm, other, again):
        assert call.status.status_code is StatusCode.UNSET
        ends = [(span.start_time or 0, span.end_time or 0) for span in parts]
        assert (call.start_time or 0) <= ends[0][0]
        assert ends[-1][1] <= (call.end_time or 0)
        assert all(before[1] <= after[0] for before, after in zip(ends, ends[1:], strict=False))
    assert [event.name for event in cold[0].events] == ["first layer ready"]


async def test_a_call_is_part_of_what_makes_it(tmp_path: Path, kept: Kept, tracer: Tracer) -> None:
    """Two callers of one adapter have a span each, below their own requests."""
    source = stocked(tmp_path, "a")

    async def request(there: AdapterLoader, name: str) -> None:
        with tracer.start_as_current_span(name):
            await load(there, "a")

    async with over(source) as there:
        with LoadSpans(there, tracer):
            source.hold("a")
            both = [asyncio.create_task(request(there, name)) for name in ("one", "two")]
            await until(lambda: there.usage().waiting == 2)
            source.allow("a", 0, 1, 2, 3)
            await asyncio.gather(*both)
    named = [span for span in kept.get_finished_spans() if span.name in ("one", "two")]
    requests = {span.context.span_id: span.name for span in named if span.context}
    (first, its), (second, others) = calls(kept)
    assert sorted(requests[call.parent.span_id] for call in (first, second) if call.parent) == [
        "one",
        "two",
    ]
    assert stages(its)[0] == stages(others)[0] == "resolve"
    assert stages(its)[-1] == stages(others)[-1] == "copy"


async def test_errors_are_recorded(tmp_path: Path, kept: Kept, tracer: Tracer) -> None:
    source = stocked(tmp_path, "a")
    source.fail("open", FetchError("the source is down"), id="a")
    async with over(source) as there:
        with LoadSpans(there, tracer):
            for name, error in (("missing", AdapterNotFoundError), ("a", FetchError)):
                with pytest.raises(error):
                    await there.load(name)
    (missing, its), (failed, parts) = calls(kept)
    assert (stages(its), stages(parts)) == (["resolve"], ["resolve", "fetch"])
    for call, last, kind, stage in (
        (missing, its[-1], "AdapterNotFoundError", "resolve"),
        (failed, parts[-1], "FetchError", "fetch"),
    ):
        assert (call.attributes or {})["lorax.stage"] == stage
        for span in (call, last):
            assert span.status.status_code is StatusCode.ERROR
            (event,) = [event for event in span.events if event.name == "exception"]
            assert (event.attributes or {})["exception.type"] == f"lorax_async.errors.{kind}"
    assert parts[0].status.status_code is StatusCode.UNSET


async def test_streams_pins_and_cancelled_calls(tmp_path: Path, kept: Kept, tracer: Tracer) -> None:
    source = stocked(tmp_path, "a", "b")
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
            await until(lambda: there.usage().slots.used == 2)
            waiting.cancel()
            await asyncio.wait([waiting])
    (stream, its), (pin, pins), (cancelled, parts) = calls(kept)
    assert (stream.name, pin.name) == ("lorax stream", "lorax pin")
    assert stages(its) == ["resolve", "fetch", "queue", "copy"]
    assert stages(pins) == ["resolve"]
    assert stages(parts) == ["resolve", "fetch", "queue", "copy"]
    assert [event.name for event in cancelled.events] == ["cancelled"]
    assert cancelled.status.status_code is StatusCode.UNSET
    assert all(span.end_time for span in parts)


async def test_what_is_not_sampled_costs_no_more(tmp_path: Path) -> None:
    kept = Kept()
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        with LoadSpans(there, provider.get_tracer("tests")) as spans:
            source.hold("a")
            waiting = asyncio.create_task(load(there, "a"))
            await until(lambda: there.usage().waiting)
            assert not spans._calls
            source.allow("a", 0, 1, 2, 3)
            await waiting
    assert kept.get_finished_spans() == ()


async def test_one_watches_and_nobody_elses_globals_are_touched(
    tmp_path: Path, tracer: Tracer
) -> None:
    source = stocked(tmp_path, "a")
    async with over(source) as there:
        first = LoadSpans(there, tracer)
        with pytest.raises(UsageError, match="watched already"):
            LoadSpans(there, tracer)
        first.close()
        first.close()
        with LoadSpans(there, tracer) as second:
            first.close()
            await load(there, "a")
            assert not second._calls
    assert isinstance(get_tracer_provider(), ProxyTracerProvider)


async def test_nobody_is_told_of_after_the_end(tmp_path: Path, tracer: Tracer) -> None:
    async with over(stocked(tmp_path, "a")) as there:
        journal = there._machinery.driver.journal
        with LoadSpans(there, tracer) as spans:
            assert journal.has_subscribers
            await load(there, "a")
            with pytest.raises(AdapterNotFoundError):
                await there.load("missing")
            assert not spans._calls
        assert not journal.has_subscribers
