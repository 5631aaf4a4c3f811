"""What watches calls may fail: the calls go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from lorax_async import FetchError
from lorax_async.load_spans import LoadSpans
from tiny_sources import over, stocked

pytestmark = pytest.mark.usefixtures("nothing_left")


class Broken(SpanProcessor):
    """Fails at the beginnings, or at the ends, of spans with this name."""

    def __init__(self, name: str, *, at_end: bool) -> None:
        self.name = name
        self.at_end = at_end

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if span.name == self.name and not self.at_end:
            raise RuntimeError("no room for spans")

    def on_end(self, span: ReadableSpan) -> None:
        if span.name == self.name and self.at_end:
            raise RuntimeError("no way to export")


NAMES = ("load", "resolve", "fetch", "queue", "copy")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at_end", [False, True])
async def test_a_broken_tracer_hurts_no_load(
    tmp_path: Path, name: str, at_end: bool, caplog: pytest.LogCaptureFixture
) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Broken(f"lorax {name}", at_end=at_end))
    source = stocked(tmp_path, "a", "b")
    source.fail("open", FetchError("the source is down"), id="b")
    async with over(source, max_slots=1) as there:
        with LoadSpans(there, provider.get_tracer("tests")) as spans:
            for _ in range(2):
                (await there.load("a")).release()
            with pytest.raises(FetchError, match="down"):
                await there.load("b")
            assert not spans._calls
            assert not spans._by_key
            assert there.usage().waiting == 0
    assert any(record.exc_info for record in caplog.records)
