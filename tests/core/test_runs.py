"""Strided spans of a file, against lists of the numbers of their bytes."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from lorax_async.core.runs import Run, Span, merged, portions


def numbers(spans: Iterable[Span]) -> list[int]:
    """By the definition: as many bytes as the first row has, `pitch` further on each."""
    return [
        first + row * span.pitch
        for span in spans
        for row in range(span.rows)
        for first in range(span.start, span.stop)
    ]


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start, nbytes = draw(st.integers(0, 99)), draw(st.integers(1, 12))
    rows = draw(st.integers(1, 9))
    pitch = nbytes + draw(st.integers(0, 9)) if rows > 1 else 0
    return Span(start, start + nbytes, rows, pitch)


@given(spans())
def test_a_span_is_as_many_bytes_as_it_says(span: Span) -> None:
    every = numbers([span])
    assert (span.nbytes, span.start, span.end) == (len(every), every[0], every[-1] + 1)
    assert [n for start, stop in span.ranges() for n in range(start, stop)] == every


@given(spans(), st.data())
def test_a_cut_is_at_most_three_spans(span: Span, data: st.DataObject) -> None:
    """The rest of a row, rows, and the beginning of one."""
    first = data.draw(st.integers(0, span.nbytes))
    last = data.draw(st.integers(first, span.nbytes))
    cut = [each for each in span.cut(first, last) if each.nbytes]
    assert numbers(cut) == numbers([span])[first:last]
    assert len(cut) <= 3
    assert all(each.rows == 1 or each.pitch == span.pitch for each in cut)
    assert all((each.rows == 1) == (each.pitch == 0) for each in cut)


@given(st.lists(spans(), min_size=1, max_size=5), st.integers(1, 60))
def test_portions_are_equal_parts(drawn: list[Span], nbytes: int) -> None:
    runs = [Run("F32", *span[:2], 0, span.nbytes, *span[2:]) for span in drawn]
    found = list(portions(runs, nbytes))
    assert [n for portion in found for n in numbers(portion)] == numbers(drawn)
    assert {len(numbers(portion)) for portion in found[:-1]} <= {nbytes}
    assert 0 < len(numbers(found[-1])) <= nbytes


def test_by_hand() -> None:
    """Three rows of four bytes, ten from one to the next."""
    span = Span(2, 6, 3, 10)
    assert (span.nbytes, span.end) == (12, 26)
    assert list(span.ranges()) == [(2, 6), (12, 16), (22, 26)]
    assert span.cut(0, 12) == [span]
    assert span.cut(1, 11) == [Span(3, 6), Span(12, 16), Span(22, 25)]
    assert span.cut(1, 3) == [Span(3, 5)]
    assert span.cut(4, 12) == [Span(12, 16, 2, 10)]
    assert Span(5, 9).cut(1, 3) == [Span(6, 8)]


def test_what_adjoins_in_one_row_is_merged() -> None:
    strided = Span(30, 34, 2, 8)
    given = [Span(42, 50), Span(4, 9), strided, Span(9, 20), Span(25, 30), Span(50, 51)]
    assert merged(given) == (Span(4, 20), Span(25, 30), strided, Span(42, 51))
