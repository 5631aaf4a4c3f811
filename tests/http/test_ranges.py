"""Plans of ranges: every byte once, in order, balanced; and what a measured link makes of them."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_async.errors import InternalError
from lorax_async.formats.spans import ByteRange, SpanSet
from lorax_async.http.link_model import LinkEstimate
from lorax_async.http.ranges import GroupArrivals, PieceSizes, RangePlan, split_of


def adapter(layers: int = 32, layer: int = 2_621_440) -> list[list[ByteRange]]:
    """Groups −1 … layers of a file as PEFT writes it: by name, nothing before them or after."""
    places = {n: 50_000 + layer * place for place, n in enumerate(sorted(range(layers), key=str))}
    return [[], *([(places[n], places[n] + layer)] for n in range(layers)), []]


@st.composite
def grouped(draw: st.DrawFn) -> list[list[ByteRange]]:
    """Spans that share no byte, some adjoining, dealt to groups."""
    lengths = draw(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5_000)), max_size=30))
    groups: list[list[ByteRange]] = [[] for _ in range(draw(st.integers(1, 8)))]
    at = 0
    for gap, length in lengths:
        start = at + gap * draw(st.integers(0, 1))
        at = start + length
        draw(st.sampled_from(groups)).append((start, at))
    return groups


def bytes_of(spans: list[ByteRange]) -> list[int]:
    return sorted(n for start, stop in spans for n in range(start, stop))


delays = st.sampled_from([0.0, 0.0001, 0.01, 1.0])
rates = st.sampled_from([1e3, 1e6, 1e9])
links = st.one_of(
    st.builds(LinkEstimate, delays),
    st.builds(LinkEstimate, delays, st.integers(1, 64), rates, rates, st.booleans()),
)
piece_sizes = st.builds(PieceSizes, st.sampled_from([1, 64, 900]), st.sampled_from([1_000, 7_777]))


@settings(max_examples=200, deadline=None)
@given(
    groups=grouped(), first=st.integers(0, 3), sizes=piece_sizes, most=st.integers(1, 20),
    data=st.data(),
)  # fmt: skip
def test_every_byte_is_requested_once_whatever_the_link_does(
    groups: list[list[ByteRange]], first: int, sizes: PieceSizes, most: int, data: st.DataObject
) -> None:
    """Pieces end in any order; no more connections than allowed, earlier groups not later."""
    plan = RangePlan(groups, min(first, len(groups)), sizes)
    running: list[ByteRange] = []
    pieces: list[ByteRange] = []
    while plan.left or running:
        link = data.draw(links)
        flight = sum(stop - start for start, stop in running)
        piece = plan.take(link, most, len(running), flight)
        if piece is None:
            assert running, "somebody must go on"
            running.pop(data.draw(st.integers(0, len(running) - 1)))
            continue
        assert len(running) < plan.pace(link, most).connections <= most
        assert 0 < piece[1] - piece[0] <= sizes.most
        running.append(piece)
        pieces.append(piece)
    assert bytes_of(pieces) == bytes_of([span for group in groups for span in group])
    assert plan.take(LinkEstimate(0.0), most, 0, 0) is None


@given(grouped(), st.integers(0, 9))
def test_all_that_is_left_can_be_taken(groups: list[list[ByteRange]], count: int) -> None:
    plan = RangePlan(groups, 1, PieceSizes(64, 1_000))
    taken = [plan.take(LinkEstimate(0.0), 99, 0, 0) for _ in range(count)]
    pieces = [piece for piece in taken if piece is not None] + plan.take_all()
    assert bytes_of(pieces) == bytes_of([span for group in groups for span in group])
    assert not plan.left


OWN = LinkEstimate(0.010, 16, 20e6, 320e6, is_compared=True)
SHARED = LinkEstimate(0.010, 1, 125e6, 125e6, is_compared=True)


def requests(link: LinkEstimate, connections: int = 16) -> list[ByteRange]:
    """What is requested at first, while nothing comes, of 32 layers of 2.6 MB."""
    plan = RangePlan(adapter(), 2, PieceSizes())
    found: list[ByteRange] = []
    while (piece := plan.take(link, connections, len(found), 0)) is not None:
        found.append(piece)
    return found


def test_connections_of_their_own_rate_all_begin_with_the_first_layer() -> None:
    found = requests(OWN)
    assert len(found) == 16
    assert found[0][0] == 50_000
    assert found[-1][1] == 50_000 + 2_621_440
    assert max(b - a for a, b in found) - min(b - a for a, b in found) <= 16


def test_a_shared_link_has_little_in_flight_and_few_connections() -> None:
    """Two delays of 125 MB/s are 2.5 MB, of 84."""
    found = requests(SHARED)
    assert 3 <= len(found) <= 4
    assert 1.25e6 < sum(stop - start for start, stop in found) < 5e6
    lengths = [stop - start for start, stop in found]
    assert lengths == sorted(lengths), "they do not end together"


def test_little_is_requested_of_an_origin_that_is_not_known() -> None:
    found = requests(LinkEstimate(0.010))
    assert len(found) == 4
    assert sum(stop - start for start, stop in found) < 0.05 * 84e6


def test_a_long_delay_is_not_paid_twice_for_a_small_file() -> None:
    """3 MB at 20 MB/s are 15 delays in order, and less than one on 16 connections."""
    plan = RangePlan(adapter(24, 125_000), 2, PieceSizes())
    link = LinkEstimate(0.010, 2, 20e6, 40e6)
    found = [plan.take(link, 16, n, 0) for n in range(16)]
    assert None not in found
    assert not plan.left


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 10_000_000),
    own=st.floats(1.0, 1e8),
    others=st.floats(1e3, 1e9),
    delay=st.floats(0.0001, 1.0),
)
def test_a_split_ends_earlier_for_both(
    length: int, own: float, others: float, delay: float
) -> None:
    assert split_of((0, 300_000), 9e6, 20e6, 0.010, 65_536) is None, "it is nearly done"
    assert split_of((0, 100), 1.0, 20e6, 0.010, 65_536) is None
    assert split_of((0, 1 << 30), 10e6, 20e6, 0.010, 65_536) is None, "it is not that slow"
    cut = split_of((100, 100 + length), own, others, delay, 64)
    if cut is None:
        return
    assert own < others / 2
    assert 100 < cut < 100 + length
    straggler = (cut - 100) / own
    newcomer = delay + (100 + length - cut) / others
    grain = 1 / own + 1 / others
    assert straggler == pytest.approx(newcomer, abs=2 * grain)
    assert max(straggler, newcomer) <= length / own - 2 * delay + 2 * grain


spans = st.lists(st.tuples(st.integers(0, 39), st.integers(1, 12)), max_size=12)


def runs(model: set[int]) -> list[ByteRange]:
    """The fewest spans of these bytes."""
    starts = sorted(byte for byte in model if byte - 1 not in model)
    stops = sorted(byte + 1 for byte in model if byte + 1 not in model)
    return list(zip(starts, stops, strict=True))


@given(spans, st.tuples(st.integers(0, 52), st.integers(0, 52)).map(sorted))
def test_a_span_set_is_the_set_of_its_bytes(
    given_spans: list[tuple[int, int]], wanted: list[int]
) -> None:
    found, model = SpanSet(), set[int]()
    for start, length in given_spans:
        part = found.add(start, start + length)
        model |= set(range(start, start + length))
        assert list(found) == runs(model)
        assert part in runs(model)
        assert part[0] <= start < start + length <= part[1]
    assert (found.nbytes, found.end) == (len(model), max(model, default=-1) + 1)
    start, stop = wanted
    gaps = set(range(start, stop)) - model
    assert found.missing(start, stop) == runs(gaps)
    assert found.covers(start, stop) == (not gaps)
    assert found.reach(start) == min(set(range(start, 99)) - model)


@settings(max_examples=200, deadline=None)
@given(owners=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 1 << 16))
def test_groups_arrive_once_they_are_whole(owners: list[int], seed: int) -> None:
    """Byte n belongs to group owners[n]; they land in runs, in any order."""
    groups = [[(n, n + 1) for n, owner in enumerate(owners) if owner == g] for g in range(5)]
    arrivals = GroupArrivals(groups)
    draw = random.Random(seed)
    cuts = sorted({0, len(owners), *(draw.randrange(len(owners)) for _ in range(6))})
    pieces = list(pairwise(cuts))
    draw.shuffle(pieces)
    here: set[int] = set()
    told = [n for n, group in enumerate(groups) if not group]
    assert not arrivals.landed((len(owners), 99)), "bytes of no group count for none"
    for start, stop in pieces:
        told += arrivals.landed((start, stop))
        here |= set(range(start, stop))
        whole = [n for n, group in enumerate(groups) if all(byte in here for byte, _ in group)]
        assert sorted(told) == whole
    with pytest.raises(InternalError, match="arrived twice"):
        arrivals.landed(pieces[0])
