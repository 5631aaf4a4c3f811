"""Plans of ranges: every byte once, in order, balanced; and what a measured link makes of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_async.core.ranges import (
    Link,
    PieceSizes,
    overlaps,
    plan_waves,
    size_of,
    split_of,
    without,
)
from lorax_async.core.spans import Span

LAYER = 2_621_440
THROTTLED = Link(delay=0.010, rate=20e6)


def file_order(layers: int) -> list[int]:
    """Where PEFT puts layers: sorted by name."""
    return sorted(range(layers), key=str)


def adapter(layers: int = 32, layer: int = LAYER, header: int = 50_000) -> list[list[Span]]:
    """Groups −1 … layers of a file as PEFT writes it: nothing before the layers or after them."""
    places = {n: header + layer * place for place, n in enumerate(file_order(layers))}
    return [[], *([(places[n], places[n] + layer)] for n in range(layers)), []]


@st.composite
def grouped(draw: st.DrawFn) -> list[list[Span]]:
    """Spans that share no byte, some adjoining, dealt to groups."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5_000)), max_size=30))
    groups: list[list[Span]] = [[] for _ in range(draw(st.integers(1, 8)))]
    at = 0
    for gap, length in lengths:
        start = at + gap * draw(st.integers(0, 1))
        at = start + length
        draw(st.sampled_from(groups)).append((start, at))
    return groups


def bytes_of(spans: list[Span]) -> list[int]:
    return sorted(n for start, stop in spans for n in range(start, stop))


links = st.builds(Link, st.sampled_from([0.0, 0.0001, 0.01, 1.0]), st.sampled_from([1e3, 1e6, 1e9]))
piece_sizes = st.builds(PieceSizes, st.sampled_from([1, 64, 900]), st.sampled_from([1_000, 7_777]))


@settings(max_examples=300, deadline=None)
@given(
    groups=grouped(),
    first=st.integers(0, 3),
    connections=st.integers(1, 20),
    link=links,
    sizes=piece_sizes,
)
def test_every_byte_once_and_earlier_groups_first(
    groups: list[list[Span]], first: int, connections: int, link: Link, sizes: PieceSizes
) -> None:
    first = min(first, len(groups))
    waves = plan_waves(groups, first=first, connections=connections, link=link, sizes=sizes)
    pieces = [piece for wave in waves for piece in wave]
    assert bytes_of(pieces) == bytes_of([span for group in groups for span in group])
    assert all(0 < stop - start <= sizes.most for start, stop in pieces)
    assert all(list(wave) == sorted(wave) for wave in waves)
    for group in groups:
        touched = {n for n, wave in enumerate(waves) for span in group if overlaps(wave, span)}
        assert len(touched) <= 1, "a group is in one wave"
    order = [
        next(n for n, wave in enumerate(waves) if overlaps(wave, group[0]))
        for group in groups
        if group
    ]
    assert order == sorted(order)


@settings(max_examples=200, deadline=None)
@given(
    nbytes=st.integers(1, 100_000),
    connections=st.integers(1, 20),
    sizes=piece_sizes,
)
def test_one_span_is_cut_evenly(nbytes: int, connections: int, sizes: PieceSizes) -> None:
    (wave,) = plan_waves(
        [[(7, 7 + nbytes)]], first=0, connections=connections, link=THROTTLED, sizes=sizes
    )
    lengths = [stop - start for start, stop in wave]
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= min(sizes.least, nbytes, sizes.most // 2)
    if nbytes >= connections * sizes.least:
        assert len(wave) % connections == 0 or min(lengths) < 2 * sizes.least


@settings(max_examples=200, deadline=None)
@given(groups=grouped(), connections=st.integers(1, 8))
def test_no_piece_is_much_larger_than_its_part(groups: list[list[Span]], connections: int) -> None:
    sizes = PieceSizes(least=64, most=1 << 30)
    total = size_of(span for group in groups for span in group)
    for wave in plan_waves(groups, first=0, connections=connections, link=THROTTLED, sizes=sizes):
        parts = max(1, min(connections, total // sizes.least))
        assert max(stop - start for start, stop in wave) <= total // parts + 1 + 2 * sizes.least


def test_the_first_layer_over_all_connections_then_the_rest() -> None:
    """The design's measured plan: 84 MB, 16 connections of 20 MB/s, 10 ms."""
    groups = adapter()
    first, rest = plan_waves(groups, first=2, connections=16, link=THROTTLED)
    assert (len(first), len(rest)) == (16, 16)
    assert (first[0][0], first[-1][1]) == groups[1][0]
    assert {stop - start for start, stop in first} == {LAYER // 16}
    assert (rest[0][0], rest[-1][1]) == (50_000 + LAYER, 50_000 + 32 * LAYER)
    assert {stop - start for start, stop in rest} == {31 * LAYER // 16}


def test_nobody_waits_so_it_is_one_wave() -> None:
    (wave,) = plan_waves(adapter(), first=0, connections=16, link=THROTTLED)
    assert len(wave) == 16


def test_a_slow_link_brings_layers_in_order() -> None:
    """2.6 s for all of it: 5 % of that are 13 delays."""
    waves = plan_waves(adapter(), first=2, connections=16, link=Link(0.010, 2e6))
    assert len(waves) == 14
    assert max(len(wave) for wave in waves) <= 16 + 4, "and hardly a request more than needed"


def test_a_long_delay_is_not_paid_twice() -> None:
    assert len(plan_waves(adapter(), first=2, connections=16, link=Link(0.2, 20e6))) == 1


def test_a_small_adapter_is_not_shredded() -> None:
    """1 MB on 16 connections: no piece below 64 KiB but for what is smaller by itself."""
    waves = plan_waves(adapter(8, 131_072), first=2, connections=16, link=Link(0.0001, 1e6))
    assert min(stop - start for wave in waves for start, stop in wave) == 65_536


def test_large_files_are_cut_into_rounds() -> None:
    (wave,) = plan_waves([[(0, 1 << 30)]], first=0, connections=16, link=THROTTLED)
    assert [stop - start for start, stop in wave] == [32 << 20] * 32


def test_nothing_to_fetch() -> None:
    assert plan_waves([[], []], first=1, connections=4, link=THROTTLED) == ()
    assert plan_waves([], first=0, connections=4, link=THROTTLED) == ()


@settings(max_examples=200, deadline=None)
@given(groups=grouped(), have=st.lists(st.tuples(st.integers(0, 9_000), st.integers(0, 3_000))))
def test_what_is_missing(groups: list[list[Span]], have: list[tuple[int, int]]) -> None:
    spans = [span for group in groups for span in group]
    here = [(start, start + length) for start, length in have]
    left = without(spans, here)
    assert set(bytes_of(list(left))) == set(bytes_of(spans)) - set(bytes_of(here))
    assert all(a[1] < b[0] for a, b in pairwise(left))


def test_overlaps_by_hand() -> None:
    assert overlaps([(30, 40), (0, 10)], (5, 35)) == ((5, 10), (30, 35))
    assert overlaps([(0, 10)], (10, 20)) == ()


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 10_000_000),
    own=st.floats(1.0, 1e8),
    link=st.builds(Link, st.floats(0.0001, 1.0), st.floats(1e3, 1e9)),
)
def test_a_split_ends_earlier_for_both(length: int, own: float, link: Link) -> None:
    cut = split_of((100, 100 + length), own, link, 64)
    if cut is None:
        return
    assert 100 < cut < 100 + length
    straggler = (cut - 100) / own
    newcomer = link.delay + (100 + length - cut) / link.rate
    grain = 1 / own + 1 / link.rate
    assert straggler == pytest.approx(newcomer, abs=2 * grain)
    assert max(straggler, newcomer) <= length / own - 2 * link.delay + 2 * grain


def test_a_straggler_of_a_tenth_of_the_speed_gives_most_away() -> None:
    """10 MB left at 2 MB/s, the newcomer does 20 MB/s after 10 ms: x / 20 + 10 ms = (10 − x) / 2."""
    cut = split_of((0, 10_000_000), 2e6, THROTTLED, 65_536)
    assert cut == pytest.approx(10_000_000 - 20 * (10 / 2 - 0.01) / (1 + 10) * 1e6, abs=2)


def test_what_is_nearly_done_is_left_alone() -> None:
    assert split_of((0, 300_000), 20e6, THROTTLED, 65_536) is None
    assert split_of((0, 100), 1.0, THROTTLED, 65_536) is None
