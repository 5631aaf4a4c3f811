"""Sets of spans against sets of bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.spans import Span, SpanSet

END = 40
SPAN = st.tuples(st.integers(0, END - 1), st.integers(1, 12)).map(lambda s: (s[0], s[0] + s[1]))
SPANS = st.lists(SPAN, max_size=12)
RANGE = st.tuples(st.integers(0, END + 12), st.integers(0, END + 12)).map(sorted)


def bytes_of(spans: list[Span]) -> set[int]:
    return {byte for start, stop in spans for byte in range(start, stop)}


def runs(model: set[int]) -> list[Span]:
    """The fewest spans of these bytes."""
    starts = sorted(byte for byte in model if byte - 1 not in model)
    stops = sorted(byte + 1 for byte in model if byte + 1 not in model)
    return list(zip(starts, stops, strict=True))


@given(SPANS)
def test_it_is_the_set_of_its_bytes(spans: list[Span]) -> None:
    found, model = SpanSet(), set[int]()
    for start, stop in spans:
        part = found.add(start, stop)
        model |= set(range(start, stop))
        assert list(found) == runs(model)
        assert part in runs(model)
        assert part[0] <= start < stop <= part[1]
    assert found.nbytes == len(model)
    assert found.end == max(model, default=-1) + 1


@given(SPANS, RANGE)
def test_what_is_missing_is_what_is_not_there(spans: list[Span], wanted: list[int]) -> None:
    start, stop = wanted
    found, model = SpanSet(spans), bytes_of(spans)
    gaps = set(range(start, stop)) - model
    assert found.missing(start, stop) == runs(gaps)
    assert found.covers(start, stop) == (not gaps)


@given(SPANS, st.integers(0, END + 12))
def test_it_reaches_to_the_first_byte_that_is_not_there(spans: list[Span], start: int) -> None:
    reach = start
    while reach in bytes_of(spans):
        reach += 1
    assert SpanSet(spans).reach(start) == reach
