"""Batches: rows in kernel order, shares of adapters, who comes first, and what passes will take."""

from itertools import groupby, pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refusals import refusals

from lorax_async.errors import HandleClosedError
from lorax_async.planning.batch_plan import (
    BASE_ONLY,
    NO_SLOT,
    SlotOccupant,
    SlotRef,
    plan_batch,
    plan_rows,
    require_current,
)
from lorax_async.scheduler.admission import share
from lorax_async.scheduler.estimates import (
    DECAY,
    LATE_FACTOR,
    LoadEstimate,
    LoadProfile,
    PassTimeModel,
)
from lorax_async.scheduler.look_ahead import LookAhead
from lorax_async.scheduler.scheduler import urgency

GENERATIONS_AND_RANKS = ((4, 16), (9, 8), (5, 16), (1, 64))
TENANTS = {slot: SlotOccupant(*each) for slot, each in enumerate(GENERATIONS_AND_RANKS)}
A, B, C = SlotRef(0, 4), SlotRef(1, 9), SlotRef(2, 5)


def test_a_stale_row_is_refused() -> None:
    cases = {
        "generation 3 of slot 0, which has generation 4": [[A, SlotRef(0, 3), NO_SLOT]],
        "generation 5 of slot 0, which has generation 4": [[A, SlotRef(0, 5), NO_SLOT]],
        "generation 1 of slot 7, which has no occupant": [[A, SlotRef(7, 1), NO_SLOT]],
        "generation -1 of slot 7, which has no occupant": [[A, SlotRef(7, -1), NO_SLOT]],
    }
    refusals(lambda rows: plan_batch(rows, [1, 1, 1], TENANTS), HandleClosedError, cases)
    refusals(lambda rows: require_current(rows, TENANTS), HandleClosedError, cases)
    require_current([A, NO_SLOT, C], TENANTS)


def test_batches_that_cannot_be_are_refused() -> None:
    batches = [([A], [0]), ([A], []), ([A, B], [1])]
    cases = {"at least one token": [(*batch, TENANTS) for batch in batches]}
    refusals(lambda batch: plan_batch(*batch), ValueError, cases)
    rows = {
        "slot 0, -1 tokens": [([0], [-1])],
        "slot -2, 1 tokens": [([-2], [1])],
        "slot -2, 0 tokens": [([-2], [0])],
        "shorter": [([0, 1], [1])],
        "longer": [([0], [1, 2])],
    }
    refusals(lambda batch: plan_rows(*batch), ValueError, rows)


PLACES = st.sampled_from([NO_SLOT, *(SlotRef(slot, t.generation) for slot, t in TENANTS.items())])


@given(st.lists(st.tuples(PLACES, st.integers(1, 40)), max_size=30), st.integers(1, 16))
def test_a_plan_is_its_definition_token_by_token(
    batch: list[tuple[SlotRef, int]], rows: int
) -> None:
    def rank(place: SlotRef) -> int:
        return 0 if place == NO_SLOT else TENANTS[place.slot].rank

    order = sorted(range(len(batch)), key=lambda n: (rank(batch[n][0]), batch[n][0].slot))
    tokens = [batch[n][0] for n in order for _ in range(batch[n][1])]
    runs = [(place, len(list(run))) for place, run in groupby(tokens)]
    plan = plan_batch([place for place, _ in batch], [n for _, n in batch], TENANTS, tile_rows=rows)
    assert list(plan.order) == order
    assert plan.segments.slots == tuple(place.slot for place, _ in runs)
    bounds = plan.segments.bounds
    cut = [(s, at) for s in range(len(runs)) for at in range(bounds[s], bounds[s + 1])]
    assert [(s, at) for s, start, stop in plan.tiles for at in range(start, stop)] == cut
    assert all(0 < stop - start <= rows for _, start, stop in plan.tiles)
    ranks = [r for r, first, stop in plan.groups for _ in range(first, stop)]
    assert ranks == [rank(place) for place, _ in runs]
    assert len({r for r, _, _ in plan.groups}) == len(plan.groups)


@given(st.lists(st.tuples(st.integers(BASE_ONLY, 3), st.integers(0, 40)), max_size=30))
def test_segments_are_the_runs_of_equal_tokens(batch: list[tuple[int, int]]) -> None:
    tokens = [slot for slot, length in batch for _ in range(length)]
    runs = [(slot, len(list(run))) for slot, run in groupby(tokens)]
    found = plan_rows([slot for slot, _ in batch], [length for _, length in batch])
    assert found.slots == tuple(slot for slot, _ in runs)
    assert [two - one for one, two in pairwise(found.bounds)] == [length for _, length in runs]
    assert (found.bounds[0], found.tokens) == (0, len(tokens))
    assert plan_rows(tokens, [1] * len(tokens)) == found


wants = st.lists(st.lists(st.integers(1, 200), max_size=6), max_size=6)


@pytest.mark.parametrize(
    ("asked", "tokens", "given"),
    [
        # 64 tokens for a row of each prompt, 1 for the decoding one; of the other 127,
        # whoever wants more has the odd one.
        ([[1000], [1], [500]], 256, [[128], [1], [127]]),
        # 64 + 64 are begun with, and 100 - 64 wanted by the second: the first has the rest.
        ([[1000], [100]], 256, [[156], [100]]),
        # No prompt is begun with a few tokens, but its end may be few, or the batch smaller.
        ([[1000], [1000], [1000]], 150, [[75], [75], []]),
        ([[1000], [3], [10]], 80, [[67], [3], [10]]),
        ([[1000], [1]], 10, [[10], []]),
    ],
)
def test_a_long_prompt_leaves_tokens_to_the_others(
    asked: list[list[int]], tokens: int, given: list[list[int]]
) -> None:
    assert share(asked, tokens, 8) == given


@given(wants, st.integers(1, 500), st.integers(1, 20), st.integers(1, 64))
def test_nobody_gets_too_much_and_nothing_is_left(
    asked: list[list[int]], tokens: int, rows: int, least: int
) -> None:
    given = share(asked, tokens, rows, least=least)
    flat = [each for adapter in given for each in adapter]
    assert sum(flat) <= tokens
    assert len(flat) <= rows
    assert all(len(one) <= len(other) for one, other in zip(given, asked, strict=True))
    for adapter, wanted in zip(given, asked, strict=True):
        for got, want in zip(adapter, wanted, strict=False):
            assert min(least, tokens, want) <= got <= want
    wanting = [number for number, each in enumerate(asked) if each]
    if wanting:
        assert given[wanting[0]], "the most urgent one always gets some"
    complete = all(len(one) == len(two) for one, two in zip(given, asked, strict=True))
    if sum(flat) < tokens and len(flat) < rows and complete:
        assert given == asked, "tokens are left over only where every row has all that it wants"


@given(wants, st.integers(1, 500), st.integers(1, 20))
def test_nobody_has_two_rows_more_than_one_who_wants_one(
    asked: list[list[int]], tokens: int, rows: int
) -> None:
    asked = [[1] * len(each) for each in asked]
    given = [len(each) for each in share(asked, tokens, rows)]
    for number, got in enumerate(given):
        if got < len(asked[number]):
            assert max(given) <= got + 1


LEVEL = 5.0


@given(st.floats(0, 1e6), st.integers(-3, 3), st.floats(0, 1e3), st.integers(-3, 3))
def test_a_low_priority_waits_for_a_bounded_time(
    since: float, low: int, later: float, high: int
) -> None:
    """Whoever comes later than by the levels between, and one for a deadline, is behind."""
    old = urgency(since, low, inf, LEVEL)
    after = since + LEVEL * max(0, high - low) + LEVEL + 1 + later
    assert old < urgency(after, high, after, LEVEL)
    # A deadline 3 s nearer than a level is as if it had waited for 3 s, a farther one is none.
    assert urgency(100.0, 0, 102.0, LEVEL) == 97.0
    assert urgency(100.0, 2, 105.0, LEVEL) == 90.0


def test_look_ahead_goes_from_loads_to_the_device_to_the_host() -> None:
    ahead = LookAhead(loads=2, slots=5, hints=3)
    for occupied, devices in ((0, 3), (2, 1), (4, 0), (5, 0)):
        expected = [None] * 2 + ["device"] * devices + ["host"] * 3
        assert ahead.targets(occupied) == expected


@pytest.mark.parametrize(
    ("passes", "tokens", "seconds"),
    [
        # Of one size: smaller ones are shorter, larger ones no longer.
        *(([(100, 2.0), (100, 2.0)], n, min(2.0, n / 50)) for n in (50, 100, 200)),
        *(([(n, 0.5 + n / 100) for n in (1, 200, 8)], n, 0.5 + n / 100) for n in (1, 100, 1000)),
        # The line would be at -0.7 for 0, and downwards.
        ([(10, 0.1), (20, 0.9)], 5, 5 * (0.1 * DECAY + 0.9) / (10 * DECAY + 20)),
        ([(10, 1.0), (20, 0.5)], 1000, (1.0 * DECAY + 0.5) / (DECAY + 1)),
    ],
)
def test_a_pass_is_predicted_by_those_before(
    passes: list[tuple[int, float]], tokens: int, seconds: float
) -> None:
    pace = PassTimeModel()
    assert pace.predict(tokens) is None
    for seen in passes:
        pace.record(*seen)
    assert pace.predict(tokens) == pytest.approx(seconds)


def arrival(profile: LoadProfile, since: float = 10.0, *notes: tuple[int, float]) -> LoadEstimate:
    """Of four layers, of which some came: up to this one, at this time."""
    load = LoadEstimate((0, 1, 2, 3), 400, since, profile)
    for note in notes:
        load.record(*note)
    return load


@pytest.mark.parametrize(
    ("notes", "now", "expected"),
    [
        ([], 10.0, None),
        ([(0, 10.0)], 10.0, None),  # it came in no time
        ([(0, 10.0), (1, 12.0)], 12.0, [13.0, 14.0]),
        ([(0, 12.0)], 12.0, [14.0, 16.0, 18.0]),  # the rest as the first came
        ([(2, 13.0)], 13.0, [14.0]),  # several may come at once
        ([(0, 12.0)], 14.0, [14.0, 16.0, 18.0]),
        # After 10 s the second layer is expected after 11, and the others in proportion.
        ([(0, 12.0)], 20.0, [10 + 10 * LATE_FACTOR * n for n in (1, 1.5, 2)]),
    ],
)
def test_layers_are_expected_as_others_came_or_later_and_later(
    notes: list[tuple[int, float]], now: float, expected: list[float] | None
) -> None:
    load = arrival(LoadProfile(), 10.0, *notes)
    assert load.expected(now) == (None if expected is None else pytest.approx(expected))
    assert load.latest == (notes[-1][1] if notes else 10.0)


@pytest.mark.parametrize(
    ("load", "now", "seconds", "layers", "joins"),
    [
        (arrival(LoadProfile()), 10.0, 100.0, 4, inf),
        # A second per layer: layer 3 is computed 3 s after the beginning, and expected at 18.
        (arrival(LoadProfile(), 10.0, (0, 12.0)), 12.0, 4.0, 4, 15.0),
        # Three seconds per layer: layer 1 is the one to wait for, at 14 - 3.
        (arrival(LoadProfile(), 10.0, (0, 12.0)), 12.0, 12.0, 4, 11.0),
        (arrival(LoadProfile(), 10.0, (0, 12.0)), 12.0, None, 4, 18.0),
        # One that has stopped is late: at 110 it is expected after 11/10 of its 100 s.
        (arrival(LoadProfile(), 10.0, (2, 13.0)), 110.0, 4.0, 4, 10 + 100 * LATE_FACTOR - 3),
    ],
)
def test_a_pass_may_begin_when_no_layer_is_computed_before_it_is_expected(
    load: LoadEstimate, now: float, seconds: float | None, layers: int, joins: float
) -> None:
    assert load.earliest_pass(now, seconds, layers) == pytest.approx(joins)


def test_a_load_that_nobody_saw_begin_teaches_nothing() -> None:
    profile = LoadProfile()
    profile.record([1.0, 2.0, 3.0, 4.0], 400)
    load = arrival(profile)
    load.skip(2)
    assert load.arrived == 2
    assert load.expected(10.0) == pytest.approx([13.0, 14.0])  # as others went
    load.record(3, 30.0)
    assert profile.per_byte == pytest.approx(4.0 / 400)
    profile.record([8.0] * 4, 400)
    assert profile.per_byte == pytest.approx(6.0 / 400), "courses are averaged"
