"""Traces of many spans: a picture of one stays small, and no call of json takes all of it at once."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from lorax_async.tracing.picture import Picture, picture_of
from lorax_async.tracing.recorder import Tracer, now
from lorax_async.tracing.svg import LEFT, WIDTH, as_svg
from lorax_async.tracing.trace import Trace

RECT = "{http://www.w3.org/2000/svg}rect"
PIXELS = WIDTH - LEFT - 8


def of_spans(*spans: tuple[float, float]) -> Picture:
    """Of so many milliseconds from such, in one lane; as long as there are pixels."""
    events = [
        {"ph": "X", "pid": 1, "tid": 1, "name": "x", "ts": start * 1e3, "dur": length * 1e3}
        for start, length in spans
    ]
    return picture_of(events, 0.0, float(PIXELS))


def drawn(picture: Picture) -> list[float]:
    """The left edges of all boxes, in pixels from the first millisecond."""
    rects = [
        each for each in ET.fromstring(as_svg(picture)).iter(RECT) if "class" not in each.attrib
    ]
    return [float(each.attrib["x"]) - LEFT for each in rects]


def test_of_those_in_one_pixel_one_is_drawn() -> None:
    """What is wider, lies inside of another, or in another pixel, is drawn too."""
    narrow = of_spans((10.0, 0.2), (10.3, 0.2), (10.6, 0.2), (11.1, 0.2), (300.0, 0.5))
    assert drawn(narrow) == pytest.approx([10.0, 11.1, 300.0])
    wide = of_spans((10.0, 0.2), (10.3, 5.0), (15.4, 5.0))
    assert drawn(wide) == pytest.approx([10.0, 10.3, 15.4])
    inside = of_spans((10.0, 0.9), (10.1, 0.3), (10.5, 0.2))
    assert drawn(inside) == pytest.approx([10.0, 10.1])


def test_a_picture_of_thousands_stays_small() -> None:
    spans = [(n * PIXELS / 50_000, PIXELS / 60_000) for n in range(50_000)]
    picture = of_spans(*spans)
    assert len(picture.lanes[0].boxes) == len(spans), "what is said of it counts all"
    assert len(drawn(picture)) == pytest.approx(PIXELS, abs=1)
    assert len(as_svg(picture)) < 300_000


def test_a_trace_is_written_event_by_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of json holds the GIL from its beginning to its end."""
    longest = 0
    dumps = json.dumps

    def watched(value: Any, **settings: Any) -> str:
        nonlocal longest
        text = dumps(value, **settings)
        longest = max(longest, len(text))
        return text

    with Trace(Tracer(), 5_000, dict) as trace:
        recorder = trace._tracer.on
        assert recorder is not None
        for _ in range(5_000):
            recorder.add("files", "x", "fetch", now(), now())
    monkeypatch.setattr(json, "dumps", watched)
    assert len(trace.encoded()) > 400_000
    assert 0 < longest < 1_000
