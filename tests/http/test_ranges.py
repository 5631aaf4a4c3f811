"""Plans of ranges: every byte once, in order, balanced; and what a measured link makes of them."""

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_async.errors import InternalError
from lorax_async.formats.spans import ByteRange, SpanSet
from lorax_async.http.ranges import GroupArrivals, LinkEstimate, PieceSizes, plan_waves, split_of

THROTTLED = LinkEstimate(delay=0.010, rate=20e6)


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


links = st.builds(
    LinkEstimate, st.sampled_from([0.0, 0.0001, 0.01, 1.0]), st.sampled_from([1e3, 1e6, 1e9])
)
piece_sizes = st.builds(PieceSizes, st.sampled_from([1, 64, 900]), st.sampled_from([1_000, 7_777]))
conditions = st.fixed_dictionaries(
    {"connections": st.integers(1, 20), "link": links, "sizes": piece_sizes}
)


@settings(max_examples=200, deadline=None)
@given(grouped(), st.integers(0, 3), conditions)
def test_every_byte_once_evenly_and_earlier_groups_first(
    groups: list[list[ByteRange]], first: int, how: dict[str, Any]
) -> None:
    waves, sizes = plan_waves(groups, first=min(first, len(groups)), **how), how["sizes"]
    pieces = [piece for wave in waves for piece in wave]
    assert bytes_of(pieces) == bytes_of([span for group in groups for span in group])
    assert all(0 < stop - start <= sizes.most for start, stop in pieces)
    assert all(list(wave) == sorted(wave) for wave in waves)
    touched = [
        {n for n, w in enumerate(waves) if any(a < d and c < b for a, b in w for c, d in group)}
        for group in groups
    ]
    assert all(len(each) <= 1 for each in touched), "a group is in one wave"
    order = [n for each in touched for n in each]
    assert order == sorted(order)
    nbytes = 1 + len(pieces) * 997
    (wave,) = plan_waves([[(7, 7 + nbytes)]], first=0, **how)
    lengths = [stop - start for start, stop in wave]
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= min(sizes.least, nbytes, sizes.most // 2)


@pytest.mark.parametrize(
    ("groups", "first", "link", "pieces"),
    [
        (adapter(), 0, THROTTLED, [16]),  # nobody waits: one wave
        (adapter(), 2, THROTTLED, [16, 16]),  # the first layer over all connections, then the rest
        (adapter(), 2, LinkEstimate(0.2, 20e6), [16]),  # a long delay is not paid twice
        (adapter(), 2, LinkEstimate(0.0003, 2.5e8), [8]),  # more would only cost time here
        ([[(0, 1 << 30)]], 0, THROTTLED, [32]),  # large files are cut into rounds
        ([[], []], 1, THROTTLED, []),
        ([], 0, THROTTLED, []),
    ],
)
def test_waves_by_hand(
    groups: list[list[ByteRange]], first: int, link: LinkEstimate, pieces: list[int]
) -> None:
    waves = plan_waves(groups, first=first, connections=16, link=link, sizes=PieceSizes())
    assert [len(wave) for wave in waves] == pieces
    assert all(len({stop - start for start, stop in wave}) == 1 for wave in waves)


def test_a_slow_link_brings_layers_in_order_and_a_small_adapter_is_not_shredded() -> None:
    """2.6 s for all of it: 5 % of that are 13 delays. No piece of 1 MB is below 64 KiB."""
    waves = plan_waves(
        adapter(), first=2, connections=16, link=LinkEstimate(0.010, 2e6), sizes=PieceSizes()
    )
    assert len(waves) == 14
    assert max(len(wave) for wave in waves) <= 16 + 4, "and hardly a request more than needed"
    waves = plan_waves(
        adapter(8, 131_072),
        first=2,
        connections=16,
        link=LinkEstimate(0.0001, 1e6),
        sizes=PieceSizes(),
    )
    assert min(stop - start for wave in waves for start, stop in wave) == 65_536


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 10_000_000),
    own=st.floats(1.0, 1e8),
    link=st.builds(LinkEstimate, st.floats(0.0001, 1.0), st.floats(1e3, 1e9)),
)
def test_a_split_ends_earlier_for_both(length: int, own: float, link: LinkEstimate) -> None:
    assert split_of((0, 300_000), 20e6, THROTTLED, 65_536) is None, "it is nearly done"
    assert split_of((0, 100), 1.0, THROTTLED, 65_536) is None
    cut = split_of((100, 100 + length), own, link, 64)
    if cut is None:
        return
    assert 100 < cut < 100 + length
    straggler = (cut - 100) / own
    newcomer = link.delay + (100 + length - cut) / link.rate
    grain = 1 / own + 1 / link.rate
    assert straggler == pytest.approx(newcomer, abs=2 * grain)
    assert max(straggler, newcomer) <= length / own - 2 * link.delay + 2 * grain


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
